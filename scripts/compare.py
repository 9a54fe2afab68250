"""Compare runs by their final losses: means with intervals, valid records, and each group against a baseline.

    python scripts/compare.py logs/cpu [--baseline muon] [--target 1.75] [--png FILE] [--html FILE]
    python scripts/compare.py records/cpu/2026-11-28*/*_600_* records/cpu/2026-11-25_muon*/adamw_600_* \\
        --readme_png records/cpu/readme_curves.png

A PATH is a run's folder, a log that the speedrun published, or a folder that has such runs and logs in it or
below. Runs of one optimizer, configuration and number of steps are a group, whatever their seeds, names and
machines; logs without a run.json are a group if they lie in one folder (see --group_by). Runs of different
tracks (data, model, batch, validation) are refused.

final loss        That of a run whose schedule ends there. A run that diverged leaves its group without a
                  result. So does one that ended early, unless --at_step names the step at which to compare,
                  or all logs of a published group end at the same step.
valid record      The mean final loss is at or below the target with p < 0.01, by a one-sided t-test. On the
                  speedrun's track also (3.28 - mean) sqrt(n) >= 0.004, the rule of its optimizer track, and
                  for fewer than 5 runs a z-test with the standard deviation that is known for it, 0.0013.
                  Logs without a run.json are taken for the speedrun's if the target is 3.28.
against           Difference of the mean final losses with its interval and one-sided p, by Welch's t-test;
                  change in the time of a step, by the same test on logarithms. "track 3" is the speedrun's
                  rule for two groups: (loss difference + 0.0045 for each 100 steps fewer) / sqrt(1/n1 +
                  1/n2), better from 0.004 on.
95 % of a mean    By Student's t, and by the percentile bootstrap (9999 resamples of the runs).
first crossing    Where the straight line between the first evaluation at or below the target and the one
                  before meets it. It depends on the schedule, the target and the evaluations' interval, so
                  nothing is decided by it.
pictures          A line is the mean of a group's runs, its band the 95 % interval of that mean. Times are
                  medians; a run that took far longer than its group is marked, not drawn. Curves of more
                  than 1,000 evaluations are thinned: the first, the last, the lowest and the extremes in
                  between are kept.
"""
import argparse
import difflib
import json
import math
import re
import sys
import textwrap
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command
import numpy as np

from harness import pictures
from harness import runs as reading
from harness.estimates import (
    SPEEDRUN_MARGIN, Change, Estimate, Record, mean_interval, ratio_change, record, track3_margin, welch)
from train_gpt2 import UserError

SPEEDRUN_TARGET = 3.28
PLOTS = (".png", ".pdf", ".svg")  # endings of what --png writes
WIDTH = 128  # of the printed text
LABEL_WIDTH = 54  # characters of a line in a legend
SHOWN_RUNS = 1000  # single runs in the page; further ones count in the means only


# the results


@dataclass
class Summary:
    """A group against the target and the baseline.

    What does not exist is None, or an Estimate or Change of None.
    """
    group: reading.Group
    steps: int
    loss: Estimate
    sd: float
    seconds: Estimate
    step_ms: Estimate
    tokens: float
    crossings: list  # for each run (steps, seconds), or None
    record: Record
    loss_change: Change = Change()
    step_change: Change = Change()
    margin: float = None  # against the baseline, by the speedrun's rule

    @property
    def label(self):
        return self.group.label

    @property
    def runs(self):
        return self.group.runs


def find_baseline(groups, name=None):
    """The group of this label or, if it is the only one, of this optimizer.

    By default the first of muon that has a result, else the first of all.
    """
    if name is None:
        return next((group for group in groups if group.optimizer == "muon" and not group.fault), groups[0])
    fits = [group for group in groups if group.label == name]
    if not fits:
        fits = [group for group in groups if group.optimizer == name]
    if len(fits) == 1:
        return fits[0]
    labels = [group.label for group in groups]
    near = difflib.get_close_matches(name, labels, n=1, cutoff=0)[0]
    what = "several groups match" if fits else "no group matches"
    raise UserError(f"{what} the baseline '{name}'; the nearest is '{near}', "
                    f"all are: {', '.join(map(repr, labels))}")


