"""Looking at a verdict again after more seeds, without more wrong answers.

A 95 % interval misses the truth in 5 % of cases if it is computed once, after a number of seeds that was
fixed beforehand. Somebody who adds seeds and looks until the question is decided gets many chances to be
wrong. Here the 5 % are spent little by little: of N planned seeds, n may have spent n / N of them (alpha
spending: Lan and DeMets 1983, with a linear spending function). The interval of each look is wider, so that
all looks together miss the truth in 5 % of cases.

levels        the confidence level of each look
at_level      steps saved with an interval of another level
detectable    the smallest saving that some number of seeds is likely to show
simulate      what the verdict says of runs with a known saving
"""
import functools
import json
import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

from harness.command import ROOT
from harness.estimates import steps_saved, t_quantile, trusted_interval, verdict
from train_gpt2 import UserError, write_atomically

ALPHA = 0.05
PLANNED_SEEDS = 10  # if nothing else is said


class Noise(NamedTuple):
    """What decides how many seeds a comparison takes."""
    sd: float  # of the final loss over seeds
    correlation: float  # of the final losses of two arms over the seeds they share
    slope: float  # final loss that all steps are worth, if it goes on falling in a straight line


# the levels


@functools.lru_cache
def levels(looks, planned):
    """The confidence level of each look, for the tuple `looks` of numbers of seeds, in rising order.

    The sum of n independent normal values has independent increments, so the chance to cross a bound at the
    i-th look, and not before, follows from the density of the sums that have not crossed one, look by look.
    Each bound is such that this chance is what may be spent there. Student's t then takes the place of the
    normal distribution, at the same level.
    """
    found = []
    spent = 0
    before = 0  # seeds at the look before
    nodes, weights = np.polynomial.legendre.leggauss(200)
    sums = np.zeros(1)  # the sums that have crossed no bound, and the chance of each
    chances = np.ones(1)
    for n in looks:
        may_spend = ALPHA * n / planned
        sd = math.sqrt(n - before)

        def crossing(bound):
            """The chance to cross +-bound at this look, and not before."""
            return chances @ (special.ndtr((sums - bound) / sd) + special.ndtr((-sums - bound) / sd))

        bound = optimize.brentq(lambda bound: crossing(bound) - (may_spend - spent), 0, 40 * math.sqrt(n))
        inside = bound * nodes
        density = stats.norm.pdf(inside[:, None], sums, sd) @ chances
        sums = inside
        chances = bound * weights * density
        spent = may_spend
        before = n
        found.append(1 - 2 * float(special.ndtr(-bound / math.sqrt(n))))
    return found


def at_level(saved, fraction, seeds, level):
    """`saved`, of steps_saved() with so many seeds of each arm, with an interval of confidence `level`."""
    if saved.cov is None:
        return saved  # it has no interval
    x = saved.gain
    y = saved.slope * fraction
    scale = np.array([1, fraction])
    cov = saved.cov * np.outer(scale, scale) / seeds
    quantile = t_quantile((1 + level) / 2, saved.df * (seeds - 1))
    mean, low, high = trusted_interval(x, y, cov, quantile, fraction)
    return saved._replace(mean=mean, low=low, high=high)


# the plan in the folder of the runs


def read_plan(path):
    """{"planned_seeds": number, "looks": [numbers of seeds]}; None without the file.

    UserError if it is damaged.
    """
    try:
        plan = json.loads(path.read_text())
        numbers = [plan["planned_seeds"], *plan["looks"]]
        if not all(type(number) is int and number >= 2 for number in numbers):
            raise ValueError("a number of seeds is not 2 or more")
        if max(numbers) > plan["planned_seeds"]:
            raise ValueError("a look has more seeds than were planned")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); "
                        "delete it to plan this comparison again") from None
    return plan


def make_plan(path, seeds, planned=None):
    """The plan in the file `path`, which is written if there is none.

    `planned` is the number that the user asks for, None for the one of the file or else PLANNED_SEEDS.
    UserError if the plan does not allow `seeds`.
    """
    plan = read_plan(path)
    if plan is None:
        plan = {"planned_seeds": planned or max(seeds, PLANNED_SEEDS), "looks": []}
    there = plan["planned_seeds"]
    if planned and planned != there:
        raise UserError(f"--planned_seeds {planned}, but {path} says {there}: the number is fixed before the "
                        "first run; another plan needs another --log_dir")
    if seeds > there:
        raise UserError(f"--seeds {seeds}, but {there} were planned ({path}), and further looks would make a "
                        "wrong verdict more likely; a larger plan needs another --log_dir")
    write_plan(path, plan)
    return plan


