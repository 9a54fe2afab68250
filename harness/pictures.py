"""What all pictures share: a colour, a line and a name for each optimizer, and the mean curve of a group.

Pictures must be readable in greyscale too: groups differ in lines and markers, not only in colour.
"""
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.command import printable
from harness.estimates import t_quantile
from harness.runs import DIVERGED

NAMES = {"muon": "Muon", "newton_muon": "Newton-Muon", "adamw": "AdamW", "sgd": "SGD"}
COLORS = {"muon": "#0072b2", "newton_muon": "#d55e00", "adamw": "#8c8c8c", "sgd": "#000000"}
LINES = {"muon": "-", "newton_muon": "--", "adamw": "-.", "sgd": ":"}
OTHERS = ("#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5d3a9b", "#4b0d0d")  # further optimizers, in turn
MARKERS = "osD^vPX*<>ph"
SHADES = (0, 0.45, -0.4, 0.25, -0.65)  # of one optimizer's groups: its colour, lighter, darker (negative)
SETTINGS = {"num_iterations": "{} steps", "learning_rate": "lr {}", "hidden_learning_rate": "hidden lr {}"}
LEAST_TELLING = ("warmdown_iters", "learning_rate", "hidden_learning_rate")  # left out of a label if possible
POINTS = 1000  # of a curve; those with more evaluations are thinned
OUTLIER = 1.5  # a run that took so many times the median of its group does not set the scale of time


# names and styles


def short_name(optimizer):
    """What a picture calls an optimizer of a configuration: Muon, or the class of module:Class."""
    return printable(NAMES.get(optimizer, optimizer.rpartition(":")[2]))


def styles(optimizers):
    """{optimizer: dict(color, linestyle)}: its own if it has them, so that every picture shows it alike."""
    others = [name for name in dict.fromkeys(optimizers) if name not in COLORS]
    chosen = {}
    for i, name in enumerate(others):
        chosen[name] = dict(color=OTHERS[i % len(OTHERS)], linestyle=(0, (5, 1 + i % 5)))
    for name, color in COLORS.items():
        chosen[name] = dict(color=color, linestyle=LINES[name])
    return chosen


def shaded(color, amount):
    """The color "#rrggbb", mixed with white by `amount`, or with black if that is negative."""
    parts = [int(color[i:i + 2], 16) for i in (1, 3, 5)]
    goal = 255 if amount > 0 else 0
    mixed = [round(part + abs(amount) * (goal - part)) for part in parts]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def group_styles(groups):
    """For each group dict(color, linestyle, marker): its optimizer's, each further group in another shade."""
    families = [group.optimizer or group.label for group in groups]
    own = styles(families)
    found = []
    for i, family in enumerate(families):
        shade = SHADES[families[:i].count(family) % len(SHADES)]
        found.append(dict(color=shaded(own[family]["color"], shade), linestyle=own[family]["linestyle"],
                          marker=MARKERS[i % len(MARKERS)]))
    return found


