"""What several test files share: a tiny model, its data, and ways to run the trainer on them."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels then run on the CPU, slowly

import forks
import train_gpt2
from data.shards import write_shard
from train_gpt2 import Config

ROOT = Path(__file__).resolve().parents[1]
# to import the trainer or a module of tests/ in a new process
PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}

# Seconds. Only ends a test that hangs: on a busy machine everything may take ten times as long.
HANGS = 1800

# Test files run in parallel, one a core, and tiny models gain nothing from more threads.
torch.set_num_threads(1)

# fields of a model that trains in a second, on the shards of the fixture `shards`
TINY = dict(
    n_layer=2, n_head=2, n_embd=16, vocab_size=64, sequence_length=16,
    batch_size=12, num_iterations=10, warmdown_iters=4, learning_rate=0.01, hidden_learning_rate=0.002,
    val_loss_every=5, val_tokens=16 * 24, log_every=1, device="cpu")

toml = json.dumps  # numbers, strings and booleans look the same in TOML


def write_config(path, shards, **fields):
    """Writes the TOML file of a tiny run on `shards`, with its logs beside the file. Returns `path`."""
    values = dict(
        TINY,
        input_bin=str(shards / "train_*.bin"),
        input_val_bin=str(shards / "val_*.bin"),
        log_dir=str(path.parent / "logs"),
        allow_repeat=True)
    values.update(fields)
    lines = [f"{key} = {toml(value)}\n" for key, value in values.items()]
    path.write_text("".join(lines))
    return path


def arguments(fields):
    """These fields of the configuration as command-line arguments."""
    words = []
    for key, value in fields.items():
        words += [f"--{key}", str(value)]
    return words


def environment(changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def run(*command, env={}, **options):
    """Runs the command in its own process until it ends: returncode, stdout, stderr. `env` is added to the
    environment; `options` are those of subprocess.run."""
    options = dict(capture_output=True, text=True, timeout=HANGS) | options
    return subprocess.run([*map(str, command)], env=environment(env), **options)


def fork(*words, env={}, cwd=ROOT):
    """run(sys.executable, *words), in a process that has torch imported when it starts: see forks.py."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = (Path(folder, name) for name in ("out", "errors"))
        process = forks.start(words, environment(env), cwd, str(out), str(errors))
        process.join(HANGS)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{words} hangs: {out.read_text()}{errors.read_text()}")
        return SimpleNamespace(returncode=process.exitcode, stdout=out.read_text(), stderr=errors.read_text())


def torchrun(processes):
    """What Python's command line begins with to start this number of processes of the script that follows."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]


def sequence(*groups):
    """Runs [(processes, [[ARGUMENT, ...], ...]), ...] by sequence.py. Returns its output and
    {(processes, run name): reports in order of rank}."""
    done = fork(ROOT / "tests/sequence.py", json.dumps(groups), env=PATHS)
    assert done.returncode == 0, done.stderr
    found = [json.loads(text) for text in re.findall(r"REPORT (\{.*?\})", done.stdout)]
    reports = {}
    for report in sorted(found, key=lambda report: report["rank"]):
        reports.setdefault((report["world"], report["run"]), []).append(report)
    return done.stdout, reports


def refused(done, *words, code=1):
    """Asserts that the run ended with one sentence, which has these words, and without a traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    sentences = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(sentences) == 1, done.stderr
    for word in words:
        assert word in sentences[0], sentences[0]


def logged(folder):
    """{(step, kind): loss} of a run."""
    losses = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for kind in ("train_loss", "val_loss"):
            if kind in record:
                losses[record["step"], kind] = record[kind]
    return losses


def checkpoint(folder, step):
    return torch.load(folder / f"checkpoints/step_{step:06d}.pt", weights_only=True)


def same_weights(a, b):
    """Whether the newest checkpoints of the runs in folders a and b have the same weights, bit for bit."""
    weights = []
    for folder in (a, b):
        newest = max((folder / "checkpoints").glob("step_*.pt"))
        weights.append(torch.load(newest, weights_only=True)["model"].values())
    return all(torch.equal(x, y) for x, y in zip(*weights, strict=True))


@pytest.fixture
def tiny():
    return Config(**TINY)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Folder with two training shards and a validation shard, of tokens below 64 that can be learned."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, n in (("train_000001", 3000), ("train_000002", 3000), ("val_000000", 1000)):
        tokens = np.cumsum(rng.integers(1, 4, n)) % 64  # the next token is one of three
        write_shard(folder / f"{name}.bin", tokens)
    return folder


@pytest.fixture
def call(monkeypatch, capfd):
    """call(module, *arguments) runs main() of the module in this process, because imports take seconds.
    Returns returncode, stdout and stderr."""
    def call(module, *arguments):
        capfd.readouterr()  # what earlier calls wrote
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {number: signal.getsignal(number) for number in numbers}
        code = 0
        message = ""
        try:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
                module.main()
        except SystemExit as end:
            if isinstance(end.code, str):  # sys.exit("a message")
                code = 1
                message = end.code
            else:
                code = int(end.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, errors = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=errors + message)
    return call


@pytest.fixture
def launch(tmp_path):
    """launch(*command, env={}, **options of Popen) starts a process, which does not outlive the test."""
    def ctrl_c_works():  # even if it is ignored here
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with contextlib.ExitStack() as stack:
        def launch(*command, env={}, **options):
            defaults = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
            process = subprocess.Popen([*map(str, command)], preexec_fn=ctrl_c_works, env=environment(env),
                                       **(defaults | options))
            stack.callback(process.wait)  # the last one first: kill, then wait
            stack.callback(process.kill)
            return process
        yield launch


@pytest.fixture
def start(shards, tmp_path, monkeypatch, call):
    """start(*words, processes=0, config=None, env={}, **fields) trains the tiny model, as a user would.

    `config` is the text of the TOML file; `words` and `fields` become command-line arguments. With
    processes = 0 it trains in this process, because an import of torch takes seconds; with 1 in a process
    of its own; with more in several, by torchrun. These are forks, see forks.py, but on a GPU, which no fork
    can use after the process that it comes from has looked for one. Returns returncode, stdout and stderr.
    """
    def start(*words, processes=0, config=None, env={}, **fields):
        path = write_config(tmp_path / "config.toml", shards, allow_repeat=False)
        if config is not None:
            path.write_text(config)
        command = [path, *words, *arguments(fields)]
        if processes > 0:
            command = [ROOT / "train_gpt2.py", *command]
            if processes > 1:
                command = [*torchrun(processes), *command]
            if fields.get("device") == "cuda":
                return run(sys.executable, *command, cwd=tmp_path, env=env)
            return fork(*command, cwd=tmp_path, env=env)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            for name, value in env.items():
                patch.setenv(name, value)
            return call(train_gpt2, *command)
    return start
