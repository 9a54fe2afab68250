"""scripts/gpu_check.sh, on a CPU."""
import json
import math
import re
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, fork, refused, run
from harness import parts
from scripts import bench, gpu_check
from train_gpt2 import Shards, load_config, open_shard, sequences_per_process


def check(*arguments, **env):
    return fork(ROOT / "scripts/gpu_check.py", *arguments, cwd="/", env={"CUDA_VISIBLE_DEVICES": "", **env})


def test_gpu_check_without_a_gpu_says_so(tmp_path):
    done = run(ROOT / "scripts/gpu_check.sh", cwd="/",
               env=dict(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="", OUT=str(tmp_path / "out")))
    refused(done, "finds no GPU on this machine")
    assert not (tmp_path / "out").exists()


def test_gpu_check_with_wrong_shards_says_so(tmp_path):
    done = check("--cpu", "--shards", tmp_path / "mine", OUT=str(tmp_path / "out"))
    refused(done, "mine_train_*.bin and ", "mine_val_*.bin")
    assert not (tmp_path / "out").exists()


def test_without_shards_tokens_are_made(tmp_path):
    size = dict(gpu_check.TOY, shards="data/none/none")
    shards, source = parts.find_shards(None, size, tmp_path)
    assert source == "made here, since there are no shards data/none/none_*.bin"
    for kind in ("train", "val"):
        path, = tmp_path.glob(f"{shards.name}_{kind}_*.bin")
        tokens = open_shard(path).astype(int)
        assert len(tokens) > size["val_tokens"] and tokens.max() < size["vocab_size"]
        assert set(np.diff(tokens) % size["vocab_size"]) == {1, 2, 3}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The folder of gpu_check.py --cpu, with limits that a busy machine does not reach."""
    folder = tmp_path_factory.mktemp("checked")
    done = check("--cpu", "--seconds", 8000, OUT=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_gpu_check_reports_all_its_parts(checked):
    report = (checked / "report.txt").read_text()
    assert re.findall(r"^== (.*): done, \d+ s$", report, re.MULTILINE) == [
        "facts", "attention without cuDNN", "20 steps muon", "20 steps newton muon", "bench", "tests",
        "20 steps of 4 sequences newton muon", "environment"]
    assert report.count("attention: torch takes") == 2 and "the loss's kernel launches" in report
    assert re.search(r"^     5       \d\.\d{4}       \d\.\d{4}   7.2 to 7.4$", report, re.MULTILINE)
    assert "not comparable" in report and "DIFFERS" not in report
    assert "newton_muon/muon: mean step" in report and "where a step goes" in report
    assert re.search(r"^\d+ SKIPPED$", report, re.MULTILINE)


def test_gpu_check_leaves_a_few_files(checked):
    names = {path.name for path in checked.iterdir()}
    assert names == {"report.txt", "bench.json", "tests.txt", "environment.txt", "runs.tar.gz"}
    with tarfile.open(checked / "runs.tar.gz") as archive:
        members = {member.name for member in archive}
        facts = json.load(archive.extractfile("runs/20_steps_newton_muon/run.json"))
    runs = ("20_steps_muon", "20_steps_newton_muon", "20_steps_of_4_sequences_newton_muon")
    logs = {f"runs/{run}/{name}" for run in runs for name in ("log.txt", "metrics.jsonl", "run.json")}
    assert {name for name in members if name.startswith("runs/")} == logs and "output/bench.txt" in members
    assert math.isfinite(facts["final_val_loss"]) and facts["steps"] == 20
    profile = json.loads((checked / "bench.json").read_text())["sides"]["newton_muon"]["profile"]
    assert profile["refresh"]["groups"]["statistics"] > 0


def test_gpu_check_without_time_begins_nothing(tmp_path):
    done = check("--cpu", "--seconds", 1, OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "== facts: not run, the time is used up" in (tmp_path / "report.txt").read_text()
    assert "done" not in done.stdout


def ended(pid):
    """Whether the process has ended; nobody may have waited for it yet, which makes it a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_gpu_check_ends_what_it_runs_and_keeps_what_it_found(tmp_path, launch):
    """At SIGTERM, to the script alone."""
    script = launch(ROOT / "scripts/gpu_check.sh", "--cpu", "--seconds", 8000,
                    env={"PYTHON": sys.executable, "OUT": str(tmp_path / "out")})
    while not script.stdout.readline().startswith("-- 20 steps muon"):
        assert script.poll() is None
    while not (running := parts.descendants(script.pid)):
        assert script.poll() is None
        time.sleep(0.01)
    script.terminate()
    script.stdout.read()
    assert script.wait() == 130
    assert "the loss's kernel launches" in (tmp_path / "out/report.txt").read_text()
    assert (tmp_path / "out/runs.tar.gz").exists()
    for pid in running:
        while not ended(pid):
            time.sleep(0.01)


STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
if sys.argv[1:]:
    print("ready", flush=True)
else:
    subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
signal.pause()
"""


def test_a_part_that_does_not_end_is_ended_with_all_its_processes(tmp_path, launch, monkeypatch):
    monkeypatch.setattr(parts, "GRACE", 0.1)
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    process = launch(sys.executable, tmp_path / "stubborn.py")
    assert process.stdout.readline() == "ready\n"
    parts.end(process, signal.SIGINT)
    assert process.stdout.read() == ""  # its child has the pipe, too
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("code, result", [
    ("pass", "done"),
    ("raise SystemExit(3)", "FAILED with exit code 3"),
    ("import signal; signal.pause()", "stopped by its limit of 2 s"),
])
def test_how_a_part_ended(code, result, tmp_path):
    limit = 2 if "limit" in result else 600
    assert parts.run_part([sys.executable, "-c", code], limit, tmp_path / "output.txt") == result


def test_a_test_that_was_stopped_has_not_failed():
    output = """
tests/test_cuda.py::test_a[dtype0-0.0001] PASSED                         [  6%]
tests/test_cuda.py::test_b FAILED                                        [ 12%]
tests/test_cuda.py::test_two SKIPPED (NCCL needs a GPU for each)         [ 18%]
tests/test_cuda.py::test_c """
    assert gpu_check.count_tests(output) == (
        "1 PASSED, 1 FAILED, 1 SKIPPED, 1 NOT FINISHED\nFAILED: test_b\nNOT FINISHED: test_c")


def test_losses_beside_the_published_ones():
    runs = {"muon": {0: 10.95, 5: 7.8}, "newton_muon": {0: 10.95}}
    expected = ["     0      10.9500      10.9500   10.93, Muon agrees",
                "     5       7.8000            -   7.2 to 7.4, MUON DIFFERS"]
    assert gpu_check.loss_table(runs, comparable=True)[2:] == expected
    other = gpu_check.loss_table(runs, comparable=False)
    assert "not comparable" in other[1]
    assert other[2:] == [line.rpartition(", ")[0] for line in expected]


class Recorder:
    """In the place of parts.Report: keeps the commands instead of running them."""

    def __init__(self, folder):
        self.folder = folder
        self.temporary = folder
        self.commands = []

    def part(self, name, limit, arguments, **options):
        self.commands.append([str(argument) for argument in arguments][1:])
        return ""

    def say(self, text):
        pass

    def archive(self):
        pass


def test_the_commands_for_a_gpu_are_valid(tmp_path, monkeypatch):
    """Their configurations can be read, and the tokens that are made suffice for them."""
    monkeypatch.chdir(ROOT)
    report = Recorder(tmp_path)
    size = dict(gpu_check.GPU, shards="data/none/none")
    shards, _ = parts.find_shards(None, size, tmp_path)
    gpu_check.first_steps(report, size, shards)
    gpu_check.long_runs(report, size, shards, micro_batch=128)
    assert [command[0] for command in report.commands] == ["train_gpt2.py"] * 5
    for _, *arguments in report.commands:
        config = load_config(arguments)
        assert sequences_per_process(config, world=1) == config.batch_size
        T = config.sequence_length
        training = Shards(config.input_bin, T, config.vocab_size, config.allow_repeat)
        training.require(config.num_iterations * config.batch_size, "training", less="steps")
        validation = Shards(config.input_val_bin, T, config.vocab_size)
        validation.require(config.val_tokens // T, "validation", less="val_tokens")

    gpu_check.bench(report, size)
    script, *arguments = report.commands[-1]
    assert script == "scripts/bench.py"
    monkeypatch.setattr(sys, "argv", report.commands[-1])
    args, configs = bench.parse_arguments()
    assert args.profile and list(configs) == ["muon", "newton_muon", "adamw"]
    assert all(config.compile and config.device == "cuda" for config in configs.values())

    gpu_check.tests(report)
    chosen = [argument for argument in report.commands[-1] if "::" in argument]
    assert len(chosen) == len(set(chosen)) > len(gpu_check.FIRST_TESTS)
    done = fork("-m", "pytest", "-o", "addopts=", "--collect-only", "-q", *chosen)
    assert done.returncode == 0, done.stdout
