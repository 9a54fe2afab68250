"""The statistics of a comparison, on plain numbers: nothing here reads a file or knows what a run is.

mean_interval    a mean with its 95 % intervals, by Student's t and by the percentile bootstrap
ratio_change     change of a mean against a baseline's, by Welch's t-test of the logarithms
record           whether final losses are a record: their mean is at or below the target (p < 0.01), and the speedrun's own rules
track3_margin    the speedrun's rule for one group against another with another number of steps
steps_saved      steps saved at equal final loss, by Fieller's interval
time_saved       the same in time, with the overhead of a step
verdict          what that makes of a claim: reproduced, partly, not reproduced or undecided

Steps saved. The baseline and the candidate are run at N steps, the candidate also at (1 - f) N. With B, C and D their mean final losses,

    s = f (B - C) / (D - C)

is the fraction of its steps that the candidate can do without and still end at the baseline's loss, if its final loss between
(1 - f) N and N steps lies on a straight line. That is trusted up to f past either end: beyond -f and 2 f there are only bounds.
"""
import math
import warnings
from typing import NamedTuple

import numpy as np
from scipy import special, stats

SPEEDRUN_SD = 0.0013  # of the speedrun's final loss, over seeds
SPEEDRUN_MARGIN = 0.004  # of its rules for the optimizer track
SPEEDRUN_SLOPE = 0.0045 / 100  # final loss that a step is worth
MIN_RUNS_FOR_SD = 5  # from this many runs on, their own standard deviation is used, not the known one


class Estimate(NamedTuple):
    """A mean with 95 % intervals by t and by bootstrap; None where the values do not give one."""
    mean: float
    low: float = None
    high: float = None
    boot_low: float = None
    boot_high: float = None


class Change(NamedTuple):
    """Change as a fraction (0.06 is 6 %) with its 95 % interval, and the chance of a ratio this low if there were no difference."""
    mean: float = None
    low: float = None
    high: float = None
    p: float = None


class Record(NamedTuple):
    """Whether final losses are a record, in a word and in a sentence."""
    valid: bool
    verdict: str
    p: float = None
    more: int = None  # runs that are still needed, about; None: no number would do


class Saved(NamedTuple):
    """Steps saved as a fraction of the baseline's, with a 95 % interval. An infinite end is unknown; without both there is no mean."""
    mean: float = None
    low: float = -math.inf
    high: float = math.inf
    way: str = ""  # paired or unpaired
    fault: str = ""  # why there is no interval at all
    gain: float = None  # B - C
    slope: float = None  # (D - C) / f: loss for all of the steps
    cov: np.ndarray = None  # covariance of gain and slope with one run of each arm
    df: int = None  # degrees of freedom for each run of an arm beyond its first


class Answer(NamedTuple):
    word: str  # yes, no, undecided
    runs: int = None  # of each arm in all with which these means and this spread would decide; None if decided, or if none would do


class Verdict(NamedTuple):
    word: str  # reproduced, partly, not reproduced, undecided
    fewer: Answer  # steps than the baseline?
    as_claimed: Answer  # as many fewer as claimed?


def t_quantile(p, df):
    return float(special.stdtrit(df, p) if df < math.inf else special.ndtri(p))  # stats.t.ppf takes a hundred times as long


def mean_interval(values):
    """Estimate of the mean of `values`."""
    mean = float(np.mean(values))
    if np.ptp(values) == 0:  # one value, or equal ones: nothing says how far off the next would be
        return Estimate(mean)
    half = t_quantile(0.975, len(values) - 1) * stats.sem(values)
    boot = stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    return Estimate(mean, *map(float, (mean - half, mean + half, *boot)))