def common_target(runs):
    """The target_val_loss of all runs; 3.28, the speedrun's, if none has one. UserError if they differ."""
    targets = sorted({run.config["target_val_loss"] for run in runs if "target_val_loss" in run.config})
    if len(targets) > 1:
        raise UserError(f"the runs have different targets ({', '.join(map(str, targets))}); "
                        "choose one with --target")
    return targets[0] if targets else SPEEDRUN_TARGET


def estimate(values):
    """The mean of `values` with its intervals; none unless all of them exist."""
    if not values or not all(map(math.isfinite, values)):
        return Estimate(None)
    return mean_interval(values)


def difference(new, old):
    """Change of the mean from `old` to `new`, and the chance of one this low without a true difference.

    By Welch's t-test.
    """
    mean = float(np.mean(new) - np.mean(old))
    if min(len(new), len(old)) < 2 or np.ptp(new) == np.ptp(old) == 0:
        return Change(mean)
    return Change(mean, *welch(new, old))


def judge(runs, target):
    """The Record of the runs of a group that has a result."""
    speedrun = target == SPEEDRUN_TARGET and all(map(reading.is_speedrun, runs))
    verdict = record([run.final for run in runs], target, speedrun=speedrun)
    unknown_track = not all(run.config for run in runs)
    if verdict.p is not None and target == SPEEDRUN_TARGET and unknown_track:
        verdict = verdict._replace(verdict=verdict.verdict.replace(")", ", if the speedrun's)"))
    return verdict


def summarize(group, target):
    """The Summary of a group, not yet against a baseline."""
    runs = group.runs
    summary = Summary(
        group, steps=None, loss=Estimate(None), sd=None, tokens=None,
        seconds=estimate([run.seconds[-1] for run in runs]),
        step_ms=estimate([run.step_ms for run in runs]),
        crossings=[run.first_crossing(target) for run in runs],
        record=Record(False, f"no: {group.fault}"))
    if group.fault:
        return summary
    losses = [run.final for run in runs]
    summary.steps = runs[0].steps[-1]
    summary.loss = estimate(losses)
    if len(losses) > 1:
        summary.sd = float(np.std(losses, ddof=1))
    tokens_per_step = runs[0].facts.get("tokens_per_step")
    if tokens_per_step:
        summary.tokens = tokens_per_step * summary.steps
    summary.record = judge(runs, target)
    return summary


def set_against(new, old):
    """Fills in how the Summary `new` differs from that of the baseline, `old`."""
    if not new.group.fault and not old.group.fault:
        new.loss_change = difference([run.final for run in new.runs], [run.final for run in old.runs])
        new.margin = track3_margin((new.loss.mean, new.steps, len(new.runs)),
                                   (old.loss.mean, old.steps, len(old.runs)))
    new_times = [run.step_ms for run in new.runs]
    old_times = [run.step_ms for run in old.runs]
    if all(map(math.isfinite, new_times + old_times)):
        new.step_change = ratio_change(new_times, old_times)


def compare(groups, baseline, target):
    """A Summary of each of the `groups`, in their order; `baseline` is for find_baseline."""
    summaries = [summarize(group, target) for group in groups]
    old = summaries[groups.index(find_baseline(groups, baseline))]
    for new in summaries:
        if new is not old:
            set_against(new, old)
    return summaries


# the tables


def shown(spec, *values):
    """The values as text, "n/a" where the first is None."""
    if values[0] is None:
        return "n/a"
    return " to ".join(format(value, spec) for value in values)


def with_interval(spec, e):
    """The two cells of an Estimate or a Change."""
    return shown(spec, e.mean), shown(spec, e.low, e.high)


