import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels then run on the CPU, slowly

import train_gpt2
from data.shards import write_shard
from train_gpt2 import Config

ROOT = Path(__file__).resolve().parents[1]
PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}  # for processes that import the trainer, or a module of tests/
torch.set_num_threads(1)  # of two cores, other processes have one; and tiny models gain nothing from more

# fields of a model that trains in a second, on the shards of the fixture `shards`
TINY = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=64, sequence_length=16, batch_size=12, num_iterations=10, warmdown_iters=4,
            val_loss_every=5, val_tokens=16 * 24, log_every=1, learning_rate=0.01, hidden_learning_rate=0.002, device="cpu")


toml = json.dumps  # numbers, strings and booleans are written alike


def write_config(path, shards, **fields):
    """The TOML file of a tiny run on the shards, whose logs will lie beside it."""
    values = {**TINY, "input_bin": str(shards / "train_*.bin"), "input_val_bin": str(shards / "val_*.bin"),
              "log_dir": str(path.parent / "logs"), "allow_repeat": True, **fields}
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in values.items()))
    return path


def run(*command, env={}, **options):
    """The command in a process of its own, to its end: returncode, stdout, stderr. `env` is added to the environment."""
    options = dict(capture_output=True, text=True, timeout=300) | options
    return subprocess.run([*map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1", **env}, **options)


def torchrun(processes):
    """The command that starts so many processes of the script that follows."""
    return [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else [])]


def sequence(*groups):
    """Runs [(processes, [[ARGUMENT, ...], ...]), ...] by sequence.py. Returns its output and {(processes, run name): reports, by rank}."""
    done = run(sys.executable, ROOT / "tests/sequence.py", json.dumps(groups), env=PATHS, timeout=240)
    assert done.returncode == 0, done.stderr
    reports = {}
    for report in sorted(map(json.loads, re.findall(r"REPORT (\{.*?\})", done.stdout)), key=lambda report: report["rank"]):
        reports.setdefault((report["world"], report["run"]), []).append(report)
    return done.stdout, reports


def refused(done, *words, code=1):
    """The run ended with one sentence, which has these words, and without a traceback."""
    assert done.returncode == code, done.stderr
    sentences = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(sentences) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in sentences[0] for word in words), sentences[0]


def logged(folder):
    """{(step, kind): loss} of a run."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {(r["step"], kind): r[kind] for r in records for kind in ("train_loss", "val_loss") if kind in r}


def same_weights(*folders):
    a, b = (torch.load(max((folder / "checkpoints").glob("step_*.pt")), weights_only=True)["model"].values() for folder in folders)
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def tiny():
    return Config(**TINY)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Folder with two training shards and a validation shard of learnable tokens below 64."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, n in (("train_000001", 3000), ("train_000002", 3000), ("val_000000", 1000)):
        tokens = np.cumsum(rng.integers(1, 4, n)) % 64  # the next token is one of three
        write_shard(folder / f"{name}.bin", tokens)
    return folder


@pytest.fixture
def call(monkeypatch, capfd):
    """call(module, *arguments) runs its main() in this process (imports take seconds): returncode, stdout, stderr."""
    def call(module, *arguments):
        capfd.readouterr()
        code, text, handlers = 0, "", {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
                module.main()
        except SystemExit as end:
            code, text = (1, end.code) if isinstance(end.code, str) else (int(end.code or 0), "")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, errors = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=errors + text)
    return call


@pytest.fixture
def launch(tmp_path):
    """launch(*command, env={}, **options of Popen) starts it in a process of its own, which does not outlive the test."""
    with contextlib.ExitStack() as stack:
        def launch(*command, env={}, **options):
            options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) | options
            ctrl_c_works = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # even if it is ignored here
            process = subprocess.Popen([*map(str, command)], preexec_fn=ctrl_c_works,
                                       env={**os.environ, "OMP_NUM_THREADS": "1", **env}, **options)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process
        yield launch


@pytest.fixture
def start(shards, tmp_path, monkeypatch, call):
    """start(*arguments, processes=0, config=None, env={}, timeout=300, **fields) trains the tiny model as the command line does.

    With processes = 0 in this process (an import of torch takes seconds), else in one of its own or, by torchrun, in several. `config` is
    the text of the TOML file; fields become command-line arguments. Returns returncode, stdout and stderr.
    """
    def start(*arguments, processes=0, config=None, env={}, timeout=300, **fields):
        path = write_config(tmp_path / "config.toml", shards, allow_repeat=False)
        if config is not None:
            path.write_text(config)
        command = [path, *arguments, *(text for key, value in fields.items() for text in (f"--{key}", value))]
        if processes:
            return run(*torchrun(processes), ROOT / "train_gpt2.py", *command, cwd=tmp_path, env=env, timeout=timeout)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            for name, value in env.items():
                patch.setenv(name, value)
            return call(train_gpt2, *command)
    return start
