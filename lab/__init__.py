"""Predictions of the papers on Muon, as experiments of minutes: one module each, whose run(size, seed) returns a Result.

scripts/lab.py runs them; records/lab/README.md shows what came out.
"""
import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from scipy import stats


@dataclass
class Result:
    """What an experiment found.

    rows     (prediction, measurement, holds) each; holds is True, False, or None where the paper or the measurement leaves it open
    figure   the measurement, with the prediction drawn beside it
    summary  two sentences with the measured numbers, also those that speak against the prediction
    source   authors, title, arXiv number
    """
    rows: list
    figure: Figure
    summary: str
    source: str


def exponent(x, y):
    """(slope of log y over log x by least squares, half-width of its 95 % interval)."""
    x, y = (torch.as_tensor(z, dtype=torch.float64).log().flatten() for z in (x, y))
    x = x - x.mean()
    slope = (x * y).sum() / (x * x).sum()
    left = y - y.mean() - slope * x
    return slope.item(), (stats.t.ppf(0.975, len(x) - 2) * ((left * left).sum() / (len(x) - 2) / (x * x).sum()).sqrt()).item()


def mean_interval(x):
    """(mean of x, half-width of its 95 % interval)."""
    return x.mean(), stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else math.inf


def judge(value, width, low=-math.inf, high=math.inf):
    """True if all that is within `width` of value lies from low to high, False if none of it does, else None: too uncertain."""
    if low <= value - width and value + width <= high:
        return True
    return False if value + width < low or value - width > high else None
