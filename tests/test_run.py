"""Whole runs of train_gpt2.py, as a user starts them."""
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import train_gpt2
from conftest import HANGS, PATHS, ROOT, arguments, checkpoint, fork, refused, run, same_weights, write_config
from harness.runs import read_run
from train_gpt2 import GPT, Config, UserError, choose_micro_batch, learning_rate_scale, load_config


def records(folder):
    """The lines of metrics.jsonl of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    """[(step, validation loss)] of a run."""
    return [(record["step"], record["val_loss"]) for record in records(folder) if "val_loss" in record]


def facts_of(folder):
    return json.loads((folder / "run.json").read_text())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(name, code) makes `code` the module of that name, here and in the processes of a run."""
    def module(name, code):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return module


# what a run writes


def test_files_of_a_run(tmp_path, shards):
    """In a new process, as a user starts it."""
    config = write_config(tmp_path / "config.toml", shards, optimizer="newton_muon", refresh_interval=3)
    done = run(sys.executable, ROOT / "train_gpt2.py", config, "--run_name", "a")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "logs/a"
    code = (ROOT / "train_gpt2.py").read_text()
    names = {path.name for path in folder.iterdir()}
    assert names == {"log.txt", "metrics.jsonl", "run.json", "train_gpt2.py", "checkpoints"}
    assert (folder / "train_gpt2.py").read_text() == code

    log = (folder / "log.txt").read_text()
    assert log.startswith(code.rstrip())
    last_line = r"^step:10/10 val_loss:\d\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$"
    assert re.search(last_line, log, re.MULTILINE)

    found = read_run(folder)
    assert found.steps == [0, 5, 10]
    assert found.seconds[0] == 0 and found.seconds == sorted(found.seconds)
    assert [(step, round(loss, 4)) for step, loss in losses(folder)] == list(zip(found.steps, found.losses))

    metrics = records(folder)
    assert [record["step"] for record in metrics if "train_loss" in record] == list(range(1, 11))

    facts = facts_of(folder)
    assert facts["config"]["optimizer"] == "newton_muon"
    assert facts["config"]["seed"] == 0
    assert facts["world_size"] == 1
    assert facts["tokens_per_step"] == 192
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["parameters"] == 2 * 12 * 16 ** 2 + 64 * 16
    assert len(facts["code_sha256"]) == 64
    assert facts["final_val_loss"] == pytest.approx(found.losses[-1], abs=1e-4)
    assert facts["end"] >= facts["start"]
    assert [shard["tokens"] for shard in facts["train_shards"]] == [3000, 3000]
    content = (shards / "val_000000.bin").read_bytes()
    assert facts["val_shards"] == [dict(
        name="val_000000.bin",
        tokens=1000,
        sha256_of_first_mebibyte=hashlib.sha256(content).hexdigest())]

    for weight in checkpoint(folder, 10)["model"].values():
        assert weight.isfinite().all()


def test_a_run_ends_with_its_results(start, tmp_path):
    done = start(run_name="a", target_val_loss=4.0)
    facts = facts_of(tmp_path / "logs/a")
    step, seconds = facts["target_reached"]
    total = facts["train_time_ms"] / 1000
    assert step == 5
    assert 0 < seconds < total
    assert facts["tokens_per_second"] == pytest.approx(10 * 192 / total)
    assert facts["peak_memory_bytes"] > 2 ** 26
    assert f"final loss   {facts['final_val_loss']:.4f}; target 4 met at step 5" in done.stdout


@pytest.mark.parametrize("gigabytes, most", [(80, 128), (40, 64), (24, 32), (16, 16)])
def test_micro_batch_fits_the_gpu(monkeypatch, gigabytes, most):
    def chosen(per_process=512, dtype=torch.bfloat16, fused_loss=True, **fields):
        with torch.device("meta"):
            model = GPT(Config(**fields))
        model.fused_loss = fused_loss
        return choose_micro_batch(model, Config(**fields), torch.device("cuda", 0), per_process, dtype)

    properties = SimpleNamespace(total_memory=gigabytes * 1.056e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert chosen() == most
    assert chosen(per_process=24) == min(most, 8)
    assert chosen(device_batch_size=4) == 4
    whole_logits = 12 * 50257  # bytes a token, in fp32: log-probabilities and two gradients
    needed = 1024 * (50 * 12 * 768 + whole_logits) * chosen(fused_loss=False)
    available = 0.9 * properties.total_memory - 32 * 123.5e6 - 2 * 16384 * 50257  # parameters, a chunk
    assert needed < available < 2 * needed
    assert chosen(dtype=torch.float32) == most / 2  # also for dtype = auto on a GPU without bfloat16
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.45)
    assert chosen() <= most / 2


