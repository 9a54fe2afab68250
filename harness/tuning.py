"""The protocol by which learning rates are tuned: which pair of rates is tried next.

A pair (i, j) stands for the rates of a centre, times the square root of 2 to the power of i and j.
"""

RATES = ("learning_rate", "hidden_learning_rate")
FIRST_TUNING_SEED = 100
AXES = ((1, 0), (-1, 0), (0, 1), (0, -1))
DIAGONALS = ((1, 1), (-1, -1), (1, -1), (-1, 1))


def next_pairs(tried):
    """The pairs to try next, after those in `tried`, {pair: mean loss}.

    The first are 3 x 3, a factor of 2 apart. Then it is one neighbour of the best pair: at a factor of 2 or,
    once these are tried, of the square root of 2. The list is empty when all of them are tried.
    """
    if not tried:
        return [(i, j) for i in (-2, 0, 2) for j in (-2, 0, 2)]
    best = min(tried, key=tried.get)
    for factor in (2, 1):
        for i, j in AXES + DIAGONALS:
            pair = (best[0] + factor * i, best[1] + factor * j)
            if pair not in tried:
                return [pair]
    return []


def at_edge(tried):
    """Whether a rate of the best pair is the smallest or the largest that was tried."""
    best = min(tried, key=tried.get)
    for axis, exponent in enumerate(best):
        exponents = [pair[axis] for pair in tried]
        if exponent in (min(exponents), max(exponents)):
            return True
    return False


def rates(centre, pair):
    """[learning_rate, hidden_learning_rate] of a pair, to three digits."""
    return [float(f"{middle * 2 ** (exponent / 2):.3g}") for middle, exponent in zip(centre, pair)]


def open_sides(best, tried):
    """[(axis, side), ...] of `best` on which nothing was tried: side 1 is larger, -1 smaller.

    Points are tuples of numbers. One lies on a side of `best` if it differs from it on that axis alone. An
    axis whose other side was tried comes first: there the loss is known to fall towards `best`.
    """
    sides = {}  # axis -> those that were tried
    for point in tried:
        axes = [axis for axis, (value, own) in enumerate(zip(point, best)) if value != own]
        if len(axes) == 1:
            axis, = axes
            sides.setdefault(axis, set()).add(1 if point[axis] > best[axis] else -1)
    found = []
    for axis in sorted(range(len(best)), key=lambda axis: axis not in sides):
        found += [(axis, side) for side in (1, -1) if side not in sides.get(axis, ())]
    return found
