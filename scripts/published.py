"""What others measured of Newton-Muon against Muon, read with this repository's own statistics.

    python scripts/published.py             writes records/published/README.md and steps_saved.png
    python scripts/published.py --check     only says whether the page is up to date: exit code 1 if it is not

The figures are in the CSV files of records/published/, copied from where they were published. Our own runs in
records/cpu/ stand beside them.
"""
import argparse
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import ROOT, command
import numpy as np
from matplotlib.figure import Figure

from harness import estimates, pictures
from harness.runs import find_runs
from harness.zoo.page import share_saved
from harness.zoo.table import Table

FOLDER = ROOT / "records" / "published"
CPU = ROOT / "records" / "cpu"
RECORD4_STEPS = 6200
# the last evaluations of a curve give its slope, over about the distance that is to be converted
RECORD4_SLOPE_FROM = 5875
TRACK3_LAST = 100  # steps
SHORTER = 0.06  # by so much of its steps our own third arm is shorter

# results of the optimizer track with Muon, by number, in the order of their tuning
BASELINES = {"6": "first Muon", "12": "larger learning rate", "36": "auxiliary AdamW tuned"}
PAPER, REPLICATION, TRACK3, OURS = "paper", "replication", "optimizer track", "ours"
BORROWED = "slope of record 4"


@dataclass
class Row:
    """A comparison of Newton-Muon with Muon. Triples are (mean, low, high): a 95 % interval."""
    source: str
    setting: str
    runs: str  # of each optimizer
    gain: tuple  # Muon's final loss minus Newton-Muon's
    slope: float = None  # loss that 100 steps are worth
    slope_from: str = ""
    saved: tuple = None  # steps, as a fraction of Muon's: 0.05 is 5 % fewer

    def convert(self, slope, steps, slope_from):
        """Steps saved from the gain alone, with a slope of the loss in a step that counts as known."""
        self.slope = 100 * slope
        self.slope_from = slope_from
        self.saved = tuple(None if gain is None else gain / slope / steps for gain in self.gain)


def read(name):
    """The lines of a CSV file in records/published/, as dicts."""
    with open(FOLDER / name, newline="") as file:
        return list(csv.DictReader(file))


def record4_slope():
    """Loss that a step is worth near the end of record 4's own curve, with Muon."""
    lines = (ROOT / "records/speedrun/record4.csv").read_text().splitlines()
    table = csv.DictReader(line for line in lines if not line.startswith("#"))
    losses = {int(row["step"]): float(row["val_loss"]) for row in table}
    fall = losses[RECORD4_SLOPE_FROM] - losses[RECORD4_STEPS]
    return fall / (RECORD4_STEPS - RECORD4_SLOPE_FROM)


def paper_rows():
    """The paper's repository: one run each of record 4's configuration, and four each of another."""
    losses = {}
    for row in read("newton_muon_paper.csv"):
        if row["run"] != "mean":
            losses.setdefault((row["experiment"], row["optimizer"]), []).append(float(row["final_val_loss"]))
    (first, second) = dict.fromkeys(experiment for experiment, _ in losses)
    muon, = losses[first, "muon"]
    newton_muon, = losses[first, "newton_muon"]
    gain = muon - newton_muon
    noise = estimates.noise(estimates.SPEEDRUN_SD)  # of single runs only the known spread over seeds is left
    single = Row(PAPER, "124 M, record 4", "1", (gain, gain - noise, gain + noise))
    single.convert(record4_slope(), RECORD4_STEPS, "record 4's curve")
    old = losses[second, "muon"]
    new = losses[second, "newton_muon"]
    return [single, Row(PAPER, "124 M, near record 28", f"{len(new)}", difference(old, new))]


def difference(old, new):
    """(mean, low, high) of how far the mean of the losses `new` is below that of `old`, by Welch's t-test."""
    low, high, _ = estimates.welch(new, old)
    return np.mean(old) - np.mean(new), -high, -low


