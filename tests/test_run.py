"""Whole runs of train_gpt2.py, as a user starts them."""
import dataclasses
import hashlib
import io
import json
import re
import shutil
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import train_gpt2
from conftest import ROOT, refused, same_weights
from harness.runs import read_run
from train_gpt2 import Config, UserError, choose_micro_batch, learning_rate_scale, load_config


def losses(folder):
    return [(r["step"], r["val_loss"]) for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "val_loss" in r]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(name, code) makes `code` the module of that name, here and in the processes that a run starts."""
    def module(name, code):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return module


# what a run writes


def test_files_of_a_run(start, shards, tmp_path):
    done = start(processes=1, run_name="a", optimizer="newton_muon", refresh_interval=3)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "logs" / "a"
    assert {path.name for path in folder.iterdir()} == {"log.txt", "metrics.jsonl", "run.json", "train_gpt2.py", "checkpoints"}
    run = read_run(folder)
    assert run.steps == [0, 5, 10] and run.seconds[0] == 0 and run.seconds == sorted(run.seconds)
    assert [(s, round(loss, 4)) for s, loss in losses(folder)] == list(zip(run.steps, run.losses))
    log = (folder / "log.txt").read_text()
    assert log.startswith((ROOT / "train_gpt2.py").read_text().rstrip())  # the log contains the code
    assert re.search(r"^step:10/10 val_loss:\d\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$", log, re.MULTILINE)
    assert (folder / "train_gpt2.py").read_text() == (ROOT / "train_gpt2.py").read_text()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train_loss" in r] == list(range(1, 11))
    assert records[-1]["tokens"] == 10 * 12 * 16
    facts = json.loads((folder / "run.json").read_text())
    assert facts["config"]["optimizer"] == "newton_muon" and facts["config"]["seed"] == 0
    assert facts["world_size"] == 1 and facts["tokens_per_step"] == 192 and facts["machine"]["torch"] == torch.__version__
    assert facts["parameters"] == 2 * 12 * 16 ** 2 + 64 * 16 and facts["hidden_parameters"] == 2 * 12 * 16 ** 2
    assert [shard["tokens"] for shard in facts["train_shards"]] == [3000, 3000] and len(facts["code_sha256"]) == 64
    content = (shards / "val_000000.bin").read_bytes()
    assert facts["val_shards"] == [dict(name="val_000000.bin", tokens=1000, sha256_of_first_mebibyte=hashlib.sha256(content).hexdigest(),
                                        sha256_of_header_and_size=hashlib.sha256(content[:1024] + b"3024").hexdigest())]
    assert facts["final_val_loss"] == pytest.approx(run.losses[-1], abs=1e-4) and facts["end"] >= facts["start"]
    weights = torch.load(folder / "checkpoints" / "step_000010.pt", weights_only=True)["model"]
    assert all(w.isfinite().all() for w in weights.values())


def test_a_run_ends_with_its_results(start, tmp_path):
    done = start(run_name="a", target_val_loss=4.0)
    facts = json.loads((tmp_path / "logs/a/run.json").read_text())
    step, seconds = facts["target_reached"]
    assert step == 5 and 0 < seconds < facts["train_time_ms"] / 1000
    assert facts["tokens_per_second"] == pytest.approx(10 * 192 / (facts["train_time_ms"] / 1000))
    assert facts["peak_memory_bytes"] > 2 ** 26 and facts["utilisation"] is None and facts["attention"] in ("flash_attention", "math")
    assert f"final loss   {facts['final_val_loss']:.4f}; target 4 met at step 5" in done.stdout


@pytest.mark.parametrize("gigabytes, most", [(80, 128), (40, 64), (24, 32), (16, 16)])
def test_micro_batch_fits_the_gpu(monkeypatch, gigabytes, most):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gigabytes * 1.056e9))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert choose_micro_batch(Config(), gpu, 512, torch.bfloat16) == most
    assert choose_micro_batch(Config(), gpu, 24, torch.bfloat16) == min(most, 8)
    assert choose_micro_batch(Config(device_batch_size=4), gpu, 512, torch.bfloat16) == 4
    assert choose_micro_batch(Config(), gpu, 512, torch.float32) == most / 2  # dtype = auto on a GPU without bfloat16, too
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.45)
    assert choose_micro_batch(Config(), gpu, 512, torch.bfloat16) <= most / 2


def test_a_run_continues_without_a_compiler(start, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError("no C++ compiler")))
    done = start(run_name="a", compile="true")
    assert done.returncode == 0 and "torch.compile does not work here (RuntimeError: no C++ compiler): training without it" in done.stdout
    assert json.loads((tmp_path / "logs/a/run.json").read_text())["compiled"] is False


def test_resume_is_exact(start, tmp_path):
    fields = dict(optimizer="newton_muon", refresh_interval=2)
    assert start(run_name="whole", **fields).returncode == 0
    assert start(run_name="parts", save_every=3, **fields).returncode == 0
    folder = tmp_path / "logs/parts"
    newest, older = sorted((folder / "checkpoints").iterdir(), reverse=True)  # the last two are kept
    assert (older.name, newest.name) == ("step_000009.pt", "step_000010.pt")
    newest.write_bytes(newest.read_bytes()[:1000])  # as if the disk had lost its end
    done = start(run_name="parts", save_every=3, resume="auto", **fields)
    assert done.returncode == 0 and "resumed at step 9" in done.stdout and "cannot be loaded" in done.stderr
    assert same_weights(tmp_path / "logs/whole", folder)
    assert losses(tmp_path / "logs/whole") == losses(folder)  # and nothing is logged twice
    facts = json.loads((folder / "run.json").read_text())
    assert facts["config"]["resume"] == "" and [part["config"]["resume"] for part in facts["resumed"]] == ["auto"]
    done = start(run_name="parts", resume="auto", **fields)  # a finished run has nothing left to do
    again = json.loads((folder / "run.json").read_text())
    assert done.returncode == 0 and again["final_val_loss"] == losses(folder)[-1][1] and again["train_time_ms"] == facts["train_time_ms"]


def test_the_newest_checkpoint_has_the_highest_step(start, tmp_path):
    assert start(run_name="a", save_every=4).returncode == 0
    folder = tmp_path / "logs/a/checkpoints"
    shutil.copy(folder / "step_000008.pt", folder / "step_best.pt")  # of the user's own: left alone
    (folder / "step_000010.pt").rename(folder / "step_1000000.pt")
    (folder / "step_000008.pt").rename(folder / "step_999999.pt")
    assert [path.name for path in train_gpt2.checkpoints(tmp_path / "logs/a")] == ["step_999999.pt", "step_1000000.pt"]
    assert "resumed at step 10" in start(run_name="a", save_every=4, resume="auto").stdout
    assert sorted(path.name for path in folder.iterdir()) == ["step_best.pt"]  # what is beyond the step goes


@pytest.mark.parametrize("files, code, fields, words", [
    ({}, {}, {}, "already holds a run"),
    ({"log.txt": None}, {}, {}, "already holds a run"),
    ({}, {}, dict(resume="auto", momentum=0.9), "momentum = 0.95, not 0.9"),
    ({}, dict(code_sha256=lambda: "0" * 64), dict(resume="auto"),
     "step_000010.pt was written by another version of train_gpt2.py; resume with the one in the run's folder"),
    ({}, dict(find_checkpoint=lambda *_: (None, None)), dict(resume="auto"),  # as if it had looked before the first was saved
     "has a checkpoint that was not there a moment ago"),
    ({"checkpoints/step_000008.pt": None, "checkpoints/step_000010.pt": None}, {}, dict(resume="auto"),
     "holds a finished run without a checkpoint"),
    *(({"log.txt": None, "metrics.jsonl": None, "run.json": text}, {}, dict(resume="auto"),
       "has checkpoints but no run.json that can be read") for text in (None, "", "{}", "[]", "{"))])
def test_a_run_that_cannot_continue_stays(start, tmp_path, monkeypatch, files, code, fields, words):
    assert start(run_name="a", save_every=4).returncode == 0
    for name, text in files.items():
        (tmp_path / "logs/a" / name).unlink()
        if text is not None:
            (tmp_path / "logs/a" / name).write_text(text)
    for name, function in code.items():
        monkeypatch.setattr(train_gpt2, name, function)
    before = contents(tmp_path / "logs/a")
    refused(start(run_name="a", save_every=4, **fields), words)
    assert contents(tmp_path / "logs/a") == before


@pytest.mark.parametrize("data_seed, allow_repeat", [(1, "false"), (0, "true"), (0, "false")])
def test_resume_needs_the_same_shards(start, shards, tmp_path, data_seed, allow_repeat):
    shutil.copy(shards / "train_000001.bin", tmp_path)
    run = dict(run_name="a", data_seed=data_seed, allow_repeat=allow_repeat, input_bin=tmp_path / "train_*.bin")
    assert start(**run).returncode == 0
    shutil.copy(shards / "train_000002.bin", tmp_path)
    done = start(resume="auto", **run)
    if data_seed == 0 and allow_repeat == "false":  # what comes later in the files' order does not matter
        assert done.returncode == 0
        (tmp_path / "train_000001.bin").rename(tmp_path / "train_000003.bin")
        refused(start(resume="auto", **run), f"'{tmp_path}/train_*.bin' has other shards than the run in", "a began with; restore them")
    else:
        refused(done, f"'{tmp_path}/train_*.bin' has other shards than the run in", "a began with")


def test_resume_needs_the_optimizers_code(start, module, tmp_path):
    module("kept", "import torch\n\n\nclass Mine(torch.optim.SGD):\n    pass\n")
    assert start(run_name="a", optimizer="kept:Mine").returncode == 0
    kept = (tmp_path / "logs/a/optimizer.py").read_text()
    (tmp_path / "kept.py").write_text(kept + "    changed = True\n")
    refused(start(run_name="a", optimizer="kept:Mine", resume="auto"), "began with another version of kept:Mine")
    assert (tmp_path / "logs/a/optimizer.py").read_text() == kept


def test_a_final_checkpoint_has_the_weights_of_its_loss(start, module, tmp_path):
    """Also after a signal in the last step, which saves the weights at which gradients are taken."""
    module("stopping", "import os\nimport signal\nfrom optimizers.sf_normuon import SFNorMuon\n\n\nclass Stopping(SFNorMuon):\n    steps = 0\n\n"
           "    def step(self, closure=None):\n        super().step(closure)\n        self.steps += 1\n        if self.steps == 10:\n"
           "            os.kill(os.getpid(), signal.SIGTERM)\n")
    assert start(run_name="whole", optimizer="optimizers.sf_normuon:SFNorMuon").returncode == 0
    assert start(processes=1, run_name="a", optimizer="stopping:Stopping", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}).returncode == 143
    assert not same_weights(tmp_path / "logs/whole", tmp_path / "logs/a")
    assert start(run_name="a", optimizer="stopping:Stopping", resume="auto").returncode == 0
    assert same_weights(tmp_path / "logs/whole", tmp_path / "logs/a")


def test_another_target_is_met_again(start, tmp_path):
    assert start(run_name="a", target_val_loss=99, save_every=3, val_loss_every=2).returncode == 0
    (tmp_path / "logs/a/checkpoints/step_000010.pt").unlink()
    done = start(run_name="a", target_val_loss=0.1, resume="auto", save_every=3, val_loss_every=2)
    assert done.returncode == 0 and "target 0.1 not met" in done.stdout
    (tmp_path / "logs/a/checkpoints/step_000010.pt").unlink()
    done = start(run_name="a", target_val_loss=99, stop_at_target="true", resume="auto", save_every=3, val_loss_every=2)
    assert done.returncode == 0 and losses(tmp_path / "logs/a")[-1][0] == 10


def test_nobody_reads_the_output(start, tmp_path, monkeypatch):
    """As `train_gpt2.py ... | head -1`, or a terminal that is closed."""
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    for run, stdout in (("a", Gone()), ("b", None)):
        monkeypatch.setattr(sys, "stdout", stdout)
        assert start(run_name=run).returncode == 0
        assert [step for step, _ in losses(tmp_path / f"logs/{run}")] == [0, 5, 10]
        assert "final loss" in (tmp_path / f"logs/{run}/log.txt").read_text()


@pytest.mark.parametrize("name", ["\u2603", "\udcff"])  # a letter that the terminal lacks, and a byte that is not UTF-8
def test_names_that_cannot_be_printed(start, tmp_path, monkeypatch, name):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert start(run_name=name).returncode == 0
    assert b"final loss" in out.buffer.getvalue() and "final loss" in (tmp_path / f"logs/{name}/log.txt").read_text()


def test_a_gpu_machine_without_nvidia_smi(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    assert train_gpt2.describe_machine(torch.device("cuda", 0))["nvidia_smi"] == ""


def test_stop_at_target(start, tmp_path):
    done = start(run_name="a", target_val_loss=4.0, stop_at_target="true")
    assert done.returncode == 0 and "target 4.0 reached at step 5" in done.stdout
    assert losses(tmp_path / "logs/a")[-1][0] == 5 and (tmp_path / "logs/a/checkpoints/step_000005.pt").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "newton_muon", "sgd", "optimizers.signum:Signum", "torch.optim:NAdam"])
def test_optimizers_learn_the_plays(start, tmp_path, optimizer):
    plays, rate = ROOT / "data/shakespeare/shakespeare", {"sgd": 0.1, "adamw": 0.004, "torch.optim:NAdam": 0.004}.get(optimizer, 0.002)
    table_only, whole = (start(run_name=f"{hidden}", optimizer=optimizer, hidden_learning_rate=hidden, vocab_size=256, num_iterations=30,
                               sequence_length=64, val_tokens=64 * 64, val_loss_every=15, n_embd=32, refresh_interval=4,
                               learning_rate=0.003, input_bin=f"{plays}_train_*.bin", input_val_bin=f"{plays}_val_*.bin")
                         for hidden in (0.0, rate))
    assert table_only.returncode == whole.returncode == 0, whole.stderr
    frozen, trained = (losses(tmp_path / f"logs/{hidden}") for hidden in (0.0, rate))
    assert trained[0] == frozen[0]
    assert trained[2][1] < trained[1][1] < trained[0][1] - 0.1
    assert trained[2][1] < frozen[2][1] - 0.05  # the hidden matrices learned too, not the table alone


def test_optimizer_args(start, tmp_path):
    assert start(run_name="a", optimizer="torch.optim:SGD", optimizer_args='{"momentum": 0.5}').returncode == 0
    _, hidden = torch.load(tmp_path / "logs/a/checkpoints/step_000010.pt", weights_only=True)["optimizers"]
    assert hidden["param_groups"][0]["momentum"] == 0.5


def test_groups_of_different_rates_keep_their_ratio(start, module, tmp_path):
    module("grouped", "import torch\nclass Grouped(torch.optim.SGD):\n    def __init__(self, params, lr):\n        first, *rest = params\n"
                      "        super().__init__([dict(params=[first], lr=4 * lr), dict(params=rest)], lr=lr)\n")
    assert start(run_name="a", optimizer="grouped:Grouped", save_every=9).returncode == 0
    saved = torch.load(tmp_path / "logs/a/checkpoints/step_000009.pt", weights_only=True)["optimizers"]  # the ninth: scaled by 2 / 4
    assert [group["lr"] for optimizer in saved for group in optimizer["param_groups"]] == [0.005, 0.004, 0.001]


def test_muon_of_ones_own(start, module, tmp_path):
    """Its state may hold numbers, and a refresh() without a default refresh_interval is a method of its own."""
    module("counted", "from train_gpt2 import Muon\nclass Counted(Muon):\n    def precondition(self, p, G):\n"
                      "        self.state[p]['count'] = self.state[p].get('count', 0) + 1\n        return G\n"
                      "    def refresh(self):\n        pass\n")
    assert start(run_name="a", optimizer="counted:Counted").returncode == 0
    _, hidden = torch.load(tmp_path / "logs/a/checkpoints/step_000010.pt", weights_only=True)["optimizers"]
    assert {state["count"] for state in hidden["state"].values()} == {10}


@pytest.mark.parametrize("value, word", [("lambda x: x", "lambda"), ("open(__file__)", "TextIOWrapper"), ("Thing()", "kept.Thing")])
def test_unsavable_state_is_refused(start, module, tmp_path, value, word):
    module("kept", "import torch\nclass Thing:\n    pass\nclass Mine(torch.optim.SGD):\n    def step(self, closure=None):\n"
                   f"        self.param_groups[0]['note'] = {value}\n")
    refused(start(optimizer="kept:Mine", run_name="a"), "the state of optimizer = 'kept:Mine' cannot be saved and loaded", word)
    assert not losses(tmp_path / "logs/a")  # before training


def test_compiled_newton_muon(start, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and g++ is not on the PATH")
    fields = dict(optimizer="newton_muon", refresh_interval=2, n_layer=1, val_tokens=16 * 20)  # 20 sequences: the last batch is not full
    assert start(run_name="eager", **fields).returncode == 0
    done = start(processes=1, run_name="compiled", compile="true", env={"TORCH_LOGS": "recompiles,graph_code"}, **fields)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("TRACED GRAPH") == 3  # of the trial; with and without collecting the inputs; validation has none
    assert len(re.findall(r"Recompiling function", done.stderr)) == 1
    assert dict(losses(tmp_path / "logs/compiled")) == pytest.approx(dict(losses(tmp_path / "logs/eager")), rel=1e-4)


def test_wandb_gets_every_record_and_the_configuration(start, tmp_path, module):
    module("wandb", "import json\nclass Run:\n    log = staticmethod(lambda record, step: print('LOG', json.dumps(record), flush=True))\n"
                    "    finish = staticmethod(lambda: print('FINISHED', flush=True))\n"
                    "def init(**given):\n    print('INIT', json.dumps(given), flush=True)\n    return Run")
    out, folder = start(run_name="a", wandb_project="p").stdout, tmp_path / "logs/a"
    given = json.loads(re.search(r"^INIT (.*)$", out, re.MULTILINE)[1])
    assert (given["project"], given["name"]) == ("p", "a")
    assert given["config"] == json.loads((folder / "run.json").read_text())["config"]
    assert re.findall(r"^LOG (.*)$", out, re.MULTILINE) == (folder / "metrics.jsonl").read_text().splitlines() and "FINISHED" in out


@pytest.mark.parametrize("code, seconds, warning", [
    ("def init(**kwargs):\n    raise OSError('no disk')", train_gpt2.WANDB_SECONDS, "warning: wandb failed (OSError: no disk)"),
    ("import signal\ninit = lambda **kwargs: signal.pause()", 0.01, "warning: wandb does not finish")])
def test_a_run_outlives_wandb(start, tmp_path, module, monkeypatch, code, seconds, warning):
    module("wandb", code)
    monkeypatch.setattr(train_gpt2, "WANDB_SECONDS", seconds)
    done = start(run_name="a", wandb_project="p")
    assert done.returncode == 0 and done.stderr.count(warning) == 1
    assert losses(tmp_path / "logs/a")[-1][0] == 10


def test_wandb_offline_needs_no_account(start, tmp_path):
    done = start(run_name="a", wandb_project="p", env=dict(WANDB_MODE="offline", WANDB_SILENT="true", HOME=str(tmp_path)))
    assert done.returncode == 0 and "warning" not in done.stderr
    written, = (tmp_path / "logs/a").glob("wandb/offline-run-*/*.wandb")
    assert b"val_loss" in written.read_bytes()


# configuration


def test_order_of_settings(tmp_path):
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xef\xbb\xbfnum_iterations = 7\r\nwarmdown_iters = 2\r\nlearning_rate = 1\r\ncompile = true\r\n")  # of an editor
    config = load_config([str(path), "--warmdown_iters", "3", "--compile", "false"])
    assert (config.num_iterations, config.warmdown_iters, config.learning_rate, config.compile, config.n_layer) == (7, 3, 1.0, False, 12)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_in_the_repository_loads(path):
    assert path.stem.endswith(load_config([str(path)]).optimizer)


def test_speedrun_configurations():
    for name, table, hidden in (("adamw", 0.0036, 0.16 * 0.0036), ("muon", 0.0036, 0.1 * 0.0036), ("newton_muon", 0.0040, 0.1 * 0.0040)):
        config = load_config([str(ROOT / f"configs/speedrun_{name}.toml")])
        assert config.learning_rate == table and config.hidden_learning_rate == pytest.approx(hidden)
        assert dataclasses.replace(config, compile=False, optimizer="muon", learning_rate=0.0036, hidden_learning_rate=0.00036,
                                   ) == Config()  # everything else is the default


def test_help_lists_every_field(start):
    text = start("--help").stdout
    for field in dataclasses.fields(Config):
        entry = re.search(rf"--{field.name} {field.type.__name__}\s+(.+?)\(default:\s+(.+?)\)\n", text, re.DOTALL)
        assert entry and len(entry[1].split()) > 0, field.name
        assert re.sub(r"\s", "", entry[2]) == re.sub(r"\s", "", json.dumps(field.default))


def test_learning_rate_schedule():
    config = Config(num_iterations=10, warmup_iters=2, warmdown_iters=4)
    assert [learning_rate_scale(config, step) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


# bad input: one sentence that names the thing, an exit code, and no traceback


@pytest.mark.parametrize("fields, words", [
    (dict(batch_size=12, device_batch_size=5), ["device_batch_size = 5", "12 sequences", "nearest that does is 4"]),
    (dict(num_iterations=5000), ["train_*.bin", "needs 960,000", "add 319 more shards", "allow_repeat"]),
    (dict(val_tokens=16 * 1000), ["val_*.bin", "validation needs 16,000"]),
    (dict(val_tokens=100), ["val_tokens = 100", "sequence_length = 16"]),
    (dict(input_bin="nowhere/*.bin"), ["nowhere/*.bin", "data/"]),
    (dict(n_head=3), ["n_head = 3", "n_embd = 16"]),
    (dict(momentum=1.5), ["momentum = 1.5", "below 1"]),
    (dict(learning_rate="nan"), ["learning_rate = nan"]),
    (dict(warmdown_iters=11), ["warmdown_iters = 11", "num_iterations = 10"]),
    (dict(optimizer="lion"), ["optimizer = 'lion'", "newton_muon"]),
    (dict(optimizer="no.such:Thing"), ["no.such:Thing", "ModuleNotFoundError"]),
    (dict(optimizer="torch.optim:SGD", optimizer_args='{"speed": 3}'), ["torch.optim:SGD", "speed"]),
    (dict(optimizer="torch.optim:LBFGS"), ["torch.optim:LBFGS", "closure"]),
    (dict(optimizer="torch.optim:SGD", weight_decay=0.1), ["weight_decay = 0.1", "optimizer_args"]),
    (dict(optimizer_args="{"), ["optimizer_args", "JSON"]),
    (dict(optimizer_args='{"momentum": 0.5}'), ["optimizer_args = '{\"momentum\": 0.5}', optimizer = 'muon'", "without a module:Class"]),
    (dict(seed=2 ** 64), ["seed = 18446744073709551616"]),
    (dict(collective_timeout=2 ** 32), ["collective_timeout = 4294967296", "below 2^32"]),
    (dict(vocab_size=32), ["val_000000.bin", "vocab_size = 32"]),
    (dict(resume="nowhere"), ["resume = 'nowhere'"]),
    (dict(resume="auto"), ["run_name"]),
    (dict(run_name="a/b"), ["run_name = 'a/b'"]),
    (dict(log_dir="/proc/none"), ["/proc/none", "log_dir"]),
    pytest.param(dict(device="cuda"), ["device = 'cuda'", "--device cpu"],
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    (dict(batch_size=9, env=dict(WORLD_SIZE="2")),
     ["batch_size = 9 cannot be split over 2 processes; the nearest numbers of processes that can are 1 and 3"]),
    (dict(config="num_iteration = 5\n"), ["unknown key 'num_iteration'", "'num_iterations'", "config.toml"]),
    (dict(config="num_iterations = 5.0\n"), ["config.toml", "num_iterations = 5.0", "float", "int"]),
    (dict(config="compile = 1\n"), ["compile = 1", "bool"]),
    (dict(config="optimizer = [1]\n"), ["optimizer = [1]"]),
    (dict(config="num_iterations = = 5\n"), ["config.toml", "not valid TOML"]),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_bad_values_are_refused(start, fields, words):
    refused(start(**fields), *words)


@pytest.mark.parametrize("fields, words", [
    (dict(num_iteration=5), ["--num_iteration", "--num_iterations"]), (dict(num_iterations="many"), ["--num_iterations", "int", "many"]),
    (dict(compile=1), ["--compile", "bool", "1"])])
def test_usage_errors_exit_with_2(start, fields, words):
    refused(start(**fields), *words, code=2)


def test_a_missing_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none.toml: No such file.*configs/"):
        load_config([str(tmp_path / "none.toml")])


def test_nan_loss_keeps_the_log(start, tmp_path):
    refused(start(optimizer="faults:TurnsNaN", run_name="a"), "loss is nan at step 5", "learning_rate")
    assert [step for step, _ in losses(tmp_path / "logs/a")] == [0, 5]


@pytest.mark.parametrize("save_every", [0, 4])
def test_two_runs_of_one_folder_at_once(start, tmp_path, monkeypatch, save_every):
    """The second would write into the logs of the first, and delete its checkpoints."""
    seconds, folder = [], tmp_path / "logs/a"

    def evaluate(*args, evaluate=train_gpt2.evaluate):
        monkeypatch.setattr(train_gpt2, "evaluate", evaluate)  # once only
        before = contents(folder)
        seconds.append(start(run_name="a", resume="auto"))
        assert contents(folder) == before
        return evaluate(*args)

    if save_every:
        assert start(run_name="a", save_every=save_every).returncode == 0
    monkeypatch.setattr(train_gpt2, "evaluate", evaluate)
    assert start(run_name="a", resume="auto").returncode == 0
    refused(seconds[0], "another process is writing to", "run_name")