def table_of_runs(summaries, first):
    rows = [("run", "group", "steps", "final loss", "seconds", "ms/step", f"{first}: step", "second")]
    for s in summaries:
        for run, crossing in zip(s.runs, s.crossings):
            met = ("never", "never")
            if crossing:
                met = (f"{crossing[0]:.0f}", f"{crossing[1]:.1f}")
            rows.append((run.name, s.label, f"{run.steps[-1]}", f"{run.losses[-1]:.4f}",
                         f"{run.seconds[-1]:.1f}", f"{run.step_ms:.1f}", *met))
    return rows


def table_of_losses(summaries):
    rows = [("group", "runs", "steps", "mean loss", "95 % by t", "bootstrap", "sd", "p", "valid record")]
    for s in summaries:
        rows.append((s.label, f"{len(s.runs)}", shown("d", s.steps), *with_interval(".4f", s.loss),
                     shown(".4f", s.loss.boot_low, s.loss.boot_high), shown(".4f", s.sd),
                     shown(".2g", s.record.p), s.record.verdict))
    return rows


def table_of_times(summaries, first):
    rows = [("group", "M tokens", "seconds", "95 % by t", "ms/step", "met", f"{first}: step", "95 % by t",
             "second")]
    for s in summaries:
        met = [crossing for crossing in s.crossings if crossing]
        all_met = met if len(met) == len(s.runs) else []
        step = estimate([crossing[0] for crossing in all_met])
        second = estimate([crossing[1] for crossing in all_met])
        millions = s.tokens / 1e6 if s.tokens else None
        rows.append((s.label, shown(".1f", millions), *with_interval(".1f", s.seconds),
                     shown(".1f", s.step_ms.mean), f"{len(met)} of {len(s.runs)}",
                     *with_interval(".0f", step), shown(".1f", second.mean)))
    return rows


def table_against(summaries, baseline, speedrun):
    rows = [["group", "steps", "loss", "95 %", "p", "ms/step", "95 %"]]
    if speedrun:
        rows[0].append("track 3")
    for s in summaries:
        if s.label == baseline:
            continue
        row = [s.label, shown("d", s.steps), *with_interval("+.4f", s.loss_change),
               shown(".2g", s.loss_change.p), *with_interval("+z.1%", s.step_change)]
        if speedrun:
            margin = shown("+.4f", s.margin)
            if s.margin is not None:
                margin += ", better" if s.margin >= SPEEDRUN_MARGIN else ", not better"
            row.append(margin)
        rows.append(row)
    return rows


def tables(summaries, baseline, target):
    """[(title, rows of text, the first of headers, what they mean)]"""
    first = f"first {target:g}"
    speedrun = target == SPEEDRUN_TARGET
    several = any(len(s.runs) > 1 for s in summaries)
    found = [("Runs", table_of_runs(summaries, first),
              f"seconds: of training; {first}: where the line between two evaluations first meets it, "
              "which decides nothing")]
    meaning = f"p: chance of losses this low if their true mean were {target:g}; a valid record has p < 0.01"
    if several:
        meaning += ("\n95 %: interval for the true mean, by Student's t and by bootstrap "
                    "(too narrow for few runs)")
    found.append(("Final losses", table_of_losses(summaries), meaning))
    if several:
        found.append((f"Time, and first crossings of {target:g}", table_of_times(summaries, first),
                      "met: runs that met it; this decides nothing, see --help"))
    versus = table_against(summaries, baseline, speedrun)
    if len(versus) > 1:
        meaning = ("loss: lower is better; 95 %: interval for the true change; "
                   "p: chance of this if the group were no better\n"
                   "n/a: a side has no result, or a single run, which gives no interval")
        if speedrun:
            meaning += "\ntrack 3: the speedrun's rule; better from +0.0040 on"
        found.append((f"Against {baseline}", versus, meaning))
    return found