def test_a_run_continues_without_a_compiler(start, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError("no C++ compiler")))
    done = start(run_name="a", compile="true")
    assert done.returncode == 0
    note = ("no kernels can be compiled here, so training goes without torch.compile and fused loss "
            "(RuntimeError: no C++ compiler)")
    assert note in done.stdout
    assert facts_of(tmp_path / "logs/a")["compiled"] is False


# resumed runs


def test_resume_is_exact(start, tmp_path):
    fields = dict(optimizer="newton_muon", refresh_interval=2)
    assert start(run_name="whole", **fields).returncode == 0
    assert start(run_name="parts", save_every=3, **fields).returncode == 0
    whole = tmp_path / "logs/whole"
    parts = tmp_path / "logs/parts"
    older, newest = sorted((parts / "checkpoints").iterdir())  # the last two are kept
    assert older.name == "step_000009.pt"
    assert newest.name == "step_000010.pt"
    newest.write_bytes(newest.read_bytes()[:1000])  # as if the disk had lost its end
    done = start(run_name="parts", save_every=3, resume="auto", **fields)
    assert done.returncode == 0
    assert "resumed at step 9" in done.stdout
    assert "cannot be loaded" in done.stderr
    assert same_weights(whole, parts)
    assert losses(whole) == losses(parts)  # and nothing is logged twice
    facts = facts_of(parts)
    assert facts["config"]["resume"] == ""
    assert [part["config"]["resume"] for part in facts["resumed"]] == ["auto"]


def test_a_finished_run_has_nothing_left_to_do(start, tmp_path):
    assert start(run_name="a", save_every=3).returncode == 0
    before = facts_of(tmp_path / "logs/a")
    done = start(run_name="a", resume="auto")
    after = facts_of(tmp_path / "logs/a")
    assert done.returncode == 0
    assert after["final_val_loss"] == losses(tmp_path / "logs/a")[-1][1]
    assert after["train_time_ms"] == before["train_time_ms"]


def test_the_newest_checkpoint_has_the_highest_step(start, tmp_path):
    assert start(run_name="a", save_every=4).returncode == 0
    folder = tmp_path / "logs/a/checkpoints"
    shutil.copy(folder / "step_000008.pt", folder / "step_best.pt")  # the user's own: left alone
    (folder / "step_000010.pt").rename(folder / "step_1000000.pt")
    (folder / "step_000008.pt").rename(folder / "step_999999.pt")
    found = [(step, path.name) for step, path in train_gpt2.checkpoints(tmp_path / "logs/a").items()]
    assert found == [(999999, "step_999999.pt"), (1000000, "step_1000000.pt")]
    assert "resumed at step 10" in start(run_name="a", save_every=4, resume="auto").stdout
    assert sorted(path.name for path in folder.iterdir()) == ["step_best.pt"]  # what is beyond step 10 goes


def refused_and_untouched(start, folder, *words, **fields):
    """Asserts that the run cannot continue, and that its folder stays as it is."""
    before = contents(folder)
    refused(start(run_name="a", save_every=4, **fields), *words)
    assert contents(folder) == before


@pytest.fixture
def finished(start, tmp_path):
    """Folder of a run with checkpoints at steps 8 and 10."""
    assert start(run_name="a", save_every=4).returncode == 0
    return tmp_path / "logs/a"


@pytest.mark.parametrize("lost", [[], ["log.txt"]])
def test_a_run_is_not_overwritten(start, finished, lost):
    for name in lost:
        (finished / name).unlink()
    refused_and_untouched(start, finished, "already holds a run")


def test_resume_needs_the_same_configuration(start, finished):
    refused_and_untouched(start, finished, "momentum = 0.95, not 0.9", resume="auto", momentum=0.9)


