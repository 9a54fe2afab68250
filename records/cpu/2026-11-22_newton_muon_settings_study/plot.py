"""Draw settings.png from the runs in this folder, and print its table.

    python records/cpu/2026-11-22_newton_muon_settings_study/plot.py
"""
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

from matplotlib.figure import Figure
from scipy import stats

from harness import pictures
from harness.runs import read_run

CENTRE = dict(refresh_interval=32, ridge=0.2, power=1.0)  # the paper's; one of them varies in each panel
TARGET = 1.75
QUANTITIES = ("final validation loss", f"steps to {TARGET}")


def measured(group):
    """[(mean, standard deviation)] of the QUANTITIES of these runs."""
    losses = [run.facts["final_val_loss"] for run in group]  # not rounded, as those of log.txt are
    steps = [run.first_crossing(TARGET)[0] for run in group]
    return [(statistics.mean(values), statistics.stdev(values)) for values in (losses, steps)]


def groups_of(name, newton, muon):
    """{value of the setting `name`: runs} of the runs that have the paper's other settings."""
    groups = {}
    for run in newton:
        if all(run.config[other] == value for other, value in CENTRE.items() if other != name):
            groups.setdefault(run.config[name], []).append(run)
    if name == "power":
        groups[0.0] = muon  # (K + ridge)^0 is the identity, so Newton-Muon is Muon
    return dict(sorted(groups.items()))


def print_groups(name, groups):
    for value, group in groups.items():
        (loss, loss_sd), (steps, steps_sd) = measured(group)
        print(f"{name + ' ' + str(value):>24}  {loss:.4f} ({loss_sd:.4f})  {steps:6.1f} ({steps_sd:.1f})   "
              f"{len(group)} runs")


def draw(axis, name, groups, row):
    """One panel: the quantity `row` against the setting `name`."""
    style = pictures.styles(["newton_muon"])["newton_muon"]
    points = [measured(group)[row] for group in groups.values()]
    means = [mean for mean, _ in points]
    spreads = [sd for _, sd in points]
    axis.errorbar(list(groups), means, yerr=spreads, color=style["color"], marker="o", capsize=3,
                  label="Newton-Muon, with the standard deviation of 3 runs")
    axis.set_xlabel(name.replace("_", " "))
    if name != "power":
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xticks(list(groups), [f"{value:g}" for value in groups])
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def main():
    runs = [read_run(log.parent) for log in sorted(HERE.glob("*/log.txt"))]
    muon = [run for run in runs if run.config["optimizer"] == "muon"]
    newton = [run for run in runs if run.config["optimizer"] == "newton_muon"]
    reference = measured(muon)
    figure = Figure(figsize=(8.3, 5.4), layout="constrained")
    axes = figure.subplots(2, 3, sharey="row")
    print(f"{'setting':>24}  final loss: mean (sd)   steps to {TARGET}: mean (sd)")
    for column, (name, centre) in enumerate(CENTRE.items()):
        groups = groups_of(name, newton, muon)
        print_groups(name, groups)
        for row, quantity in enumerate(QUANTITIES):
            axis = axes[row, column]
            draw(axis, name, groups, row)
            axis.axhline(reference[row][0], color=pictures.COLORS["muon"], linewidth=1.5,
                         label="Muon at the same rates")
            axis.axvline(centre, color="black", linestyle=":", linewidth=1, label="the paper's setting")
            if column == 0:
                axis.set_ylabel(quantity)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    pictures.save(figure, HERE / "settings.png")

    centre = groups_of("ridge", newton, muon)[CENTRE["ridge"]]
    finals = [[run.facts["final_val_loss"] for run in group] for group in (centre, muon)]
    p = stats.ttest_ind(*finals, equal_var=False, alternative="less").pvalue
    print(f"the paper's settings end below Muon: p = {p:.3f} (Welch's t-test, one-sided)")


if __name__ == "__main__":
    main()
