"""Predictions of the papers on Muon, as experiments of minutes: one module each.

scripts/lab.py runs them, and records/lab/README.md shows what came out. Every experiment has SOURCE (authors,
title, arXiv number) and four functions:

    measure(size, seed)   does the work. Returns a dict of what JSON can hold
    rows(numbers)         [(prediction, measurement, verdict)]. A verdict is True, False, or None where
                          the paper or the measurement leaves it open
    summary(numbers)      two or three sentences with the numbers, also with those against the prediction
    figure(numbers)       the measurement, with the prediction drawn beside it

Only measure() takes time. The other three work from the file of its numbers.
"""
import math

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from harness.estimates import mean_interval
from harness.pictures import styles

WIDTH = 8.3  # inches of every figure: a README is 830 pixels wide, so 10 points are 14 pixels there
OTHERS = ("signsgd", "error feedback")  # optimizers without a colour of their own in harness/pictures.py
MARKERS = {"muon": "o", "newton_muon": "D", "adamw": "^", "sgd": "s", "signsgd": "v", "error feedback": "P"}


def exponent(x, y):
    """(slope of log y over log x by least squares, half-width of its 95 % interval)."""
    x = torch.as_tensor(x, dtype=torch.float64).log().flatten()
    y = torch.as_tensor(y, dtype=torch.float64).log().flatten()
    x = x - x.mean()
    slope = (x * y).sum() / (x * x).sum()
    residual = y - y.mean() - slope * x
    df = len(x) - 2
    error = ((residual * residual).sum() / df / (x * x).sum()).sqrt()
    return slope.item(), (stats.t.ppf(0.975, df) * error).item()


def interval(values, level=0.95):
    """(mean of the values, half-width of its interval, infinite where they do not give one)."""
    found = mean_interval(values, level)
    if found.low is None:
        return found.mean, math.inf
    return found.mean, found.high - found.mean


def judge(value, width, low=-math.inf, high=math.inf):
    """Verdict on "it lies from low to high", for a value that is known to within `width`.

    True if all of the interval lies there, False if none of it does, else None: too uncertain.
    """
    if low <= value - width and value + width <= high:
        return True
    if value + width < low or value - width > high:
        return False
    return None


def all_of(verdicts):
    """True if all are true, False if one is false, else None."""
    verdicts = list(verdicts)
    if False in verdicts:
        return False
    return None if None in verdicts else True


def counted(n, word):
    """'1 step', '5 steps'."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def thinned(curve, points=200):
    """([1, ... len(curve)], the curve there), at up to so many places that are even on a logarithmic axis."""
    places = np.unique(np.geomspace(1, len(curve), points).round().astype(int))
    return places.tolist(), np.asarray(curve)[places - 1].tolist()


def new_figure(height):
    """Figure as wide as a README, `height` in inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def look(optimizer, **changes):
    """Colour, line and marker of an optimizer in all pictures of the lab; `changes` are for a variant."""
    return styles(OTHERS)[optimizer] | dict(marker=MARKERS[optimizer], markersize=5) | changes


def legend_below(axes, columns=1):
    """Legend below the axes, where it covers no data."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, fontsize=9, handlelength=3)