def test_checkpoints_may_be_a_link(start, finished, tmp_path):
    (finished / "checkpoints").rename(tmp_path / "scratch")
    (finished / "checkpoints").symlink_to(tmp_path / "scratch")
    (tmp_path / "scratch/step_000010.pt").unlink()
    done = start(run_name="a", save_every=2, resume="auto")
    assert "resumed at step 8" in done.stdout
    assert (tmp_path / "scratch/step_000010.pt").exists()


def test_a_folder_without_fsync(start, tmp_path, monkeypatch):
    """As some network file systems have it."""
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert start(run_name="a").returncode == 0
    assert checkpoint(tmp_path / "logs/a", 10)


def test_resume_needs_the_same_code(start, finished, monkeypatch):
    monkeypatch.setattr(train_gpt2, "code_sha256", lambda: "0" * 64)
    sentence = ("step_000010.pt was written by another version of train_gpt2.py; "
                "resume with the one in the run's folder")
    refused_and_untouched(start, finished, sentence, resume="auto")


def test_a_checkpoint_that_comes_late(start, finished, monkeypatch):
    # as if it had looked before the first one was saved
    monkeypatch.setattr(train_gpt2, "find_checkpoint", lambda *_: None)
    sentence = "has a checkpoint that was not there a moment ago"
    refused_and_untouched(start, finished, sentence, resume="auto")


def test_a_finished_run_without_checkpoints(start, finished):
    (finished / "checkpoints/step_000008.pt").unlink()
    (finished / "checkpoints/step_000010.pt").unlink()
    refused_and_untouched(start, finished, "holds a finished run without a checkpoint", resume="auto")


@pytest.mark.parametrize("damage, word", [
    (lambda c: c["progress"].update(step=11), "step=11"),
    (lambda c: c["progress"].update(step="10"), "TypeError"),
    (lambda c: c["progress"].update(log_bytes={}), "ValueError"),
    (lambda c: c["progress"].pop("train_time") and c["progress"].update(time=1.0), "'time'"),
    (lambda c: c["model"].popitem(), "Missing key"),
    (lambda c: c["model"].update({"h.0.c_fc.weight": torch.zeros(2, 2)}), "mismatch for h.0.c_fc.weight"),
    (lambda c: c["model"]["h.1.c_fc.weight"].fill_(math.nan), "h.1.c_fc.weight is not finite"),
    (lambda c: c["optimizers"].pop(), "ValueError"),
    (lambda c: c["optimizers"][1]["param_groups"].pop(), "parameter groups"),
    (lambda c: c.update(rng=torch.zeros(3)), "TypeError"),
    (lambda c: c.pop("rng"), "'rng'"),
    (lambda c: c.pop("config"), "is no checkpoint of train_gpt2.py"),
    (lambda c: c["config"].update(colour="red"), "is no checkpoint of train_gpt2.py"),
])
def test_a_damaged_checkpoint_is_refused(start, finished, damage, word):
    content = checkpoint(finished, 10)
    damage(content)
    torch.save(content, finished / "checkpoints/step_000010.pt")
    refused_and_untouched(start, finished, word, "logs/a", "move it away", resume="auto")


def test_a_file_that_is_no_checkpoint_is_refused(start, finished):
    torch.save([1, 2], finished / "checkpoints/step_000010.pt")
    refused_and_untouched(start, finished, "step_000010.pt is no checkpoint", resume="auto")


@pytest.mark.parametrize("text", [None, "", "{}", "[]", "{", "[" * 100_000,
                                  '{"optimizer_sha256": null, "train_shards": [], "val_shards": []}'])
def test_resume_needs_run_json(start, finished, text):
    for name in ("log.txt", "metrics.jsonl", "run.json"):
        (finished / name).unlink()
    if text is not None:
        (finished / "run.json").write_text(text)
    sentence = "has checkpoints but no run.json that can be read"
    refused_and_untouched(start, finished, sentence, resume="auto")


@pytest.mark.parametrize("data_seed, allow_repeat", [(1, "false"), (0, "true")])
def test_resume_needs_the_same_shards(start, shards, tmp_path, data_seed, allow_repeat):
    shutil.copy(shards / "train_000001.bin", tmp_path)
    fields = dict(run_name="a", data_seed=data_seed, allow_repeat=allow_repeat,
                  input_bin=tmp_path / "train_*.bin")
    assert start(**fields).returncode == 0
    shutil.copy(shards / "train_000002.bin", tmp_path)
    done = start(resume="auto", **fields)
    refused(done, f"'{tmp_path}/train_*.bin' has other shards than the run in", "a began with")