def plain(rows, width=WIDTH):
    """Rows as aligned text. Where they are wider than `width`, the widest columns are broken into lines."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    while sum(widths) + 2 * len(widths) - 2 > width:
        widths[np.argmax(widths)] -= 1
    lines = []
    for row in rows:
        wrapped = [textwrap.wrap(cell, columns) for cell, columns in zip(row, widths)]
        for first, *others in zip_longest(*wrapped, fillvalue=""):
            cells = [first.ljust(widths[0])]
            cells += [cell.rjust(columns) for cell, columns in zip(others, widths[1:])]
            lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def notes(groups, target):
    """Sentences on what the tables do not show, and on what makes runs less comparable."""
    runs = [run for group in groups for run in group.runs]
    known = [run for run in runs if run.config]
    trained = [group for group in groups if group.optimizer]  # here, not read from published logs
    found = [group.remark for group in groups if group.remark]
    if len(known) < len(runs):
        found.append(f"{len(runs) - len(known)} of {len(runs)} runs have no run.json: "
                     "their track could not be checked")
    early = sum(run.losses[0] <= target for run in runs)
    if early:
        found.append(f"{early} of {len(runs)} runs are at the target in their first evaluation: "
                     "they met it then or earlier")
    timeless = sum(math.isnan(run.seconds[-1]) for run in runs)
    if timeless:
        found.append(f"{timeless} of {len(runs)} runs have no training times, or some that run backwards: "
                     "these are not used")
    untimed = [run for run in runs if run.untimed]
    if untimed:
        found.append(f"{len(untimed)} of {len(runs)} runs did not time their first 10 steps: "
                     "ms/step is of the others")
    for group in trained:
        times = [time for run in group.runs if (time := reading.refresh_times(run)) is not None]
        if times:
            step, more, _ = np.mean(times, axis=0)
            half = math.hypot(*(half for *_, half in times)) / len(times)
            found.append(f"{group.label}: a step takes {step:.1f} ms, and a refresh adds {more:.1f} ms "
                         f"(95 %: {more - half:.1f} to {more + half:.1f})")
    machines = reading.machines(known)
    if len(machines) > 1:
        found.append(f"the runs had different machines ({'; '.join(machines)}): "
                     "their seconds cannot be compared")
    if len({run.facts.get("code_sha256") for run in known}) > 1:
        found.append("the runs had different versions of train_gpt2.py")
    orders = [{run.config.get("data_seed", 0) for run in group.runs} for group in trained]
    if any(len(own) == 1 < len(group.runs) for own, group in zip(orders, trained)):
        found.append("all runs of a group saw the data in one order: "
                     "intervals leave out what another order would change")
    seeds = [{(run.config.get("seed"), run.config.get("data_seed", 0)) for run in group.runs}
             for group in trained]
    if any(len(own) < len(group.runs) for own, group in zip(seeds, trained)):
        found.append("a group has several runs of one seed: they are not independent, "
                     "and its intervals are too narrow")
    return found


# the pictures


def legend_label(label, group):
    """`label` with the number of the group's runs, and how many of them diverged."""
    count = len(group.runs)
    diverged = sum(bool(run.diverged) for run in group.runs)
    text = label
    if count > 1:
        text += f" ({count} runs"
        text += f", {diverged} diverged)" if diverged else ")"
    elif diverged:
        text += " (diverged)"
    return pictures.plain_text(textwrap.fill(text, LABEL_WIDTH))


def drawn(summaries):
    """[(group, short label, style, MeanCurve)] of the groups that have a curve."""
    groups = [s.group for s in summaries]
    found = []
    for group, label, style in zip(groups, pictures.short_labels(groups), pictures.group_styles(groups)):
        curve = pictures.mean_curve(group.runs)
        if curve:
            found.append((group, label, style, curve))
    return found


def mark_divergence(axis, group, style, seconds=False):
    """A cross where each diverged run of the group was last finite."""
    for run in group.runs:
        bad = [i for i, loss in enumerate(run.losses) if not abs(loss) < reading.DIVERGED]
        if bad and bad[0] > 0:
            x = run.seconds if seconds else run.steps
            axis.plot(x[bad[0] - 1], run.losses[bad[0] - 1], marker="x", markersize=7, color=style["color"])