def replication_rows():
    """What an anonymous artifact and others state; their intervals are theirs, not computed here."""
    rows = []
    source = ""
    for row in read("replications.csv"):
        if row["source"] != "same":
            source = REPLICATION if "anonymous" in row["source"] else row["source"].split()[0]
        if not row["minus_muon"]:
            continue
        gain = tuple(-float(row[name]) if row[name] else None for name in ("minus_muon", "high_95", "low_95"))
        variant = row["optimizer"].removeprefix("newton_muon").strip()
        setting = row["setting"].partition(",")[0] + (f" ({variant})" if variant else "")
        setting = setting.replace("record 4 configuration", "124 M, record 4")
        own_curve = row["setting"].startswith("record 4")
        found = Row(source, setting, row["runs"], gain)
        found.convert(record4_slope(), RECORD4_STEPS, "record 4's curve" if own_curve else BORROWED)
        rows.append(found)
    return rows


def track3_rows():
    """Newton-Muon on the optimizer track against three baselines, with the slope of its own last steps."""
    runs = {}
    planned = {}
    for row in read("track3_muon_newton_muon.csv"):
        curve = runs.setdefault(row["result"], {}).setdefault(row["run"], {})
        curve[int(row["step"])] = float(row["val_loss"])
        planned[row["result"]] = int(row["num_iterations"])
    steps = planned["15"]

    def arm(result, step):
        return {(result, run): curve[step] for run, curve in runs[result].items()}

    rows = []
    for result, name in BASELINES.items():
        baseline = arm(result, planned[result])
        candidate = arm("15", steps)
        earlier = arm("15", steps - TRACK3_LAST)
        saved = estimates.steps_saved(baseline, candidate, earlier, TRACK3_LAST / steps)
        fewer = tuple(1 - steps / planned[result] * (1 - s) for s in (saved.mean, saved.low, saved.high))
        gain = difference(list(baseline.values()), list(candidate.values()))
        rows.append(Row(TRACK3, f"124 M, {name} (#{result})", f"{len(baseline)} and {len(candidate)}", gain,
                        100 * saved.slope / steps, f"its last {TRACK3_LAST} steps", fewer))
    return rows


def our_rows():
    """The CPU track's two records, the same model at three widths, and the studies that tuned every arm:
    finely, with the preconditioner on some matrices, and on the optimizer track's model."""
    rows = []
    for name, momentum in (("2026-11-25_muon_newton_muon_adamw", "0.95"), ("2026-11-28_momentum_0.9", "0.9")):
        arms = {}
        for run in find_runs(CPU / name)[0]:
            arms.setdefault((run.config["optimizer"], run.planned), {})[run.config["seed"]] = run.final
        rows.append(our_row(f"0.2 M, momentum {momentum}", arms))
    for width, parameters in ((32, "0.06 M"), (64, "0.2 M"), (128, "0.8 M")):
        arms = arms_of(CPU / "2026-11-25_width_study" / f"width_{width}" / "runs.csv")
        rows.append(our_row(f"{parameters}, width {width}", arms))
    rows.append(fine_row())
    for arm, matrices in (("newton_muon", "all matrices"), ("mlp_proj_alone", "mlp_proj alone"),
                          ("all_but_mlp_proj", "all but mlp_proj")):
        rows.append(lengths_row(f"0.2 M, {matrices}", "2026-11-30_where_the_gain_comes_from", arm))
    rows.append(lengths_row("0.2 M, optimizer track's model", "2026-11-30_optimizer_track", "newton_muon"))
    return rows


def fine_row():
    """Both tuned finely: the interval of that study, which has the uncertainty of the optima in it."""
    results = json.loads((CPU / "2026-11-30_fine_tuning/results.json").read_text())
    pair = results["checked"][0]
    assert (pair["first"], pair["second"]) == ("newton_muon", "muon")
    mean, low, high = pair["optima"]  # Newton-Muon minus Muon
    return Row(OURS, "0.2 M, tuned finely", "20", (-mean, -high, -low), 100 * pair["slope"] / 600,
               "runs of 540 and 660 steps", tuple(pair["saved"]))


def arms_of(path):
    """{(optimizer, steps): {seed: final loss}} of the results in a study's runs.csv."""
    table = Table(path)
    arms = {(point.optimizer, point.steps) for point in table.losses}
    return {arm: table.results(*arm) for arm in arms}


