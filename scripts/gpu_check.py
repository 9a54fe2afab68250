"""The first minutes on a new GPU: 400 seconds at most, the most important facts first.

    scripts/gpu_check.sh                           with data/fineweb10B/fineweb_*.bin, if they are there
    scripts/gpu_check.sh --shards data/mine/mine   with data/mine/mine_train_*.bin and mine_val_*.bin
    scripts/gpu_check.sh --cpu                     the same parts at toy size on the CPU: tries the script

1. facts          versions, GPU, which attention runs (with and without cuDNN's), whether the loss's kernel
                  launches
2. 20 steps       of Muon and of Newton-Muon, with refreshes, by the trainer itself: the 124 M model and the
                  batch of the speedrun, beside the published losses
3. bench          step times of Muon, Newton-Muon and AdamW, then a profile of each (scripts/bench.py)
4. tests          tests/test_cuda.py
5. 200 steps      of each optimizer with the time that is left, one micro-batch a step
6. environment    torch's own description of the machine

Each part has a time limit. A part that fails or is stopped by its limit does not stop the others. What has
been found so far is always in the folder: report.txt, which grows, bench.json, tests.txt, environment.txt and
runs.tar.gz (logs and complete output). Without shards, the trainer gets tokens that are made here.
"""
import time

START = time.monotonic()  # the imports below count, too

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import ROOT, command

import numpy as np
import torch
from data.shards import write_shard
from train_gpt2 import UserError

SECONDS = 400
AT_THE_END = 20  # seconds kept for stopping a part, and for the environment and the archive
GRACE = 5  # seconds between the signal that asks a part to end and the one that ends it
FIRST_TESTS = ("test_the_compiled_loss_is_the_plain_one",
               "test_compiled_steps_are_near_plain_ones",
               "test_two_processes_on_one_gpu")
# losses of the speedrun's record 4, which is Muon, on FineWeb: {after so many steps: (least, greatest)}
PUBLISHED = {0: (10.93, 10.93), 5: (7.2, 7.4)}
CLOSE = 0.1  # a tenth of FineWeb's validation tokens is evaluated here
GPU = dict(
    device="cuda", config="configs/speedrun_{}.toml", model=[],
    shards="data/fineweb10B/fineweb", vocab_size=50257, val_tokens=2 ** 20,
    bench=["--rounds", "6", "--steps", "1"], long_steps=200, long_runs=["newton_muon", "muon", "adamw"])
TOY = dict(
    device="cpu", config="configs/cpu_{}.toml",
    model=["--n_layer", "1", "--batch_size", "4", "--sequence_length", "32"],
    shards="data/shakespeare/shakespeare", vocab_size=256, val_tokens=1024,
    bench=["--rounds", "1", "--steps", "1"], long_steps=20, long_runs=["newton_muon"])


# ---- Processes

def descendants(pid):
    """Ids of the processes that `pid` has started, that those have started, and so on. From /proc."""
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])  # after the name: state, parent
        except OSError:  # it has ended
            continue
        children[parent].append(int(path.parent.name))
    found = []
    waiting = [pid]
    while waiting:
        new = children[waiting.pop()]
        found += new
        waiting += new
    return found


def end(process, ask):
    """Ends a process and all its descendants. `ask`: the signal that comes GRACE seconds before SIGKILL."""
    family = descendants(process.pid)  # torchrun's workers have process groups of their own
    try:
        process.send_signal(ask)
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for pid in {process.pid, *family, *descendants(process.pid)}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()