def test_resume_with_more_shards_in_the_files_order(start, shards, tmp_path):
    """What comes later does not matter there; what comes first does."""
    shutil.copy(shards / "train_000001.bin", tmp_path)
    fields = dict(run_name="a", data_seed=0, allow_repeat="false", input_bin=tmp_path / "train_*.bin")
    assert start(**fields).returncode == 0
    shutil.copy(shards / "train_000002.bin", tmp_path)
    assert start(resume="auto", **fields).returncode == 0
    (tmp_path / "train_000001.bin").rename(tmp_path / "train_000003.bin")
    done = start(resume="auto", **fields)
    refused(done, f"'{tmp_path}/train_*.bin' has other shards than the run in", "a began with; restore them")


def test_resume_needs_the_optimizers_code(start, module, tmp_path):
    module("kept", "import torch\n\n\nclass Mine(torch.optim.SGD):\n    pass\n")
    assert start(run_name="a", optimizer="kept:Mine").returncode == 0
    kept = (tmp_path / "logs/a/optimizer.py").read_text()
    (tmp_path / "kept.py").write_text(kept + "    changed = True\n")
    done = start(run_name="a", optimizer="kept:Mine", resume="auto")
    refused(done, "began with another version of kept:Mine")
    assert (tmp_path / "logs/a/optimizer.py").read_text() == kept


STOPPING = """
import os
import signal
from optimizers.sf_normuon import SFNorMuon

class Stopping(SFNorMuon):
    steps = 0

    def step(self, closure=None):
        super().step(closure)
        self.steps += 1
        if self.steps == 10:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_final_checkpoint_has_the_weights_of_its_loss(start, module, tmp_path):
    """Also after a signal in the last step, which saves the weights at which gradients are taken."""
    module("stopping", STOPPING)
    whole = tmp_path / "logs/whole"
    stopped = tmp_path / "logs/a"
    assert start(run_name="whole", optimizer="optimizers.sf_normuon:SFNorMuon").returncode == 0
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = start(processes=1, run_name="a", optimizer="stopping:Stopping", env=env)
    assert done.returncode == 143
    assert not same_weights(whole, stopped)
    assert start(run_name="a", optimizer="stopping:Stopping", resume="auto").returncode == 0
    assert same_weights(whole, stopped)


SIGNALLED = """
import os, signal, torch
class Signalled(torch.optim.SGD):
    steps = 0

    def step(self, closure=None):
        super().step(closure)
        self.steps += 1
        if self.steps == 5:
            os.kill(os.getpid(), signal.NAME)
