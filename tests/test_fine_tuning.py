"""The study of finely tuned arms, records/cpu/2026-11-30_fine_tuning: its fit, and its runs.

Nothing is trained: the losses are a known function of the settings, with noise.
"""
import json
import math
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product

import numpy as np
import pytest
from scipy import optimize, stats

from conftest import ROOT, refused
from harness.zoo.table import TUNING_SEEDS, Point, Table
from harness.zoo.training import Track

FOLDER = ROOT / "records/cpu/2026-11-30_fine_tuning"
sys.path.append(str(FOLDER))
import quadratic

SPEC = spec_from_file_location("fine_tuning_study", FOLDER / "study.py")
study = module_from_spec(SPEC)
SPEC.loader.exec_module(study)
HESSIAN = np.array([[0.008, 0.001, 0.0], [0.001, 0.012, -0.006], [0.0, -0.006, 0.01]])


def bowl(x, lowest):
    return 1.5 + 0.5 * (x - lowest) @ HESSIAN @ (x - lowest)


def losses(lowest, places=quadratic.DESIGN, noise=0.0, rng=None, seeds=4):
    """{place: {seed: loss}} of the bowl, with an effect of each seed and noise."""
    of_seed = 0.01 * np.arange(seeds)
    found = {}
    for place in places:
        values = bowl(np.array(place), lowest) + of_seed
        if noise:
            values = values + rng.normal(0, noise, seeds)
        found[tuple(place)] = dict(enumerate(values))
    return found


# the fit


def test_the_design_has_as_many_points_as_its_plan():
    assert len(set(quadratic.DESIGN)) == len(quadratic.DESIGN) == 13
    assert {sum(map(abs, place)) for place in quadratic.DESIGN} == {0, 2}


def test_a_bowl_is_found_exactly():
    lowest = np.array([0.3, -0.6, 0.4])
    found = quadratic.fit(losses(lowest))
    assert found.lowest == pytest.approx(lowest, abs=1e-9) and not found.ends.any()
    assert found.sd < 1e-9 and found.df == 13 * 4 - 9 - 4
    assert 2 * found.coefficients[3:6] == pytest.approx(np.diag(HESSIAN), abs=1e-9)
    assert found.coefficients[6:] == pytest.approx(HESSIAN[np.triu_indices(3, 1)], abs=1e-9)
    assert quadratic.next_place(found) is None


def test_the_errors_of_the_fit_are_those_of_repeated_fits():
    rng = np.random.default_rng(0)
    lowest = np.array([0.2, 0.1, -0.3])
    fits = [quadratic.fit(losses(lowest, noise=0.004, rng=rng)) for _ in range(500)]
    spread = np.std([found.coefficients for found in fits], axis=0)
    said = np.sqrt(np.mean([np.diag(found.covariance) for found in fits], 0))
    assert said == pytest.approx(spread, rel=0.15)
    assert np.mean([found.sd ** 2 for found in fits]) == pytest.approx(0.004 ** 2, rel=0.05)


def test_seeds_have_effects_of_their_own():
    """A seed that only some points have had, and that ends far above the others, changes nothing."""
    lowest = np.array([0.3, -0.6, 0.4])
    found = losses(lowest)
    for place in ((0, 0, 0), (1, 1, 0)):
        found[place][9] = bowl(np.array(place), lowest) + 1.0
    assert quadratic.fit(found).lowest == pytest.approx(lowest, abs=1e-9)


def test_the_lowest_point_of_a_box_is_that_of_a_search():
    rng = np.random.default_rng(0)
    low = np.array([-1.0, -2.0, -1.0])
    high = np.array([1.0, 1.0, 1.5])
    coefficients = rng.normal(size=(12, quadratic.TERMS))  # bowls, saddles and hills
    points, ends, values = quadratic.lowest(coefficients, low, high)
    starts = [(low + high) / 2, *product(*zip(low, high))]
    for row, point, end, value in zip(coefficients, points, ends, values):
        searches = [optimize.minimize(lambda x: quadratic.terms(x) @ row, start, method="L-BFGS-B",
                                      bounds=list(zip(low, high))) for start in starts]
        best = min(searches, key=lambda found: found.fun)
        assert value == pytest.approx(best.fun, abs=1e-6)
        assert point == pytest.approx(best.x, abs=1e-3)
        assert [*end] == [int(x == b) - int(x == a) for x, a, b in zip(point, low, high)]


@pytest.mark.parametrize("lowest, place", [
    ((0.2, 1.8, 0.1), (0, 2, 0)), ((-1.4, 0.0, 0.2), (-2, 0, 0)), ((0.0, 0.8, -1.7), (0, 2, -2))])
