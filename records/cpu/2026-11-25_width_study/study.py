"""Does what Newton-Muon saves change with the width of the model? The CPU track at widths 32, 64 and 128, depth 4, the same tokens.

    python records/cpu/2026-11-25_width_study/study.py --jobs 2     runs what is missing, and writes results.md and saving.png
    python records/cpu/2026-11-25_width_study/study.py --page       only writes them

For each width and optimizer the same grid: learning_rate 0.02, on which both optimizers hardly depend (tuning.csv of the track's record),
and hidden_learning_rate from 0.001 to 0.004 in steps of the square root of 2, and on in such steps where the best is the smallest or the
largest, by the mean final loss of the seeds 100 and 101 (100 alone where it ends 0.02 above the best). Then the best with the seeds 1 to 6:
Muon and Newton-Muon at 600 steps, Newton-Muon at 564; and with the seeds 7 to 12 where that leaves an end of the saving's interval
unknown. Every finished run is a line of width_N/runs.csv: the same command continues.
"""
import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from harness import estimates, runs
from scripts import zoo
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
WIDTHS = (32, 64, 128)
LEARNING_RATE, GRID = 0.02, (0.001, 0.0014, 0.002, 0.0028, 0.004)
ARMS = (("muon", 600), ("newton_muon", 600), ("newton_muon", 564))
SEEDS, FURTHER = range(1, 7), range(7, 13)


def best_rate(table, optimizer):
    """The hidden learning rate with the lowest mean final loss of the tuning seeds, and whether it is the smallest or the largest tried."""
    points = list(table.losses)  # a copy: the other optimizer's thread adds to them
    tried = sorted({p.hidden_learning_rate for p in points if p.optimizer == optimizer and p.seed in zoo.TUNING_SEEDS})
    best = min(tried, key=lambda hidden: table.mean(optimizer, 600, LEARNING_RATE, hidden, "", zoo.TUNING_SEEDS))
    return best, best in (tried[0], tried[-1])


def train(width, jobs):
    table = zoo.Table(HERE / f"width_{width}" / "runs.csv")
    track = zoo.Track("cpu", jobs, Path("logs") / f"width_{width}", ["--n_embd", str(width)], table)

    def tune(optimizer):
        wanted, at_edge = GRID, True
        while at_edge:
            track.losses_of([(optimizer, 600, LEARNING_RATE, hidden, "") for hidden in wanted])
            best, at_edge = best_rate(table, optimizer)
            wanted = [float(f"{best * 2 ** (0.5 if best > GRID[0] else -0.5):.2g}")]
        return best

    with ThreadPoolExecutor(2) as pool:
        best = dict(zip(("muon", "newton_muon"), pool.map(tune, ("muon", "newton_muon"))))
    for seeds in (SEEDS, FURTHER):
        track.train([zoo.Point(optimizer, steps, LEARNING_RATE, best[optimizer], "", seed) for seed in seeds for optimizer, steps in ARMS])
        if estimates.steps_saved(*finals(table), 0.06).mean is not None:
            break


def finals(table):
    """For each arm {seed: final loss}."""
    return [table.results(*arm) for arm in ARMS]


def write_page():
    lines = ["| width | optimizer | hidden learning rate | seeds | final loss at 600 | at 564 | against Muon, by pairs | steps saved |",
             "|" + " --- |" * 8]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for width in WIDTHS:
        table = zoo.Table(HERE / f"width_{width}" / "runs.csv")
        arms = finals(table)
        seeds = set.intersection(*map(set, arms))
        if not seeds >= set(SEEDS):
            lines.append(f"| {width} | not run to the end | | | | | | |")
            continue
        saved = estimates.steps_saved(*arms, 0.06)
        gap = estimates.mean_interval([arms[1][seed] - arms[0][seed] for seed in seeds])
        muon, candidate, shorter = (f"{loss.mean:.4f} ({loss.low:.4f} to {loss.high:.4f})" for loss in map(zoo.mean_loss, arms))
        rates = [f"{best_rate(table, optimizer)[0]:g}" for optimizer in ("muon", "newton_muon")]
        lines += [f"| {width} | muon | {rates[0]} | {len(seeds)} | {muon} | | | |",
                  f"| {width} | newton_muon | {rates[1]} | {len(seeds)} | {candidate} | {shorter} "
                  f"| {gap.mean:+.4f} ({gap.low:+.4f} to {gap.high:+.4f}) | {estimates.saved_text(saved)} |"]
        if saved.mean is not None:
            bars = [[100 * (saved.mean - saved.low)], [100 * (saved.high - saved.mean)]]
            axes.errorbar(width, 100 * saved.mean, bars, fmt="o", color="C0", capsize=3)
    axes.axhline(0, color="black", lw=0.8)
    axes.axhline(6, color="C1", ls="--", label="claimed for the speedrun")
    axes.set(xlabel="width", ylabel="steps saved by Newton-Muon, % (95 %)", xscale="log", xticks=WIDTHS, xticklabels=WIDTHS, xlim=(25, 160))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(HERE / "saving.png", dpi=110)
    (HERE / "results.md").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
