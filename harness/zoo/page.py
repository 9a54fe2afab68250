"""The page of the comparison, records/zoo/README.md, and its picture."""
import ast
import importlib
import inspect
import math
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from harness import estimates
from harness.command import ROOT, markdown
from harness.estimates import Estimate
from harness.pictures import COLORS
from harness.tuning import RATES
from harness.zoo.optimizers import ZOO
from harness.zoo.table import SEEDS, TUNING_SEEDS, Table, read_overhead
from harness.zoo.training import LENGTHS
from train_gpt2 import UserError

RECORDS = ROOT / "records" / "zoo"
PICTURE = "differences.png"
ARROWS = {1: "↑", -1: "↓"}

HEAD = """# The optimizers people ask about

`python scripts/zoo.py` tunes each optimizer with the same effort, runs it with six other seeds, and
writes this page. `--help` says how. Every run behind the table is a line of `runs.csv`.

How to read the table:

- **Against Muon**: the difference of the final losses, seed by seed, with its 95 % interval. All
  optimizers share the seeds. **=** means that the interval contains 0: the optimizer cannot be told
  from Muon. One in twenty of those equal to Muon will fail this.
- **Steps saved**: Muon would need more steps, or fewer, to reach the same loss; this is the share
  that the optimizer does without. Muon's loss at other lengths comes from its runs at 0.5 to 1.5 of
  the steps, interpolated linearly in the logarithm of the steps. The interval is that of the
  difference in loss, converted the same way.
- **Time of a step**: relative to Muon's. The two take turns in one process, on the machine that
  `overhead.json` names.
- **State**: bytes per hidden parameter (fp32), without the buffer through which Muon and its
  relatives share updates.
- **Lines**: lines of code in the optimizer's file, without what it imports from others.
- **Rates, setting**: the tuned values. Which setting is tuned was our choice: one of the
  optimizer's own where it has any, else the momentum. **An arrow marks an end of what was tried**: no
  larger value (↑), no smaller one (↓) or neither (↕) was tried with the other two as they are, so the
  optimizer may be better than its place. Tuning tries 12 points of each; `--refine` goes on until
  there is no arrow, with 12 more at most.
"""


class Result(NamedTuple):
    """What the page says of an optimizer."""
    name: str
    loss: Estimate  # of the mean final loss; nan if a run diverged
    gap: Estimate  # of the difference to Muon; None for Muon itself and where a run diverged
    cells: tuple  # of the table


# the numbers


def mean_loss(finals):
    """Estimate of the mean of {seed: final loss}; nan if one diverged."""
    values = list(finals.values())
    if not np.isfinite(values).all():
        return Estimate(math.nan)
    return estimates.mean_interval(values)


def share_saved(change, curve, steps):
    """1 - steps / s, where Muon takes s steps to a loss that is `change` above that of its `steps` steps.

    `curve` is {steps: mean final loss} of Muon: between its points the loss is linear in the logarithm of the
    steps. nan for a loss beyond them.
    """
    lengths, losses = zip(*sorted(curve.items(), reverse=True))  # rising losses
    needed = np.interp(curve[steps] + change, losses, np.log(lengths), left=math.nan, right=math.nan)
    return 1 - steps / math.exp(needed)


def steps_saved(gap, curve, steps):
    """Text of share_saved() with its interval. `gap` is an Estimate of the difference to Muon's loss."""
    def text(change):
        share = share_saved(change, curve, steps)
        if not math.isnan(share):
            return f"{share:z.1%}"
        if change < 0:
            return f"above {1 - steps / max(curve):.0%}"
        return f"below {1 - steps / min(curve):.0%}"

    middle = text(gap.mean)
    ends = [text(change) for change in (gap.high, gap.low) if change is not None]
    if all(end == middle for end in ends):
        return middle
    return f"{middle} ({' to '.join(ends)})"


def marked_values(table, best):
    """Text of the rates and the setting of the point `best`, with an arrow at each end of what was tried.

    A setting that has its default and no arrow is left out.
    """
    name, steps, *values = best
    entry = ZOO[name]
    arrows = {}
    for what, side, _ in entry.neighbours(best, table.tried(name, steps)):
        arrows[what] = "↕" if what in arrows else ARROWS[side]
    texts = [f"{value:g}{arrows.get(rate, '')}" for rate, value in zip(RATES, values)]
    if values[-1] or entry.setting in arrows:
        texts.append(f"{entry.setting} {entry.value(values[-1]):g}{arrows.get(entry.setting, '')}")
    return ", ".join(texts)


def lines_of_code(entry):
    """Lines of the optimizer's module that are neither empty, comments nor its docstring.

    None for an optimizer of torch's.
    """
    module = entry.optimizer.partition(":")[0]
    if not module.startswith("optimizers."):
        return None
    source = inspect.getsource(importlib.import_module(module))
    docstring = ast.parse(source).body[0].end_lineno
    lines = [line.strip() for line in source.splitlines()[docstring:]]
    return sum(1 for line in lines if line and not line.startswith("#"))