def test_a_lowest_point_outside_is_refused_and_the_next_is_beyond(lowest, place):
    found = quadratic.fit(losses(np.array(lowest)))
    assert found.ends.any()
    assert quadratic.next_place(found) == place
    wider = quadratic.fit(losses(np.array(lowest), [*quadratic.DESIGN, place]))
    assert quadratic.next_place(wider) is None and wider.lowest == pytest.approx(lowest, abs=1e-9)


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="5 points and 20 runs are too few"):
        quadratic.fit(losses(np.zeros(3), quadratic.DESIGN[:5]))


def test_the_cost_that_is_drawn_is_the_cost_that_is_paid():
    rng = np.random.default_rng(0)
    lowest = np.array([0.2, 0.1, -0.3])
    paid = []
    drawn = []
    for _ in range(150):
        found = quadratic.fit(losses(lowest, noise=0.004, rng=rng))
        paid.append(bowl(found.lowest, lowest) - 1.5)
        costs, places = quadratic.draws(found, found.lowest, 200, rng)
        assert costs.min() > -1e-12 and (places >= found.low).all() and (places <= found.high).all()
        drawn.append(costs.mean())
    assert 0.7 < np.mean(drawn) / np.mean(paid) < 2  # more on average: the curvature is uncertain, too
    chosen = lowest + [0.5, 0, 0]
    certain = quadratic.fit(losses(lowest, noise=1e-6, rng=rng))
    costs, _ = quadratic.draws(certain, chosen, 50, rng)
    assert costs == pytest.approx(0.5 * HESSIAN[0, 0] * 0.25, rel=0.02)


def test_what_may_lie_beyond_the_limits_costs_more():
    rng = np.random.default_rng(0)
    found = quadratic.fit(losses(np.array([0.9, 0.0, -0.8]), noise=0.004, rng=rng))
    wider = found._replace(low=found.low - 1, high=found.high + 1)
    inside, beyond = (quadratic.draws(of, found.lowest, 500, np.random.default_rng(1))[0]
                      for of in (found, wider))
    assert (beyond >= inside).all() and beyond.mean() > inside.mean()


def test_the_difference_is_that_of_the_optima():
    rng = np.random.default_rng(0)
    gaps = np.array([0.001, 0.002, 0.003, 0.002])
    paid = np.full(20_000, 0.004)
    none = np.zeros(20_000)
    plain = quadratic.difference(gaps, none, none, rng)
    error = gaps.std(ddof=1) / 2
    assert np.quantile(plain, 0.975) == pytest.approx(0.002 + 3.182 * error, rel=0.05)  # t, 3 degrees
    # the first arm paid 0.004 for its choice, and would be that much better
    assert np.median(quadratic.difference(gaps, paid, none, rng)) == pytest.approx(-0.002, abs=1e-4)
    assert np.median(quadratic.difference(gaps, none, paid, rng)) == pytest.approx(0.006, abs=1e-4)


# the runs

OPTIMA = {"muon": (0.02, 0.0038, 0.82), "newton_muon": (0.011, 0.003, 0.89), "half": (0.016, 0.0025, 0.92)}
DEPTHS = {"muon": 1.5, "newton_muon": 1.495, "half": 1.49}


def loss_of(point):
    entry = study.ARMS[point.optimizer]
    learning_rate, hidden, momentum = OPTIMA[point.optimizer]
    x = np.log2([point.learning_rate / learning_rate, point.hidden_learning_rate / hidden,
                 (1 - entry.value(point.setting)) / (1 - momentum)])
    along = x[1] - 0.5 * x[2]
    rng = np.random.default_rng(abs(hash(point[1:4] + (x[2], point.seed))))
    seed = 0.005 * math.sin(point.seed)
    return (DEPTHS[point.optimizer] + 0.002 * x[0] ** 2 + 0.023 * along ** 2 + 0.008 * x[2] ** 2
            - 0.15 * math.log(point.steps / 600) + seed + rng.normal(0, 0.002))


@pytest.fixture
def run_study(call, monkeypatch, tmp_path):
    """run_study(*arguments) calls study.py on tmp_path; .ran counts its runs, .stop_after ends them."""
    first = tmp_path / "first"
    (tmp_path / "fine").mkdir()
    table = Table(first / "runs.csv")
    for name in OPTIMA:
        for learning_rate, hidden in product((0.007, 0.014, 0.028), (0.0014, 0.0028, 0.0056)):
            for seed in TUNING_SEEDS:
                point = Point(name, 600, learning_rate, hidden, "", seed)
                table.add(point, loss_of(point), {})

    def run(self, point):
        if run_study.ran == run_study.stop_after:
            raise study.UserError("stopped")
        run_study.ran += 1
        return run_study.loss(point), {}

    def run_study(*arguments, stop_after=None):
        run_study.ran = 0
        run_study.stop_after = stop_after
        return call(study, *arguments)

    monkeypatch.setattr(Track, "run", run)
    monkeypatch.setattr(study, "HERE", tmp_path / "fine")
    monkeypatch.setattr(study, "FIRST", first)
    monkeypatch.chdir(ROOT)
    run_study.loss = loss_of
    run_study.table = tmp_path / "fine/runs.csv"
    run_study.page = tmp_path / "fine/results.md"
    return run_study