def lengths_row(setting, study, arm):
    """An arm of a study against Muon, with Muon's runs of other lengths."""
    arms = arms_of(CPU / study / "runs.csv")
    muon = arms["muon", 600]
    gain = estimates.mean_interval([muon[seed] - arms[arm, 600][seed] for seed in sorted(muon)])
    seeds = arms["muon", 540]
    curve = {steps: np.mean([arms["muon", steps][seed] for seed in seeds]) for steps in (540, 600, 660)}
    slope = 100 * (curve[540] - curve[660]) / (660 - 540)
    saved = tuple(share_saved(-change, curve, 600) for change in gain[:3])
    return Row(OURS, setting, f"{len(muon)}", gain[:3], slope, "runs of 540 and 660 steps", saved)


def our_row(setting, arms):
    steps = 600
    shorter = arms["newton_muon", 564]
    muon = arms["muon", steps]
    newton_muon = arms["newton_muon", steps]
    gain = estimates.mean_interval([muon[seed] - newton_muon[seed] for seed in sorted(muon)])
    saved = estimates.steps_saved(muon, newton_muon, shorter, SHORTER)
    return Row(OURS, setting, f"{len(muon)}", gain[:3], 100 * saved.slope / steps, "runs of 564 steps",
               (saved.mean, saved.low, saved.high))


def overheads():
    """[(who, step time of Newton-Muon against Muon's, how)], as fractions."""
    table = [row for row in read("newton_muon_paper.csv") if row["train_time_s"]]
    seconds = {(row["hardware"], row["optimizer"]): float(row["train_time_s"]) for row in table}
    found = []
    for hardware in dict.fromkeys(hardware for hardware, _ in seconds):
        ratio = seconds[hardware, "newton_muon"] / seconds[hardware, "muon"]
        found.append((PAPER, f"{hardware}, whole runs", ratio - 1))
    speeds = {row["optimizer"]: float(row["tokens_per_second"])
              for row in read("replications.csv") if row["tokens_per_second"]}
    ratio = speeds["muon"] / speeds["newton_muon"]
    return [*found, (REPLICATION, "1xH100, tokens a second measured alone", ratio - 1)]


def all_rows():
    """[Row, ...], as the page and the picture show them."""
    return paper_rows() + replication_rows() + track3_rows() + our_rows()


# ---- Page

def interval(values, form):
    """'mean (low to high)', each by `form`."""
    mean, low, high = values
    if low is None:
        return f"{form.format(mean)} (no interval)"
    return f"{form.format(mean)} ({form.format(low)} to {form.format(high)})"


HEAD = """# What others measured

Published by others and **not run here**, except the rows "ours". Two sources are weak: the replication
is an anonymous artifact of a paper under review, and muon_spectra is a repository that nobody has
reviewed. Their figures are copied as stated, intervals too.

- paper: README of github.com/zhehangdu/Newton-Muon (arXiv:2604.01472); `newton_muon_paper.csv`.
- replication: the artifact of "Selective Newton-Muon", and muon_spectra; `replications.csv`.
- optimizer track: track 3 of github.com/KellerJordan/modded-nanogpt at f411b3d3, folder
  records/track_3_optimization/results, 84 runs; losses every 500 steps and over the last 100 are in
  `track3_muon_newton_muon.csv`, final losses and times of some in `modded_nanogpt_track3_finals.csv`.
- record 4's curve, from the same repository, is in [records/speedrun](../speedrun/record4.csv).

Written by `python scripts/published.py` from these files and [records/cpu](../cpu/): change those, not
this page.

![steps saved by Newton-Muon](steps_saved.png)

| source | setting | runs of each | loss below Muon's (95 %) | loss of 100 steps | fewer steps (95 %) |
| --- | --- | --- | --- | --- | --- |
"""

