"""scripts/tune.py: the grid and the protocol."""
import json
import sys
from argparse import Namespace

import numpy as np
import pytest

from harness import jobs
import train_gpt2
from scripts import tune
from conftest import ROOT, refused
from train_gpt2 import UserError, load_config


def test_grid(monkeypatch, call, tmp_path):
    def train(command, **options):  # leaves what a run leaves that tune.py reads
        assert command[:2] == [sys.executable, str(ROOT / "train_gpt2.py")]
        config = load_config(command[2:])
        started.append(config.run_name)
        failed = config.learning_rate == 9
        if not failed:
            facts = dict(config=vars(config), code_sha256=train_gpt2.code_sha256(), end="now",
                         final_val_loss=1 / config.learning_rate)
            (tmp_path / config.run_name).mkdir()
            (tmp_path / config.run_name / "run.json").write_text(json.dumps(facts))
        return Namespace(returncode=int(failed), communicate=lambda: ("", "it failed" if failed else ""))

    started = []
    arguments = ["configs/cpu_adamw.toml", "--learning_rate", "0.5,9,1", "--weight_decay", 0.1,
                 "--log_dir", tmp_path]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jobs.subprocess, "Popen", train)
    for runs_of_it in (["0.5", "9", "1"], ["9"]):  # the same command tries again only what failed
        done = call(tune, *arguments)
        assert started == [f"cpu_adamw_learning_rate-{rate}_weight_decay-0.1" for rate in runs_of_it]
        assert [line.split("_w")[0] for line in done.stdout.splitlines()[-3:]] == [
            "1.0000  cpu_adamw_learning_rate-1", "2.0000  cpu_adamw_learning_rate-0.5",
            "failed  cpu_adamw_learning_rate-9"]
        assert done.returncode == 1 and "it failed" in done.stderr
        started.clear()


@pytest.mark.parametrize("arguments, words", [
    ("zero.toml --protocol", "zero.toml has hidden_learning_rate = 0"),
    ("a.toml --jobs 0", "--jobs 0: must be at least 1"),
    ("a/cpu.toml b/cpu.toml --protocol", "configurations of different names"),
    ("a.toml --protocol --seed=1", "leave out seed"),
    ("a.toml --protocol --learning_rate=0.1", "leave out learning_rate"),
])
def test_impossible_arguments_are_refused(monkeypatch, tmp_path, call, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero.toml").write_text("hidden_learning_rate = 0.0\n")
    monkeypatch.setattr(tune, "train_all", lambda *_: pytest.fail("starts"))
    refused(call(tune, *arguments.split()), words)


def test_a_stopped_search_leaves_no_run_behind(monkeypatch, call, tmp_path):
    (tmp_path / "train_gpt2.py").write_text("""
import os, pathlib, signal, sys
# blocked until it is waited for: a signal just before signal.pause() would be lost
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
pathlib.Path(sys.argv[3], "started").open("a").write("x")
os.kill(os.getppid(), signal.SIGTERM)
signal.sigwait({signal.SIGTERM})
pathlib.Path(sys.argv[3], "saved").touch()  # as a run writes its checkpoint
sys.exit(143)
""")
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    monkeypatch.chdir(ROOT)
    done = call(tune, "configs/cpu_muon.toml", "--seed", "0,1,2", "--log_dir", tmp_path)
    assert done.returncode == 130 and "interrupted; run the same command again to continue" in done.stderr
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "started").read_text() == "x"  # none of the other two


def test_a_broken_run_is_no_divergence(monkeypatch, tmp_path):
    def train(self, arguments, folder):
        return None if "0.02_" in folder.name else 1.0

    monkeypatch.setattr(jobs.Jobs, "train", train)
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="cpu_muon_learning_rate-0.02_.* did not end"):
        tune.protocol(["configs/cpu_muon.toml"], {}, 9, 2, tmp_path, 1)
    monkeypatch.setattr(tune, "diverged", lambda folder: True)
    found = tune.protocol(["configs/cpu_muon.toml"], {}, 9, 2, tmp_path, 1)
    assert found["configs/cpu_muon.toml"][0] != 0.02


def test_protocol_tunes_alike(monkeypatch, tmp_path):
    asked = []
    # the first is 2 steps away
    bottom = {"configs/cpu_muon.toml": (0.08, 0.001), "configs/cpu_adamw.toml": (0.005, 0.0057)}

    def bowl(settings, log_dir, jobs):
        asked.extend(settings)
        losses = {}
        for i, (path, fields) in enumerate(settings):
            distance = sum(abs(np.log(fields[rate] / at)) for rate, at in zip(tune.RATES, bottom[path]))
            losses[str(i)] = distance + 0.01 * (fields["seed"] - 100)
        return losses

    monkeypatch.setattr(tune, "train_all", bowl)
    monkeypatch.chdir(ROOT)
    found = tune.protocol(list(bottom), {"num_iterations": "600"}, 12, 2, tmp_path, 1)
    assert all(found[path] == pytest.approx(bottom[path], rel=0.01) for path in bottom)
    counts = [sum(path == each for each, _ in asked) for path in bottom]
    assert counts[0] == counts[1] >= 24 and len({str(point) for point in asked}) == len(asked)
    assert {(fields["seed"], fields["data_seed"]) for _, fields in asked} == {(100, 100), (101, 101)}
    table = (tmp_path / "tuning.csv").read_text().splitlines()
    assert len(table) == 1 + len(asked) / 2
    assert all(line.startswith("configs/cpu_muon.toml") for line in table[1:1 + counts[0] // 2])
    pairs = set()
    for path, fields in asked:
        if path == "configs/cpu_muon.toml":
            pairs.add(tuple(fields[rate] for rate in tune.RATES))
    assert max(pairs)[0] > 0.08 and min(pair[1] for pair in pairs) < 0.001