def run_part(arguments, limit, output, ask=signal.SIGINT, env=None):
    """Runs a command for `limit` seconds at most; its output goes to the file `output` and to the terminal.

    Returns "done", "stopped by its limit of N s" or "FAILED with exit code N".
    """
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
    until = time.monotonic() + limit
    with open(output, "wb") as file, open(output, errors="replace") as written:
        process = subprocess.Popen([*map(str, arguments)], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
                                   stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < until:
                print(written.read(), end="", flush=True)
                time.sleep(0.1)
            in_time = process.poll() is not None
        finally:
            if process.poll() is None:
                end(process, ask)
            print(written.read(), end="", flush=True)
    if not in_time:
        return f"stopped by its limit of {limit:.0f} s"
    if process.returncode:
        return f"FAILED with exit code {process.returncode}"
    return "done"


# ---- The report

class Report:
    """The folder that is sent back, a temporary folder for everything else, and the time."""

    def __init__(self, folder, temporary, seconds):
        self.folder = folder
        self.temporary = temporary
        self.deadline = START + seconds
        self.scale = seconds / SECONDS  # of the limits
        self.failed = False
        self.path = folder / "report.txt"
        self.path.write_text("")

    def say(self, text):
        print(text, flush=True)
        with open(self.path, "a") as file:
            file.write(text + "\n")

    def time_left(self):
        return self.deadline - AT_THE_END - time.monotonic()

    def part(self, name, limit, arguments, output=None, **options):
        """Runs a part, and reports how it ended.

        limit: its seconds, if there are SECONDS in all. Returns its output, "" if there was no time for it.
        """
        output = output or self.temporary / f"{name.replace(' ', '_')}.txt"
        limit = min(limit * self.scale, self.time_left())
        if limit < 1:
            self.say(f"\n== {name}: not run, the time is used up")
            return ""
        print(f"\n-- {name}, at most {limit:.0f} s", flush=True)
        start = time.monotonic()
        result = run_part(arguments, limit, output, **options)
        self.failed |= result.startswith("FAILED")
        self.say(f"\n== {name}: {result}, {time.monotonic() - start:.0f} s")
        text = output.read_text(errors="replace")
        if result != "done":
            self.say(last_lines(text, 25 if result.startswith("FAILED") else 5))
        return text

    def archive(self):
        """Writes runs.tar.gz anew: the output of all parts, and the runs without weights and code."""
        path = self.folder / "runs.tar.gz"
        new = self.temporary / "runs.tar.gz"
        with tarfile.open(new, "w:gz") as archive:
            for file in sorted(self.temporary.glob("*.txt")):
                archive.add(file, f"output/{file.name}")
            for file in sorted(self.temporary.glob("runs/*/*")):
                if file.name in ("log.txt", "metrics.jsonl", "run.json"):
                    archive.add(file, file.relative_to(self.temporary))
        shutil.move(new, path)


def last_lines(text, count):
    return "\n".join(text.rstrip().splitlines()[-count:])


# ---- The parts

def facts(report, size):
    arguments = [sys.executable, "-m", "harness.gpu_facts"]
    if size is TOY:
        arguments.append("--cpu")
    text = report.part("facts", 25, arguments)
    report.say(text.rstrip())
    without_cudnn = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
    text = report.part("attention without cuDNN", 15, [*arguments, "--attention"], env=without_cudnn)
    report.say(text.rstrip())


def find_shards(prefix, size, temporary):
    """(prefix of the shards to train on, what they are). UserError if those that were named are missing."""
    named = prefix or size["shards"]
    folder = ROOT / named
    if all(list(folder.parent.glob(f"{folder.name}_{kind}_*.bin")) for kind in ("train", "val")):
        return folder, f"{named}_*.bin"
    if prefix:
        raise UserError(f"there are no {prefix}_train_*.bin and {prefix}_val_*.bin; "
                        "--shards is their path up to _train_")
    rng = np.random.default_rng(0)
    for name in ("train_000001", "val_000000"):
        steps = rng.integers(1, 4, 2 * size["val_tokens"])  # the next token is one of three
        write_shard(temporary / f"made_{name}.bin", np.cumsum(steps) % size["vocab_size"])
    return temporary / "made", f"made here, since there are no shards {named}_*.bin"


def train(report, size, shards, optimizer, name, limit, fields):
    """A run of the trainer. Returns its folder."""
    arguments = [sys.executable, "train_gpt2.py", size["config"].format(optimizer), *size["model"],
                 "--device", size["device"], "--log_dir", report.temporary / "runs", "--run_name", name,
                 "--input_bin", f"{shards}_train_*.bin", "--input_val_bin", f"{shards}_val_*.bin",
                 "--allow_repeat", "true", "--val_tokens", size["val_tokens"], *fields]
    text = report.part(name.replace("_", " "), limit, arguments)
    ending = re.findall(r"^(?:final loss|training|memory) .*", text, re.MULTILINE)
    report.say("\n".join(ending))
    folder = report.temporary / "runs" / name
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    report.archive()
    return folder


def losses(folder):
    """{step: validation loss} of a run so far."""
    try:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):  # it did not begin, or was stopped in the middle of a line
        return {}
    return {record["step"]: record["val_loss"] for record in records if "val_loss" in record}