def cells(page, *heads):
    """Cells of the one line that begins with `heads`: an arm's has one head, that of a comparison two."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    width = 9 if len(heads) == 1 else 5
    found, = [row for row in rows if len(row) == width and row[:len(heads)] == [*heads]]
    return found


def ends(text):
    """(middle, low, high) of 'middle (low to high)', in per cent or not."""
    return [float(part) for part in re.sub(r"[()%]|to", " ", text).split()]


def test_the_study_from_the_coarse_search_to_the_page(run_study):
    done = run_study("--third", "half")
    assert done.returncode == 0, done.stderr
    assert 3 * (52 + 20) + 12 < run_study.ran < 290
    runs = Table(run_study.table).losses
    assert len(runs) == run_study.ran  # nothing of the first study is copied
    page = run_study.page.read_text()
    for name, optimum in OPTIMA.items():
        found = [ends(cell) for cell in cells(page, name)[3:6]]
        for (value, low, high), true in zip(found, optimum):
            assert low <= true <= high and low <= value <= high
        point, = {point[2:5] for point in runs if (point.optimizer, point.steps) == (name, 600)
                  and point.seed in study.SEEDS}
        assert point[:2] == pytest.approx([value for value, _, _ in found[:2]], rel=0.01)
        assert {seed for *_, seed in runs if seed in study.SEEDS} == set(study.SEEDS)
    found = json.loads(run_study.page.with_suffix(".json").read_text())
    assert found["planned"][0]["slope"] == pytest.approx(0.15, abs=0.02)
    pairs = (("newton_muon", "muon"), ("half", "muon"), ("half", "newton_muon"))
    for (first, second), written in zip(pairs, found["planned"], strict=True):
        assert (written["first"], written["second"]) == (first, second)
        row = cells(page, first, second)
        assert ends(row[3]) == pytest.approx(written["optima"], abs=6e-5)
        true = DEPTHS[first] - DEPTHS[second]
        _, low, high = ends(row[3])
        plain = ends(row[2])
        assert low < true < high and high - low > plain[2] - plain[1]
        finals = [[runs[point] for point in runs if point.optimizer == name and point.steps == 600
                   and point.seed in study.SEEDS] for name in (first, second)]
        gaps = np.subtract(*finals)
        half = stats.t.ppf(0.975 if second + first == "muonnewton_muon" else 0.9875, 19) * stats.sem(gaps)
        assert plain == pytest.approx([gaps.mean(), gaps.mean() - half, gaps.mean() + half], abs=2e-4)
        if second == "muon":
            assert ends(row[4]) == pytest.approx([100 * share for share in written["saved"]], abs=0.06)
            _, low, high = written["saved"]
            assert low < 1 - math.exp(true / 0.15) < high
    assert page.count("Steps saved by newton_muon if the true optima may lie 0.5 steps beyond") == 1
    assert run_study("--third", "half").returncode == 0 and run_study.ran == 0


def test_it_goes_on_where_it_was_stopped(run_study):
    assert run_study().returncode == 0
    whole = run_study.table.read_text()
    page = run_study.page.read_text()
    lines = whole.splitlines(keepends=True)
    for number, more in ((9, 30), (len(lines) - 30, 10), (len(lines) - 1, 0)):
        run_study.table.write_text("".join(lines[:number]))
        refused(run_study(stop_after=more), "stopped")
        assert run_study("--jobs", 2).returncode == 0
        assert sorted(run_study.table.read_text().splitlines()) == sorted(whole.splitlines())
        assert run_study.page.read_text() == page


def margin(table, name):
    """Steps between the optimum of the arm's last fit and the nearest end of what was tried."""
    found, _ = study.fits(table, name)[1][-1]
    return min(*(found.lowest - found.low), *(found.high - found.lowest))


