"""Several processes, and runs that are stopped, killed and resumed."""
import json
import os
import re
import resource
import shutil
import signal
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

import train_gpt2
from conftest import (HANGS, PATHS, ROOT, arguments, fork, logged, refused, same_weights, sequence, torchrun,
                      write_config)
from faults import full_disk
from train_gpt2 import GPT, Config, NewtonMuon

OPTIMIZERS = ("adamw", "muon", "newton_muon")
STEPS = 20
REFRESH = 5


# the same result, with the work and the memory divided


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, shards):
    """20 steps of each optimizer on 1 to 4 processes, with micro-batches of different sizes:
    ({processes: folder of the logs}, reports of sequence())."""
    folders = {}
    groups = []
    for processes, size in ((1, 12), (2, 2), (3, 4), (4, 3)):
        folder = tmp_path_factory.mktemp(f"world{processes}")
        config = write_config(
            folder / "config.toml", shards, num_iterations=STEPS, warmdown_iters=10, refresh_interval=REFRESH,
            data_seed=1, save_every=10, device_batch_size=size,
            val_tokens=16 * 23)  # 23 sequences: no number of processes divides them
        runs = [[str(config), "--optimizer", name, "--run_name", name] for name in OPTIMIZERS]
        groups.append((processes, runs))
        folders[processes] = folder / "logs"
    _, reports = sequence(*groups)
    return folders, reports


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_losses_on_any_number_of_processes(worlds, optimizer, processes):
    folders, _ = worlds
    one = logged(folders[1] / optimizer)
    many = logged(folders[processes] / optimizer)
    assert many == pytest.approx(one, rel=2e-4)
    assert len(one) == STEPS + STEPS // 5 + 1


@pytest.mark.parametrize("optimizer", ["muon", "newton_muon"])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_optimizer_state_is_divided_among_the_processes(worlds, optimizer, processes):
    _, reports = worlds
    whole, = [report["state"] for report in reports[1, optimizer]]
    parts = [report["state"] for report in reports[processes, optimizer]]
    largest = 4 * 16 * 64  # bytes of the momentum of the largest matrix
    if optimizer == "newton_muon":
        largest *= 3  # and of its K and P, which have the same size
    assert len(parts) == processes
    assert sum(parts) == whole
    assert max(parts) <= whole / processes + largest