def write_plan(path, plan):
    write_atomically(path, json.dumps(plan).encode() + b"\n")


def note_look(path, seeds):
    """Notes in the plan that the verdict was looked at with so many seeds."""
    plan = read_plan(path)
    plan["looks"] = sorted({*plan["looks"], seeds})
    write_plan(path, plan)


def level_of_look(path, seeds):
    """(confidence level of a look at so many seeds after those in the plan, planned seeds)."""
    plan = read_plan(path)
    until_now = sorted({seeds, *(n for n in plan["looks"] if n < seeds)})
    return levels(tuple(until_now), plan["planned_seeds"])[-1], plan["planned_seeds"]


# what to expect


def read_noise(track):
    """Noise of the track's runs, from the file that scripts/power.py writes; None if it has none."""
    path = ROOT / "records" / "power" / "noise.json"
    if not path.exists():
        return None
    try:
        tracks = json.loads(path.read_text())
        return Noise(**tracks[track]) if track in tracks else None
    except (OSError, ValueError, TypeError) as error:
        fault = type(error).__name__
        raise UserError(f"{path} cannot be read ({fault}); `python scripts/power.py` writes it") from None


def runs_at_level(needed, level):
    """About how many runs an interval of this level takes, where one of 95 % takes `needed`."""
    ratio = t_quantile((1 + level) / 2, math.inf) / t_quantile(1 - ALPHA / 2, math.inf)
    return math.ceil(needed * max(1, ratio) ** 2 - 1e-9)


def detectable(noise, seeds, level=1 - ALPHA, power=0.8):
    """The smallest true saving that is told from none with this chance, by an interval of this level."""
    paired = noise.correlation > 0.5  # then pairs are closer than their degrees of freedom cost
    df = (seeds - 1) if paired else 3 * (seeds - 1)
    difference = noise.sd * math.sqrt(2 * (1 - noise.correlation) if paired else 2)
    t = t_quantile((1 + level) / 2, df)

    def lack(saving):
        return power - stats.nct.sf(t, df, saving * noise.slope / (difference / math.sqrt(seeds)))

    return optimize.brentq(lack, 0, 1000 * difference / noise.slope)


def simulate(noise, saving, looks, planned=None, trials=1000, claim=0.06):
    """[(Verdict, seeds), ...] of simulated comparisons in which the true saving is `saving`.

    Each starts with looks[0] seeds and goes on to the next look until both questions are decided. `planned`
    seeds correct for the looks; None: the 95 % interval of a single look, every time.
    """
    rng = np.random.default_rng(0)
    gain = saving * noise.slope
    # of the baseline, the candidate and the candidate's shorter arm
    means = np.array([0, -gain, claim * noise.slope - gain])
    used = levels(tuple(looks), planned) if planned else [1 - ALPHA] * len(looks)
    found = []
    for _ in range(trials):
        shared = math.sqrt(noise.correlation) * rng.standard_normal((looks[-1], 1))
        own = math.sqrt(1 - noise.correlation) * rng.standard_normal((looks[-1], 3))
        losses = means + noise.sd * (shared + own)
        for seeds, level in zip(looks, used):
            arms = [dict(enumerate(arm)) for arm in losses[:seeds].T]
            saved = at_level(steps_saved(*arms, claim), claim, seeds, level)
            answer = verdict(saved, claim)
            if "undecided" not in (answer.fewer.word, answer.as_claimed.word):
                break
        found.append((answer, seeds))
    return found


def is_wrong(answer, saving, claim=0.06, tolerance=0.005):
    """Whether a Verdict says something that is not so when the true saving is `saving`."""
    wrong_fewer = answer.fewer.word == ("no" if saving > 0 else "yes")
    too_high = answer.as_claimed.word == "yes" and saving <= claim / 2
    too_low = answer.as_claimed.word == "no" and saving >= claim - tolerance
    return wrong_fewer or too_high or too_low