def loss_table(runs, comparable):
    """Lines with the validation losses of {optimizer: {step: loss}} beside the published ones."""
    heading = "published, record 4 on FineWeb"
    if not comparable:
        heading += " (not comparable: these are other tokens, or another model)"
    names = "".join(f"{name:>13}" for name in runs)
    lines = ["validation loss", f"{'step':>6}{names}   {heading}"]
    for step in sorted(PUBLISHED.keys() | set().union(*runs.values())):
        line = f"{step:6}"
        for run in runs.values():
            line += f"{run[step]:13.4f}" if step in run else f"{'-':>13}"
        if step in PUBLISHED:
            low, high = PUBLISHED[step]
            line += f"   {low}" if low == high else f"   {low} to {high}"
            if comparable and step in runs.get("muon", {}):
                agrees = low - CLOSE <= runs["muon"][step] <= high + CLOSE
                line += ", Muon agrees" if agrees else ", MUON DIFFERS"
        lines.append(line)
    return lines


def first_steps(report, size, shards):
    """20 steps of Muon and of Newton-Muon. Returns the micro-batch, or None if neither began."""
    comparable = size is GPU and shards.name == "fineweb"
    fields = ["--num_iterations", 20, "--warmdown_iters", 0, "--val_loss_every", 5, "--log_every", 1,
              "--refresh_interval", 8]
    runs = {}
    micro_batch = None
    for optimizer, limit in (("muon", 110), ("newton_muon", 100)):
        folder = train(report, size, shards, optimizer, f"20_steps_{optimizer}", limit, fields)
        runs[optimizer] = losses(folder)
        report.say("\n".join(loss_table(runs, comparable)))
        if (folder / "run.json").is_file():
            micro_batch = json.loads((folder / "run.json").read_text())["micro_batch"]
    return micro_batch


def bench(report, size):
    arguments = [sys.executable, "scripts/bench.py", size["config"].format("newton_muon"), *size["model"],
                 *size["bench"], "--device", size["device"], "--sides", "muon,newton_muon,adamw", "--profile",
                 "--json", report.folder / "bench.json"]
    text = report.part("bench", 120, arguments)
    tables = re.split(r"^(?=after \d+ rounds)", text, flags=re.MULTILINE)
    report.say(tables[-1].rstrip())  # the last one, and the profile below it


def tests(report):
    """tests/test_cuda.py, the most telling tests first."""
    env = {}
    if subprocess.run([sys.executable, "-c", "import pytest"], capture_output=True).returncode:
        packages = report.temporary / "packages"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "0"]
        report.part("pytest's installation", 15, [*install, "--target", packages, "pytest"])
        env["PYTHONPATH"] = f"{packages}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    names = re.findall(r"^def (test_\w+)", (ROOT / "tests/test_cuda.py").read_text(), re.MULTILINE)
    rest = [name for name in names if name not in FIRST_TESTS]
    chosen = [f"tests/test_cuda.py::{name}" for name in (*FIRST_TESTS, *rest)]
    arguments = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "-rs", "--durations", "10",
                 "-p", "no:cacheprovider", *chosen]
    # SIGKILL: a test that is only asked to stop fails, and the next one begins
    output = report.folder / "tests.txt"
    text = report.part("tests", 60, arguments, output=output, env=env, ask=signal.SIGKILL)
    report.say(count_tests(text))


