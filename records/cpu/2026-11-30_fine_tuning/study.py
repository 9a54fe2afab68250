"""How many steps does Newton-Muon save, if both are tuned finely? The CPU track, 600 steps, three arms.

    python records/cpu/2026-11-30_fine_tuning/study.py --third half --jobs 2    run what is missing
    python records/cpu/2026-11-30_fine_tuning/study.py --page                   only write the results

The arms: Muon, Newton-Muon and, with --third, the best other arm of the study "where the gain comes from".
README.md has the plan. Every finished run is a line of runs.csv: the same command continues, on any machine
that has that file and runs.csv of the first study.
"""
import argparse
import json
import math
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import combinations
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]
from harness import estimates, runs
from harness.command import command
from harness.zoo.table import TUNING_SEEDS, Point, Table
from harness.zoo.training import Track
from quadratic import DESIGN, difference, draws, fit, next_place
from train_gpt2 import UserError

FIRST = HERE.with_name("2026-11-30_where_the_gain_comes_from")
STEPS = 600
COMPILED = ["--compile", "true"]  # as in the first study
FACTORS = (3, math.sqrt(2), 1.7)  # of learning_rate, hidden_learning_rate, 1 - momentum: a step of the design
AXES = ("learning_rate", "hidden_learning_rate", "1 - momentum")
FIT_SEEDS = range(102, 106)
CHECK_SEEDS = (range(106, 110), range(110, 114), range(114, 118))
MOST_ADDED = 4  # points of an arm beyond the design
MARGIN = 0.5  # steps of the design: an optimum closer to an end of what was tried is checked
SEEDS = (*range(33, 41), *range(44, 56))  # of the results; 41 to 43 have been used
LENGTHS = (540, 660)  # at which Muon says what a step is worth
LENGTH_SEEDS = SEEDS[:6]
DRAWS = 10_000


