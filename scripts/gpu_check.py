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

import json
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import ROOT, command
from harness import parts
from harness.parts import losses, train

SECONDS = 400
AT_THE_END = 20  # seconds kept for stopping a part, and for the environment and the archive
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


@command(interrupted="interrupted; what was found until then is in the folder")
def main():
    args = parts.parse(parts.argument_parser(__doc__, SECONDS))
    size = TOY if args.cpu else GPU
    with parts.reported("gpu_check", args, size, START, SECONDS, AT_THE_END) as (report, shards):
        facts(report, size)
        micro_batch = first_steps(report, size, shards)
        bench(report, size)
        tests(report)
        long_runs(report, size, shards, micro_batch)
        environment(report)


if __name__ == "__main__":
    main()