def count_tests(output):
    """How the tests in pytest's verbose output ended, and which one was running when it stopped."""
    results = re.findall(r"^\S+::(\S+)(.*)", output, re.MULTILINE)
    ended = defaultdict(list)
    for name, rest in results:
        outcome = re.search("PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS", rest)
        ended[outcome[0] if outcome else "NOT FINISHED"].append(name)
    lines = [", ".join(f"{len(names)} {outcome}" for outcome, names in ended.items()) or "no test began"]
    for outcome in ("FAILED", "ERROR", "NOT FINISHED"):
        lines += [f"{outcome}: {name}" for name in ended[outcome]]
    return "\n".join(lines)


def long_runs(report, size, shards, micro_batch):
    """Steps of one micro-batch, so that the graphs of the first steps serve again."""
    if not micro_batch:
        report.say(f"\n== {size['long_steps']} steps: not run, since the first steps did not begin")
        return
    fields = ["--num_iterations", size["long_steps"], "--warmdown_iters", size["long_steps"] // 4,
              "--val_loss_every", size["long_steps"] // 4, "--batch_size", micro_batch]
    for optimizer in size["long_runs"]:
        name = f"{size['long_steps']}_steps_of_{micro_batch}_sequences_{optimizer}"
        train(report, size, shards, optimizer, name, SECONDS, fields)


def environment(report):
    output = report.folder / "environment.txt"
    report.deadline += AT_THE_END - 5  # the time that was kept for this
    report.part("environment", 12, [sys.executable, "-m", "torch.utils.collect_env"], output=output)


def describe_commit():
    done = subprocess.run("git log -1 --format='commit %H' && git status --short", shell=True, cwd=ROOT,
                          capture_output=True, text=True)
    return done.stdout.strip() or "no git commit here"


@command(interrupted="interrupted; what was found until then is in the folder")
def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="toy size, on the CPU; says nothing about a GPU")
    parser.add_argument("--shards", metavar="PREFIX", default=os.environ.get("SHARDS"),
                        help="PREFIX_train_*.bin and PREFIX_val_*.bin (or SHARDS in the environment)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=os.environ.get("OUT"),
                        help="(or OUT in the environment; default: logs/gpu_check_DATE)")
    parser.add_argument("--seconds", type=int, default=SECONDS,
                        help=f"in all; the limits of the parts change with it (default: {SECONDS})")
    args = parser.parse_args()
    size = TOY if args.cpu else GPU
    if size is GPU and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} of {sys.executable} finds no GPU on this machine "
                        "(to try the script itself: --cpu)")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    folder = args.out or ROOT / "logs" / f"gpu_check_{datetime.now():%Y-%m-%d_%H%M%S}"
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as temporary:
        temporary = Path(temporary)
        shards, source = find_shards(args.shards, size, temporary)
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        report = Report(folder, temporary, args.seconds)
        report.say(f"gpu_check, {datetime.now():%Y-%m-%d %H:%M}, {describe_commit()}\ntokens: {source}")
        try:
            facts(report, size)
            micro_batch = first_steps(report, size, shards)
            bench(report, size)
            tests(report)
            long_runs(report, size, shards, micro_batch)
            environment(report)
        finally:
            report.archive()
        report.say(f"\nended after {time.monotonic() - START:.0f} s; send back the files in {folder}")
    if report.failed:
        sys.exit("error: a part FAILED; report.txt says which")


if __name__ == "__main__":
    main()
