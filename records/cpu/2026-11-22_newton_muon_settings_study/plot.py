"""Draws settings.png from the runs in this folder, and prints its table: python records/cpu/DATE_newton_muon_settings_study/plot.py"""
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy import stats

from harness.runs import read_run

CENTRE = dict(refresh_interval=32, ridge=0.2, power=1.0)  # the paper's settings; one of them varies in each panel
TARGET = 1.75

runs = [read_run(log.parent) for log in sorted(HERE.glob("*/log.txt"))]
muon = [run for run in runs if run.config["optimizer"] == "muon"]
figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharey="row", layout="constrained")
print(f"{'setting':>24}  final loss: mean (sd)   steps to {TARGET}: mean (sd)")


def measured(group):
    losses = [run.facts["final_val_loss"] for run in group]  # not rounded, as those of log.txt are
    steps = [run.first_crossing(TARGET)[0] for run in group]
    return [(statistics.mean(values), statistics.stdev(values)) for values in (losses, steps)]


for column, (name, centre) in enumerate(CENTRE.items()):
    groups = {}
    for run in runs:
        if run.config["optimizer"] == "newton_muon" and all(run.config[other] == value for other, value in CENTRE.items() if other != name):
            groups.setdefault(run.config[name], []).append(run)
    if name == "power":
        groups[0.0] = muon  # (K + ridge)^0 is the identity, so Newton-Muon is Muon
    points = {value: measured(group) for value, group in sorted(groups.items())}
    for value, ((loss, loss_sd), (steps, steps_sd)) in points.items():
        print(f"{name + ' ' + str(value):>24}  {loss:.4f} ({loss_sd:.4f})  {steps:6.1f} ({steps_sd:.1f})   {len(groups[value])} runs")
    for row, quantity in enumerate(("final validation loss", f"steps to {TARGET}")):
        axis = axes[row, column]
        means, spreads = zip(*(point[row] for point in points.values()))
        axis.errorbar(list(points), means, yerr=spreads, marker="o", capsize=3)
        reference = measured(muon)[row][0]
        axis.axhline(reference, color="grey", linestyle=":", label="Muon at the same rates")
        axis.axvline(centre, color="grey", linewidth=0.5)
        axis.set_xlabel(name)
        axis.set_ylabel(quantity if column == 0 else "")
        if name != "power":
            axis.set_xscale("log", base=2 if name == "refresh_interval" else 10)
        axis.grid(alpha=0.2)
centre = [run for run in runs if run.config["optimizer"] == "newton_muon" and all(run.config[name] == value for name, value in CENTRE.items())]
p = stats.ttest_ind(*([run.facts["final_val_loss"] for run in group] for group in (centre, muon)), equal_var=False, alternative="less").pvalue
print(f"the paper's settings end below Muon: p = {p:.3f} (Welch's t-test, one-sided)")
axes[0, 0].legend()
figure.savefig(HERE / "settings.png", dpi=120)