"""


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_the_run_with_a_checkpoint(start, module, tmp_path, name, code):
    """Ctrl-C, the end of a job, a closed terminal."""
    module("signalled", SIGNALLED.replace("NAME", name))
    done = start(run_name="a", optimizer="signalled:Signalled", val_loss_every=0)
    assert done.returncode == code
    assert f"stopped by {name} after step 5" in done.stdout
    assert checkpoint(tmp_path / "logs/a", 5)


def test_nohup_is_respected(start, module, monkeypatch):
    module("signalled", SIGNALLED.replace("NAME", "SIGHUP"))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert start(run_name="a", optimizer="signalled:Signalled", val_loss_every=0).returncode == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_target_is_met_again(start, tmp_path):
    last = tmp_path / "logs/a/checkpoints/step_000010.pt"
    fields = dict(run_name="a", save_every=3, val_loss_every=2)
    assert start(target_val_loss=99, **fields).returncode == 0
    last.unlink()
    done = start(target_val_loss=0.1, resume="auto", **fields)
    assert done.returncode == 0
    assert "target 0.1 not met" in done.stdout
    last.unlink()
    done = start(target_val_loss=99, stop_at_target="true", resume="auto", **fields)
    assert done.returncode == 0
    assert losses(tmp_path / "logs/a")[-1][0] == 10


# terminals and machines


class GonePipe(io.StringIO):
    def reconfigure(self, **settings):
        pass

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stdout", [GonePipe(), None])
def test_nobody_reads_the_output(start, tmp_path, monkeypatch, stdout):
    """As with `train_gpt2.py ... | head -1`, or a terminal that is closed."""
    monkeypatch.setattr(sys, "stdout", stdout)
    assert start(run_name="a").returncode == 0
    assert [step for step, _ in losses(tmp_path / "logs/a")] == [0, 5, 10]
    assert "final loss" in (tmp_path / "logs/a/log.txt").read_text()


# a letter that the terminal lacks, and a byte that is not UTF-8
@pytest.mark.parametrize("name", ["\u2603", "\udcff"])
def test_names_that_cannot_be_printed(start, tmp_path, monkeypatch, name):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert start(run_name=name).returncode == 0
    assert b"final loss" in out.buffer.getvalue()
    assert "final loss" in (tmp_path / f"logs/{name}/log.txt").read_text()


def test_a_machine_without_git_and_nvidia_smi(start, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert start(run_name="a").returncode == 0
    machine = facts_of(tmp_path / "logs/a")["machine"]
    assert machine["git_commit"] is None
    assert machine["git_changes"] is False
    assert machine["cpu"]


def test_stop_at_target(start, tmp_path):
    done = start(run_name="a", target_val_loss=4.0, stop_at_target="true")
    assert done.returncode == 0
    assert "target 4.0 reached at step 5" in done.stdout
    assert losses(tmp_path / "logs/a")[-1][0] == 5
    assert (tmp_path / "logs/a/checkpoints/step_000005.pt").exists()


# optimizers


PLAYS = dict(vocab_size=256, num_iterations=30, sequence_length=64, val_tokens=64 * 64, val_loss_every=15,
             n_embd=32, refresh_interval=4, learning_rate=0.003,
             input_bin=str(ROOT / "data/shakespeare/shakespeare_train_*.bin"),
             input_val_bin=str(ROOT / "data/shakespeare/shakespeare_val_*.bin"))


@pytest.fixture(scope="module")
def table_only(tmp_path_factory):
    """[(step, validation loss)] on the plays if the hidden matrices stay as they are."""
    folder = tmp_path_factory.mktemp("table_only")
    config = write_config(folder / "config.toml", folder, hidden_learning_rate=0.0, **PLAYS)
    assert train_gpt2.run(load_config([str(config), "--run_name", "a"])) == 0
    return losses(folder / "logs/a")


@pytest.mark.parametrize("optimizer, rate", [
    ("adamw", 0.004), ("muon", 0.002), ("newton_muon", 0.002), ("sgd", 0.1),
    ("optimizers.signum:Signum", 0.002), ("torch.optim:NAdam", 0.004)])
def test_optimizers_learn_the_plays(start, table_only, tmp_path, optimizer, rate):
    done = start(run_name="a", optimizer=optimizer, hidden_learning_rate=rate, **PLAYS)
    assert done.returncode == 0, done.stderr
    frozen = [loss for _, loss in table_only]
    trained = [loss for _, loss in losses(tmp_path / "logs/a")]
    assert trained[0] == frozen[0]
    assert trained[2] < trained[1] < trained[0] - 0.1
    assert trained[2] < frozen[2] - 0.05  # the hidden matrices learned, too


def test_optimizer_args(start, tmp_path):
    done = start(run_name="a", optimizer="torch.optim:SGD", optimizer_args='{"momentum": 0.5}')
    assert done.returncode == 0
    _, hidden = checkpoint(tmp_path / "logs/a", 10)["optimizers"]
    assert hidden["param_groups"][0]["momentum"] == 0.5


GROUPED = """
import torch

class Grouped(torch.optim.SGD):
    def __init__(self, params, lr):
        first, *rest = params
        super().__init__([dict(params=[first], lr=4 * lr), dict(params=rest)], lr=lr)
"""


def test_groups_of_different_rates_keep_their_ratio(start, module, tmp_path):
    module("grouped", GROUPED)
    assert start(run_name="a", optimizer="grouped:Grouped", save_every=9).returncode == 0
    table, hidden = checkpoint(tmp_path / "logs/a", 9)["optimizers"]  # the ninth step: scaled by 2 / 4
    assert [group["lr"] for group in table["param_groups"]] == [0.005]
    assert [group["lr"] for group in hidden["param_groups"]] == [0.004, 0.001]


COUNTED = """
from train_gpt2 import Muon

class Counted(Muon):
    def precondition(self, p, G):
        self.state[p]["count"] = self.state[p].get("count", 0) + 1
        return G

    def refresh(self):
        pass
