"""The planned studies of records/cpu/: from no run to the page, with losses that are computed."""
import math
import re
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest

from conftest import ROOT
from harness.zoo.training import Track

OPTIMUM = {"muon": (0.02, 0.003), "newton_muon": (0.028, 0.002)}  # of the rates
BETTER = 0.01  # that Newton-Muon is


def loss_of(point):
    """A bowl in the logarithms of the rates, with noise of each seed."""
    best = OPTIMUM.get(point.optimizer, OPTIMUM["muon"])
    far = [math.log(rate / middle) for rate, middle in zip(point[2:4], best)]
    noise = np.random.default_rng([point.seed, *point.optimizer.encode()]).normal(0, 0.0005)
    return 1.5 + 0.01 * far[0] ** 2 + 0.03 * far[1] ** 2 - BETTER * (point.optimizer == "newton_muon") \
        - 0.15 * math.log(point.steps / 600) + noise


@pytest.fixture
def run_study(call, monkeypatch, tmp_path):
    """run_study(name): the text of results.md, and how many runs it took."""
    def run_study(name):
        path = ROOT / "records/cpu" / name / "study.py"
        spec = spec_from_file_location("study", path)
        study = module_from_spec(spec)
        spec.loader.exec_module(study)
        ran = []
        arm = {"models.faster:BF16GPT": 0.001}

        def run(self, point):
            ran.append(point)
            return loss_of(point) + arm.get(self.full.model, 0.0002 * math.sin(point.seed)), {}
        monkeypatch.setattr(Track, "run", run)
        monkeypatch.setattr(study, "HERE", tmp_path)
        done = call(study, "--jobs", 2)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "results.md").read_text(), len(ran)
    return run_study


def test_optimizer_track(run_study):
    page, runs = run_study("2026-11-30_optimizer_track")
    assert 60 <= runs <= 100
    assert -0.012 < float(re.search(r"by pairs: ([-+.\d]+)", page)[1]) < -0.006  # less what tuning misses
    assert "540 steps 1.51" in page and "660 steps 1.48" in page
    assert run_study("2026-11-30_optimizer_track") == (page, 0)  # nothing is missing


def test_where_the_gain_comes_from(run_study):
    page, runs = run_study("2026-11-30_where_the_gain_comes_from")
    assert 180 <= runs <= 260
    assert page.count("| newton_muon | mlp_proj_alone |") == 1
    first = next(line for line in page.splitlines() if line.startswith("| muon | newton_muon |"))
    assert 0.006 < float(first.split("|")[3].split()[0]) < 0.012
    same = next(line for line in page.splitlines() if line.startswith("| muon | half |"))
    low, high = map(float, re.search(r"\(([-+.\d]+) to ([-+.\d]+)\)", same).groups())
    assert low < 0 < high
    mlp_proj, others = page.splitlines()[-2].split("|")[2:4]  # Newton-Muon alone is better: half to each
    for effect in (mlp_proj, others):
        assert -BETTER / 2 - 0.002 < float(effect.split()[0]) < -BETTER / 2 + 0.002


def test_bf16_residual(run_study):
    page, runs = run_study("2026-11-30_bf16_residual")
    assert runs == 20
    gaps = [float(line.split("|")[-2]) for line in page.splitlines() if re.match(r"\| \d", line)]
    mean = float(re.search(r"([-+.\d]+) \(95 %", page)[1])
    assert len(gaps) == 10 and mean == pytest.approx(np.mean(gaps), abs=1e-4)
