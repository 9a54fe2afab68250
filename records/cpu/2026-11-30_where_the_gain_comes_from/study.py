"""Which matrices does Newton-Muon's preconditioner help? The CPU track, seven arms, all tuned alike.

    python records/cpu/2026-11-30_where_the_gain_comes_from/study.py --jobs 2    run what is missing
    python records/cpu/2026-11-30_where_the_gain_comes_from/study.py --page      only write results.md

The arms: Muon, and the preconditioner to the power 1 (Newton-Muon) and 1/2 on all matrices, on mlp_proj
alone, and on all others. README.md has the plan. Every finished run is a line of runs.csv: the same command
continues, on any machine that has that file.
"""
import argparse
import json
import os
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from harness import estimates, runs
from harness.command import command
from harness.zoo.optimizers import Entry
from harness.zoo.page import steps_saved
from harness.zoo.table import Point, Table
from harness.zoo.training import Track

HERE = Path(__file__).resolve().parent
COMPILED = ["--compile", "true"]  # faster, and the same up to rounding
CENTRE = (0.014, 0.0028)  # of the rates, for all arms
SEEDS = range(21, 33)  # of the results
LENGTHS = (540, 660)  # at which Muon says what a step is worth
LENGTH_SEEDS = range(21, 27)


def arm(optimizer, groups={}, **arguments):
    return Entry(optimizer, setting="momentum", values=(), source="", groups=groups, rates=CENTRE,
                 arguments={"momentum": 0.9, **arguments})


def power_arm(mlp_proj, others):
    """Newton-Muon with these powers of the preconditioner; 0 is Muon."""
    return arm("optimizers.power_newton_muon:PowerNewtonMuon", {"h.*.mlp_proj.weight": {"power": mlp_proj}},
               power=others)


ARMS = {
    "muon": arm("muon"),
    "newton_muon": arm("newton_muon"),
    "mlp_proj_alone": power_arm(mlp_proj=1, others=0),
    "all_but_mlp_proj": power_arm(mlp_proj=0, others=1),
    "half": power_arm(mlp_proj=0.5, others=0.5),
    "half_mlp_proj_alone": power_arm(mlp_proj=0.5, others=0),
    "half_all_but_mlp_proj": power_arm(mlp_proj=0, others=0.5),
}
POWERS = {"1": ("muon", "mlp_proj_alone", "all_but_mlp_proj", "newton_muon"),
          "1/2": ("muon", "half_mlp_proj_alone", "half_all_but_mlp_proj", "half")}


def train(jobs):
    """Trains what is missing: the tuning of all arms, then the results seed by seed."""
    table = Table(HERE / "runs.csv")
    track = Track("cpu", jobs, Path("logs/where_the_gain_comes_from"), COMPILED, table, ARMS)
    best = track.side_by_side(track.tune_rates, ARMS)
    points = [Point(name, track.steps, *best[name], "", seed) for seed in SEEDS for name in ARMS]
    points += [Point("muon", steps, *best["muon"], "", seed) for seed in LENGTH_SEEDS for steps in LENGTHS]
    track.train(points)


def holm(p_values):
    """p-values corrected for their number by Holm's method, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def compare(results):
    """[(first, second, Estimate of the difference of the mean final loss, p), ...] of all pairs of arms.

    Paired by seed, t-test. The intervals hold together with 95 % (Bonferroni), p is Holm's.
    """
    pairs = list(combinations(results, 2))
    rows = []
    for first, second in pairs:
        gaps = np.array([results[first][seed] - results[second][seed] for seed in SEEDS])
        gap = estimates.mean_interval(gaps, level=1 - 0.05 / len(pairs))
        rows.append((first, second, gap, stats.ttest_1samp(gaps, 0).pvalue))
    corrected = holm([row[-1] for row in rows])
    return [(*row[:-1], p) for row, p in zip(rows, corrected)]


def with_interval(gap):
    return f"{gap.mean:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"


def effects_of(arms, results):
    """Estimates of two effects on the final loss: of preconditioning mlp_proj, and all other matrices.

    arms: with neither of them preconditioned, mlp_proj, the others, both.
    """
    neither, mlp_proj, others, both = (np.array([results[name][seed] for seed in SEEDS]) for name in arms)
    return [estimates.mean_interval((both + mlp_proj - others - neither) / 2),
            estimates.mean_interval((both + others - mlp_proj - neither) / 2)]


def cost_cells(name):
    """The time of a step and the state, as costs.py measured them; empty without costs.json."""
    path = HERE / "costs.json"
    if not path.exists():
        return ["", ""]
    costs = json.loads(path.read_text())["arms"][name]
    time = "1" if name == "muon" else "{mean_step:.3f} ({low:.3f} to {high:.3f})".format(**costs)
    return [time, f"{costs['state_bytes']:.1f}"]


def write_page():
    table = Table(HERE / "runs.csv")
    results = {name: table.results(name, 600) for name in ARMS}
    results = {name: finals for name, finals in results.items() if set(finals) >= set(SEEDS)}
    lines = [f"Written by study.py; {len(table.losses)} runs.", "",
             "| arm | rates | final loss (95 %) | against Muon, by pairs (95 %) | steps saved "
             "| time of a step (Muon: 1) | state, bytes per hidden parameter |", "|" + " --- |" * 7]
    lengths = (540, 600, 660)
    curve = {}
    for steps in lengths:
        finals = table.results("muon", steps)
        if finals:
            curve[steps] = float(np.mean([finals[seed] for seed in LENGTH_SEEDS if seed in finals]))
    for name, finals in results.items():
        loss = estimates.mean_interval(list(finals.values()))
        cells = ["", ""]
        if name != "muon" and len(curve) == len(lengths):
            gap = estimates.mean_interval([finals[seed] - results["muon"][seed] for seed in SEEDS])
            cells = [with_interval(gap), steps_saved(gap, curve, 600)]
        cells += cost_cells(name)
        point = next(point for point in table.losses if (point.optimizer, point.seed) == (name, SEEDS[0]))
        lines.append(f"| {name} | {point.learning_rate:g}, {point.hidden_learning_rate:g} "
                     f"| {loss.mean:.4f} ({loss.low:.4f} to {loss.high:.4f}) | {' | '.join(cells)} |")
    if len(results) == len(ARMS):
        lines += ["", "All pairs, corrected for their number: intervals by Bonferroni, p by Holm.", "",
                  "| first | second | first - second | p |", "|" + " --- |" * 4]
        for first, second, gap, p in compare(results):
            lines.append(f"| {first} | {second} | {with_interval(gap)} | {p:.2g} |")
        lines += ["", "Not planned: what preconditioning mlp_proj, and what preconditioning all others, "
                  "changes in the final loss, on average over both states of the rest; pairs, 95 % each.", "",
                  "| power | mlp_proj | all others |", "|" + " --- |" * 3]
        for power, arms in POWERS.items():
            mlp_proj, others = map(with_interval, effects_of(arms, results))
            lines.append(f"| {power} | {mlp_proj} | {others} |")
    (HERE / "results.md").write_text("\n".join(lines) + "\n")


@command(interrupted="stopped; the same command continues")
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--page", action="store_true", help="train nothing")
    args = parser.parse_args()
    os.chdir(runs.ROOT)
    if not args.page:
        train(args.jobs)
    write_page()


if __name__ == "__main__":
    main()
