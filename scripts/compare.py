"""Compare runs by their final losses: means with intervals, which are valid records, and each group against a baseline.

    python scripts/compare.py logs/cpu [--baseline muon] [--target 1.75] [--png FILE] [--html FILE]

A PATH is a run's folder, a log that the speedrun published, or a folder that has such runs and logs in it or below. Runs of one
optimizer, configuration and number of steps are a group, whatever their seeds, names and machines; logs without a run.json are a
group if they lie in one folder (see --group_by). Runs of different tracks (data, model, batch, validation) are refused.

final loss        That of a run whose schedule ends there. A run that diverged leaves its group without a result. So does one that ended
                  early, unless --at_step names the step at which to compare, or all logs of a published group end at the same step.
valid record      The mean final loss is at or below the target with p < 0.01, by a one-sided t-test. On the speedrun's track also
                  (3.28 - mean) sqrt(n) >= 0.004, the rule of its optimizer track, and for fewer than 5 runs a z-test with the standard
                  deviation that is known for it, 0.0013. Logs without a run.json are taken for the speedrun's if the target is 3.28.
against           Difference of the mean final losses with its interval and one-sided p, by Welch's t-test; change in the time of a
                  step, by the same test on logarithms. "track 3" is the speedrun's rule for two groups: (loss difference + 0.0045 for each
                  100 steps fewer) / sqrt(1/n1 + 1/n2), better from 0.004 on.
95 % of a mean    By Student's t, and by the percentile bootstrap (9999 resamples of the runs).
first crossing    Where the straight line between the first evaluation at or below the target and the one before meets it. It depends
                  on the schedule, the target and the evaluations' interval, so nothing is decided by it.
"""
import argparse
import difflib
import itertools
import json
import math
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command
import numpy as np

from harness import runs as reading
from harness.estimates import SPEEDRUN_MARGIN, Change, Estimate, Record, mean_interval, ratio_change, record, track3_margin, welch
from train_gpt2 import UserError

SPEEDRUN_TARGET = 3.28
PLOTS = (".png", ".pdf", ".svg")  # endings of what --png writes


@dataclass
class Summary:
    """A group against the target and the baseline. What does not exist is None, or an Estimate or Change of None."""
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
    """The group of this label or, if it is the only one, this optimizer; by default muon's first, else the first."""
    if name is None:
        return next((group for group in groups if group.optimizer == "muon" and not group.fault), groups[0])
    fits = [group for group in groups if group.label == name] or [group for group in groups if group.optimizer == name]
    if len(fits) != 1:
        labels = [group.label for group in groups]
        near = difflib.get_close_matches(name, labels, n=1, cutoff=0)[0]
        raise UserError(f"{'several groups match' if fits else 'no group matches'} the baseline '{name}'; the nearest is '{near}', "
                       f"all are: {', '.join(map(repr, labels))}")
    return fits[0]


def common_target(runs):
    """The target_val_loss of all runs; 3.28, the speedrun's, if none has one. UserError if they differ."""
    targets = sorted({run.config["target_val_loss"] for run in runs if "target_val_loss" in run.config})
    if len(targets) > 1:
        raise UserError(f"the runs have different targets ({', '.join(map(str, targets))}); choose one with --target")
    return targets[0] if targets else SPEEDRUN_TARGET


def estimate(values):
    return mean_interval(values) if values and all(map(math.isfinite, values)) else Estimate(None)


def difference(new, old):
    """Change of the mean from `old` to `new`, and the chance of one this low without a true difference, by Welch's t-test."""
    mean = float(np.mean(new) - np.mean(old))
    if min(len(new), len(old)) < 2 or np.ptp(new) == np.ptp(old) == 0:
        return Change(mean)
    return Change(mean, *welch(new, old))