READING = """
## How to read it

- **Steps from losses.** A difference of final losses becomes a number of steps by the slope of the loss,
  which is measured. On the optimizer track it is that of the last {last} steps of Newton-Muon's own runs,
  and `harness.estimates.steps_saved` gives the interval. For record 4's configuration it is that from
  step {start} to {end} of record 4's published curve ({record4:.4f} for 100 steps), taken as known. Our
  own runs have a third arm of 564 steps, or runs of Muon with 540, 600 and 660, between which its loss
  is linear in the logarithm of the steps, as in those studies. The optimizer track's rule of thumb is
  {rule:.4f}. A slope within one schedule is not quite that of two schedules of different length:
  nobody has published both.
- **Numbers of steps.** Record 4: 6200. Optimizer track: the three baselines 3375, 3350 and 3250,
  Newton-Muon (#15) 3300. Ours: 600.
- **Borrowed slope.** Rows with "{borrowed}" have no published curve. Their steps are a guess that shows
  the sign and the order of size; they are hollow in the picture.
- **Single runs.** For the paper's one run of each the interval is that of two single runs with the
  standard deviation known for the speedrun, {sd}.
- **The paper's second setting** has neither a number of steps nor a curve in what was copied: its loss
  stands alone.
- **Optimizer track.** Newton-Muon's auxiliary AdamW was not tuned. Others ran it again, four times
  (unreviewed): the mean first step at the target was 3256, and their mean loss at step 3275 misses the
  track's rule. Ours is [its model at CPU size](../cpu/2026-11-30_optimizer_track/README.md), both tuned.
- **Tuned finely.** Both at the lowest point of a quadratic in both rates and the momentum, with what that
  leaves uncertain [in the interval](../cpu/2026-11-30_fine_tuning/README.md). The other rows of ours take
  the best of a grid for the optimum, which makes their intervals too narrow.
- **Which matrices.** "All matrices", "mlp_proj alone" and "all but mlp_proj" are those that
  [a study of ours](../cpu/2026-11-30_where_the_gain_comes_from/README.md) preconditions, each way
  tuned by itself.
- **1 B.** Newton-Muon is worse in three of three seeds, and ahead only until step 1400 to 2500 of 6200.
- **muon_spectra.** One run; in its second setting Newton-Muon is worse, by 0.0025.

## The time of a step

| source | how | Newton-Muon's step against Muon's |
| --- | --- | --- |
"""

AFTER_TIME = """| [records/bench](../bench/README.md) | H100, estimated, mean step | +0.3 to 0.6 % |
| ours | CPU track, `scripts/bench.py`, measured | {cpu} |

The estimate counts only Z Z^T, at assumed rates, and G P. It leaves out:

- the split of the long sum of Z Z^T over multiprocessors, which a 768 x 768 result needs, and which may
  double its time;
- the factorisation, on one GPU of all blocks: 5 to 20 ms a refresh;
- the second graph that a collecting step uses, and the launches of G P.

With these, as far as they can be derived, it is 1.004 to 1.015
([how much each adds](../bench/README.md#newton-muons-overhead)).

The published figures are of other implementations, which refresh in their own ways.

## In short

"""


def row_text(row):
    saved = slope = ""
    if row.saved:
        saved = interval([None if s is None else 100 * s for s in row.saved], "{:z.1f} %")
        slope = f"{row.slope:.4f}, {row.slope_from}"
    cells = (row.source, row.setting, row.runs, interval(row.gain, "{:+.4f}"), slope, saved)
    return f"| {' | '.join(cells)} |"


def percent(row):
    mean, low, high = row.saved
    return f"{100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def percent_more(row):
    """Of a row in which Newton-Muon needs more steps than Muon."""
    mean, low, high = row.saved
    return f"{-100 * mean:.1f} % ({-100 * high:.1f} to {-100 * low:.1f}) more"