# the table


def interval(estimate, form):
    """'mean (low to high)', each written in the format `form`; the mean alone if there is no interval."""
    text = format(estimate.mean, form)
    if estimate.low is not None:
        text += f" ({estimate.low:{form}} to {estimate.high:{form}})"
    return text


def is_equal(gap):
    """Whether the optimizer cannot be told from Muon: the interval of the difference contains 0."""
    return gap.low is not None and gap.low * gap.high <= 0


def result(table, best, finals, costs, muon, curve):
    """The Result of an optimizer whose best point is `best`.

    `finals` and `muon` are {seed: final loss}, its own and Muon's.
    """
    name, steps, *_ = best
    entry = ZOO[name]
    loss = mean_loss(finals)
    gap = None
    against = ""
    saved = ""
    if name != "muon" and math.isfinite(loss.mean):
        gap = estimates.mean_interval([finals[seed] - muon[seed] for seed in finals])
        against = interval(gap, "+.4f")
        if is_equal(gap):
            against += " ="
        saved = steps_saved(gap, curve, steps)
    time = ""
    if "mean_step" in costs:
        time = f"{costs['mean_step']:.2f} ({costs['low']:.2f} to {costs['high']:.2f})"
    lines = str(lines_of_code(entry) or "")
    cells = (f"`{name}`", interval(loss, ".4f"), against, saved, time, f"{costs['state_bytes']:.1f}",
             lines, marked_values(table, best), entry.source)
    return Result(name, loss, gap, cells)


def complete_points(table, name, steps):
    """[(learning_rate, hidden_learning_rate, setting), ...] that have all results, Muon's at all LENGTHS."""
    lengths = LENGTHS if name == "muon" else (1.0,)
    by_length = [table.results_by_point(name, round(length * steps)) for length in lengths]
    return [point for point in by_length[0]
            if all(set(found.get(point, {})) == set(SEEDS) for found in by_length)]


def values_of(point):
    """Text of (learning_rate, hidden_learning_rate, setting)."""
    return ", ".join(str(value) for value in point if value != "")


def section(folder):
    """The part of the page on the track in `folder`: (text, [Result, ...] by final loss)."""
    table = Table(folder / "runs.csv")
    costs = read_overhead(folder / "overhead.json")
    steps = max((point.steps for point in table.losses if point.seed in TUNING_SEEDS), default=0)
    best = {}  # name -> point, or None
    shown = {}  # the same, or the older one while the results of a new best point are not complete
    for name in ZOO:
        tried = table.tried(name, steps)
        best[name] = min(tried, key=tried.get, default=None)
        complete = complete_points(table, name, steps)
        shown[name] = min((point for point in tried if point[2:] in complete), key=tried.get, default=None)
    curve = {}  # of Muon: steps -> mean final loss
    if shown["muon"]:
        for number in (round(length * steps) for length in LENGTHS):
            finals = table.results("muon", number, shown["muon"], best["muon"])
            curve[number] = float(np.mean(list(finals.values())))

    results = []
    waiting = []
    unfinished = []
    older = []
    for name in ZOO:
        if not (shown[name] and shown["muon"] and name in costs):
            waiting.append(f"`{name}`")
            continue
        muon = table.results("muon", steps, shown["muon"], best["muon"])
        finals = table.results(name, steps, shown[name], best[name])
        results.append(result(table, shown[name], finals, costs[name], muon, curve))
        if shown[name] != best[name]:
            unfinished.append(f"`{name}` ({values_of(best[name][2:])})")
        for point, finals in table.results_by_point(name, steps).items():
            if point not in (shown[name][2:], best[name][2:]) and set(finals) == set(SEEDS):
                older.append(f"`{name}` {mean_loss(finals).mean:.4f} ({values_of(point)})")
    results.sort(key=lambda found: math.inf if math.isnan(found.loss.mean) else found.loss.mean)

    head = ("optimizer", "final loss (95 %)", "against Muon, by pairs", "steps saved", "time of a step",
            "state, bytes", "lines", "rates, setting", "source")
    text = [f"## {folder.name}\n",
            f"{steps} steps, {len(SEEDS)} seeds; {len(results)} of {len(ZOO)} optimizers.\n",
            f"![difference of the final loss to Muon's]({folder.name}/{PICTURE})\n",
            markdown([head, *(found.cells for found in results)])]
    if older:
        text.append(f"Final losses at the best points before the tuning went on: {', '.join(older)}.\n")
    if unfinished:
        text.append("Tuned further, but not yet run to the end at the new best point, so that the table has "
                    f"the results of the older one: {', '.join(unfinished)}.\n")
    if waiting:
        text.append(f"Not run yet, or not to the end: {', '.join(waiting)}.\n")
    return "\n".join(text), results


