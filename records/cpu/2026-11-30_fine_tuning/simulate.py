"""What does choosing among points with noise cost an arm? The simulation that sized the design.

    python records/cpu/2026-11-30_fine_tuning/simulate.py    half a minute

True losses are bowls of the curvature that was measured on the CPU track, with a third-order term, around an
optimum that is drawn at random; runs have the noise that was measured.
"""
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]
from harness.tuning import at_edge, next_pairs, open_sides
from quadratic import DESIGN, difference, draws, fit, next_place
from study import FACTORS, FIT_SEEDS, MOST_ADDED, SEEDS

# sd of a final loss, beyond what a seed does to all arms alike: 0.0041 in the record at momentum 0.9
NOISE = 0.004
# Loss per squared factor of 2. tuning.csv of that record: 0.001 and 0.003 for learning_rate, 0.023 for the
# hidden rate. The width study, which has five hidden rates: 0.008 and 0.011 for the third order.
RATE, HIDDEN, THIRD = 0.002, 0.023, 0.008
# The best hidden rate is 0.5 factors of 2 higher at momentum 0.9 than at 0.95 (tuning.csv, runs.csv of the
# zoo). Muon's loss at 0.8, 0.9 and 0.95 gives 0.007 to 0.013 along that line.
MOMENTUM, SHIFT = 0.008, 0.5
PER_PERCENT = 0.0014  # loss that 1 % of the steps are worth: Muon at 564 and 600 steps, runs.csv of the zoo
STEPS = np.log2(FACTORS)
PAIRS = 400  # of arms that are simulated
DRAWS = 1000
rng = np.random.default_rng(0)


def excess(places, optimum):
    """True loss at `places` (..., 3) in factors of 2 above that of the optimum."""
    y, x, z = np.moveaxis(np.asarray(places, float) - optimum, -1, 0)
    along = x - SHIFT * z
    return RATE * y ** 2 + HIDDEN * along ** 2 + THIRD * along ** 3 + MOMENTUM * z ** 2


def observed(place, optimum, runs):
    return excess(place, optimum) + rng.normal(0, NOISE / np.sqrt(runs))


def protocol(optimum):
    """{place: mean of two runs} of the pairs that scripts/tune.py --protocol tries, at a fixed momentum."""
    tried = {}
    while len(tried) < 12 or at_edge(tried):
        pairs = next_pairs(tried)
        if not pairs:
            break
        for i, j in pairs:
            tried[i, j] = observed((i / 2, j / 2, 0), optimum, 2)
    return {(i / 2, j / 2, 0): loss for (i, j), loss in tried.items()}


def until_inside(tried, optimum):
    """The same after at most 12 points more, as scripts/zoo.py --refine chooses them."""
    tried = dict(tried)
    for _ in range(12):
        best = min(tried, key=tried.get)
        sides = open_sides(best, tried)
        if not sides:
            break
        place = list(best)
        place[sides[0][0]] += sides[0][1]
        tried[tuple(place)] = observed(place, optimum, 2)
    return tried


def fine(centre, optimum):
    """(Fit, its losses by place), None for the Fit if its lowest point stays at an end."""
    losses = {}
    places = list(DESIGN)
    while True:
        for place in places[len(losses):]:
            runs = {seed: observed(centre + STEPS * place, optimum, 1) for seed in FIT_SEEDS}
            losses[tuple(place)] = runs
        found = fit(losses)
        place = next_place(found)
        if place is None:
            return found, losses
        if len(places) == len(DESIGN) + MOST_ADDED:
            return None, losses
        places.append(place)


def arm():
    """{what: figure} of one arm, and the draws of its cost."""
    optimum = np.array([rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 1.5)])
    pairs = protocol(optimum)
    at_fixed = excess(min(pairs, key=pairs.get), optimum)
    best_rates = np.array([optimum[0], optimum[1] - SHIFT * optimum[2], 0])  # at that momentum
    # the third order moves the best hidden rate a little: look around
    around = [best_rates + [0, step, 0] for step in np.linspace(-0.2, 0.2, 41)]
    figures = {"rates": at_fixed - min(excess(place, optimum) for place in around)}
    coarse = until_inside(pairs, optimum)
    centre = np.array(min(coarse, key=coarse.get))
    figures["coarse"] = excess(centre, optimum)
    figures["coarse points"] = len(coarse) - len(pairs)
    found, losses = fine(centre, optimum)
    figures["added"] = len(losses) - len(DESIGN)
    if not found:
        return figures, None
    figures["fine"] = excess(centre + STEPS * found.lowest, optimum)
    return figures, draws(found, found.lowest, DRAWS, rng)[0]


def main():
    arms = []
    covered = []
    halves = []
    above = []  # upper end of the interval
    for _ in range(PAIRS):
        pair = [arm(), arm()]
        arms.append([figures for figures, _ in pair])
        if any(costs is None for _, costs in pair):
            continue
        (first, costs_first), (second, costs_second) = pair
        noise = rng.normal(0, NOISE * np.sqrt(2), len(SEEDS))
        gaps = first["fine"] - second["fine"] + noise  # the true difference of the optima is 0
        drawn = difference(gaps, costs_first, costs_second, rng)
        low, high = np.quantile(drawn, (0.025, 0.975))
        plain = np.quantile(difference(gaps, np.zeros(DRAWS), np.zeros(DRAWS), rng), (0.025, 0.975))
        old = noise + first["rates"] - second["rates"]  # at the coarse choice, as in the records so far
        old = np.quantile(difference(old, np.zeros(DRAWS), np.zeros(DRAWS), rng), (0.025, 0.975))
        covered.append([ends[0] <= 0 <= ends[1] for ends in ((low, high), plain, old)])
        halves.append([(high - low) / 2, (plain[1] - plain[0]) / 2])
        above.append(high)

    def column(name):
        return np.array([[figures.get(name, np.nan) for figures in pair] for pair in arms])

    print("choice                          cost of an arm: mean, 95 %    sd of the difference of two arms")
    for name, text in (("rates", "pairs of rates, momentum fixed"),
                       ("coarse", "factors of 2, with momentum"), ("fine", "the fitted optimum")):
        costs = column(name)
        print(f"{text:30}  {np.nanmean(costs):.4f}, {np.nanquantile(costs, 0.95):.4f}"
              f"{np.nanstd(costs[:, 0] - costs[:, 1]):26.4f}")
    print(f"points of the coarse search beyond the protocol's: {column('coarse points').mean():.1f}; "
          f"added to the design: {column('added').mean():.1f}; "
          f"refused after {MOST_ADDED}: {np.isnan(column('fine')).mean():.1%} of arms")
    inside, plain, old = np.mean(covered, 0)
    wide, narrow = np.mean(halves, 0)
    print(f"95 % interval of the difference with {len(SEEDS)} seeds: the truth is in it in {inside:.1%} "
          f"(+-{wide:.4f}),")
    print(f"without the uncertainty of the optimum in {plain:.1%} (+-{narrow:.4f}), "
          f"at the pairs of rates in {old:.1%}")
    for percent in (2, 3, 4, 6):
        shown = np.mean(np.array(above) < percent * PER_PERCENT)
        print(f"a true saving of {percent} % of the steps is shown in {shown:.0%}")


if __name__ == "__main__":
    main()