def test_the_arm_closer_to_an_end_is_checked_until_it_is_not(run_study, monkeypatch):
    arms = ("muon", "newton_muon")
    monkeypatch.setattr(study, "MARGIN", 0)
    assert run_study().returncode == 0
    assert run_study.page.read_text().count("check") == 0
    before = json.loads(run_study.page.with_suffix(".json").read_text())
    table = study.open_table(arms)
    closer, other = sorted(arms, key=lambda name: margin(table, name))
    monkeypatch.setattr(study, "MARGIN", (margin(table, closer) + margin(table, other)) / 2)
    assert run_study().returncode == 0

    table = study.open_table(arms)
    missing, done = study.fits(table, closer)
    assert not missing and len(done) > 1 and margin(table, closer) >= study.MARGIN
    for number, (seeds, (found, centre)) in enumerate(zip(study.CHECK_SEEDS, done[1:])):
        assert study.point_at(closer, centre) == study.optimum(closer, *done[number])
        tried = {point.seed for point in table.losses if point[:5] == study.point_at(closer, centre)}
        assert tried >= set(seeds)
    assert len(study.fits(table, other)[1]) == 1
    assert study.results_at(table, study.optimum(closer, *done[-1])) is not None

    after = json.loads(run_study.page.with_suffix(".json").read_text())
    assert after["planned"][0]["chosen"] == pytest.approx(before["planned"][0]["chosen"], abs=2e-4)
    first, last = (study.results_at(table, study.optimum(closer, *done[number])) for number in (0, -1))
    sign = 1 if closer == "newton_muon" else -1
    moved = after["checked"][0]["chosen"][0] - after["planned"][0]["chosen"][0]
    assert moved == pytest.approx(sign * (last - first).mean(), abs=3e-4)
    low, high = after["checked"][0]["optima"][1:]
    assert low < DEPTHS["newton_muon"] - DEPTHS["muon"] < high
    assert run_study().returncode == 0 and run_study.ran == 0


def test_a_result_that_diverged_is_not_called_missing(run_study):
    def loss(point):
        diverges = point.optimizer == "newton_muon" and point.seed == study.SEEDS[3]
        return math.nan if diverges else loss_of(point)
    run_study.loss = loss
    assert run_study().returncode == 0
    page = run_study.page.read_text()
    assert "nan" in cells(page, "newton_muon", "muon")[3] and "nan" not in cells(page, "muon")[6]


def test_an_optimum_that_stays_close_to_an_end_is_refused(run_study, monkeypatch):
    monkeypatch.setattr(study, "MARGIN", 5)
    refused(run_study(), "is still less than 5 steps from an end of what was tried after 3 checks")


def test_the_third_arm_may_come_later(run_study):
    assert run_study().returncode == 0
    assert "half" not in run_study.page.read_text()
    two = run_study.table.read_text()
    pair = cells(run_study.page.read_text(), "newton_muon", "muon")
    assert run_study("--third", "half").returncode == 0
    assert run_study.table.read_text().startswith(two)
    assert len(cells(run_study.page.read_text(), "half", "newton_muon")) == 5
    assert cells(run_study.page.read_text(), "newton_muon", "muon") == pair


def test_seeds_are_fresh():
    assert len(set(study.SEEDS)) == 20
    assert not set(study.SEEDS) & {*range(1, 33), 41, 42, 43, *TUNING_SEEDS, *study.FIT_SEEDS}
    tuning = [*TUNING_SEEDS, *study.FIT_SEEDS, *(seed for seeds in study.CHECK_SEEDS for seed in seeds)]
    assert len(set(tuning)) == len(tuning) and not set(tuning) & set(study.SEEDS)


def test_what_no_quadratic_describes_is_refused(run_study):
    def downhill(point):  # along the hidden rate, for ever, from momentum 0.9 on in the fine runs
        return 1.5 - 0.05 * math.log(point.hidden_learning_rate) * (point.seed in study.FIT_SEEDS)
    run_study.loss = downhill
    refused(run_study(), "quadratic of muon is still lowest at an end after 4 points more (",
            "hidden_learning_rate above")

    def diverging(point):
        return math.nan if point.hidden_learning_rate > 0.005 else loss_of(point)
    run_study.table.unlink()
    run_study.loss = diverging
    refused(run_study(), "a run of muon diverged", "take smaller FACTORS")


def test_the_filed_results_are_those_of_the_filed_runs(call, monkeypatch, tmp_path):
    (tmp_path / "runs.csv").write_text((FOLDER / "runs.csv").read_text())
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.chdir(ROOT)
    assert call(study, "--third", "half", "--page").returncode == 0
    for name in ("results.md", "results.json"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text()


def test_what_is_missing_is_named(run_study):
    refused(run_study("--page"), "the runs of Muon in", "the same command without --page goes on")
    (study.FIRST / "runs.csv").unlink()
    refused(run_study(), "has no tuning of muon; run")
