"""Muon and Newton-Muon on the optimizer track's model at CPU size, both tuned, twelve seeds.

    python records/cpu/2026-11-30_optimizer_track/study.py --jobs 2

Runs what is missing, and writes results.md. README.md has the plan. Every finished run is a line of runs.csv:
the same command continues, on any machine that has that file.
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from harness import estimates, runs
from harness.command import command
from harness.zoo.optimizers import Entry
from harness.zoo.page import steps_saved
from harness.zoo.table import Point, Table
from harness.zoo.training import Track

HERE = Path(__file__).resolve().parent
CENTRE = (0.02, 0.025)  # of the rates, for both
SEEDS = range(71, 83)
LENGTHS = (540, 660)  # at which Muon says what a step is worth
LENGTH_SEEDS = SEEDS[:6]


def arm(kind, **arguments):
    return Entry(f"optimizers.track_muon:{kind}", setting="momentum", values=(), source="", rates=CENTRE,
                 arguments={"weight_decay": 0.05, **arguments})


ARMS = {"muon": arm("TrackMuon"), "newton_muon": arm("TrackNewtonMuon", refresh_interval=32)}


def train(jobs):
    """(Table, {arm: its rates}) after the training of what is missing."""
    table = Table(HERE / "runs.csv")
    track = Track("cpu_track3", jobs, Path("logs/optimizer_track"), ["--compile", "true"], table, ARMS)
    best = track.side_by_side(track.tune_rates, ARMS)
    points = [Point(name, track.steps, *best[name], "", seed) for seed in SEEDS for name in ARMS]
    points += [Point("muon", steps, *best["muon"], "", seed) for seed in LENGTH_SEEDS for steps in LENGTHS]
    track.train(points)
    return table, best


def write_page(table, best):
    finals = {name: table.results(name, 600) for name in ARMS}
    lines = [f"Written by study.py; {len(table.losses)} runs.", "",
             "| optimizer | learning_rate, hidden_learning_rate | final loss (95 %) |", "| --- | --- | --- |"]
    for name, losses in finals.items():
        loss = estimates.mean_interval([losses[seed] for seed in SEEDS])
        rates = ", ".join(f"{rate:g}" for rate in best[name])
        lines.append(f"| {name} | {rates} | {loss.mean:.4f} ({loss.low:.4f} to {loss.high:.4f}) |")
    gap = estimates.mean_interval([finals["newton_muon"][seed] - finals["muon"][seed] for seed in SEEDS])
    curve = {}
    for steps in (540, 600, 660):
        losses = table.results("muon", steps)
        curve[steps] = float(np.mean([losses[seed] for seed in LENGTH_SEEDS]))
    lengths = ", ".join(f"{steps} steps {loss:.4f}" for steps, loss in curve.items())
    lines += ["", f"Newton-Muon minus Muon, by pairs: {gap.mean:+.4f} "
                  f"(95 %: {gap.low:+.4f} to {gap.high:+.4f}); steps saved: {steps_saved(gap, curve, 600)}.",
              f"Muon, seeds {LENGTH_SEEDS[0]} to {LENGTH_SEEDS[-1]}: {lengths}."]
    (HERE / "results.md").write_text("\n".join(lines) + "\n")


@command(interrupted="stopped; the same command continues")
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    args = parser.parse_args()
    os.chdir(runs.ROOT)
    write_page(*train(args.jobs))


if __name__ == "__main__":
    main()