def draw_steps(axis, curves, published, limits):
    """The whole runs, loss against steps."""
    for group, label, style, curve in curves:
        pictures.draw_curve(axis, curve.steps, curve, style, legend_label(label, group))
        mark_divergence(axis, group, style)
    for label, points in published:
        steps, losses, _ = zip(*points)
        text = pictures.plain_text(textwrap.fill(label, LABEL_WIDTH))
        axis.plot(steps, losses, color="black", linewidth=1, label=text)
    axis.set_ylim(*limits)
    axis.set(title="loss against steps", xlabel="step", ylabel="validation loss")


def draw_seconds(axis, curves, published, limits):
    """The whole runs, loss against the median training time. Runs beyond the scale are marked at its end."""
    groups = [group for group, *_ in curves]
    longest = max([pictures.longest_time(groups), *(points[-1][2] for _, points in published)])
    right = 1.04 * longest if longest > 0 else 1
    beyond = []
    for group, _, style, curve in curves:
        pictures.draw_curve(axis, curve.seconds, curve, style)
        mark_divergence(axis, group, style, seconds=True)
        for run in group.runs:
            if run.seconds[-1] > right:
                beyond.append(run.seconds[-1])
                axis.plot(0.985 * right, run.losses[-1], marker=">", markersize=7, color=style["color"])
    for _, points in published:
        _, losses, seconds = zip(*points)
        axis.plot(seconds, losses, color="black", linewidth=1)
    several = any(len(group.runs) > 1 for group in groups)
    axis.set(title="loss against time", ylabel="validation loss",
             xlabel="training time, median (s)" if several else "training time (s)")
    if beyond:
        runs = "1 run" if len(beyond) == 1 else f"{len(beyond)} runs"
        axis.set_title(f"loss against time (▸ {runs} beyond it, to {max(beyond):.0f} s)")
    if longest == 0:
        axis.set_title("no training times")
    axis.set_xlim(-0.02 * right, right)
    axis.set_ylim(*limits)


def range_of_the_end(lines):
    """(lowest final loss, height of the picture) for the last part of the `lines`, [(steps, losses)]."""
    lowest = min(losses[-1] for _, losses in lines)
    # a little less of the run than the picture shows, so that the lines come in from above
    highest = max(float(np.interp(0.88 * steps[-1], steps, losses)) for steps, losses in lines)
    return lowest, max(highest - lowest, 1e-3)


def draw_end(axis, curves, published=(), start=0.85):
    """The last part of each run. Groups that end far above the others are out of it, and named in the title.

    Against steps if all have the same number, else against the share of a run's own steps.
    Returns for each curve whether it is in the picture.
    """
    lines = [(curve.steps, curve.mean) for *_, curve in curves]
    lines += [tuple(np.array(points, float).T[:2]) for _, points in published]
    same = len({steps[-1] for steps, _ in lines}) == 1
    near = pictures.near_the_best([losses[-1] for _, losses in lines])
    lowest, height = range_of_the_end([line for line, shown_there in zip(lines, near) if shown_there])
    bottom = lowest - 0.15 * height
    end = max(lines[0][0][-1], 1) if same else 100
    gap = 0.03 * (1 - start) * end if near.count(True) > 3 else 0  # so that many intervals do not overlap
    right = end
    for (_, _, style, curve), shown_there in zip(curves, near):
        scale = 1 if same else 100 / max(curve.steps[-1], 1)
        pictures.draw_curve(axis, curve.steps * scale, curve, style)
        if shown_there and np.isfinite(curve.low[-1]):
            right += gap
            half = curve.high[-1] - curve.mean[-1]
            axis.errorbar(right, curve.mean[-1], half, color=style["color"], marker=style["marker"],
                          markersize=4.5, capsize=3)
            bottom = min(bottom, max(curve.low[-1], lowest - height) - 0.05 * height)
    for steps, losses in lines[len(curves):]:
        axis.plot(steps * (1 if same else 100 / steps[-1]), losses, color="black", linewidth=1)
    axis.set_xlim(end * start, right + 0.15 * (1 - start) * end)
    axis.set_ylim(bottom, lowest + 1.05 * height)
    axis.set(title="the end", xlabel="step" if same else "share of the run's steps (%)")
    axis.locator_params(axis="x", nbins=6)
    axis.set_xticks([tick for tick in axis.get_xticks() if end * start <= tick <= end])
    return near[:len(curves)]