def sentences(rows):
    """What README may say, with the figures of the page."""
    def find(source, start):
        return next(row for row in rows if row.source == source and row.setting.startswith(start))
    replication = find(REPLICATION, "124 M, record 4")
    tuned = find(TRACK3, f"124 M, {BASELINES['36']}")
    first = find(TRACK3, f"124 M, {BASELINES['6']}")
    large = find(REPLICATION, "LLaMA/SwiGLU 1B")
    small = find(OURS, "0.2 M, optimizer track's model")
    fine = find(OURS, "0.2 M, tuned finely")
    ours = [row for row in rows if row.source == OURS and row not in (small, fine)
            and "mlp_proj" not in row.setting]
    alone = find(OURS, "0.2 M, mlp_proj alone")
    others = find(OURS, "0.2 M, all but mlp_proj")
    low, high = (100 * end([row.saved[0] for row in ours]) for end in (min, max))
    return [
        f"Where the paper measured it, on record 4's 124 M model, three pairs of runs by others show "
        f"{percent(replication)} fewer steps than Muon; the paper claims 6 %.",
        f"On the speedrun's optimizer track Newton-Muon saves {percent(first)} against the first Muon "
        f"baseline, and nothing against the best tuned one: it takes {percent_more(tuned)}. "
        f"So it does on that track's model at toy size, both tuned alike: {percent_more(small)}.",
        f"At 1 B parameters it is worse (its loss is {-large.gain[0]:.4f} above Muon's); our own toy "
        f"models of 0.06 to 0.8 M, built like record 4's, save {low:.1f} to {high:.1f} % "
        f"at rates from a grid, and {percent(fine)} where rates and momentum of both were tuned finely.",
        f"Where the preconditioner works, at that size: on mlp_proj alone the loss ends "
        f"{alone.gain[0] - others.gain[0]:.4f} lower than on all other matrices alone; against Muon that is "
        f"{percent(alone)} fewer steps, and {percent(others)}."]


def cpu_overhead():
    """The mean step of Newton-Muon against Muon's, from the benchmark filed in records/bench."""
    ratio = json.loads((ROOT / "records/bench/cpu.json").read_text())["ratios"]["newton_muon/muon"]
    return interval([100 * (ratio[name] - 1) for name in ("mean_step", "low", "high")], "{:+.1f} %")


def page():
    """The text of records/published/README.md."""
    rows = all_rows()
    reading = READING.format(last=TRACK3_LAST, start=RECORD4_SLOPE_FROM, end=RECORD4_STEPS, borrowed=BORROWED,
                             record4=100 * record4_slope(), rule=100 * estimates.SPEEDRUN_SLOPE,
                             sd=estimates.SPEEDRUN_SD)
    times = [f"| {who} | {how} | {100 * ratio:+.2f} % |" for who, how, ratio in overheads()]
    numbered = [f"{i}. {sentence}" for i, sentence in enumerate(sentences(rows), start=1)]
    tables = ["\n".join(lines) + "\n" for lines in (map(row_text, rows), times, numbered)]
    return HEAD + tables[0] + reading + tables[1] + AFTER_TIME.format(cpu=cpu_overhead()) + tables[2]


# ---- Picture

def draw(rows, path):
    """Steps saved, a row for each setting."""
    rows = [row for row in rows if row.saved]
    color = pictures.COLORS["newton_muon"]
    figure = Figure(figsize=(8, 0.34 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    labels = []
    for y, row in enumerate(rows):
        mean, low, high = (None if s is None else 100 * s for s in row.saved)
        borrowed = row.slope_from == BORROWED
        marker = "s" if row.source == OURS else "o"
        bars = None if low is None else [[mean - low], [high - mean]]
        face = "white" if borrowed else color
        axes.errorbar(mean, y, xerr=bars, fmt=marker, color=color, mfc=face, capsize=3)
        labels.append(f"{row.source}: {row.setting}")
        if y and rows[y - 1].source != row.source:
            axes.axhline(y - 0.5, color="lightgrey", lw=0.8)
    kinds = (("o", color, "published"), ("o", "white", "published, slope borrowed"), ("s", color, "ours"))
    for marker, face, label in kinds:
        axes.plot([], [], marker, color=color, mfc=face, label=label)
    axes.axvline(0, color="black", lw=0.8)
    axes.axvline(6, color="black", lw=0.8, ls=":")
    axes.annotate("claimed", (6, -0.75), ha="center", va="bottom", fontsize=9)
    axes.annotate("Muon", (0, -0.75), ha="center", va="bottom", fontsize=9)
    axes.set(yticks=range(len(rows)), yticklabels=labels, ylim=(len(rows) - 0.5, -0.8),
             xlabel="fewer steps than Muon, % (95 %)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


@command()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    args = parser.parse_args()
    path = FOLDER / "README.md"
    text = page()
    if args.check:
        if not path.exists() or path.read_text() != text:
            sys.exit(f"error: {path} is out of date; run python scripts/published.py")
        print(f"{path} is up to date")
        return
    path.write_text(text)
    draw(all_rows(), FOLDER / "steps_saved.png")
    print(text)


if __name__ == "__main__":
    main()
