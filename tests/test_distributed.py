"""Several processes, and runs that are stopped, killed and resumed."""
import json
import re
import resource
import shutil
import signal
import sys
import time
from itertools import takewhile
from types import SimpleNamespace

import pytest
import torch

import train_gpt2
from conftest import PATHS, ROOT, logged, refused, run, same_weights, sequence, torchrun, write_config
from faults import full_disk

OPTIMIZERS = ("adamw", "muon", "newton_muon")
STEPS, REFRESH = 40, 10


# the same result, and the work and memory divided


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, shards):
    """(folders of the logs by number of processes, reports) of 40 steps with each optimizer, with micro-batches of other sizes."""
    folders, groups = {}, []
    for processes, size in ((1, 12), (2, 2), (3, 4), (4, 3)):
        folder = tmp_path_factory.mktemp(f"world{processes}")
        config = write_config(folder / "config.toml", shards, num_iterations=STEPS, warmdown_iters=20, refresh_interval=REFRESH,
                              data_seed=1, save_every=20, device_batch_size=size, val_tokens=16 * 23)  # 23 sequences: no count divides them
        groups.append((processes, [[str(config), "--optimizer", name, "--run_name", name] for name in OPTIMIZERS]))
        folders[processes] = folder / "logs"
    return folders, sequence(*groups)[1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_losses_on_any_number_of_processes(worlds, optimizer, processes):
    one, many = (logged(worlds[0][count] / optimizer) for count in (1, processes))
    assert many == pytest.approx(one, rel=2e-4) and len(one) == STEPS + STEPS // 5 + 1


@pytest.mark.parametrize("optimizer", ["muon", "newton_muon"])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_optimizer_state_is_divided_among_the_processes(worlds, optimizer, processes):
    whole, parts = ([report["state"] for report in worlds[1][count, optimizer]] for count in (1, processes))
    largest = 4 * 16 * 64 * (1 if optimizer == "muon" else 3)  # bytes of the largest matrix's state: momentum, and K and P of the same size
    assert [sum(parts)] == whole and len(parts) == processes
    assert max(parts) <= whole[0] / processes + largest


@pytest.mark.parametrize("optimizer", ["muon", "newton_muon"])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_traffic_between_processes(worlds, optimizer, processes):
    weights, largest = 4 * 2 * 12 * 16 ** 2, 4 * 16 * 64
    grams = 4 * 2 * 7 * 16 ** 2  # bytes of all second moments: 1 + 1 + 1 + 4 blocks a layer
    warm_up = 3 if optimizer == "newton_muon" else 2
    for report in worlds[1][processes, optimizer]:
        # each must send its share of the updates; the largest share, to which the others are padded, is at most one matrix above the mean
        assert report["all_gather"] <= (STEPS + warm_up) * (weights / processes + largest)
        assert report.get("reduce", 0) == ((STEPS // REFRESH + 1) * grams if optimizer == "newton_muon" else 0)
        assert "all_reduce" not in report


def test_resume_on_three_processes(worlds, tmp_path):
    before = worlds[0][2] / "newton_muon"
    shutil.copytree(before, tmp_path / "logs/newton_muon")
    (tmp_path / "logs/newton_muon/checkpoints/step_000040.pt").unlink()
    output, _ = sequence((3, [[str(before.parents[1] / "config.toml"), "--optimizer", "newton_muon", "--run_name", "newton_muon",
                               "--resume", "auto", "--device_batch_size", "0", "--log_dir", str(tmp_path / "logs")]]))
    assert "resumed at step 20" in output
    assert logged(tmp_path / "logs/newton_muon") == pytest.approx(logged(before), rel=2e-4)


# killed, stopped, resumed


def test_twenty_kills(shards, tmp_path):
    """The runs are forks of one process that has torch imported, so that the kills fall into training and checkpoints, not imports."""
    config = write_config(tmp_path / "config.toml", shards, num_iterations=60, warmdown_iters=20, save_every=1, val_loss_every=10,
                          optimizer="newton_muon", refresh_interval=4)
    code = """
import json, multiprocessing, random, sys, time
import torch, torch._dynamo, train_gpt2  # an optimizer imports the second
torch.set_num_threads(1)
def attempt(seconds, *arguments):
    sys.argv = ["train_gpt2.py", config, *arguments]
    fork = multiprocessing.get_context("fork").Process(target=train_gpt2.main)
    fork.start()
    fork.join(seconds)
    fork.kill()
    fork.join()
    return fork.exitcode
config, rng, start = sys.argv[1], random.Random(0), time.perf_counter()
assert attempt(None, "--run_name", "whole") == 0
duration = time.perf_counter() - start
kills = [attempt(rng.uniform(0.05, duration / 10), "--run_name", "killed", "--resume", "auto") for _ in range(20)]
print(json.dumps([*kills, attempt(None, "--run_name", "killed", "--resume", "auto")]))
"""
    result = run(sys.executable, "-c", code, config, env=PATHS, timeout=240)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [-9] * 20 + [0], result.stdout + result.stderr
    assert same_weights(tmp_path / "logs/whole", tmp_path / "logs/killed")
    assert logged(tmp_path / "logs/whole") == logged(tmp_path / "logs/killed")
    steps = [json.loads(line)["step"] for line in (tmp_path / "logs/killed/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def stop_in_the_middle(process, number):
    """Sends it the signal once step 5 is evaluated; returns exit code, seconds until the end, and all output."""
    before = "".join(takewhile(lambda line: not line.startswith("step:5/"), process.stdout))
    process.send_signal(number)
    sent = time.monotonic()
    after = process.communicate(timeout=60)
    return process.returncode, time.monotonic() - sent, "".join((before, *after))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_a_checkpoint(launch, shards, tmp_path, number, code):
    config = write_config(tmp_path / "config.toml", shards, num_iterations=1000, val_loss_every=1)
    returned, seconds, output = stop_in_the_middle(launch(sys.executable, ROOT / "train_gpt2.py", config, "--run_name", "a"), number)
    assert returned == code and seconds < 10 and f"stopped by {number.name}" in output and "Traceback" not in output
    step = int(re.search(r"stopped by \w+ after step (\d+)", output)[1])
    assert 5 <= step < 1000 and (tmp_path / f"logs/a/checkpoints/step_{step:06d}.pt").exists()
    assert [key for key in logged(tmp_path / "logs/a") if key[1] == "train_loss"][-1] == (step, "train_loss")


def test_stopped_processes_resume_exactly(launch, shards, tmp_path):
    config = write_config(tmp_path / "c.toml", shards, num_iterations=40, val_loss_every=1, optimizer="newton_muon", refresh_interval=3)
    two = launch(*torchrun(2), ROOT / "train_gpt2.py", config, "--run_name", "stopped")
    code, seconds, output = stop_in_the_middle(two, signal.SIGTERM)
    assert code != 0 and seconds < 10 and "stopped by SIGTERM" in output, output
    output, _ = sequence((2, [[str(config), "--run_name", name, "--resume", "auto"] for name in ("stopped", "whole")]))
    assert output.count("resumed at step") == 1
    assert same_weights(tmp_path / "logs/stopped", tmp_path / "logs/whole")
    assert logged(tmp_path / "logs/stopped") == logged(tmp_path / "logs/whole")


# faults


FAULTY = dict(num_iterations=20, save_every=2, run_name="a")
OF_TWO = dict(FAULTY, processes=2, env=PATHS, timeout=120, collective_timeout=5, resume="auto")  # the second process has the fault


def checkpoints(tmp_path):
    return sorted(path.name for path in (tmp_path / "logs/a/checkpoints").iterdir())


@pytest.mark.parametrize("fault", ["Dies", "Hangs"])
def test_lost_process_is_named(start, tmp_path, fault):
    began = time.monotonic()
    done = start(optimizer=f"faults:{fault}", **OF_TWO)
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert re.findall(r"^error:[^(]*", done.stderr, re.MULTILINE) == ["error: process 0: process 1 does not answer any more "], done.stderr
    assert checkpoints(tmp_path) == ["step_000002.pt", "step_000004.pt"]


def test_no_process_calls_itself_lost(monkeypatch):
    """Without torchrun the store is in process 0: when that is gone, nobody answers, and nobody knows who else is there."""
    def gone(*args):
        raise RuntimeError("Broken pipe")
    monkeypatch.setattr(train_gpt2, "rank", lambda: 1)
    monkeypatch.setattr(train_gpt2, "world_size", lambda: 2)
    monkeypatch.setattr(train_gpt2.dist, "group", SimpleNamespace(WORLD=SimpleNamespace(get_group_store=lambda: SimpleNamespace(set=gone))))
    assert "process 1: processes lost each other (Connection reset)" in train_gpt2.lost_processes(RuntimeError("Connection reset"))


def test_nan_loss_ends_all_processes(start, tmp_path):
    done = start(optimizer="faults:TurnsNaN", val_loss_every=0, **OF_TWO)
    assert done.returncode == 1
    assert re.findall(r"^error:.*", done.stderr, re.MULTILINE) == [
        "error: the train loss is nan at step 6 on process 1; lower learning_rate or hidden_learning_rate"]
    assert checkpoints(tmp_path) == ["step_000002.pt", "step_000004.pt"]


def test_torchrun_restarts_from_a_checkpoint(start, tmp_path):
    env = {**PATHS, "FAULT_MARKER": str(tmp_path / "died"), "PET_MAX_RESTARTS": "1"}  # as --max_restarts 1
    done = start(optimizer="faults:DiesOnce", **dict(OF_TWO, env=env))
    assert done.returncode == 0 and "resumed at step 4" in done.stdout, done.stderr
    assert list(logged(tmp_path / "logs/a"))[-1] == (20, "val_loss")


@pytest.mark.parametrize("limit, name", [(20_000, "log.txt"), (200_000, "step_000006.pt")])
def test_full_disk_keeps_the_last_checkpoint(start, tmp_path, limit, name):
    with full_disk(resource.RLIM_INFINITY):  # restores the limit that the fault sets
        done = start(optimizer="faults:FillsDisk", n_embd=64, env={"FAULT_BYTES": str(limit)}, **FAULTY)
    refused(done, name, "File too large")
    assert checkpoints(tmp_path) == ["step_000002.pt", "step_000004.pt"]
    for checkpoint in checkpoints(tmp_path):
        torch.load(tmp_path / "logs/a/checkpoints" / checkpoint, weights_only=True)


def test_nan_weights_are_never_saved(start, tmp_path):
    done = start(optimizer="faults:TurnsNaN", val_loss_every=0, log_every=100, **FAULTY)  # nothing else looks at the weights before
    refused(done, "not finite after step 6")
    assert checkpoints(tmp_path) == ["step_000002.pt", "step_000004.pt"]