# the picture


def in_groups(results):
    """{heading: [Result, ...]} of the optimizers that are better than Muon, equal to it, and worse."""
    groups = {"better than Muon": [], "cannot be told from Muon": [], "worse than Muon": [], "diverged": []}
    for found in results:
        if found.name == "muon":
            continue
        if found.gap is None:
            groups["diverged"].append(found)
        elif found.gap.low is None or is_equal(found.gap):
            groups["cannot be told from Muon"].append(found)
        elif found.gap.mean < 0:
            groups["better than Muon"].append(found)
        else:
            groups["worse than Muon"].append(found)
    return {heading: found for heading, found in groups.items() if found}


def scale(results):
    """(left, right) of the axis.

    It ends at twice the median distance from Muon: what lies further does not set the scale.
    """
    gaps = [found.gap for found in results if found.gap]
    if not gaps:
        return -0.01, 0.01
    bound = 2 * float(np.median([abs(gap.mean) for gap in gaps])) or 0.01
    lows = [gap.low if gap.low is not None else gap.mean for gap in gaps]
    highs = [gap.high if gap.high is not None else gap.mean for gap in gaps]
    left = max(min(lows), -bound)
    right = min(max(highs), bound)
    left = min(left, 0)
    right = max(right, 0)
    margin = 0.04 * (right - left) or 0.001
    return left - margin, right + margin


def plot(results):
    """A forest plot: the difference of each optimizer's final loss to Muon's, with its 95 % interval."""
    groups = in_groups(results)
    rows = sum(1 + len(found) for found in groups.values())
    figure = Figure(figsize=(8.3, 1.2 + 0.225 * max(rows, 4)), layout="constrained")
    axes = figure.subplots()
    left, right = scale(results)
    axes.axvline(0, color=COLORS["muon"], linewidth=1.2)
    axes.text(0, -0.75, "Muon", color=COLORS["muon"], ha="center", va="bottom", fontsize=9)
    labels = {}  # height -> name
    y = 0
    for heading, found in groups.items():
        axes.axhspan(y - 0.5, y + 0.5, color="0.92", linewidth=0)
        labels[y] = heading
        y += 1
        for each in found:
            labels[y] = ZOO[each.name].label
            draw_row(axes, y, each, left, right)
            y += 1
    axes.set_xlim(left, right)
    axes.set_ylim(y - 0.4, -0.6)  # the best is on top
    axes.set_yticks(list(labels), list(labels.values()), fontsize=9)
    for label in axes.get_yticklabels():
        if label.get_text() in groups:
            label.set_weight("bold")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9)
    axes.grid(axis="x", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.set_xlabel("final loss minus Muon's, mean and 95 % interval (left is better, arrow: off the scale)",
                    fontsize=9)
    return figure


def draw_row(axes, y, found, left, right):
    """A mark with its interval, an arrow at the edge if it lies beyond, and the numbers at the right."""
    color = COLORS.get(found.name, "0.2")
    edge = axes.get_yaxis_transform()  # x from 0 to 1
    if found.gap is None:
        axes.text(1.03, y, "diverged", transform=edge, va="center", fontsize=8)
        return
    gap = found.gap
    if gap.mean > right:
        axes.plot(right, y, marker=">", color=color, markersize=7, clip_on=False)
    elif gap.mean < left:
        axes.plot(left, y, marker="<", color=color, markersize=7, clip_on=False)
    else:
        if gap.low is not None:
            axes.plot([max(gap.low, left), min(gap.high, right)], [y, y], color=color, linewidth=1.6)
        equal = gap.low is None or is_equal(gap)
        inside = "white" if equal else color
        axes.plot(gap.mean, y, marker="o", color=color, markersize=5.5, markerfacecolor=inside)
    axes.text(1.03, y, interval(gap, "+.4f"), transform=edge, va="center", fontsize=8)


# the page


def write_page(records, check=False):
    """Writes README.md in `records`, and the pictures.

    `check` only compares the page. UserError if it is stale.
    """
    path = records / "README.md"
    sections = {file.parent.name: section(file.parent) for file in sorted(records.glob("*/runs.csv"))}
    parts = [HEAD, *(text for text, _ in sections.values())]
    notes = records / "notes.md"
    if notes.exists():
        parts.append(notes.read_text(encoding="utf-8"))
    page = "\n".join(parts)
    if check:
        if not path.exists() or path.read_text(encoding="utf-8") != page:
            raise UserError(f"{path} is stale; run `python scripts/zoo.py --page`")
        return
    path.write_text(page, encoding="utf-8")
    for track, (_, results) in sections.items():
        plot(results).savefig(records / track / PICTURE, dpi=200)
    counts = [f"{track} {len(results)}" for track, (_, results) in sections.items()]
    print(f"{path}: {', '.join(counts) or 'no'} optimizers")