def welch(new, old):
    """(low, high, p) of the difference of the means: 95 % interval, chance of one this low without a true difference (Welch's t-test)."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of numpy and scipy, about a side of equal values
        low, high = stats.ttest_ind(new, old, equal_var=False).confidence_interval(0.95)
        p = stats.ttest_ind(new, old, equal_var=False, alternative="less").pvalue
    return float(low), float(high), float(p)


def ratio_change(new, old, sign=1):
    """Change sign * (r - 1), with r = exp(mean(log new) - mean(log old)) of positive values; p that r < 1."""
    if min(*new, *old) <= 0:
        return Change()
    a, b = np.log(new), np.log(old)
    mean = sign * math.expm1(a.mean() - b.mean())
    if min(len(a), len(b)) < 2 or np.ptp(a) == np.ptp(b) == 0:
        return Change(mean)
    *ends, p = welch(a, b)
    return Change(mean, *sorted(sign * math.expm1(end) for end in ends), p)


def runs_needed(distance, sd, alpha=0.01, df=1, known_sd=False):
    """Smallest number n of runs with q sd / sqrt(n) < distance; None if distance <= 0, or if a billion would not do.

    q is the 1 - alpha quantile of t with df * (n - 1) degrees of freedom, of the normal distribution for a known sd: a mean
    `distance` away from a value then excludes it, one-sided at level alpha.
    """
    if distance <= 0:
        return None
    z = float(special.ndtri(1 - alpha))
    if (z * sd / distance) ** 2 > 1e9:
        return None
    n = max(1 if known_sd else 2, math.floor((z * sd / distance) ** 2))
    while (z if known_sd else t_quantile(1 - alpha, df * (n - 1))) * sd / math.sqrt(n) >= distance:
        n += 1
    return n


def noise(sd, df=math.inf):
    """Difference of two single runs that 95 % of pairs without a true difference stay below; `sd` has `df` degrees of freedom."""
    return t_quantile(0.975, df) * math.sqrt(2) * sd


def record(finals, target, speedrun=False):
    """Record of these final losses by a one-sided t-test against `target`.

    For the speedrun also (target - mean) sqrt(n) >= 0.004 and, below 5 runs, a z-test with its known sd instead of the t-test.
    """
    n, mean = len(finals), float(np.mean(finals))
    diverged = n - int(np.isfinite(finals).sum())
    if diverged:
        return Record(False, f"no: {diverged} of {n} runs diverged")
    too_high = "no: the mean is {} the target, no number of runs would do"
    if mean >= target:
        return Record(False, too_high.format("above" if mean > target else "at"))
    known = speedrun and n < MIN_RUNS_FOR_SD
    if not known and np.ptp(finals) == 0:
        return Record(False, "not yet: 1 more run, at least" if n == 1 else "not yet: no spread, 1 more run, at least", more=1)
    if known:
        sd, p, test = SPEEDRUN_SD, float(special.ndtr((mean - target) / (SPEEDRUN_SD / math.sqrt(n)))), f"z-test, sd {SPEEDRUN_SD}"
    else:
        sd, p, test = np.std(finals, ddof=1), float(stats.ttest_1samp(finals, target, alternative="less").pvalue), "t-test"
    margin = (target - mean) * math.sqrt(n)
    if speedrun:
        test += f", margin {margin:.4f}"
    if p < 0.01 and (not speedrun or margin >= SPEEDRUN_MARGIN):
        return Record(True, f"yes ({test})", p, 0)
    total = runs_needed(target - mean, sd, known_sd=known)
    if total is None:
        return Record(False, too_high.format("at"))
    if speedrun:
        total = max(total, math.ceil((SPEEDRUN_MARGIN / (target - mean)) ** 2))
    if known and total >= MIN_RUNS_FOR_SD:  # then it will be a t-test
        total = max(MIN_RUNS_FOR_SD, total, runs_needed(target - mean, sd))
    more = total - n
    return Record(False, f"not yet: about {more} more run{'s' * (more > 1)} ({test})", p, more)


def track3_margin(new, old):
    """How far `new` is ahead of `old`, each (mean final loss, steps, number of runs). It is better from SPEEDRUN_MARGIN on."""
    ahead = old[0] - new[0] + SPEEDRUN_SLOPE * (old[1] - new[1])
    return ahead / math.sqrt(1 / new[2] + 1 / old[2])


def fieller(x, y, cov, t):
    """Fieller's interval for the ratio of the true values of x and y, which have the covariance matrix `cov`. The true y is positive.

    The ratios r for which |x - r y| <= t sd(x - r y). That is an interval if y is clearly positive. If not, it is what lies on x's side
    of a gap around 0, if there is one (x is clearly not 0), else (-inf, inf): also if y is clearly negative, which cannot be.
    """
    a, b, c = y * y - t * t * cov[1][1], x * y - t * t * cov[0][1], x * x - t * t * cov[0][0]  # a r^2 - 2 b r + c <= 0
    root = b * b - a * c
    if a == 0 or root < 0 or (a > 0 and y < 0) or (a < 0 and c <= 0):
        return -math.inf, math.inf
    low, high = sorted(((b - math.sqrt(root)) / a, (b + math.sqrt(root)) / a))
    if a < 0:
        return (high, math.inf) if x > 0 else (-math.inf, low)
    return low, high


def seeds_matter(losses):
    """Whether the losses (seeds, arms) of all arms go up and down together over the seeds: an F-test in the two-way layout, p < 0.01."""
    n, arms = losses.shape
    seeds = losses.mean(1, keepdims=True)
    between = arms * ((seeds - losses.mean()) ** 2).sum() / (n - 1)
    within = ((losses - seeds - losses.mean(0) + losses.mean()) ** 2).sum() / ((n - 1) * (arms - 1))
    return special.fdtrc(n - 1, (n - 1) * (arms - 1), between / within) < 0.01 if within > 0 else False


def steps_saved(baseline, candidate, shorter, fraction):
    """Saved of the candidate against the baseline, see the head of the file. Each arm is {seed: final loss}.

    unpaired  the variance is pooled over the three arms, with n_B + n_C + n_D - 3 degrees of freedom
    paired    the covariance matrix of B_i - C_i and D_i - C_i over the n seeds that all arms have, with n - 1 degrees of freedom
    The narrower interval is used, but the paired one only where the seeds matter. The narrower of two 95 % intervals covers the truth less
    often than either: in 92 % of cases for 3 to 5 seeds that do not matter; with that condition in 94.5 % or more.
    """
    arms = [np.array(list(arm.values()), float) for arm in (baseline, candidate, shorter)]
    diverged = sum(int((~np.isfinite(arm)).sum()) for arm in arms)
    if diverged:
        return Saved(fault=f"{diverged} of {sum(map(len, arms))} runs diverged")
    ways, n = [], [len(arm) for arm in arms]
    if min(n) > 0 and sum(n) > 3:
        B, C, D = (arm.mean() for arm in arms)
        variance = sum(((arm - mean) ** 2).sum() for arm, mean in zip(arms, (B, C, D))) / (sum(n) - 3)
        cov = variance * np.array([[1 / n[0] + 1 / n[1], 1 / n[1]], [1 / n[1], 1 / n[2] + 1 / n[1]]])
        ways.append(("unpaired", B - C, D - C, cov, sum(n) - 3, variance * np.array([[2, 1], [1, 2]]), 3))
    common = np.array([[arm[seed] for arm in (baseline, candidate, shorter)] for seed in baseline if seed in candidate and seed in shorter])
    if len(common) > 1 and seeds_matter(common):
        gains = common[:, ::2] - common[:, 1:2]
        cov = np.cov(gains.T)
        ways.append(("paired", *gains.mean(0), cov / len(common), len(common) - 1, cov, 1))
    found = []
    for way, x, y, cov, df, one, per_run in ways:
        if cov[0][0] > 0 and cov[1][1] > 0:  # equal losses have no spread that could be trusted
            low, high = (end * fraction for end in fieller(x, y, cov, t_quantile(0.975, df)))
            low = min(low, 2 * fraction) if low > -fraction else -math.inf
            high = max(high, -fraction) if high < 2 * fraction else math.inf
            mean = float(fraction * x / y) if math.isfinite(high - low) else None
            scale = np.array([1, 1 / fraction])
            one = one * np.outer(scale, scale)
            found.append(Saved(mean, float(low), float(high), way, "", float(x), float(y / fraction), one, per_run))
    if not found:
        return Saved(fault="2 or more seeds of each, with different results, are needed")
    return min(found, key=lambda saved: min(saved.high, 2 * fraction) - max(saved.low, -fraction))


def saved_text(saved):
    """'2.1% (95 %: 0.8% to 4.1%, paired)', or a bound, or why there is neither."""
    if saved.mean is not None:
        return f"{saved.mean:z.1%} (95 %: {saved.low:z.1%} to {saved.high:z.1%}" + (f", {saved.way})" if saved.way else ")")
    if saved.low > -math.inf:
        return f"more than {saved.low:z.1%} (95 %, {saved.way})"
    if saved.high < math.inf:
        return f"less than {saved.high:z.1%} (95 %, {saved.way})"
    return f"unknown: {saved.fault or 'the losses differ too little between the lengths for their spread'}"


def time_saved(saved, overhead):
    """Saved of 1 - (1 - s)(1 + o), with s a Saved and o the Estimate of a step's overhead.

    The interval is that of a sum, log(1 - s) + log(1 + o), from the intervals of its terms (MOVER: Donner and Zou 2012).
    """
    if overhead.low is None or saved.mean is None:
        return Saved(fault=saved.fault or "it needs an interval for the steps saved and for the overhead of a step")
    terms = [[-math.log1p(-value) for value in (saved.mean, saved.low, saved.high)],
             [-math.log1p(value) for value in (overhead.mean, overhead.high, overhead.low)]]
    mean = terms[0][0] + terms[1][0]
    low, high = (mean + sign * math.hypot(*(term[i] - term[0] for term in terms)) for i, sign in ((1, -1), (2, 1)))
    return Saved(*(-math.expm1(-value) for value in (mean, low, high)))


def verdict(saved, claim=0.06, tolerance=0.005):
    """Verdict on `saved` for a claim, given to within `tolerance`.

    fewer       yes if the interval is above 0, no if it is below
    as claimed  no if the interval is below claim - tolerance; else yes if it is above half the claim (so that a wide one gains nothing)
    """
    least, half = claim - tolerance, claim / 2

    def runs(ratio, side):
        """Runs with which the interval would exclude `ratio` on that side of it."""
        sd = math.sqrt(np.array([1, -ratio]) @ saved.cov @ [1, -ratio])
        return runs_needed(side * (saved.gain - ratio * saved.slope), sd, 0.025, saved.df)

    fewer = "yes" if saved.low > 0 else "no" if saved.high < 0 else "undecided"
    as_claimed = "no" if saved.high < least else "yes" if saved.low > half else "undecided"
    needed = [None, None]
    if not saved.fault and saved.slope > 0:
        needed[0] = runs(0, 1) or runs(0, -1)
        bounded = runs_needed(saved.slope, math.sqrt(saved.cov[1][1]), 0.025, saved.df)
        excluding = min(filter(None, (runs(half, 1), runs(least, -1))), default=None)
        needed[1] = bounded and excluding and max(bounded, excluding)
    word = ("reproduced" if (fewer, as_claimed) == ("yes", "yes") else "partly" if (fewer, as_claimed) == ("yes", "no")
            else "not reproduced" if as_claimed == "no" else "undecided")
    return Verdict(word, *(Answer(answer, runs if answer == "undecided" else None) for answer, runs in zip((fewer, as_claimed), needed)))
