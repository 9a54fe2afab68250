"""Does what Newton-Muon saves change with the width of the model? The CPU track at widths 32, 64 and 128.

    python records/cpu/2026-11-25_width_study/study.py --jobs 2     run what is missing, and write the page
    python records/cpu/2026-11-25_width_study/study.py --page       only write it: results.md and saving.png

Depth 4 and the same tokens for all. For each width and optimizer the same grid: learning_rate 0.02, on which
both optimizers hardly depend (tuning.csv of the track's record), and hidden_learning_rate from 0.001 to 0.004
in steps of the square root of 2. Where the best is the smallest or the largest, the grid goes on in such
steps. The best is that with the lowest mean final loss of the seeds 100 and 101 (100 alone where it ends 0.02
above the best).

Then the best with the seeds 1 to 6: Muon and Newton-Muon at 600 steps, Newton-Muon at 564; and with the seeds
7 to 12 where that leaves an end of the saving's interval unknown. Every finished run is a line of
width_N/runs.csv: the same command continues.
"""
import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from harness import estimates, pictures, runs
from scripts import zoo
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
WIDTHS = (32, 64, 128)
LEARNING_RATE = 0.02
GRID = (0.001, 0.0014, 0.002, 0.0028, 0.004)  # of hidden_learning_rate
ARMS = (("muon", 600), ("newton_muon", 600), ("newton_muon", 564))
SEEDS = range(1, 7)
FURTHER = range(7, 13)
CLAIM = 0.06  # of the steps, for the speedrun


def best_rate(table, optimizer):
    """The best hidden learning rate, and whether it is the smallest or the largest that was tried.

    The best has the lowest mean final loss of the tuning seeds.
    """
    points = list(table.losses)  # a copy: the other optimizer's thread adds to them
    tried = sorted({point.hidden_learning_rate for point in points
                    if point.optimizer == optimizer and point.seed in zoo.TUNING_SEEDS})

    def mean_loss(hidden):
        return table.mean(optimizer, 600, LEARNING_RATE, hidden, "", zoo.TUNING_SEEDS)

    best = min(tried, key=mean_loss)
    return best, best in (tried[0], tried[-1])


def tune(track, table, optimizer):
    """Trains the grid, and on where the best is at an edge. Returns the best hidden learning rate."""
    wanted = GRID
    at_edge = True
    while at_edge:
        track.losses_of([(optimizer, 600, LEARNING_RATE, hidden, "") for hidden in wanted])
        best, at_edge = best_rate(table, optimizer)
        power = 0.5 if best > GRID[0] else -0.5
        wanted = [float(f"{best * 2 ** power:.2g}")]
    return best


def train(width, jobs):
    """Trains what is missing at this width."""
    table = zoo.Table(HERE / f"width_{width}" / "runs.csv")
    track = zoo.Track("cpu", jobs, Path("logs") / f"width_{width}", ["--n_embd", str(width)], table)
    with ThreadPoolExecutor(2) as pool:
        tuned = {}
        for optimizer in ("muon", "newton_muon"):
            tuned[optimizer] = pool.submit(tune, track, table, optimizer)
        best = {optimizer: rate.result() for optimizer, rate in tuned.items()}
    for seeds in (SEEDS, FURTHER):
        track.train([zoo.Point(optimizer, steps, LEARNING_RATE, best[optimizer], "", seed)
                     for seed in seeds for optimizer, steps in ARMS])
        if estimates.steps_saved(*finals(table), CLAIM).mean is not None:
            break


def finals(table):
    """For each arm {seed: final loss}."""
    return [table.results(*arm) for arm in ARMS]


def rows(width, table):
    """(the lines of results.md for this width, what Newton-Muon saves there or None)."""
    arms = finals(table)
    seeds = set.intersection(*map(set, arms))
    if not seeds >= set(SEEDS):
        return [f"| {width} | not run to the end | | | | | | |"], None
    saved = estimates.steps_saved(*arms, CLAIM)
    gap = estimates.mean_interval([arms[1][seed] - arms[0][seed] for seed in seeds])
    losses = [zoo.mean_loss(arm) for arm in arms]
    muon, candidate, shorter = (f"{loss.mean:.4f} ({loss.low:.4f} to {loss.high:.4f})" for loss in losses)
    rates = [f"{best_rate(table, optimizer)[0]:g}" for optimizer in ("muon", "newton_muon")]
    lines = [f"| {width} | muon | {rates[0]} | {len(seeds)} | {muon} | | | |",
             f"| {width} | newton_muon | {rates[1]} | {len(seeds)} | {candidate} | {shorter} "
             f"| {gap.mean:+.4f} ({gap.low:+.4f} to {gap.high:+.4f}) | {estimates.saved_text(saved)} |"]
    return lines, saved


def draw(savings):
    """saving.png: what is saved at each width, of {width: estimates.Saved}."""
    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    axes = figure.subplots()
    color = pictures.COLORS["newton_muon"]
    for width, saved in savings.items():
        percent = 100 * saved.mean
        bars = [[percent - 100 * saved.low], [100 * saved.high - percent]]
        axes.errorbar(width, percent, bars, fmt="o", color=color, capsize=4)
        axes.annotate(f"{percent:.1f} %", (width, percent), (8, 0), textcoords="offset points", va="center",
                      color=pictures.shaded(color, -0.15))
    axes.set(xlabel="width of the model", xscale="log", xticks=WIDTHS, xticklabels=WIDTHS, xlim=(25, 165),
             ylabel="steps saved (%)", title="Steps that Newton-Muon saves against Muon, with 95 % intervals")
    axes.title.set_size(10)
    axes.set_ylim(top=max(100 * CLAIM + 0.6, axes.get_ylim()[1]))
    for height, text in ((0, "none"), (100 * CLAIM, "claimed for\nthe speedrun")):
        axes.axhline(height, color="black", linewidth=0.9, linestyle="--" if height else "-")
        axes.text(1.01, height, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    pictures.save(figure, HERE / "saving.png")


def write_page():
    lines = ["| width | optimizer | hidden learning rate | seeds | final loss at 600 | at 564 "
             "| against Muon, by pairs | steps saved |",
             "|" + " --- |" * 8]
    savings = {}
    for width in WIDTHS:
        more, saved = rows(width, zoo.Table(HERE / f"width_{width}" / "runs.csv"))
        lines += more
        if saved and saved.mean is not None:
            savings[width] = saved
    draw(savings)
    (HERE / "results.md").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    os.chdir(runs.ROOT)
    for width in () if args.page else args.widths:
        train(width, args.jobs)
    write_page()


if __name__ == "__main__":
    main()