def summarize(group, target):
    runs, losses = group.runs, [run.final for run in group.runs]
    crossings = [run.first_crossing(target) for run in runs]
    seconds, step_ms = estimate([run.seconds[-1] for run in runs]), estimate([run.step_ms for run in runs])
    if group.fault:
        return Summary(group, None, Estimate(None), None, seconds, step_ms, None, crossings, Record(False, f"no: {group.fault}"))
    verdict = record(losses, target, speedrun=target == SPEEDRUN_TARGET and all(map(reading.is_speedrun, runs)))
    if verdict.p is not None and target == SPEEDRUN_TARGET and not all(run.config for run in runs):
        verdict = verdict._replace(verdict=verdict.verdict.replace(")", ", if the speedrun's)"))
    steps, per_step = runs[0].steps[-1], runs[0].facts.get("tokens_per_step")
    return Summary(group, steps, estimate(losses), float(np.std(losses, ddof=1)) if runs[1:] else None, seconds, step_ms,
                   per_step and per_step * steps, crossings, verdict)


def compare(groups, baseline, target):
    """A Summary of each of the `groups`, in their order; `baseline` is for find_baseline."""
    summaries = [summarize(group, target) for group in groups]
    old = summaries[groups.index(find_baseline(groups, baseline))]
    for new in summaries:
        times = [[run.step_ms for run in s.runs] for s in (new, old)]
        if new is not old and not new.group.fault and not old.group.fault:
            new.loss_change = difference(*([run.final for run in s.runs] for s in (new, old)))
            new.margin = track3_margin(*((s.loss.mean, s.steps, len(s.runs)) for s in (new, old)))
        if new is not old and all(map(math.isfinite, itertools.chain(*times))):
            new.step_change = ratio_change(*times)
    return summaries


def shown(spec, *values):
    return "n/a" if values[0] is None else " to ".join(format(value, spec) for value in values)


def with_interval(spec, e):
    """The cells of an Estimate or a Change."""
    return shown(spec, e.mean), shown(spec, e.low, e.high)


def tables(summaries, baseline, target):
    """[(title, rows of text, the first of headers, what they mean)]"""
    first, speedrun = f"first {target:g}", target == SPEEDRUN_TARGET
    runs = [("run", "group", "steps", "final loss", "seconds", "ms/step", f"{first}: step", "second")]
    final = [("group", "runs", "steps", "mean loss", "95 % by t", "bootstrap", "sd", "p", "valid record")]
    time = [("group", "M tokens", "seconds", "95 % by t", "ms/step", "met", f"{first}: step", "95 % by t", "second")]
    versus = [("group", "steps", "loss", "95 %", "p", "ms/step", "95 %", *(["track 3"] if speedrun else []))]
    for s in summaries:
        for run, crossing in zip(s.runs, s.crossings):
            runs.append((run.name, s.label, f"{run.steps[-1]}", f"{run.losses[-1]:.4f}", f"{run.seconds[-1]:.1f}", f"{run.step_ms:.1f}",
                         *((f"{crossing[0]:.0f}", f"{crossing[1]:.1f}") if crossing else ("never", "never"))))
        steps = shown("d", s.steps)
        final.append((s.label, f"{len(s.runs)}", steps, *with_interval(".4f", s.loss), shown(".4f", s.loss.boot_low, s.loss.boot_high),
                      shown(".4f", s.sd), shown(".2g", s.record.p), s.record.verdict))
        met = [crossing for crossing in s.crossings if crossing]
        step, second = (estimate([c[i] for c in met] if len(met) == len(s.runs) else []) for i in (0, 1))
        time.append((s.label, shown(".1f", s.tokens and s.tokens / 1e6), *with_interval(".1f", s.seconds), shown(".1f", s.step_ms.mean),
                     f"{len(met)} of {len(s.runs)}", *with_interval(".0f", step), shown(".1f", second.mean)))
        if s.label != baseline:
            better = "" if s.margin is None else ", better" if s.margin >= SPEEDRUN_MARGIN else ", not better"
            versus.append((s.label, steps, *with_interval("+.4f", s.loss_change), shown(".2g", s.loss_change.p),
                           *with_interval("+z.1%", s.step_change), *([shown("+.4f", s.margin) + better] if speedrun else [])))
    several = any(s.runs[1:] for s in summaries)
    found = [("Runs", runs, f"seconds: of training; {first}: where the line between two evaluations first meets it, which decides nothing"),
             ("Final losses", final, f"p: chance of losses this low if their true mean were {target:g}; a valid record has p < 0.01"
              + "\n95 %: interval for the true mean, by Student's t and by bootstrap (too narrow for few runs)" * several)]
    if several:
        found.append((f"Time, and first crossings of {target:g}", time, "met: runs that met it; this decides nothing, see --help"))
    if versus[1:]:
        found.append((f"Against {baseline}", versus,
                      "loss: lower is better; 95 %: interval for the true change; p: chance of this if the group were no better"
                      "\nn/a: a side has no result, or a single run, which gives no interval"
                      + "\ntrack 3: the speedrun's rule; better from +0.0040 on" * speedrun))
    return found


