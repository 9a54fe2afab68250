"""Commands that run one after the other on a GPU, each with a time limit, and the report on them.

gpu_check.py and gpu_faster.py consist of such parts. A part that fails or is stopped by its limit does not
stop the others, and what has been found so far is always in the folder.
"""
import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path

from harness.command import ROOT

import numpy as np
import torch
from data.shards import write_shard
from train_gpt2 import UserError

GRACE = 5  # seconds between the signal that asks a part to end and the one that ends it


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

    def __init__(self, folder, temporary, deadline, scale):
        """deadline: in time.monotonic(). scale: factor on the limits of the parts."""
        self.folder = folder
        self.temporary = temporary
        self.deadline = deadline
        self.scale = scale
        self.failed = False
        self.path = folder / "report.txt"
        self.path.write_text("")

    def say(self, text):
        print(text, flush=True)
        with open(self.path, "a") as file:
            file.write(text + "\n")

    def time_left(self):
        return self.deadline - time.monotonic()

    def part(self, name, limit, arguments, output=None, **options):
        """Runs a part, and reports how it ended.

        limit: its seconds, before they are scaled. Returns its output, "" if there was no time for it.
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


# ---- Training

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


# ---- A script of parts

def describe_commit():
    done = subprocess.run("git log -1 --format='commit %H' && git status --short", shell=True, cwd=ROOT,
                          capture_output=True, text=True)
    return done.stdout.strip() or "no git commit here"


def argument_parser(description, seconds):
    """For the command line of such a script, which takes `seconds` in all."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="toy size, on the CPU; says nothing about a GPU")
    parser.add_argument("--shards", metavar="PREFIX", default=os.environ.get("SHARDS"),
                        help="PREFIX_train_*.bin and PREFIX_val_*.bin (or SHARDS in the environment)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=os.environ.get("OUT"),
                        help="(or OUT in the environment; default: a folder in logs/)")
    parser.add_argument("--seconds", type=int, default=seconds,
                        help=f"in all; the limits of the parts change with it (default: {seconds})")
    return parser


def parse(parser):
    """The command line. UserError if it needs a GPU, and there is none."""
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} of {sys.executable} finds no GPU on this machine "
                        "(to try the script itself: --cpu)")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    return args


@contextlib.contextmanager
def reported(name, args, size, start, seconds, kept):
    """(Report, shards) of the script `name`; exit code 1 at the end if a part failed.

    size: {device, config, model, shards, vocab_size, val_tokens}, for find_shards() and train().
    start: of the script, in time.monotonic(). seconds: for which the limits are made. kept: seconds at the
    end in which no part begins.
    """
    folder = Path(args.out or ROOT / "logs" / f"{name}_{datetime.now():%Y-%m-%d_%H%M%S}").resolve()
    with tempfile.TemporaryDirectory(prefix=f"{name}_", ignore_cleanup_errors=True) as temporary:
        shards, source = find_shards(args.shards, size, Path(temporary))
        folder.mkdir(parents=True, exist_ok=True)
        report = Report(folder, Path(temporary), start + args.seconds - kept, args.seconds / seconds)
        report.say(f"{name}, {datetime.now():%Y-%m-%d %H:%M}, {describe_commit()}\ntokens: {source}")
        try:
            yield report, shards
        finally:
            report.archive()
        report.say(f"\nended after {time.monotonic() - start:.0f} s; send back the files in {folder}")
    if report.failed:
        sys.exit("error: a part FAILED; report.txt says which")