def new_figure(width, height):
    """An empty figure of so many inches; of 8.3 inches, what a README shows at 830 pixels."""
    from matplotlib.figure import Figure  # here, as it takes a second
    return Figure(figsize=(width, height), layout="constrained")


def finish_axes(axes, target):
    for axis in axes:
        axis.axhline(target, color="#444444", linestyle=":", linewidth=1)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_size(10)


def plot(summaries, target, path, published=()):
    """Loss against steps, at the end and against time, and a legend beside them.

    `published` are curves of others, (label, points of runs.read_curve).
    """
    curves = drawn(summaries)
    figure = new_figure(8.3, 6.4)
    if not curves and not published:
        figure.text(0.5, 0.5, "no run has a finite loss", ha="center")
        pictures.save(figure, path)
        return
    low, high = pictures.range_of_losses([group for group, *_ in curves], target)
    for _, points in published:
        losses = [loss for _, loss, _ in points]
        low = min(low, *losses)
        high = max(high, losses[len(losses) // 5])
    limits = (low - 0.05 * (high - low) - 1e-6, high + 1e-6)
    (steps, end), (seconds, names) = figure.subplots(2, 2)
    draw_steps(steps, curves, published, limits)
    near = draw_end(end, curves, published)
    far = [label for (_, label, *_), shown_there in zip(curves, near) if not shown_there]
    if far:
        end.set_title(f"the end (above it: {far[0] if len(far) == 1 else f'{len(far)} groups'})")
    draw_seconds(seconds, curves, published, limits)
    finish_axes((steps, end, seconds), target)
    steps.plot([], [], color="#444444", linestyle=":", linewidth=1, label=f"target {target:g}")
    handles, labels = steps.get_legend_handles_labels()
    lines = sum(label.count("\n") + 1 for label in labels)
    names.axis("off")
    title = ""
    if any(len(group.runs) > 1 for group, *_ in curves):
        title = "line: mean of the runs\nband and bars: 95 % interval of that mean\n"
    look = dict(title=title, title_fontsize=9, fontsize=8.5, alignment="left", frameon=False,
                handlelength=3.2, borderpad=0)
    if lines <= 18:
        names.legend(handles, labels, loc="center left", **look)
    else:  # too many for a quarter of the figure
        figure.legend(handles, labels, loc="outside lower left", **look)
        figure.set_figheight(6.8 + 0.18 * lines)
    pictures.save(figure, path)


def plot_for_readme(summaries, target, path):
    """A small picture for a README: loss against steps and its end, each line with its name at its end."""
    curves = drawn(summaries)
    if not curves:
        raise UserError("--readme_png: no run has a finite loss")
    figure = new_figure(8.3, 3.5)
    whole, end = figure.subplots(1, 2, width_ratios=(1.15, 1))
    low, high = pictures.range_of_losses([group for group, *_ in curves], target)
    draw_steps(whole, curves, (), (low - 0.05 * (high - low), high))
    near = draw_end(end, curves)
    pictures.label_ends(whole, [(curve.mean[-1], label, style["color"]) for _, label, style, curve in curves])
    ends = []
    for (_, label, style, curve), shown_there in zip(curves, near):
        arrow = "" if shown_there else " ↑"
        ends.append((curve.mean[-1], f"{label}\n{curve.mean[-1]:.3f}{arrow}", style["color"]))
    pictures.label_ends(end, ends, gap=0.16)
    counts = sorted({len(group.runs) for group, *_ in curves})
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    whole.set_title(f"mean of {several} runs" if counts[-1] > 1 else "one run each")
    if counts[-1] > 1:
        end.set_title("the end, with 95 % intervals of the means")
    whole.annotate(f"target {target:g}", (0.01, target), (0, 3), xycoords=("axes fraction", "data"),
                   textcoords="offset points", color="#444444", fontsize=9)
    finish_axes((whole, end), target)
    pictures.save(figure, path)


# the page


def run_for_page(run):
    kept = pictures.thinned(run.losses)
    return dict(name=run.name, steps=[run.steps[i] for i in kept], seconds=[run.seconds[i] for i in kept],
                losses=[run.losses[i] for i in kept])


def dashes(linestyle):
    """An SVG stroke-dasharray for matplotlib's `linestyle`."""
    named = {"-": "", "--": "7 4", "-.": "9 3 2 3", ":": "2 3"}
    if linestyle in named:
        return named[linestyle]
    return " ".join(str(part) for part in linestyle[1])


def rounded(values):
    return [round(float(value), 6) for value in values]


def groups_for_page(summaries):
    """What the page draws of each group: its mean curve, and its single runs."""
    groups = [s.group for s in summaries]
    left = SHOWN_RUNS
    found = []
    for group, label, style in zip(groups, pictures.short_labels(groups), pictures.group_styles(groups)):
        curve = pictures.mean_curve(group.runs)
        mean = dict(steps=[], seconds=[], losses=[], low=[], high=[])
        if curve:
            mean = dict(steps=curve.steps.tolist(), seconds=rounded(curve.seconds),
                        losses=rounded(curve.mean), low=rounded(curve.low), high=rounded(curve.high))
        runs = group.runs[:left]
        left -= len(runs)
        found.append(dict(label=label, full=group.label, count=len(group.runs), mean=mean,
                          runs=[run_for_page(run) for run in runs], longest=pictures.longest_time([group]),
                          light=style["color"], dark=pictures.shaded(style["color"], 0.5),
                          dash=dashes(style["linestyle"])))
    return found


def page_notes(summaries):
    """Sentences on what the page leaves out of the curves."""
    runs = [run for s in summaries for run in s.runs]
    found = []
    long = sum(len(run.losses) > pictures.POINTS for run in runs)
    if long:
        found.append(f"the curves of {long} of {len(runs)} runs were thinned to about {pictures.POINTS:,} "
                     "points: the first, the last, the lowest and the extremes in between are kept")
    if len(runs) > SHOWN_RUNS:
        found.append(f"of {len(runs):,} single runs the first {SHOWN_RUNS:,} can be shown; "
                     "the means are of all")
    return found


def write_html(summaries, target, found, remarks, path):
    """One file with the curves, the tables and the notes: scripts/compare.html with the data put in."""
    data = dict(target=target, notes=[*remarks, *page_notes(summaries)], tables=found,
                groups=groups_for_page(summaries))
    page = Path(__file__).with_name("compare.html").read_text(encoding="utf-8")
    text = json.dumps(data).replace("<", "\\u003c")
    Path(path).write_text(page.replace("__DATA__", text), encoding="utf-8")


# the command


def report(groups, baseline, target, png=None, html=None, more_notes=(), readme_png=None):
    """Prints tables and notes, writes pictures and page where a path is given, returns the Summaries."""
    summaries = compare(groups, baseline, target)
    baseline = find_baseline(groups, baseline).label
    results = tables(summaries, baseline, target)
    remarks = [*notes(groups, target), *more_notes]
    for path in filter(None, (png, html, readme_png)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    # the files first: whoever reads the tables may stop before their end
    if png:
        plot(summaries, target, png)
    if readme_png:
        plot_for_readme(summaries, target, readme_png)
    if html:
        write_html(summaries, target, results, remarks, html)
    for title, rows, meaning in results:
        print(f"{textwrap.fill(title, WIDTH)}\n{plain(rows)}\n{textwrap.indent(meaning, '  ')}\n")
    for remark in remarks:
        print(textwrap.fill(f"note: {remark}", WIDTH, subsequent_indent="      "))
    for kind, path in (("plot", png), ("plot", readme_png), ("page", html)):
        if path:
            print(f"{kind}: {reading.printable(str(path))}")
    return summaries


def at_steps(texts):
    """{label or None: step} of the arguments --at_step [GROUP=]STEP."""
    found = {}
    for text in texts:
        label, _, step = text.rpartition("=")
        if not re.fullmatch(r"\d{1,12}", step):
            raise UserError(f"--at_step {text}: must be a step, or GROUP=STEP")
        found[label or None] = int(step)
    return found


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.replace("%", "%%"),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="+", help="runs or logs, or folders that have them")
    parser.add_argument("--baseline", metavar="GROUP",
                        help="group to compare with (default: muon if there is one)")
    parser.add_argument("--target", type=float,
                        help="target loss (default: target_val_loss of the runs, else 3.28)")
    parser.add_argument("--loss", default="val_loss", metavar="NAME",
                        help="loss to compare, where logs have several (default: val_loss)")
    parser.add_argument("--at_step", action="append", default=[], metavar="[GROUP=]STEP",
                        help="compare at this step, not at the end; may be repeated")
    parser.add_argument("--group_by", choices=("folder", "code", "file"), default="folder",
                        help="what makes logs without run.json a group (default: folder)")
    parser.add_argument("--png", type=Path, metavar="FILE",
                        help="write a plot of loss against steps and seconds")
    parser.add_argument("--readme_png", type=Path, metavar="FILE",
                        help="write a small plot of loss against steps, for a few groups")
    parser.add_argument("--html", type=Path, metavar="FILE",
                        help="write the curves, to explore in a browser, and the tables")
    args = parser.parse_args()
    if args.target is not None and not abs(args.target) < reading.DIVERGED:
        raise UserError(f"--target {args.target}: must be a number")
    return args


def check_outputs(args, logs):
    """UserError if a file to be written has a wrong ending, or is one of the `logs`."""
    outputs = (("--png", args.png, PLOTS), ("--readme_png", args.readme_png, PLOTS),
               ("--html", args.html, (".html", ".htm")))
    for option, path, endings in outputs:
        if path and (path.suffix not in endings or str(path.resolve()) in logs):
            raise UserError(f"{option} {path}: the name must end in {', '.join(endings)}, "
                            "and not be that of a log")


def read_paths(paths, loss):
    """(the Runs at or below `paths`, each once, sentences on what was left out)."""
    found = {}
    left_out = []
    for path in paths:
        runs, sentences = reading.find_runs(path, loss)
        for run in runs:
            found.setdefault((run.origin["file"], run.name), run)
        left_out += sentences
    runs = reading.without_copies(list(found.values()))
    if len(runs) < len(found):
        left_out.append(f"copies of runs left out: {len(found) - len(runs)}")
    return runs, left_out, {file for file, _ in found}


@command(interrupted="interrupted")
def main():
    args = arguments()
    try:
        runs, left_out, logs = read_paths(args.path, args.loss)
        check_outputs(args, logs)
        groups = reading.make_groups(runs, args.group_by, at_steps(args.at_step))
        target = common_target(runs) if args.target is None else args.target
        report(groups, args.baseline, target, args.png, args.html, left_out, args.readme_png)
    except OSError as error:
        raise UserError(f"{error.filename or 'the output'}: {error.strerror}") from None
    if all(group.fault for group in groups):
        faults = [f"{group.label}: {group.fault}" for group in groups]
        raise UserError(f"no group has a result: {'; '.join(faults)}")


if __name__ == "__main__":
    main()
