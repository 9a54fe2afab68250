"""A quadratic through the losses of tuning runs: its lowest point, and how well that is known.

x = (x1, x2, x3) are the logarithms of learning_rate, hidden_learning_rate and 1 - momentum, in steps from a
centre. A run at x with a seed ends at

    sum_i b_i x_i + sum_i c_i x_i^2 + sum_(i < j) d_ij x_i x_j + (effect of the seed) + noise

All seeds are fitted together, each with an effect of its own, by least squares.
"""
from itertools import combinations, product
from typing import NamedTuple

import numpy as np

AXES = range(3)
PAIRS = list(combinations(AXES, 2))
# The centre, and all points that are one step away on two axes (Box and Behnken): the fewest that are spread
# evenly and give all ten terms.
DESIGN = [(0, 0, 0)]
for first, second in PAIRS:
    for i, j in product((-1, 1), repeat=2):
        place = [0, 0, 0]
        place[first] = i
        place[second] = j
        DESIGN.append(tuple(place))
TERMS = 9  # besides the effects of the seeds


class Fit(NamedTuple):
    points: int
    coefficients: np.ndarray  # (TERMS,): b, c, d
    covariance: np.ndarray  # of these
    sd: float  # of the noise
    df: int
    low: np.ndarray  # smallest and largest value of each x that was tried
    high: np.ndarray
    lowest: np.ndarray  # the lowest point between them
    ends: np.ndarray  # for each x: -1 or 1 if the lowest point is at `low` or `high`, else 0


def terms(x):
    """(..., TERMS) of x (..., 3): what the coefficients are multiplied by."""
    products = [x[..., i] * x[..., j] for i, j in PAIRS]
    return np.concatenate([x, x * x, np.stack(products, -1)], -1)


def lowest(coefficients, low, high):
    """(points (n, 3), ends (n, 3), values (n,)): where the n quadratics are lowest between low and high.

    The lowest point of a quadratic in a box is the stationary point of its inside or of a face, an edge or a
    corner. All 27 are tried.
    """
    n = len(coefficients)
    gradient = coefficients[:, :3]
    hessian = np.zeros((n, 3, 3))
    for i in AXES:
        hessian[:, i, i] = 2 * coefficients[:, 3 + i]
    for number, (i, j) in enumerate(PAIRS):
        hessian[:, i, j] = hessian[:, j, i] = coefficients[:, 6 + number]
    points = np.zeros((n, 3))
    ends = np.zeros((n, 3), int)
    values = np.full(n, np.inf)
    for face in product((-1, 0, 1), repeat=3):
        face = np.array(face)
        x = np.tile(np.where(face < 0, low, np.where(face > 0, high, 0.0)), (n, 1))
        free = np.flatnonzero(face == 0)
        if len(free):
            slope = gradient + np.einsum("nij,nj->ni", hessian, x)
            inner = hessian[:, free[:, None], free]
            x[:, free] = -np.einsum("nij,nj->ni", np.linalg.pinv(inner, hermitian=True), slope[:, free])
        value = np.einsum("ni,ni->n", terms(x), coefficients)
        better = ((x >= low) & (x <= high)).all(-1) & (value < values)
        points[better] = x[better]
        ends[better] = face
        values[better] = value[better]
    return points, ends, values


def fit(losses):
    """Fit of {(x1, x2, x3): {seed: loss}}."""
    rows = [(x, seed, loss) for x, finals in losses.items() for seed, loss in finals.items()]
    x = np.array([row[0] for row in rows], float)
    seeds = sorted({row[1] for row in rows})
    of_seed = np.array([[row[1] == seed for seed in seeds] for row in rows], float)
    A = np.hstack([terms(x), of_seed])
    y = np.array([row[2] for row in rows])
    solution, _, rank, _ = np.linalg.lstsq(A, y)
    df = len(y) - A.shape[1]
    if rank < A.shape[1] or df < 1:
        raise ValueError(f"{len(losses)} points and {len(y)} runs are too few for the quadratic")
    variance = ((y - A @ solution) ** 2).sum() / df
    covariance = variance * np.linalg.inv(A.T @ A)[:TERMS, :TERMS]
    low = x.min(0)
    high = x.max(0)
    points, ends, _ = lowest(solution[None, :TERMS], low, high)
    return Fit(len(losses), solution[:TERMS], covariance, float(np.sqrt(variance)), df, low, high,
               points[0], ends[0])


def next_place(found):
    """The place (whole steps) to try next; None if the lowest point is inside.

    It is one step beyond what was tried, on the sides where the lowest point is at an end, and the whole
    steps next to the lowest point on the other axes.
    """
    if not found.ends.any():
        return None
    return tuple(int(step) for step in np.round(found.lowest) + found.ends)


def draws(found, chosen, number, rng):
    """(costs, lowest points (number, 3)) of quadratics that the data allow, drawn from the fit's errors.

    A cost is how much higher the quadratic is at `chosen` than at its lowest point among what was tried.
    """
    root = np.linalg.cholesky(found.covariance)
    wider = np.sqrt(found.df / rng.chisquare(found.df, number))  # the noise is an estimate, too
    coefficients = found.coefficients + wider[:, None] * (rng.standard_normal((number, TERMS)) @ root.T)
    points, _, values = lowest(coefficients, found.low, found.high)
    return coefficients @ terms(np.asarray(chosen, float)) - values, points


def difference(gaps, costs_first, costs_second, rng):
    """Draws of the difference of two arms at their true optima.

    `gaps` are its differences by seed at the chosen points, the costs are draws() of each arm.
    """
    error = np.std(gaps, ddof=1) / np.sqrt(len(gaps))
    drawn = np.mean(gaps) + error * rng.standard_t(len(gaps) - 1, len(costs_first))
    return drawn - costs_first + costs_second