"""


def test_muon_of_ones_own(start, module, tmp_path):
    """Its state may hold numbers. A refresh() without a default refresh_interval is a method of its own."""
    module("counted", COUNTED)
    assert start(run_name="a", optimizer="counted:Counted").returncode == 0
    _, hidden = checkpoint(tmp_path / "logs/a", 10)["optimizers"]
    assert {state["count"] for state in hidden["state"].values()} == {10}


UNSAVABLE = """
import torch

class Thing:
    pass

class Mine(torch.optim.SGD):
    def step(self, closure=None):
        self.param_groups[0]["note"] = VALUE
"""


@pytest.mark.parametrize("value, word", [
    ("lambda x: x", "lambda"), ("open(__file__)", "TextIOWrapper"), ("Thing()", "kept.Thing")])
def test_unsavable_state_is_refused(start, module, tmp_path, value, word):
    module("kept", UNSAVABLE.replace("VALUE", value))
    done = start(optimizer="kept:Mine", run_name="a")
    refused(done, "the state of optimizer = 'kept:Mine' cannot be saved and loaded", word)
    assert not losses(tmp_path / "logs/a")  # before training


LOGGED = """
import torch, train_gpt2
torch._logging.set_logs(recompiles=True, graph_code=True)
train_gpt2.main()
"""


def test_compiled_newton_muon(start, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and g++ is not on the PATH")
    fields = dict(optimizer="newton_muon", refresh_interval=2, n_layer=1,
                  val_tokens=16 * 20)  # 20 sequences: the last batch is not full
    assert start(run_name="eager", **fields).returncode == 0
    words = [tmp_path / "config.toml", "--run_name", "compiled", "--compile", "true", *arguments(fields)]
    done = fork("-c", LOGGED, *words, env=PATHS)
    assert done.returncode == 0, done.stderr
    # the trial's, and those with and without the statistics; validation has none of its own
    assert done.stderr.count("TRACED GRAPH") == 3
    assert done.stderr.count("Recompiling function") == 1
    compiled = dict(losses(tmp_path / "logs/compiled"))
    assert compiled == pytest.approx(dict(losses(tmp_path / "logs/eager")), rel=1e-4)


# Weights & Biases


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A busy machine may be slow to import wandb."""
    monkeypatch.setattr(train_gpt2, "WANDB_SECONDS", HANGS)


WANDB = """
import json

class Run:
    @staticmethod
    def log(record, step):
        print("LOG", json.dumps(record), flush=True)

    @staticmethod
    def finish():
        print("FINISHED", flush=True)

def init(**given):
    print("INIT", json.dumps(given), flush=True)
    return Run
"""


def test_wandb_gets_every_record_and_the_configuration(start, tmp_path, module):
    module("wandb", WANDB)
    out = start(run_name="a", wandb_project="p").stdout
    folder = tmp_path / "logs/a"
    given = json.loads(re.search(r"^INIT (.*)$", out, re.MULTILINE)[1])
    assert given["project"] == "p"
    assert given["name"] == "a"
    assert given["config"] == facts_of(folder)["config"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert re.findall(r"^LOG (.*)$", out, re.MULTILINE) == lines
    assert "FINISHED" in out


@pytest.mark.parametrize("code, seconds, warning", [
    ("def init(**kwargs):\n    raise OSError('no disk')", HANGS,
     "warning: wandb failed (OSError: no disk)"),
    ("import signal\ninit = lambda **kwargs: signal.pause()", 0.01,
     "warning: wandb does not finish")])
def test_a_run_outlives_wandb(start, tmp_path, module, monkeypatch, code, seconds, warning):
    module("wandb", code)
    monkeypatch.setattr(train_gpt2, "WANDB_SECONDS", seconds)
    done = start(run_name="a", wandb_project="p")
    assert done.returncode == 0
    assert done.stderr.count(warning) == 1
    assert losses(tmp_path / "logs/a")[-1][0] == 10


def test_wandb_offline_needs_no_account(start, tmp_path):
    env = dict(WANDB_MODE="offline", WANDB_SILENT="true", HOME=str(tmp_path))
    done = start(run_name="a", wandb_project="p", env=env)
    assert done.returncode == 0
    assert "warning" not in done.stderr
    written, = (tmp_path / "logs/a").glob("wandb/offline-run-*/*.wandb")
    assert b"val_loss" in written.read_bytes()


# configuration


def test_order_of_settings(tmp_path):
    path = tmp_path / "c.toml"
    lines = [b"num_iterations = 7", b"warmdown_iters = 2", b"learning_rate = 1", b"compile = true", b""]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))  # as some editors write it
    config = load_config([str(path), "--warmdown_iters", "3", "--compile", "false"])
    assert config.num_iterations == 7
    assert config.warmdown_iters == 3
    assert config.learning_rate == 1.0
    assert config.compile is False
    assert config.n_layer == 12


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_in_the_repository_loads(path):
    optimizer = load_config([str(path)]).optimizer
    assert path.stem.endswith(optimizer) or ":" in optimizer