def load_arms():
    """The arms of the first study, {name: Entry}. Their momentum is 0.9 where a point names none."""
    spec = spec_from_file_location("where_the_gain_comes_from", FIRST / "study.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ARMS


ARMS = load_arms()
OTHERS = [name for name in ARMS if name not in ("muon", "newton_muon")]


def open_table(names):
    """The Table of this study, which knows the tuning runs of the first one too."""
    table = Table(HERE / "runs.csv")
    first = Table(FIRST / "runs.csv").losses
    for name in names:
        known = {point: loss for point, loss in first.items()
                 if point.optimizer == name and point.steps == STEPS and point.seed in TUNING_SEEDS}
        if not known:
            raise UserError(f"{FIRST / 'runs.csv'} has no tuning of {name}; run {FIRST / 'study.py'} first")
        table.losses.update(known)
    return table


def first_points(name):
    """The points, without a seed, that the first study tried for the arm."""
    return list(Table(FIRST / "runs.csv").tried(name, STEPS))


def coordinates(point):
    """Logarithms of the rates and of 1 - momentum, in steps of the design."""
    _, _, learning_rate, hidden_learning_rate, setting, *_ = point
    momentum = json.loads(setting) if setting else ARMS[point[0]].default
    values = (learning_rate, hidden_learning_rate, 1 - momentum)
    return np.array([math.log(value, factor) for value, factor in zip(values, FACTORS)])


def point_at(name, x):
    """The point, without a seed, at these coordinates, its values to three digits."""
    values = [float(f"{factor ** step:.3g}") for factor, step in zip(FACTORS, x)]
    momentum = max(0.0, round(1 - values.pop(), 9))
    setting = "" if momentum == ARMS[name].default else json.dumps(momentum)
    return (name, STEPS, *values, setting)


def coarse_best(table, name):
    """The best point of the coarse search: the lowest mean loss of the tuning seeds."""
    tried = table.tried(name, STEPS)
    return min(tried, key=tried.get)


def next_runs(table, name, centre, seeds):
    """(Points still to run, Fit): the Fit, in coordinates() minus `centre`, if there are none.

    UserError if the lowest point of the quadratic stays at an end of what was tried.
    """
    places = list(DESIGN)
    while True:
        points = [point_at(name, centre + place) for place in places]
        wanted = [Point(*point, seed) for point in points for seed in seeds]
        missing = [point for point in wanted if point not in table.losses]
        if missing:
            return missing, None
        diverged = [point for point in wanted if not math.isfinite(table.losses[point])]
        if diverged:
            raise UserError(f"a run of {name} diverged, and no quadratic describes that: {diverged[0]}; "
                            f"take smaller FACTORS in {HERE / 'study.py'}")
        losses = {}
        for point in points:
            x = coordinates(point) - centre
            losses[tuple(x)] = {seed: table.losses[Point(*point, seed)] for seed in seeds}
        found = fit(losses)
        place = next_place(found)
        if place is None:
            return [], found
        if len(places) == len(DESIGN) + MOST_ADDED or point_at(name, centre + place) in points:
            sides = [f"{axis} {'above' if end > 0 else 'below'} {factor ** x:.3g}" for axis, factor, x, end
                     in zip(AXES, FACTORS, centre + found.lowest, found.ends) if end]
            raise UserError(f"the quadratic of {name} is still lowest at an end after "
                            f"{len(places) - len(DESIGN)} points more ({', '.join(sides)}): "
                            "it does not describe the losses; look at them before you go on")
        places.append(place)


def fits(table, name):
    """(Points still to run, [(Fit, centre), ...]): the fit of step 3, then those of its checks."""
    centre = coordinates(coarse_best(table, name))
    done = []
    for seeds in (FIT_SEEDS, *CHECK_SEEDS):
        missing, found = next_runs(table, name, centre, seeds)
        if missing:
            return missing, done
        done.append((found, centre))
        if margin(found) >= MARGIN:
            return [], done
        centre = coordinates(optimum(name, found, centre))
    raise UserError(f"the optimum of {name} is still less than {MARGIN} steps from an end of what was tried "
                    f"after {len(CHECK_SEEDS)} checks; look at the losses before you go on")


def margin(found):
    """Steps between the lowest point of the Fit and the nearest end of what was tried."""
    return float(np.minimum(found.lowest - found.low, found.high - found.lowest).min())


def optimum(name, found, centre):
    """The point where the Fit around `centre` is lowest."""
    return point_at(name, centre + found.lowest)


def tune(track, name, checks):
    """The optimum of the arm by its first fit, or with `checks` by its last, after the training it takes."""
    track.refine(name, first_points(name))
    while True:
        missing, done = fits(track.table, name)
        if not missing or (done and not checks):
            return optimum(name, *done[-1 if checks else 0])
        track.train(missing)


def result_points(best):
    """The runs that decide, seed by seed; `best` is {arm: its best point}."""
    points = [Point(*point, seed) for seed in SEEDS for point in best.values()]
    if "muon" in best:
        _, _, *muon = best["muon"]
        points += [Point("muon", steps, *muon, seed) for seed in LENGTH_SEEDS for steps in LENGTHS]
    return points


def train(names, jobs):
    """Trains what is missing: the tuning of all arms and the results, then the checks and theirs."""
    track = Track("cpu", jobs, Path("logs/fine_tuning"), COMPILED, open_table(names), ARMS)
    for checks in (False, True):
        best = track.side_by_side(lambda name: tune(track, name, checks), names)
        track.train(result_points(best))


def interval(values, level):
    """(mean, low, high) of draws: the interval that has the share `level` of them."""
    return (float(np.mean(values)), *np.quantile(values, (0.5 - level / 2, 0.5 + level / 2)).tolist())


def with_interval(values, form):
    """'mean (low to high)' of what interval() returns; nothing of None."""
    if values is None:
        return ""
    mean, low, high = values
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def slopes(table, muon):
    """Loss that Muon gains at this point per unit of the logarithm of the steps, by seed."""
    losses = [[table.losses[Point("muon", steps, *muon[2:], seed)] for seed in LENGTH_SEEDS]
              for steps in LENGTHS]
    return np.subtract(*losses) / math.log(LENGTHS[1] / LENGTHS[0])


def results_at(table, point):
    """Final losses (20,) at the point; None unless all its runs are there."""
    if any(run not in table.losses for run in result_points({point[0]: point})):
        return None
    return np.array([table.losses[Point(*point, seed)] for seed in SEEDS])


def row(label, found, centre, finals):
    """The line of a Fit, with the ranges of its drawn optima; `finals`, or None, are of its optimum."""
    costs, places = draws(found, found.lowest, DRAWS, np.random.default_rng(0))
    cells = []
    for factor, lowest, start, x in zip(FACTORS, found.lowest, centre, places.T):
        cells.append([factor ** (start + at) for at in (lowest, *np.quantile(x, (0.025, 0.975)))])
    value, low, high = cells.pop()  # of 1 - momentum
    cells.append([1 - value, 1 - high, 1 - low])
    cells = [f"{value:.3g} ({low:.3g} to {high:.3g})" for value, low, high in cells]
    loss = None if finals is None else estimates.mean_interval(finals)[:3]
    return (f"| {label} | {found.points} | {found.sd:.4f} | {' | '.join(cells)} "
            f"| {with_interval(loss, '.4f')} | {costs.mean():.4f} | {margin(found):.2f} |")


def compare(table, arms, beyond=0):
    """(lines of a table, the same as dicts): the differences of all pairs of arms.

    arms: {name: (the point of its results, Fit, centre)}: what the point lost is drawn from the Fit. The
    drawn optima lie at most `beyond` steps outside of what was tried.
    """
    by_seed = slopes(table, arms["muon"][0])
    error = np.std(by_seed, ddof=1) / math.sqrt(len(by_seed))
    lines = ["| first | second | first - second, at the chosen points | at the true optima "
             "| steps saved by the first |", "|" + " --- |" * 5]
    pairs = []
    for second, first in combinations(arms, 2):  # Newton-Muon against Muon comes first
        rng = np.random.default_rng(0)  # of its own: what is drawn for a pair depends on no other arm
        finals = []
        costs = []
        for point, found, centre in (arms[first], arms[second]):
            finals.append(results_at(table, point))
            wider = found._replace(low=found.low - beyond, high=found.high + beyond)
            costs.append(draws(wider, coordinates(point) - centre, DRAWS, rng)[0])
        gaps = np.subtract(*finals)
        level = 0.95 if first == "newton_muon" else 0.975
        plain = difference(gaps, np.zeros(DRAWS), np.zeros(DRAWS), rng)
        drawn = difference(gaps, *costs, rng)
        slope = np.mean(by_seed) + error * rng.standard_t(len(by_seed) - 1, DRAWS)
        chosen = interval(plain, level)
        optima = interval(drawn, level)
        saved = interval(1 - np.exp(drawn / slope), level) if second == "muon" else None
        pairs.append({"first": first, "second": second, "level": level, "slope": np.mean(by_seed),
                      "chosen": chosen, "optima": optima, "saved": saved})
        lines.append(f"| {first} | {second} | {with_interval(chosen, '+.4f')} "
                     f"| {with_interval(optima, '+.4f')} | {with_interval(saved, '.1%')} |")
    return lines, pairs


def write_page(names):
    """Writes results.md and results.json, of the arms that have results. UserError if Muon has none."""
    table = open_table(names)
    by_fit = {"planned": {}, "checked": {}}  # by the first fit of an arm, and by its last
    rows = []
    for name in names:
        _, done = fits(table, name)
        for number, (found, centre) in enumerate(done):
            point = optimum(name, found, centre)
            finals = results_at(table, point)
            if number == 0:
                if finals is None:
                    break
                by_fit["planned"][name] = (point, found, centre)
            if finals is not None:
                measured = point
            by_fit["checked"][name] = (measured, found, centre)
            label = f"{name}, check {number}" if number else name
            rows.append(row(label, found, centre, finals))
    if "muon" not in by_fit["planned"]:
        raise UserError(f"the runs of Muon in {HERE / 'runs.csv'} are not complete; "
                        "the same command without --page goes on")

    lines = ["Written by study.py. Ranges and intervals: 95 %, of the last two comparisons 97.5 %.", "",
             "| arm | points | noise | learning_rate | hidden_learning_rate | momentum | final loss "
             "| expected cost of the choice | steps to the nearest end |", "|" + " --- |" * 9, *rows]
    titles = {"planned": "At the optima of the first fits, with what they leave uncertain:",
              "checked": "At the last optima that were run, with what the last fits leave uncertain:"}
    if len(rows) == len(by_fit["planned"]):  # no checks
        del titles["checked"]
    pairs = {}
    for which, title in titles.items():
        compared, pairs[which] = compare(table, by_fit[which])
        lines += ["", title, "", *compared]
        if "newton_muon" in by_fit[which]:
            lines.append("")
            arms = {name: by_fit[which][name] for name in ("muon", "newton_muon")}
            for beyond in (0.5, 1):
                _, (pair,) = compare(table, arms, beyond)
                lines.append(f"- Steps saved by newton_muon if the true optima may lie {beyond} steps beyond "
                             f"what was tried: {with_interval(pair['saved'], '.1%')}.")
    (HERE / "results.md").write_text("\n".join(lines) + "\n")
    # to nine decimals, the same on every CPU: the fits differ in the fourteenth
    rounded = json.loads(json.dumps(pairs), parse_float=lambda text: round(float(text), 9))
    (HERE / "results.json").write_text(json.dumps(rounded, indent=1) + "\n")


@command(interrupted="stopped; the same command continues")
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--third", choices=OTHERS, help="the third arm (default: none)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--page", action="store_true", help="train nothing")
    args = parser.parse_args()
    os.chdir(runs.ROOT)
    names = ["muon", "newton_muon"]
    if args.third:
        names.append(args.third)
    if not args.page:
        train(names, args.jobs)
    write_page(names)


if __name__ == "__main__":
    main()
