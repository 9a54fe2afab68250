"""The statistics of harness/estimates.py, against scipy's tests inverted on a grid, and by simulation."""
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from harness.estimates import (
    Estimate,
    Saved,
    fieller,
    mean_interval,
    noise,
    ratio_change,
    record,
    runs_needed,
    saved_text,
    steps_saved,
    time_saved,
    track3_margin,
    verdict,
    welch,
)

F = 0.06


def arms(saving, n, rho=0.0, sd=0.0013, slope=0.0045 * 62, rng=np.random.default_rng(0)):
    """Final losses {seed: loss} of baseline, candidate and candidate with 6 % fewer steps.

    rho is the arms' correlation over seeds.
    """
    shared = rng.normal(0, sd * math.sqrt(rho), n)
    return [
        dict(enumerate(3.28 + slope * gain + shared + rng.normal(0, sd * math.sqrt(1 - rho), n)))
        for gain in (0, -saving, F - saving)
    ]


def tracemalloc_peak(work):
    """The most bytes that Python and numpy held while `work` was done."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def apart(arms):
    """The same arms without common seeds."""
    return [{(i, seed): loss for seed, loss in arm.items()} for i, arm in enumerate(arms)]


# means and records


def test_mean_interval():
    values = [3.1, 3.3, 3.2, 3.6]
    found = mean_interval(values)
    assert found[:3] == pytest.approx((3.3, *stats.t.interval(0.95, 3, 3.3, stats.sem(values))))
    means = np.random.default_rng(1).choice(values, (100000, 4)).mean(1)
    assert found[3:] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
    assert mean_interval([2.0]) == mean_interval([2.0, 2.0]) == Estimate(2.0)


def test_half_width():
    found = mean_interval(np.array([3.1, 3.3, 3.2, 3.6]))
    low, high = stats.t.interval(0.95, 3, 3.3, np.std([3.1, 3.3, 3.2, 3.6], ddof=1) / 2)
    assert found.half_width == pytest.approx((high - low) / 2)
    assert mean_interval([2.0]).half_width == math.inf


def test_bootstrap_of_many_values_fits_into_memory():
    values = np.random.default_rng(0).normal(size=2000)
    assert tracemalloc_peak(lambda: mean_interval(values)) < 1e8  # all at once: more than 1.6e8 bytes


def test_ratio_change():
    new = [94, 97, 95]
    old = [101, 99, 100, 103]
    saved = ratio_change(new, old, -1)
    test = stats.ttest_ind(np.log(new), np.log(old), equal_var=False)
    low, high = 1 - np.exp(test.confidence_interval(0.95)[::-1])
    assert saved[:3] == pytest.approx((1 - stats.gmean(new) / stats.gmean(old), low, high))
    assert saved.p == pytest.approx(test.pvalue / 2)
    assert ratio_change([90], [100], -1)[:2] == (pytest.approx(0.1), None)
    assert ratio_change([0, 1], [1, 2]).mean is None


def test_record_by_t_test():
    good = [1.62, 1.63, 1.61, 1.64]
    for target, valid, word in ((1.66, True, "yes (t-test)"), (1.63, False, "not yet: about")):
        found = record(good, target)
        assert found.valid == valid
        assert word in found.verdict
        assert found.p == pytest.approx(stats.ttest_1samp(good, target, alternative="less").pvalue)
    above = record(good, 1.62)  # though one run is below it
    assert above.more is None
    assert "above the target" in above.verdict
    assert record([1.0], 1.65).more == 1
    assert not record([1.0, 1.0], 1.65).valid
    for bad in (math.nan, math.inf):
        assert record([1.0, 1.1, bad], 1.65) == (False, "no: 1 of 3 runs diverged", None, None)


def test_record_of_the_speedrun_needs_the_margin():
    assert record([3.276], 3.28, speedrun=True).valid
    assert not record([3.276], 3.28).valid
    close = record([3.2765], 3.28, speedrun=True)  # z = 2.7, but the margin is 0.0035
    assert close.p < 0.01
    assert not close.valid
    assert close.more == 1
    many = [3.2785 + 1e-4 * i for i in (-2, -1, 0, 1, 2)]  # p = 2e-5, margin 0.0034
    assert record(many, 3.28).valid
    assert not record(many, 3.28, speedrun=True).valid
    assert record(many, 3.28, speedrun=True).more == 3
    assert record(many + many, 3.28, speedrun=True).valid


@pytest.mark.parametrize("speedrun", [False, True])
def test_runs_that_a_record_still_needs_suffice(speedrun):
    start = 3.28 + np.array([-0.0016, -0.0006, -0.0011])
    n = 3 + record(start, 3.28, speedrun).more

    def more(n):  # n runs with the same mean and sd
        values = np.linspace(-1, 1, n)
        return start.mean() + values / values.std(ddof=1) * start.std(ddof=1)

    assert record(more(n), 3.28, speedrun).valid
    assert not record(more(n - 1), 3.28, speedrun).valid


def test_runs_needed_is_the_smallest_number():
    for distance in (0.3, 0.9, 2.5):
        n = runs_needed(distance, 1, 0.025)
        half = [stats.t.ppf(0.975, k - 1) / math.sqrt(k) for k in (n, max(2, n - 1))]
        assert half[0] < distance
        assert half[1] >= distance or n == 2
    assert runs_needed(0, 1) is None


@pytest.mark.parametrize("speedrun", [False, True])
@pytest.mark.parametrize(
    "losses", [[3.2795, 3.2802, 3.2809, 3.2794], [3.28, 3.2789, 3.2816, 3.282, 3.2795, 3.278]]
)
def test_mean_at_the_target(losses, speedrun):
    assert abs(np.mean(losses) - 3.28) < 1e-15
    found = record(losses, 3.28, speedrun)
    assert not found.valid
    assert found.verdict == "no: the mean is at the target, no number of runs would do"


def test_equal_means_need_infinite_runs():
    losses = [3.2795, 3.2802, 3.2809, 3.2794], [3.2794, 3.2809, 3.2802, 3.2795], [3.3, 3.31, 3.29, 3.3]
    saved = steps_saved(*(dict(enumerate(arm)) for arm in losses), F)
    assert verdict(saved).fewer == ("undecided", None)


def test_track_3_margin_of_fewer_steps():
    assert track3_margin((3.279, 3150, 10), (3.279, 3250, 10)) == pytest.approx(0.0045 / math.sqrt(0.2))


@pytest.mark.parametrize("old", [[90.1, 90.1], [90.1, math.nextafter(90.1, 91)], [90.1, 90.3, 90.2]])
def test_nearly_equal_values_warn_nobody(recwarn, old):
    low, high, p = welch([88.0, 88.1, 88.3], old)
    assert low < high < 0
    assert 0 < p < 0.05
    assert not recwarn.list
    assert ratio_change([88.0, 88.1, 88.3], old).mean < 0
    assert not recwarn.list


def test_noise_of_pairs_of_runs():
    rng = np.random.default_rng(0)
    runs = rng.normal(0, 0.0013, (2, 10**5))
    assert np.quantile(abs(runs[0] - runs[1]), 0.95) == pytest.approx(noise(0.0013), rel=0.02)
    assert noise(1, df=4) == pytest.approx(math.sqrt(2) * stats.t.ppf(0.975, 4))


# steps saved


@pytest.mark.parametrize(
    "n, saving, sd, way",
    [
        (6, 0.03, 0.001, "paired"),
        (20, 0.05, 0.004, "paired"),
        (4, 0.03, 0.0013, "unpaired"),
        (12, -0.02, 0.003, "unpaired"),
    ],
)
def test_interval_is_the_t_test_inverted(n, saving, sd, way):
    losses = arms(saving, n, 0.9 * (way == "paired"), sd, rng=np.random.default_rng(n))
    if way == "unpaired":
        losses = apart(losses)
        losses[0].update(more=3.281, most=3.283)  # unequal numbers
    saved = steps_saved(*losses, F)
    B, C, D = (np.array(list(arm.values())) for arm in losses)
    grid = np.linspace(-F, 2 * F, 18001)
    if way == "paired":
        kept = grid[stats.ttest_rel((B - C)[:, None], np.outer(D - C, grid / F)).pvalue >= 0.05]
    else:  # the contrast B - (1 - r) C - r D in a one-way analysis of variance
        df = B.size + C.size + D.size - 3
        mse = sum(arm.var() * arm.size for arm in (B, C, D)) / df
        r = grid / F
        contrast = abs(B.mean() - (1 - r) * C.mean() - r * D.mean())
        sd = np.sqrt(mse * (1 / B.size + (1 - r) ** 2 / C.size + r**2 / D.size))
        kept = grid[contrast <= stats.t.ppf(0.975, df) * sd]
    assert saved.way == way
    assert (saved.low, saved.high) == pytest.approx((min(kept), max(kept)), abs=2e-5)
    assert saved.mean == pytest.approx(F * (B.mean() - C.mean()) / (D.mean() - C.mean()))


def test_pairs_only_where_seeds_matter():
    B, C, D = arms(0.03, 8, 0.95, rng=np.random.default_rng(3))
    assert steps_saved(B, C, D, F).way == "paired"
    wrong_partners = {seed + 1: loss for seed, loss in B.items()}
    assert steps_saved(wrong_partners, C, D, F).way == "unpaired"
    without_more = steps_saved(B, C, D, F)
    C[8] = 3.0  # without a partner, and far out
    D[9] = 3.5
    assert steps_saved(B, C, D, F)[:4] == without_more[:4]
    fewest_seeds = {0: 3.28, 1: 3.2801}, {0: 3.27}, {0: 3.2868}
    assert steps_saved(*fewest_seeds, F).way == "unpaired"


def test_unbounded_sets_are_bounds_or_undecided():
    def plain(x, y, cov=((1, 0.5), (0.5, 1)), t=2):
        grid = np.linspace(-200, 200, 400001)
        sd = np.sqrt(cov[0][0] - 2 * grid * cov[0][1] + grid**2 * cov[1][1])
        kept = grid[abs(x - grid * y) <= t * sd]
        return fieller(x, y, np.array(cov), t), kept

    (low, high), kept = plain(5, 1)  # the candidate is better at N, the slope is not clear
    assert low == pytest.approx(min(kept[kept > 0]), abs=2e-3)
    assert high == math.inf
    assert max(kept[kept < 0]) < -1
    (low, high), kept = plain(-5, 1)
    assert low == -math.inf
    assert high == pytest.approx(max(kept[kept < 0]), abs=2e-3)
    # all of the line, or nothing that is known of the slope
    for x, y in ((1, 1), (0.1, -1), (5, -9), (1, -9)):
        assert plain(x, y)[0] == (-math.inf, math.inf)
    assert plain(2.5, 1.9, ((1, 0.99), (0.99, 1)))[0][0] > 0


@pytest.mark.parametrize("saving, low, high", [(0.2, 0.12, math.inf), (-0.2, -math.inf, -0.06)])
def test_beyond_the_lengths_there_are_only_bounds(saving, low, high):
    saved = steps_saved(*arms(saving, 5, rng=np.random.default_rng(0)), F)
    assert saved[:3] == (None, low, high)
    assert saved_text(saved).startswith("more than 12.0%" if saving > 0 else "less than -6.0%")
    assert verdict(saved).word == ("reproduced" if saving > 0 else "not reproduced")


def test_what_gives_no_interval_says_why():
    B, C, D = arms(0.06, 3)
    assert steps_saved(B, C | {2: math.nan}, D, F).fault == "1 of 9 runs diverged"
    for losses in (
        [{0: arm[0]} for arm in (B, C, D)],
        [B, C, {}],
        [{0: 3.28, 1: 3.28}, {0: 3.27, 1: 3.27}, {0: 3.28, 1: 3.28}],
    ):
        saved = steps_saved(*losses, F)
        assert saved.mean is None
        assert "2 or more seeds" in saved_text(saved)
        assert verdict(saved) == ("undecided", ("undecided", None), ("undecided", None))
    lower = {seed: loss - 0.03 for seed, loss in D.items()}  # fewer steps end lower
    saved = steps_saved(*apart([B, C, lower]), F)
    assert saved[:3] == (None, -math.inf, math.inf)
    assert "too little" in saved_text(saved)
    assert verdict(saved).word == "undecided"


def test_time_saved():
    steps = Saved(0.06, 0.05, 0.08)
    found = time_saved(steps, Estimate(0.02, 0.02, 0.02))
    assert found[:3] == pytest.approx((1 - 0.94 * 1.02, 1 - 0.95 * 1.02, 1 - 0.92 * 1.02))
    assert time_saved(steps, Estimate(0.02)).mean is None
    assert time_saved(Saved(fault="why"), Estimate(0.02, 0.01, 0.03)).fault == "why"
    rng = np.random.default_rng(0)
    steps = rng.normal(0.06, 0.005, 10**6)
    overhead = rng.normal(0.02, 0.008, 10**6)
    expected = np.quantile(1 - (1 - steps) * (1 + overhead), [0.5, 0.025, 0.975])
    saved = Saved(0.06, 0.06 - 1.96 * 0.005, 0.06 + 1.96 * 0.005)
    found = time_saved(saved, Estimate(0.02, 0.02 - 1.96 * 0.008, 0.02 + 1.96 * 0.008))
    assert found[:3] == pytest.approx(expected, abs=2e-4)


# the verdict


@pytest.mark.parametrize(
    "percent, word, fewer, as_claimed",
    [
        ((2, 0.05, 6.05), "undecided", "yes", "undecided"),  # a wide interval is no merit
        ((5.5, 5.2, 5.99), "reproduced", "yes", "yes"),
        ((6.2, 3.1, 9.3), "reproduced", "yes", "yes"),
        ((8, 7, 9), "reproduced", "yes", "yes"),  # even more
        ((3, 2, 4), "partly", "yes", "no"),
        ((0.3, -0.5, 1.1), "not reproduced", "undecided", "no"),
        ((-2, -3, -1), "not reproduced", "no", "no"),
        ((4, -2, 10), "undecided", "undecided", "undecided"),
        ((None, 3.1, math.inf), "reproduced", "yes", "yes"),
        ((None, -math.inf, 5), "not reproduced", "undecided", "no"),
        ((None, -math.inf, 6), "undecided", "undecided", "undecided"),
    ],
)
def test_verdict(percent, word, fewer, as_claimed):
    ends = [None if value is None else value / 100 for value in percent]
    found = verdict(Saved(*ends, gain=0.03, slope=1, cov=np.eye(2), df=1))
    assert (found.word, found.fewer.word, found.as_claimed.word) == (word, fewer, as_claimed)
    assert all((answer.runs is None) == (answer.word != "undecided") for answer in found[1:])


@pytest.mark.parametrize("rho", [0, 0.95])
@pytest.mark.parametrize("saving", [0.004, 0.025, 0.04])
def test_runs_that_an_undecided_verdict_names_decide(rho, saving):
    rng = np.random.default_rng(0)
    sd = 0.006 / math.sqrt(1 - rho)

    def exact(n):
        """Arms with exactly this mean and covariance."""
        noise = rng.normal(size=(n, 3))
        white = np.linalg.qr(noise - noise.mean(0))[0] * math.sqrt(n - 1)
        noise = white @ np.linalg.cholesky(rho + (1 - rho) * np.eye(3)).T
        losses = []
        for column, gain in zip(noise.T, (0, -saving, F - saving)):
            losses.append(dict(enumerate(3.28 + sd * column + 0.28 * gain)))
        return losses if rho else apart(losses)

    first = verdict(steps_saved(*exact(4), F))
    open_questions = [i for i in (1, 2) if first[i].word == "undecided"]
    assert open_questions
    for i in open_questions:
        n = first[i].runs
        assert n > 4
        assert verdict(steps_saved(*exact(n), F))[i].word != "undecided"
        assert verdict(steps_saved(*exact(n - 1), F))[i].word == "undecided"


WRONG = {
    0: ("reproduced", "partly"),
    0.03: ("reproduced", "not reproduced"),
    0.06: ("partly", "not reproduced"),
}


@pytest.mark.parametrize("rho", [0, 0.7])
def test_replications_get_the_right_word(rho):
    """2,000 replications of 6200 steps with each true saving, 3 and 5 seeds.

    rho is the correlation of the arms over seeds.
    """
    rng = np.random.default_rng(0)
    covered = []
    for n in (3, 5):
        for saving, wrong in WRONG.items():
            found = [steps_saved(*arms(saving, n, rho, rng=rng), F) for _ in range(2000)]
            words = [verdict(saved).word for saved in found]
            assert sum(word in wrong for word in words) <= 0.05 * 2000
            if (n, saving) == (5, 0.06):
                assert words.count("reproduced") >= 0.9 * 2000
            covered += [saved.low <= saving <= saved.high for saved in found]
    assert np.mean(covered) > 0.94