def plain(rows, width=128):
    """Rows as aligned text. Where they are wider than `width`, the widest columns are broken into lines."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    while sum(widths) + 2 * len(widths) - 2 > width:
        widths[np.argmax(widths)] -= 1
    lines = []
    for row in rows:
        for first, *others in itertools.zip_longest(*map(textwrap.wrap, row, widths), fillvalue=""):
            lines.append("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip())
    return "\n".join(lines)


def notes(groups, target):
    """Sentences on what the tables do not show, and on what makes runs less comparable."""
    runs = [run for group in groups for run in group.runs]
    known = [run for run in runs if run.config]
    found = [group.remark for group in groups if group.remark]
    if len(known) < len(runs):
        found.append(f"{len(runs) - len(known)} of {len(runs)} runs have no run.json: their track could not be checked")
    early = sum(run.losses[0] <= target for run in runs)
    if early:
        found.append(f"{early} of {len(runs)} runs are at the target in their first evaluation: they met it then or earlier")
    timeless = sum(math.isnan(run.seconds[-1]) for run in runs)
    if timeless:
        found.append(f"{timeless} of {len(runs)} runs have no training times, or some that run backwards: these are not used")
    untimed = [run for run in runs if run.untimed]
    if untimed:
        found.append(f"{len(untimed)} of {len(runs)} runs did not time their first 10 steps: ms/step is of the others")
    if len(reading.machines(known)) > 1:
        found.append(f"the runs had different machines ({'; '.join(reading.machines(known))}): their seconds cannot be compared")
    if len({run.facts.get("code_sha256") for run in known}) > 1:
        found.append("the runs had different versions of train_gpt2.py")
    if any(len({run.config.get("data_seed", 0) for run in group.runs}) == 1 < len(group.runs) for group in groups if group.optimizer):
        found.append("all runs of a group saw the data in one order: intervals leave out what another order would change")
    if any(len(set(seeds)) < len(seeds) for group in groups if group.optimizer
           for seeds in [[(run.config.get("seed"), run.config.get("data_seed", 0)) for run in group.runs]]):
        found.append("a group has several runs of one seed: they are not independent, and its intervals are too narrow")
    return found


def plot(summaries, target, path, published=()):
    """Loss against steps and seconds. `published` are curves of others, (label, points of runs.read_curve)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curves = [(textwrap.fill(s.label, 50) if i == 0 else None, dict(color=f"C{number}"), run.steps, run.losses, run.seconds)
              for number, s in enumerate(summaries) for i, run in enumerate(s.runs)]
    curves += [(label, dict(color="black", linestyle="--"), *zip(*points)) for label, points in published]
    finite = [[loss for loss in losses if abs(loss) < reading.DIVERGED] or [target] for _, _, _, losses, _ in curves]
    lowest = min(target, *map(min, finite))
    top = max(target, *(losses[len(losses) // 5] for losses in finite))  # the first fifth would hide the differences of the rest
    lines = sum(label.count("\n") + 1 for label, *_ in curves if label)
    figure, axes = plt.subplots(1, 2, figsize=(11, max(4.2, 0.22 * lines + 1)), sharey=True, layout="constrained")
    for axis, what, column in zip(axes, ("step", "training time (s)"), (2, 4)):
        for label, style, *values in curves:
            label = label and " " * label.startswith("_") + label.replace("$", r"\$")  # neither hidden nor a formula
            axis.plot(values[column - 2], values[1], linewidth=1, marker=".", markersize=4, label=label, **style)
        axis.axhline(target, color="grey", linestyle=":", linewidth=1, label=f"target {target:g}")
        axis.set_xlabel(what)
        axis.set_ylim(lowest - 0.05 * (top - lowest) - 1e-6, top + 1e-6)
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("validation loss")
    axes[1].legend()
    figure.savefig(path, dpi=130, metadata={"Software": None} if str(path).endswith(".png") else None)
    plt.close(figure)


def write_html(summaries, target, found, remarks, path):
    """One file with the curves, the tables and the notes: scripts/compare.html with the data put in."""
    data = dict(target=target, notes=remarks, tables=found, groups=[dict(label=s.label, runs=[
        dict(name=run.name, steps=run.steps, seconds=run.seconds, losses=run.losses) for run in s.runs]) for s in summaries])
    page = Path(__file__).with_name("compare.html").read_text(encoding="utf-8")
    Path(path).write_text(page.replace("__DATA__", json.dumps(data).replace("<", "\\u003c")), encoding="utf-8")


def report(groups, baseline, target, png=None, html=None, more_notes=()):
    """Prints tables and notes, writes plot and page where a path is given, returns the Summaries."""
    summaries, baseline = compare(groups, baseline, target), find_baseline(groups, baseline).label
    results, remarks = tables(summaries, baseline, target), [*notes(groups, target), *more_notes]
    for path in filter(None, (png, html)):  # the files first: whoever reads the tables may stop before their end
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    if png:
        plot(summaries, target, png)
    if html:
        write_html(summaries, target, results, remarks, html)
    for title, rows, meaning in results:
        print(f"{textwrap.fill(title, 128)}\n{plain(rows)}\n{textwrap.indent(meaning, '  ')}\n")
    for remark in remarks:
        print(textwrap.fill(f"note: {remark}", 128, subsequent_indent="      "))
    for kind, path in (("plot", png), ("page", html)):
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


@command(interrupted="interrupted")
def main():
    parser = argparse.ArgumentParser(description=__doc__.replace("%", "%%"), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="+", help="runs or logs, or folders that have them")
    parser.add_argument("--baseline", metavar="GROUP", help="group to compare with (default: muon if there is one)")
    parser.add_argument("--target", type=float, help="target loss (default: target_val_loss of the runs, else 3.28)")
    parser.add_argument("--loss", default="val_loss", metavar="NAME", help="loss to compare, where logs have several (default: val_loss)")
    parser.add_argument("--at_step", action="append", default=[], metavar="[GROUP=]STEP",
                        help="compare at this step, not at the end; may be repeated")
    parser.add_argument("--group_by", choices=("folder", "code", "file"), default="folder",
                        help="what makes logs without run.json a group (default: folder)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a plot of loss against steps and seconds")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the curves, to explore in a browser, and the tables")
    args = parser.parse_args()
    if args.target is not None and not abs(args.target) < reading.DIVERGED:
        raise UserError(f"--target {args.target}: must be a number")
    try:
        found, left_out = {}, []
        for path in args.path:
            runs, sentences = reading.find_runs(path, args.loss)
            found.update({(run.origin["file"], run.name): run for run in runs if (run.origin["file"], run.name) not in found})
            left_out += sentences
        for option, path, endings in (("--png", args.png, PLOTS), ("--html", args.html, (".html", ".htm"))):
            if path and (path.suffix not in endings or str(path.resolve()) in {file for file, _ in found}):
                raise UserError(f"{option} {path}: the name must end in {', '.join(endings)}, and not be that of a log")
        runs = reading.without_copies(list(found.values()))
        if len(runs) < len(found):
            left_out.append(f"copies of runs left out: {len(found) - len(runs)}")
        groups = reading.make_groups(runs, args.group_by, at_steps(args.at_step))
        target = common_target(runs) if args.target is None else args.target
        report(groups, args.baseline, target, args.png, args.html, left_out)
    except OSError as error:
        raise UserError(f"{error.filename or 'the output'}: {error.strerror}") from None
    if all(group.fault for group in groups):
        raise UserError(f"no group has a result: {'; '.join(f'{group.label}: {group.fault}' for group in groups)}")


if __name__ == "__main__":
    main()