@pytest.mark.parametrize("name, table, hidden", [
    ("adamw", 0.0036, 0.16 * 0.0036),
    ("muon", 0.0036, 0.1 * 0.0036),
    ("newton_muon", 0.0040, 0.1 * 0.0040)])
def test_speedrun_configurations(name, table, hidden):
    config = load_config([str(ROOT / f"configs/speedrun_{name}.toml")])
    assert config.learning_rate == table
    assert config.hidden_learning_rate == pytest.approx(hidden)
    rest = dataclasses.replace(config, compile=False, optimizer="muon", learning_rate=0.0036,
                               hidden_learning_rate=0.00036)
    assert rest == Config()  # everything else is the default


def test_help_lists_every_field(start):
    text = start("--help").stdout
    for field in dataclasses.fields(Config):
        pattern = rf"--{field.name} {field.type.__name__}\s+(.+?)\(default:\s+(.+?)\)\n"
        entry = re.search(pattern, text, re.DOTALL)
        assert entry, field.name
        assert entry[1].strip(), field.name
        default = re.sub(r"\s", "", json.dumps(field.default))
        assert re.sub(r"\s", "", entry[2]) == default


def test_learning_rate_schedule():
    config = Config(num_iterations=10, warmup_iters=2, warmdown_iters=4)
    scales = [learning_rate_scale(config, step) for step in range(10)]
    assert scales == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_a_folder_with_brackets(start, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "run[1]")
    assert start(input_bin=tmp_path / "run[1]/train_*.bin", run_name="a").returncode == 0
    assert start(input_bin=shards / "train_00000[12].bin", run_name="b").returncode == 0
    assert same_weights(tmp_path / "logs/a", tmp_path / "logs/b")


def test_validation_shards_are_not_trained_on(start, shards, tmp_path):
    """Whatever their names."""
    (tmp_path / "mine").mkdir()
    for path in shards.iterdir():
        (tmp_path / f"mine/{path.name}").write_bytes(path.read_bytes())
    (tmp_path / "mine/val_000000.bin").rename(tmp_path / "mine/train_000009.bin")
    done = start(input_bin=tmp_path / "mine/*.bin")
    refused(done, "train_000009.bin, one of input_bin", "is also one of input_val_bin")
    assert not (tmp_path / "logs").exists()


# bad input: one sentence that names the thing, an exit code, and no traceback


