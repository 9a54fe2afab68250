"""harness/sequential.py: levels of repeated looks, and how often verdicts are wrong."""
import json
import math

import numpy as np
import pytest
from scipy import special

from conftest import refused
from harness import sequential
from harness.estimates import steps_saved
from harness.sequential import Noise, at_level, detectable, is_wrong, levels, simulate
from scripts import power
from train_gpt2 import UserError

SPEEDRUN = Noise(0.0013, 0.0, 0.279)
PAIRED = Noise(0.0065, 0.8, 0.15)
UNTIL_DECIDED = tuple(range(3, 31))


def bounds(looks, planned):
    """The bounds of the normal statistic at the looks."""
    return np.array([-special.ndtri((1 - level) / 2) for level in levels(looks, planned)])


@pytest.mark.parametrize("looks, planned", [((10,), 10), ((3, 5, 10), 10), (UNTIL_DECIDED, 30)])
def test_all_looks_together_miss_in_5_percent(looks, planned):
    """With a known standard deviation, for which the levels are exact."""
    rng = np.random.default_rng(0)
    sums = rng.standard_normal((100_000, planned)).cumsum(1)
    statistics = sums[:, np.array(looks) - 1] / np.sqrt(looks)
    missed = (abs(statistics) > bounds(looks, planned)).any(1).mean()
    assert missed == pytest.approx(0.05, abs=0.003)  # four standard errors


def test_a_part_of_the_plan_has_spent_its_share():
    assert levels((3,), 30) == [pytest.approx(1 - 0.05 * 3 / 30)]
    assert levels((3, 5), 30) == levels((3, 5, 10), 30)[:2]


def test_the_last_look_gets_what_was_not_spent():
    assert levels((10,), 10) == [pytest.approx(0.95)]
    assert 0.95 < levels((3, 10), 10)[1] < levels((3, 5, 7, 10), 10)[3]


@pytest.mark.parametrize("noise", [SPEEDRUN, PAIRED])
def test_at_95_percent_nothing_changes(noise):
    rng = np.random.default_rng(1)
    losses = noise.sd * (math.sqrt(noise.correlation) * rng.standard_normal((6, 1))
                         + math.sqrt(1 - noise.correlation) * rng.standard_normal((6, 3)))
    losses += np.array([0, -0.03, 0.03]) * noise.slope
    saved = steps_saved(*(dict(enumerate(arm)) for arm in losses.T), 0.06)
    same = at_level(saved, 0.06, 6, 0.95)
    assert (same.mean, same.low, same.high) == pytest.approx((saved.mean, saved.low, saved.high))
    wider = at_level(saved, 0.06, 6, 0.99)
    assert wider.low < saved.low and wider.high > saved.high


def test_without_an_interval_there_is_none_at_any_level():
    saved = steps_saved({1: math.nan}, {1: 1.0}, {1: 1.1}, 0.06)
    assert at_level(saved, 0.06, 1, 0.99) == saved


@pytest.mark.parametrize("saving", [0, 0.03, 0.055])  # where an answer changes: most is wrong there
@pytest.mark.parametrize("noise", [SPEEDRUN, PAIRED])
def test_adding_seeds_until_it_is_decided_errs_in_5_percent_at_most(noise, saving):
    found = simulate(noise, saving, UNTIL_DECIDED, 30, trials=300)
    wrong = np.mean([is_wrong(answer, saving) for answer, _ in found])
    assert wrong <= 0.05
    assert {seeds for _, seeds in found} <= {*UNTIL_DECIDED}


def test_uncorrected_looks_err_more_often():
    """What the correction is for."""
    found = simulate(SPEEDRUN, 0, UNTIL_DECIDED, None, trials=300)
    assert np.mean([is_wrong(answer, 0) for answer, _ in found]) > 0.07


@pytest.mark.parametrize("saving", [0, 0.03, 0.055])
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("noise", [SPEEDRUN, PAIRED])
def test_a_single_planned_look_errs_in_5_percent_at_most(noise, seeds, saving):
    found = simulate(noise, saving, (seeds,), seeds, trials=1000)
    assert np.mean([is_wrong(answer, saving) for answer, _ in found]) <= 0.05


@pytest.mark.parametrize("noise, seeds", [(SPEEDRUN, 3), (SPEEDRUN, 10), (PAIRED, 10), (PAIRED, 20)])
def test_the_smallest_saving_is_found_in_80_percent(noise, seeds):
    found = simulate(noise, detectable(noise, seeds), (seeds,), seeds, trials=1000)
    assert np.mean([answer.fewer.word == "yes" for answer, _ in found]) == pytest.approx(0.8, abs=0.06)


def test_more_runs_for_a_higher_level():
    assert sequential.runs_at_level(10, 0.95) == 10
    assert sequential.runs_at_level(10, 0.99) == math.ceil(10 * (2.5758 / 1.95996) ** 2)


# the plan


def test_a_plan_is_kept(tmp_path):
    path = tmp_path / "plan.json"
    assert sequential.make_plan(path, 3)["planned_seeds"] == sequential.PLANNED_SEEDS
    for seeds in (3, 5):
        sequential.note_look(path, seeds)
    assert json.loads(path.read_text()) == {"planned_seeds": 10, "looks": [3, 5]}
    assert sequential.level_of_look(path, 5) == (levels((3, 5), 10)[1], 10)
    assert sequential.level_of_look(path, 10) == (levels((3, 5, 10), 10)[2], 10)
    assert sequential.make_plan(tmp_path / "large.json", 12)["planned_seeds"] == 12


@pytest.mark.parametrize("text", [
    "", "[]", "{}",
    '{"planned_seeds": 3, "looks": [4]}',
    '{"planned_seeds": "3", "looks": []}',
    '{"planned_seeds": 3, "looks": [1]}'])
def test_a_damaged_plan_is_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    remedy = "delete it to plan this comparison again"
    with pytest.raises(UserError, match=f"plan.json cannot be read .*; {remedy}"):
        sequential.read_plan(path)


# the page


def test_the_filed_noise_is_that_of_the_records():
    filed = json.loads((power.RECORDS / "noise.json").read_text())
    assert filed == {track: pytest.approx(noise._asdict()) for track, noise in power.measure_noise().items()}


def test_the_page_is_written(call, tmp_path, monkeypatch):
    monkeypatch.setattr(power, "SAVINGS", (0.03,))
    monkeypatch.setattr(power, "LOOKS", (3, 5))
    done = call(power, "--trials", 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "README.md").read_text()
    assert "## cpu" in text and "## speedrun" in text and "| 3.0 % |" in text
    assert json.loads((tmp_path / "noise.json").read_text())["speedrun"]["sd"] == 0.0013
    refused(call(power, "--trials", 0), "--trials 0: must be at least 1")