def needed_settings(rows):
    """The fewest names, found greedily, by which the `rows` of {setting: value} differ as they do by all."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def different(chosen):
        return len({tuple(row.get(name) for name in chosen) for row in rows})

    # what says least is tried first, the number of steps last
    order = [name for name in LEAST_TELLING if name in names]
    order += [name for name in reversed(names) if name not in LEAST_TELLING and name != "num_iterations"]
    for name in [*order, "num_iterations"]:
        rest = [other for other in names if other != name]
        if different(rest) == different(names):
            names = rest
    return names


def short_labels(groups):
    """A short name for each group: its optimizer, and the fewest settings that tell it from the others."""
    optimizers = dict.fromkeys(group.optimizer for group in groups if group.optimizer)
    rows = {}  # of each group's settings
    needed = {}  # of each optimizer's groups
    for optimizer in optimizers:
        same = [group for group in groups if group.optimizer == optimizer]
        for group in same:
            rows[group.label] = dict(re.findall(r"(\w+)=(\S*)", group.label.removeprefix(optimizer)))
        needed[optimizer] = needed_settings([rows[group.label] for group in same])
    names = [short_name(optimizer) for optimizer in optimizers]
    labels = []
    for group in groups:
        label = group.label
        if group.optimizer:
            name = short_name(group.optimizer)
            label = name if names.count(name) == 1 else printable(group.optimizer)
            row = rows[group.label]
            for setting in needed[group.optimizer]:
                if setting in row:
                    text = SETTINGS.get(setting, setting.replace("_", " ") + " {}")
                    label += ", " + text.format(row[setting])
        while label in labels:
            label += "'"
        labels.append(label)
    return labels


def plain_text(label):
    """`label` as matplotlib shows it as it is: neither hidden, as with a leading _, nor a formula."""
    if label.startswith("_"):
        label = " " + label
    return label.replace("$", r"\$")


# curves


def thinned(losses, limit=POINTS):
    """Indices of about `limit` of the losses that keep the curve's shape, in order.

    The first, the last, the lowest, and the lowest and highest of equal parts. All, if there are no more
    than `limit`.
    """
    losses = np.asarray(losses, float)
    if len(losses) <= limit:
        return np.arange(len(losses))
    finite = np.isfinite(losses)
    low = np.where(finite, losses, np.inf)
    high = np.where(finite, losses, -np.inf)
    kept = {0, len(losses) - 1, int(np.argmin(low))}
    for part in np.array_split(np.arange(len(losses)), max(1, limit // 2)):
        kept.add(int(part[np.argmin(low[part])]))
        kept.add(int(part[np.argmax(high[part])]))
    return np.array(sorted(kept))


@dataclass
class MeanCurve:
    """A group's mean loss at each of its `steps`, with its 95 % interval by Student's t (NaN for one run).

    `seconds` is the median of the runs' training times there, so that one run that was halted does not count.
    """
    steps: np.ndarray
    seconds: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def common_steps(runs):
    """The steps of all the runs, of long runs those of `thinned`."""
    steps = sorted({run.steps[i] for run in runs for i in thinned(run.losses)})
    limit = max(100, min(4 * POINTS, 10 ** 7 // len(runs)))  # for the memory
    if len(steps) <= limit:
        return np.array(steps, float)
    even = np.linspace(0, len(steps) - 1, limit).astype(int)
    return np.array(steps, float)[even]


def mean_curve(runs):
    """The MeanCurve of the runs, at the steps of any of them. None if no run has a finite loss.

    Between evaluations a run's loss is on the straight line. A mean is of the runs that were finite there.
    """
    steps = common_steps(runs)
    losses = np.full((len(runs), len(steps)), np.nan)
    seconds = losses.copy()
    for i, run in enumerate(runs):
        own = np.array(run.losses, float)
        good = np.abs(own) < DIVERGED
        if good.any():
            own_steps = np.array(run.steps, float)[good]
            losses[i] = np.interp(steps, own_steps, own[good], left=np.nan, right=np.nan)
            own_seconds = np.array(run.seconds, float)[good]
            seconds[i] = np.interp(steps, own_steps, own_seconds, left=np.nan, right=np.nan)
    count = np.isfinite(losses).sum(0)
    used = count > 0
    if not used.any():
        return None
    steps, losses, seconds, count = steps[used], losses[:, used], seconds[:, used], count[used]
    mean = np.nansum(losses, 0) / count
    half = np.full(len(steps), np.nan)
    for n in set(count[count > 1].tolist()):
        here = count == n
        sd = np.sqrt(np.nansum((losses[:, here] - mean[here]) ** 2, 0) / (n - 1))
        half[here] = t_quantile(0.975, n - 1) * sd / n ** 0.5
    times = np.full(len(steps), np.nan)
    timed = np.isfinite(seconds).any(0)
    if timed.any():
        # the median of fewer runs may be lower, but time does not run backwards
        times[timed] = np.maximum.accumulate(np.nanmedian(seconds[:, timed], 0))
    kept = thinned(mean)
    return MeanCurve(steps[kept], times[kept], mean[kept], (mean - half)[kept], (mean + half)[kept])


def longest_time(groups):
    """The longest training time among the runs of the groups, but for outliers; 0 if no run has one."""
    longest = 0
    for group in groups:
        times = np.array([run.seconds[-1] for run in group.runs], float)
        times = times[np.isfinite(times)]
        if times.size:
            longest = max(longest, times[times <= OUTLIER * np.median(times)].max())
    return float(longest)


def range_of_losses(groups, target):
    """(lowest, highest) loss that a picture of the whole runs shows, by the median run of each group.

    The first fifth of a run is left out: it would hide the differences of the rest.
    """
    lowest = highest = target
    for group in groups:
        lows = []
        highs = []
        for run in group.runs:
            finite = [loss for loss in run.losses if abs(loss) < DIVERGED]
            if finite:
                lows.append(min(finite))
                highs.append(finite[len(finite) // 5])
        if lows:
            lowest = min(lowest, float(np.median(lows)))
            highest = max(highest, float(np.median(highs)))
    return lowest, highest


def near_the_best(ends):
    """For each final loss whether a zoom on the best shows it: up to five times the median distance."""
    distances = np.array(ends) - min(ends)
    middle = float(np.median(distances))
    if middle == 0:
        return [True] * len(ends)
    return (distances <= 5 * middle).tolist()


# drawing


def draw_curve(axis, x, curve, style, label=None):
    """The mean as a line over its band; at most some 20 markers."""
    every = max(1, len(x) // 20)
    axis.fill_between(x, curve.low, curve.high, color=style["color"], alpha=0.22, linewidth=0)
    axis.plot(x, curve.mean, linewidth=1.6, markersize=4.5, markevery=every, label=label, **style)


def label_ends(axis, ends, gap=0.065):
    """Writes the texts of `ends`, [(y, text, color)], at the right of the axis, `gap` of its height apart."""
    low, high = axis.get_ylim()
    places = []
    for y, text, color in sorted(ends):
        place = min(max((y - low) / (high - low), gap / 2), 1 - gap / 2)
        if places:
            place = max(place, places[-1][0] + gap)
        places.append((place, text, color))
    over = max(0, places[-1][0] - (1 - gap / 2)) if places else 0
    for place, text, color in places:
        axis.text(1.015, place - over, plain_text(text), color=shaded(color, -0.15), transform=axis.transAxes,
                  va="center", ha="left", fontweight="bold")


def save(figure, path):
    """Writes a figure; the same figure gives the same bytes."""
    import matplotlib
    path = Path(path)
    # matplotlib would write its version, or the time, into the file
    metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "gpt2"}):
        figure.savefig(path, dpi=200, metadata=metadata.get(path.suffix))
