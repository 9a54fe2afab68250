"""The statistics of a comparison, on plain numbers: nothing here reads a file or knows what a run is.

mean_interval    a mean with its 95 % intervals, by Student's t and by the percentile bootstrap
ratio_change     change of a mean against a baseline's, by Welch's t-test of the logarithms
record           whether final losses are a record: their mean is at or below the target (p < 0.01), and the
                 speedrun's own rules
track3_margin    the speedrun's rule for one group against another with another number of steps
steps_saved      steps saved at equal final loss, by Fieller's interval
time_saved       the same in time, with the overhead of a step
verdict          what that makes of a claim: reproduced, partly, not reproduced or undecided

Steps saved. The baseline and the candidate are run at N steps, the candidate also at (1 - f) N. With B, C and
D their mean final losses,

    s = f (B - C) / (D - C)

is the fraction of its steps that the candidate can do without and still end at the baseline's loss, if its
final loss between (1 - f) N and N steps lies on a straight line. That is trusted up to f past either end:
beyond -f and 2 f there are only bounds.
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

    @property
    def half_width(self):
        """Half the width of the interval by t; infinite without one."""
        return math.inf if self.low is None else (self.high - self.low) / 2


class Change(NamedTuple):
    """Change as a fraction (0.06 is 6 %) with its 95 % interval.

    p is the chance of a ratio this low without a true difference.
    """
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
    """Steps saved as a fraction of the baseline's, with a 95 % interval.

    An infinite end is unknown. Where an end is, there is no mean.
    """
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
    """The answer to a question, and how many runs of each arm would settle it."""
    word: str  # yes, no, undecided
    runs: int = None  # with these means and this spread; None if it is settled, or if no number would do


class Verdict(NamedTuple):
    word: str  # reproduced, partly, not reproduced, undecided
    fewer: Answer  # does it need fewer steps than the baseline?
    as_claimed: Answer  # does it save as many steps as claimed?


def t_quantile(p, df):
    """Quantile of Student's t; of the normal distribution for infinite df."""
    if df == math.inf:
        return float(special.ndtri(p))
    return float(special.stdtrit(df, p))  # stats.t.ppf takes a hundred times as long