@pytest.mark.parametrize("optimizer", ["muon", "newton_muon"])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_traffic_between_processes(worlds, optimizer, processes):
    _, reports = worlds
    weights = 4 * 2 * 12 * 16 ** 2  # bytes of all hidden matrices
    largest = 4 * 16 * 64
    # Each process must send its share of the updates. All shares are padded to the largest one, which is
    # at most one matrix above the mean.
    share = weights / processes + largest
    if optimizer == "muon":
        steps = STEPS + 2  # with the warm-up's
        grams = 0
    else:
        steps = STEPS + 3
        all_grams = 4 * 2 * 7 * 16 ** 2  # bytes: 1 + 1 + 1 + 4 blocks in each layer
        grams = (STEPS // REFRESH + 1) * all_grams
    for report in reports[processes, optimizer]:
        assert report["all_gather"] <= steps * share
        assert report.get("reduce", 0) == grams
        assert "all_reduce" not in report


def test_resume_on_three_processes(worlds, tmp_path):
    folders, _ = worlds
    before = folders[2] / "newton_muon"
    after = tmp_path / "logs/newton_muon"
    shutil.copytree(before, after)
    (after / "checkpoints/step_000020.pt").unlink()
    words = [str(before.parents[1] / "config.toml"), "--optimizer", "newton_muon",
             "--run_name", "newton_muon", "--resume", "auto",
             "--device_batch_size", "0", "--log_dir", str(tmp_path / "logs")]
    output, _ = sequence((3, [words]))
    assert "resumed at step 10" in output
    assert logged(after) == pytest.approx(logged(before), rel=2e-4)


# The speedrun's 48 matrices, on the numbers of processes of a node


@pytest.fixture(scope="module")
def node(tmp_path_factory, shards):
    """(folder of the logs, reports) of Newton-Muon with 12 layers, on 1, 2, 4 and 8 processes."""
    folder = tmp_path_factory.mktemp("node")
    config = write_config(
        folder / "config.toml", shards, n_layer=12, n_head=2, optimizer="newton_muon", refresh_interval=2,
        batch_size=16, num_iterations=4, warmdown_iters=2, val_loss_every=2, save_every=0)
    groups = [(processes, [[str(config), "--run_name", str(processes)]]) for processes in (1, 2, 4, 8)]
    _, reports = sequence(*groups)
    return folder / "logs", reports


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_losses_with_the_speedruns_matrices(node, processes):
    folder, _ = node
    one = logged(folder / "1")
    assert len(one) == 4 + 3
    assert logged(folder / str(processes)) == pytest.approx(one, rel=2e-4)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_memory_of_each_owner_of_the_speedruns_matrices(node, processes, monkeypatch):
    """Bytes of momentum, K and P of a process's matrices. Their owners are those of the speedrun's model,
    because the costs of the matrices are as in a model 48 times as wide."""
    _, reports = node
    with torch.device("meta"):
        speedrun = list(GPT(Config()).hidden_matrices().values())
    monkeypatch.setattr(train_gpt2, "world_size", lambda: processes)
    owners = NewtonMuon(speedrun).owner
    assert len(owners) == 48
    expected = [0] * processes
    for p, owner in owners.items():
        rows, columns = (size // 48 for size in p.shape)
        blocks = max(1, columns // rows)
        width = min(rows, columns)
        expected[owner] += 4 * rows * columns  # momentum
        expected[owner] += 4 * 2 * blocks * width ** 2  # K and P
    assert [report["state"] for report in reports[processes, str(processes)]] == expected
    assert min(expected) > 0


def test_state_on_one_process_only_is_refused(start, tmp_path):
    """As of an optimizer that shares its matrices out, and keeps the state where they are."""
    (tmp_path / "shared_out.py").write_text(
        "import torch, train_gpt2\n"
        "class SharedOut(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        for i, p in enumerate(self.param_groups[0]['params']):\n"
        "            if i % train_gpt2.world_size() == train_gpt2.rank():\n"
        "                self.state[p]['buffer'] = torch.zeros_like(p)\n")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    assert start(processes=1, run_name="a", optimizer="shared_out:SharedOut", env=env).returncode == 0
    done = start(processes=2, run_name="b", optimizer="shared_out:SharedOut", env=env)
    assert done.returncode == 1
    assert "keeps the state of other parameters on other processes" in done.stderr


# compiled


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_processes(start, tmp_path, backend):
    """With DDP's buckets, accumulation, the statistics of Newton-Muon and evaluations (which keep
    gradients): the losses are those of one process without torch.compile."""
    fields = dict(optimizer="newton_muon", refresh_interval=2, num_iterations=4, warmdown_iters=2, n_layer=1,
                  val_loss_every=2, device_batch_size=2,
                  val_tokens=16 * 22)  # 22 sequences: the last batch of an evaluation is not full
    assert start(run_name="eager", **fields).returncode == 0
    words = [tmp_path / "config.toml", "--run_name", "compiled", "--compile", "true", *arguments(fields)]
    env = {**PATHS, "BACKEND": backend}
    # torchrun imports what compiles: 3 s, here once for both processes
    code = "import torch._inductor.compile_fx; from torch.distributed.run import main; main()"
    _, _, *options = torchrun(2)
    done = fork("-c", code, *options, ROOT / "tests/compiled_ddp.py", *words, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "logs/compiled/run.json").read_text())
    assert facts["compiled"] and facts["world_size"] == 2
    parts = re.findall(r"GRAPH OF (\d+) PARTS", done.stdout)
    assert len(parts) == 2 * 2, done.stdout  # in each process with and without the statistics
    assert min(int(count) for count in parts) > 2
    compiled = logged(tmp_path / "logs/compiled")
    eager = logged(tmp_path / "logs/eager")
    assert compiled == pytest.approx(eager, rel=1e-4)


# killed, stopped, resumed


def test_twenty_kills(shards, tmp_path):
    config = write_config(
        tmp_path / "config.toml", shards, num_iterations=60, warmdown_iters=20, save_every=1,
        val_loss_every=10, optimizer="newton_muon", refresh_interval=4)
    done = fork(ROOT / "tests/kills.py", config, env=PATHS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [-9] * 20 + [0], done.stdout + done.stderr
    whole = tmp_path / "logs/whole"
    killed = tmp_path / "logs/killed"
    resumed = [int(step) for step in re.findall(r"resumed at step (\d+)", done.stdout)]
    assert resumed == sorted(resumed) and len(set(resumed)) > 5  # the kills fell into training
    assert same_weights(whole, killed)
    assert logged(whole) == logged(killed)
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)


def output_until(process, start):
    """What the process prints until a line begins with `start`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(start):
            return "".join(lines)
    raise AssertionError(f"no line begins with {start}: {''.join(lines)}{process.stderr.read()}")


def test_signal_saves_a_checkpoint(launch, shards, tmp_path):
    """At any time."""
    config = write_config(tmp_path / "config.toml", shards, num_iterations=10 ** 6, val_loss_every=1)
    process = launch(sys.executable, ROOT / "train_gpt2.py", config, "--run_name", "a")
    output = output_until(process, "step:5/")
    process.send_signal(signal.SIGSTOP)  # so that it does not go on while we look at its log
    os.waitpid(process.pid, os.WUNTRACED)
    before, _ = max(logged(tmp_path / "logs/a"))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    more, errors = process.communicate(timeout=HANGS)
    output += more + errors
    assert process.returncode == 130, output
    assert "Traceback" not in output
    step = int(re.search(r"stopped by SIGINT after step (\d+)", output)[1])
    assert before <= step <= before + 1  # it ends the step that it is in
    assert (tmp_path / f"logs/a/checkpoints/step_{step:06d}.pt").exists()
    trained = [key for key in logged(tmp_path / "logs/a") if key[1] == "train_loss"]
    assert trained[-1] == (step, "train_loss")


def test_stopped_processes_resume_exactly(launch, shards, tmp_path):
    """Process 1 gets torchrun's SIGTERM in step 5, and process 0 at any time before that step's end."""
    config = write_config(
        tmp_path / "config.toml", shards, num_iterations=40, val_loss_every=1,
        optimizer="faults:WaitsForSIGTERM", optimizer_args='{"refresh_interval": 3}')
    command = [sys.executable, *torchrun(2), ROOT / "train_gpt2.py", config, "--run_name", "stopped"]
    process = launch(*command, env={**PATHS, "FAULT_WAITS": "1"})
    output = output_until(process, "step:4/")
    process.send_signal(signal.SIGTERM)
    more, errors = process.communicate(timeout=HANGS)
    output += more + errors
    assert process.returncode != 0
    assert "stopped by SIGTERM after step 5" in output, output
    runs = [[str(config), "--run_name", name, "--resume", "auto"] for name in ("stopped", "whole")]
    output, _ = sequence((2, runs))
    assert re.findall(r"resumed at step \d+", output) == ["resumed at step 5"]
    stopped = tmp_path / "logs/stopped"
    whole = tmp_path / "logs/whole"
    assert same_weights(stopped, whole)
    assert logged(stopped) == logged(whole)


# faults


FAULTY = dict(num_iterations=20, save_every=2, run_name="a")
OF_TWO = dict(FAULTY, processes=2, env=PATHS, resume="auto")  # process 1 has the fault


def checkpoints(tmp_path):
    return sorted(path.name for path in (tmp_path / "logs/a/checkpoints").iterdir())


@pytest.mark.parametrize("fault", ["Dies", "Hangs"])
def test_lost_process_is_named(start, tmp_path, fault):
    done = start(optimizer=f"faults:{fault}", **OF_TWO)
    assert done.returncode == 1
    errors = re.findall(r"^error:[^(]*", done.stderr, re.MULTILINE)
    assert errors == ["error: process 0: no answer from process 1 "], done.stderr
    assert checkpoints(tmp_path) == ["step_000002.pt", "step_000004.pt"]


def test_collectives_have_the_timeout_of_the_configuration(monkeypatch):
    given = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train_gpt2.dist, "rendezvous", lambda *_, **__: iter([("store", 0, 2)]))
    monkeypatch.setattr(train_gpt2.dist, "init_process_group", lambda *_, **more: given.append(more))
    train_gpt2.start_processes(Config(device="cpu", collective_timeout=7))
    assert [more["timeout"] for more in given] == [timedelta(seconds=7)]


def test_no_process_calls_itself_lost(monkeypatch):
    """Without torchrun the store is in process 0. When that is gone, nobody answers, and nobody knows who
    else is there."""
    def gone(*args):
        raise RuntimeError("Broken pipe")
    store = SimpleNamespace(set=gone)
    world = SimpleNamespace(get_group_store=lambda: store)
    monkeypatch.setattr(train_gpt2, "rank", lambda: 1)
    monkeypatch.setattr(train_gpt2, "world_size", lambda: 2)
    monkeypatch.setattr(train_gpt2.dist, "group", SimpleNamespace(WORLD=world))
    sentence = train_gpt2.lost_processes(RuntimeError("Connection reset"))
    assert "process 1: processes lost each other (Connection reset)" in sentence


def test_nan_loss_ends_all_processes(start, tmp_path):
    done = start(optimizer="faults:TurnsNaN", val_loss_every=0, **OF_TWO)
    assert done.returncode == 1
    assert re.findall(r"^error:.*", done.stderr, re.MULTILINE) == [
        "error: the train loss is nan at step 6 on process 1; lower learning_rate or hidden_learning_rate"]
    assert checkpoints(tmp_path) == ["step_000002.pt", "step_000004.pt"]


def test_torchrun_restarts_from_a_checkpoint(start, tmp_path):
    env = {**PATHS, "FAULT_MARKER": str(tmp_path / "died"), "PET_MAX_RESTARTS": "1"}  # as --max_restarts 1
    done = start(optimizer="faults:DiesOnce", **dict(OF_TWO, env=env))
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4" in done.stdout
    assert list(logged(tmp_path / "logs/a"))[-1] == (20, "val_loss")


@pytest.mark.parametrize("limit, name", [(20_000, "log.txt"), (200_000, "step_000006.pt")])
def test_full_disk_keeps_the_last_checkpoint(start, tmp_path, limit, name):
    env = {"FAULT_BYTES": str(limit)}
    with full_disk(resource.RLIM_INFINITY):  # restores the limit that the fault sets
        done = start(optimizer="faults:FillsDisk", n_embd=64, env=env, **FAULTY)
    refused(done, name, "File too large")
    assert checkpoints(tmp_path) == ["step_000002.pt", "step_000004.pt"]
    for checkpoint in checkpoints(tmp_path):
        torch.load(tmp_path / "logs/a/checkpoints" / checkpoint, weights_only=True)


def test_nan_weights_are_never_saved(start, tmp_path):
    fields = dict(FAULTY, val_loss_every=0, log_every=100)  # nothing else looks at the weights before
    done = start(optimizer="faults:TurnsNaN", **fields)
    refused(done, "not finite after step 6")
    assert checkpoints(tmp_path) == ["step_000002.pt", "step_000004.pt"]