@pytest.mark.parametrize("fields, words", [
    (dict(batch_size=12, device_batch_size=5),
     ["device_batch_size = 5", "must divide the 12 sequences that each of 1 processes has"]),
    (dict(num_iterations=5000), ["train_*.bin", "needs 960,000", "add 319 more shards", "allow_repeat"]),
    (dict(val_tokens=16 * 1000), ["val_*.bin", "validation needs 16,000"]),
    (dict(val_tokens=100), ["val_tokens = 100", "sequence_length = 16"]),
    (dict(input_bin="nowhere/*.bin"), ["nowhere/*.bin", "data/"]),
    (dict(n_head=3), ["n_head = 3", "n_embd = 16"]),
    (dict(n_head=3, env=dict(LOCAL_RANK="1")), ["n_head = 3"]),  # a process of no group
    (dict(momentum=1.5), ["momentum = 1.5", "below 1"]),
    (dict(learning_rate="nan"), ["learning_rate = nan"]),
    (dict(warmdown_iters=11), ["warmdown_iters = 11", "num_iterations = 10"]),
    (dict(optimizer="lion"), ["optimizer = 'lion'", "newton_muon"]),
    (dict(optimizer="no.such:Thing"), ["no.such:Thing", "ModuleNotFoundError"]),
    (dict(optimizer="torch.optim:SGD", optimizer_args='{"speed": 3}'), ["torch.optim:SGD", "speed"]),
    (dict(optimizer="torch.optim:LBFGS"), ["torch.optim:LBFGS", "closure"]),
    (dict(optimizer="torch.optim:SGD", weight_decay=0.1), ["weight_decay = 0.1", "optimizer_args"]),
    (dict(optimizer_args="{"), ["optimizer_args", "JSON"]),
    (dict(optimizer_args='{"momentum": 0.5}'),
     ["optimizer = 'muon' with optimizer_args = '{\"momentum\": 0.5}'", "multiple values", "'momentum'"]),
    (dict(optimizer_args="[]"), ["optimizer_args = '[]'", "mapping"]),
    (dict(seed=2 ** 64), ["seed = 18446744073709551616"]),
    (dict(collective_timeout=2 ** 32), ["collective_timeout = 4294967296", "below 4,294,967,296"]),
    (dict(vocab_size=32), ["val_000000.bin", "vocab_size = 32"]),
    (dict(resume="nowhere"), ["resume = 'nowhere'"]),
    (dict(resume="auto"), ["run_name"]),
    (dict(run_name="a/b"), ["run_name = 'a/b'"]),
    (dict(config='log_dir = "a\\u0000b"\n'), ["log_dir = 'a\\x00b'", "NUL"]),
    (dict(env=dict(WORLD_SIZE="two")), ["WORLD_SIZE = 'two'", "torchrun"]),
    (dict(env=dict(LOCAL_RANK="-1")), ["LOCAL_RANK = '-1'", "torchrun"]),
    (dict(log_dir="/proc/none"), ["/proc/none", "log_dir"]),
    pytest.param(dict(device="cuda"), ["device = 'cuda'", "--device cpu"],
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    (dict(batch_size=9, env=dict(WORLD_SIZE="2")),
     ["batch_size = 9 cannot be split over 2 processes; set a multiple of their number, or start fewer"]),
    (dict(config="num_iteration = 5\n"), ["unknown key 'num_iteration'", "'num_iterations'", "config.toml"]),
    (dict(config="num_iterations = 5.0\n"), ["config.toml", "num_iterations = 5.0", "float", "int"]),
    (dict(config="compile = 1\n"), ["compile = 1", "bool"]),
    (dict(config="optimizer = [1]\n"), ["optimizer = [1]"]),
    (dict(config="num_iterations = = 5\n"), ["config.toml", "not valid TOML"]),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_bad_values_are_refused(start, fields, words):
    refused(start(**fields), *words)


@pytest.mark.parametrize("fields, words", [
    (dict(num_iteration=5), ["--num_iteration", "--num_iterations"]),
    (dict(num_iterations="many"), ["--num_iterations", "int", "many"]),
    (dict(compile=1), ["--compile", "bool", "1"])])
def test_usage_errors_exit_with_2(start, fields, words):
    refused(start(**fields), *words, code=2)


def test_a_missing_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none.toml: No such file.*configs/"):
        load_config([str(tmp_path / "none.toml")])


def test_nan_loss_keeps_the_log(start, tmp_path):
    done = start(optimizer="faults:TurnsNaN", run_name="a")
    refused(done, "loss is nan at step 5", "learning_rate")
    assert [step for step, _ in losses(tmp_path / "logs/a")] == [0, 5]


@pytest.mark.parametrize("save_every", [0, 4])
def test_two_runs_of_one_folder_at_once(start, tmp_path, monkeypatch, save_every):
    """The second one, which starts while the first evaluates, would write into the logs of the first, and
    delete its checkpoints."""
    folder = tmp_path / "logs/a"
    evaluate = train_gpt2.evaluate
    ends = []

    def evaluate_during_a_second_run(*args):
        monkeypatch.setattr(train_gpt2, "evaluate", evaluate)  # once only
        before = contents(folder)
        ends.append(start(run_name="a", resume="auto"))
        assert contents(folder) == before
        return evaluate(*args)

    if save_every:
        assert start(run_name="a", save_every=save_every).returncode == 0
    monkeypatch.setattr(train_gpt2, "evaluate", evaluate_during_a_second_run)
    assert start(run_name="a", resume="auto").returncode == 0
    second, = ends
    refused(second, "another process is writing to", "run_name")