def mean_interval(values, level=0.95):
    """Estimate of the mean of `values`, a list or a 1-D array, with intervals of that level.

    One value, or equal ones, give no interval: nothing says how far off the next would be.
    """
    mean = float(np.mean(values))
    if np.ptp(values) == 0:
        return Estimate(mean)
    half = float(t_quantile((1 + level) / 2, len(values) - 1) * stats.sem(values))
    batch = max(1, 10 ** 6 // len(values))  # resamples at a time, so that many values fit into memory
    boot = stats.bootstrap((values,), np.mean, confidence_level=level, method="percentile", rng=0,
                           batch=batch).confidence_interval
    return Estimate(mean, mean - half, mean + half, float(boot.low), float(boot.high))


def welch(new, old):
    """(low, high, p) of the difference of the means by Welch's t-test.

    low and high: its 95 % interval; p: the chance of one this low without a true difference.
    """
    # numpy and scipy warn about a side of equal values
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        low, high = stats.ttest_ind(new, old, equal_var=False).confidence_interval(0.95)
        p = stats.ttest_ind(new, old, equal_var=False, alternative="less").pvalue
    return float(low), float(high), float(p)


def ratio_change(new, old, sign=1):
    """Change sign * (r - 1), with r = exp(mean(log new) - mean(log old)) of positive values; p that r < 1."""
    if min(*new, *old) <= 0:
        return Change()
    a = np.log(new)
    b = np.log(old)
    mean = sign * math.expm1(a.mean() - b.mean())
    if min(len(a), len(b)) < 2 or np.ptp(a) == np.ptp(b) == 0:
        return Change(mean)
    low, high, p = welch(a, b)
    low, high = sorted([sign * math.expm1(low), sign * math.expm1(high)])
    return Change(mean, low, high, p)


def runs_needed(distance, sd, alpha=0.01, df=1, known_sd=False):
    """Smallest number n of runs with q sd / sqrt(n) < distance.

    None if distance <= 0, or if a billion would not do. q is the 1 - alpha quantile of t with df * (n - 1)
    degrees of freedom, of the normal distribution for a known sd: a mean `distance` away from a value then
    excludes it, one-sided at level alpha.
    """
    if distance <= 0:
        return None
    z = float(special.ndtri(1 - alpha))
    least = (z * sd / distance) ** 2
    if least > 1e9:
        return None

    def excludes(n):
        q = z if known_sd else t_quantile(1 - alpha, df * (n - 1))
        return q * sd / math.sqrt(n) < distance

    n = max(1 if known_sd else 2, math.floor(least))
    while not excludes(n):
        n += 1
    return n


def noise(sd, df=math.inf):
    """Difference of two single runs that 95 % of pairs without a true difference stay below.

    `sd` has `df` degrees of freedom.
    """
    return t_quantile(0.975, df) * math.sqrt(2) * sd


def record(finals, target, speedrun=False):
    """Record of these final losses by a one-sided t-test against `target`.

    For the speedrun also (target - mean) sqrt(n) >= 0.004 and, below 5 runs, a z-test with its known sd
    instead of the t-test.
    """
    n = len(finals)
    mean = float(np.mean(finals))
    diverged = n - int(np.isfinite(finals).sum())
    if diverged:
        return Record(False, f"no: {diverged} of {n} runs diverged")
    if mean > target:
        return Record(False, "no: the mean is above the target, no number of runs would do")
    at_target = Record(False, "no: the mean is at the target, no number of runs would do")
    if mean == target:
        return at_target
    known = speedrun and n < MIN_RUNS_FOR_SD
    if not known and np.ptp(finals) == 0:
        reason = "" if n == 1 else "no spread, "
        return Record(False, f"not yet: {reason}1 more run, at least", more=1)
    if known:
        sd = SPEEDRUN_SD
        p = float(special.ndtr((mean - target) / (sd / math.sqrt(n))))
        test = f"z-test, sd {sd}"
    else:
        sd = np.std(finals, ddof=1)
        p = float(stats.ttest_1samp(finals, target, alternative="less").pvalue)
        test = "t-test"
    margin = (target - mean) * math.sqrt(n)
    if speedrun:
        test += f", margin {margin:.4f}"
    if p < 0.01 and (not speedrun or margin >= SPEEDRUN_MARGIN):
        return Record(True, f"yes ({test})", p, 0)
    total = runs_needed(target - mean, sd, known_sd=known)
    if total is None:
        return at_target
    if speedrun:
        total = max(total, math.ceil((SPEEDRUN_MARGIN / (target - mean)) ** 2))
    if known and total >= MIN_RUNS_FOR_SD:  # then it will be a t-test
        total = max(MIN_RUNS_FOR_SD, total, runs_needed(target - mean, sd))
    more = total - n
    plural = "s" if more > 1 else ""
    return Record(False, f"not yet: about {more} more run{plural} ({test})", p, more)


def track3_margin(new, old):
    """How far `new` is ahead of `old`, each (mean final loss, steps, number of runs).

    It is better from SPEEDRUN_MARGIN on.
    """
    new_loss, new_steps, new_runs = new
    old_loss, old_steps, old_runs = old
    ahead = old_loss - new_loss + SPEEDRUN_SLOPE * (old_steps - new_steps)
    return ahead / math.sqrt(1 / new_runs + 1 / old_runs)


def fieller(x, y, cov, t):
    """Fieller's interval for the ratio of the true values of x and y, which have the covariance matrix `cov`.

    The true y is positive. The interval has the ratios r for which |x - r y| <= t sd(x - r y). They are an
    interval if y is clearly positive. If not, it is what lies on x's side of a gap around 0, if there is one
    (x is clearly not 0), else (-inf, inf): also if y is clearly negative, which cannot be.
    """
    # a r^2 - 2 b r + c <= 0
    a = y * y - t * t * cov[1][1]
    b = x * y - t * t * cov[0][1]
    c = x * x - t * t * cov[0][0]
    root = b * b - a * c
    if a == 0 or root < 0 or (a > 0 and y < 0) or (a < 0 and c <= 0):
        return -math.inf, math.inf
    low, high = sorted([(b - math.sqrt(root)) / a, (b + math.sqrt(root)) / a])
    if a > 0:
        return low, high
    return (high, math.inf) if x > 0 else (-math.inf, low)


def seeds_matter(losses):
    """Whether the losses (seeds, arms) of all arms go up and down together over the seeds.

    An F-test in the two-way layout, p < 0.01.
    """
    n, arms = losses.shape
    seeds = losses.mean(1, keepdims=True)
    between = arms * ((seeds - losses.mean()) ** 2).sum() / (n - 1)
    left = losses - seeds - losses.mean(0) + losses.mean()
    within = (left ** 2).sum() / ((n - 1) * (arms - 1))
    if within <= 0:
        return False
    return special.fdtrc(n - 1, (n - 1) * (arms - 1), between / within) < 0.01


class Gains(NamedTuple):
    """What an interval for the steps saved is made of."""
    way: str  # paired or unpaired
    x: float  # B - C
    y: float  # D - C
    cov: np.ndarray  # covariance of x and y
    df: int  # degrees of freedom of cov
    one: np.ndarray  # covariance of x and y with one run of each arm
    per_run: int  # degrees of freedom for each run of an arm beyond its first


def unpaired_gains(arms):
    """Gains with the variance pooled over the three arms, n_B + n_C + n_D - 3 degrees of freedom; or None."""
    n = [len(arm) for arm in arms]
    if min(n) == 0 or sum(n) <= 3:
        return None
    B, C, D = (arm.mean() for arm in arms)
    df = sum(n) - 3
    variance = sum(((arm - mean) ** 2).sum() for arm, mean in zip(arms, (B, C, D))) / df
    cov = variance * np.array([[1 / n[0] + 1 / n[1], 1 / n[1]], [1 / n[1], 1 / n[2] + 1 / n[1]]])
    one = variance * np.array([[2, 1], [1, 2]])
    return Gains("unpaired", B - C, D - C, cov, df, one, 3)


def paired_gains(baseline, candidate, shorter):
    """Gains from B_i - C_i and D_i - C_i over the n seeds that all arms have, n - 1 degrees of freedom.

    None if they are too few, or if the seeds do not matter.
    """
    common = []
    for seed in baseline:
        if seed in candidate and seed in shorter:
            common.append([baseline[seed], candidate[seed], shorter[seed]])
    common = np.array(common)
    if len(common) < 2 or not seeds_matter(common):
        return None
    gains = common[:, ::2] - common[:, 1:2]
    x, y = gains.mean(0)
    cov = np.cov(gains.T)
    return Gains("paired", x, y, cov / len(common), len(common) - 1, cov, 1)


def trusted_interval(x, y, cov, quantile, fraction):
    """(mean, low, high) of fraction * x / y by Fieller's interval, as far as a straight line is trusted.

    That is `fraction` past either end. Beyond it a bound is infinite, and then the mean is None.
    """
    low, high = (end * fraction for end in fieller(x, y, cov, quantile))
    low = min(low, 2 * fraction) if low > -fraction else -math.inf
    high = max(high, -fraction) if high < 2 * fraction else math.inf
    mean = float(fraction * x / y) if math.isfinite(high - low) else None
    return mean, float(low), float(high)


def saved_from(gains, fraction):
    """Saved by the trusted part of Fieller's interval for x / y."""
    quantile = t_quantile(0.975, gains.df)
    mean, low, high = trusted_interval(gains.x, gains.y, gains.cov, quantile, fraction)
    scale = np.array([1, 1 / fraction])
    return Saved(
        mean=mean,
        low=low,
        high=high,
        way=gains.way,
        gain=float(gains.x),
        slope=float(gains.y / fraction),
        cov=gains.one * np.outer(scale, scale),
        df=gains.per_run,
    )


def steps_saved(baseline, candidate, shorter, fraction):
    """Saved of the candidate against the baseline, see the head of the file. Each arm is {seed: final loss}.

    The narrower of the unpaired and the paired interval is used, but the paired one only where the seeds
    matter. The narrower of two 95 % intervals covers the truth less often than either: in 92 % of cases for 3
    to 5 seeds that do not matter; with that condition in 94.5 % or more.
    """
    arms = [np.array(list(arm.values()), float) for arm in (baseline, candidate, shorter)]
    diverged = sum(int((~np.isfinite(arm)).sum()) for arm in arms)
    if diverged:
        return Saved(fault=f"{diverged} of {sum(map(len, arms))} runs diverged")
    found = []
    for gains in (unpaired_gains(arms), paired_gains(baseline, candidate, shorter)):
        # equal losses have no spread that could be trusted
        if gains and gains.cov[0][0] > 0 and gains.cov[1][1] > 0:
            found.append(saved_from(gains, fraction))
    if not found:
        return Saved(fault="2 or more seeds of each, with different results, are needed")
    return min(found, key=lambda saved: min(saved.high, 2 * fraction) - max(saved.low, -fraction))


def saved_text(saved):
    """'2.1% (95 %: 0.8% to 4.1%, paired)', or a bound, or why there is neither."""
    if saved.mean is not None:
        way = f", {saved.way}" if saved.way else ""
        return f"{saved.mean:z.1%} (95 %: {saved.low:z.1%} to {saved.high:z.1%}{way})"
    if saved.low > -math.inf:
        return f"more than {saved.low:z.1%} (95 %, {saved.way})"
    if saved.high < math.inf:
        return f"less than {saved.high:z.1%} (95 %, {saved.way})"
    return f"unknown: {saved.fault or 'the losses differ too little between the lengths for their spread'}"


def time_saved(saved, overhead):
    """Saved of 1 - (1 - s)(1 + o), with s a Saved and o the Estimate of a step's overhead.

    The interval is that of a sum, log(1 - s) + log(1 + o), from the intervals of its terms (MOVER: Donner and
    Zou 2012).
    """
    if overhead.low is None or saved.mean is None:
        needed = "it needs an interval for the steps saved and for the overhead of a step"
        return Saved(fault=saved.fault or needed)
    # minus each logarithm, so that more saved is more: its mean, lower and upper end
    steps = [-math.log1p(-value) for value in (saved.mean, saved.low, saved.high)]
    step_time = [-math.log1p(value) for value in (overhead.mean, overhead.high, overhead.low)]
    mean = steps[0] + step_time[0]
    low = mean - math.hypot(steps[1] - steps[0], step_time[1] - step_time[0])
    high = mean + math.hypot(steps[2] - steps[0], step_time[2] - step_time[0])
    return Saved(-math.expm1(-mean), -math.expm1(-low), -math.expm1(-high))


def runs_to_exclude(saved, ratio, side):
    """Runs with which the interval would exclude `ratio` on that side of it, 1 above or -1 below; or None."""
    contrast = np.array([1, -ratio])
    sd = math.sqrt(contrast @ saved.cov @ contrast)
    return runs_needed(side * (saved.gain - ratio * saved.slope), sd, 0.025, saved.df)


def runs_to_settle(saved, half, least):
    """How many runs settle (whether it needs fewer steps, whether it saves as many as claimed)."""
    if saved.fault or saved.slope <= 0:
        return None, None
    fewer = runs_to_exclude(saved, 0, 1) or runs_to_exclude(saved, 0, -1)
    bounded = runs_needed(saved.slope, math.sqrt(saved.cov[1][1]), 0.025, saved.df)
    excluding = [runs_to_exclude(saved, half, 1), runs_to_exclude(saved, least, -1)]
    excluding = [runs for runs in excluding if runs is not None]
    if bounded is None or not excluding:
        return fewer, None
    return fewer, max(bounded, min(excluding))


def verdict(saved, claim=0.06, tolerance=0.005):
    """Verdict on `saved` for a claim, given to within `tolerance`.

    fewer       yes if the interval is above 0, no if it is below
    as claimed  no if the interval is below claim - tolerance; else yes if it is above half the claim (so that
                a wide one gains nothing)
    """
    least = claim - tolerance
    half = claim / 2
    fewer = "yes" if saved.low > 0 else "undecided"
    if saved.high < 0:
        fewer = "no"
    as_claimed = "yes" if saved.low > half else "undecided"
    if saved.high < least:
        as_claimed = "no"
    word = "undecided"
    if as_claimed == "no":
        word = "partly" if fewer == "yes" else "not reproduced"
    elif fewer == as_claimed == "yes":
        word = "reproduced"
    answers = []
    for answer, runs in zip((fewer, as_claimed), runs_to_settle(saved, half, least)):
        answers.append(Answer(answer, runs if answer == "undecided" else None))
    return Verdict(word, *answers)
