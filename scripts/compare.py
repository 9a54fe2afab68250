"""Compare runs: steps, tokens and training seconds to the target loss, with intervals, against a baseline.

    python scripts/compare.py logs/cpu_20261122-031500 [--baseline muon] [--target 1.75] [--png FILE] [--html FILE]

A PATH is a run's folder, a log.txt, a log that the speedrun published, or a folder that has such runs and logs in it or
below. Runs of one optimizer and configuration are a group, whatever their seeds, names and machines; logs without a run.json are
a group if the same code stands in them. Runs of different tracks (data, model, batch, validation) are refused.

to the target     Where the straight line between the first evaluation at or below it and the one before meets the target. If a
                  run missed the target, its group has no mean, as that of the others would be too good: '> X' is a lower bound,
                  with that run counted at its last step, and the group is not compared with the baseline.
95 % of a mean    By Student's t, and by the percentile bootstrap (9999 resamples of the runs).
saved, overhead   1 - r and r - 1, with r the ratio of the group's geometric mean to the baseline's. Interval and one-sided p by
                  Welch's t-test of the logarithms. Seeds are not paired: a seed fixes the initial weights only, and what that gives
                  runs in common widens the unpaired interval. All of it is for the one order of the data that all runs have.
valid record      The speedrun's rule: a mean final loss at or below the target with p < 0.01, by a one-sided t-test. For fewer
                  than 5 runs of the speedrun itself: a z-test with the standard deviation that is known for it, 0.0013. Logs
                  without a run.json at the speedrun's target are taken for the speedrun's, and the verdict says `if`.
"""
import argparse
import difflib
import hashlib
import itertools
import json
import math
import re
import sys
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

FEW = 5  # runs from which on their own standard deviation counts, not the known one
EVALUATION = re.compile(r"^step:(\d+)/(\d+) val_loss:(nan|inf|\d+(?:\.\d+)?) train_time:(\d+(?:\.\d+)?)(ms|s)\b", re.MULTILINE)
RULER = re.compile(r"^={20,}$", re.MULTILINE)  # stands between the parts of a log: code, machine, evaluations
SPEEDRUN = dict(batch_size=512, sequence_length=1024, n_layer=12, n_head=12, n_embd=768, vocab_size=50257, val_tokens=10485760)
# settings that make no other group: those of the track, the seed, and those that change neither the weights nor what is measured
NEUTRAL = {*SPEEDRUN, "input_bin", "input_val_bin", "allow_repeat", "seed", "data_seed", "target_val_loss", "device", "device_batch_size",
           "compile", "dtype", "collective_timeout", "log_dir", "run_name", "log_every", "save_every", "resume", "wandb_project"}


@dataclass
class Run:
    """A run's evaluations: step, loss and training seconds of each, in order."""
    name: str
    facts: dict  # run.json, empty without one
    steps: list
    losses: list
    seconds: list
    total: int = 0  # steps that it was to have
    source: str = ""  # hash of the code in the log, or the log's path if there is none

    @property
    def config(self):
        return self.facts.get("config", {})

    @property
    def fault(self):
        """Why the run does not count; empty if it does."""
        for step, loss in zip(self.steps, self.losses):
            if not math.isfinite(loss):
                return f"its loss is {loss} at step {step}"
        at_target = self.config.get("stop_at_target") and self.losses[-1] <= self.config.get("target_val_loss", 0)
        return "" if self.steps[-1] >= self.total or at_target else f"it ends at step {self.steps[-1]} of {self.total}"

    def to_target(self, target):
        """(steps, seconds) at which the loss first met `target`, by linear interpolation; None if it never did."""
        for i, loss in enumerate(self.losses):
            if loss <= target:
                if i == 0:
                    return self.steps[0], self.seconds[0]
                part = (self.losses[i - 1] - target) / (self.losses[i - 1] - loss)
                return tuple(values[i - 1] + part * (values[i] - values[i - 1]) for values in (self.steps, self.seconds))
        return None


class Group(NamedTuple):
    """Finished runs of one configuration."""
    label: str  # the optimizer, and the settings in which groups of that optimizer differ
    optimizer: str  # empty for logs without run.json
    runs: list


class Estimate(NamedTuple):
    """A quantity of a group's runs (None for a run without it) and its mean, with 95 % intervals by t and by bootstrap."""
    values: list
    mean: float = None
    low: float = None
    high: float = None
    boot_low: float = None
    boot_high: float = None
    at_least: float = None  # instead of all these if a run has no value


class Change(NamedTuple):
    """Change against the baseline as a fraction (0.06 is 6 %); None where a side lacks a value, or a second run."""
    mean: float = None
    low: float = None  # 95 % interval
    high: float = None
    p: float = None  # chance of this if the group were no better
    sd: float = None  # of the difference of two runs' logarithms
    df: float = None  # degrees of freedom for each run beyond the first of each side: 1 to 2, Welch's


class Record(NamedTuple):
    """Whether a group's final losses are a valid record, in a word and in a sentence."""
    valid: bool
    verdict: str
    p: float = None
    more: int = None  # runs that are still needed, about; None: no number would do


@dataclass
class Summary:
    """A group against the target and the baseline."""
    label: str
    runs: list
    final_mean: float
    final_sd: float  # None for one run
    reached: int  # runs that met the target
    steps: Estimate  # to the target
    seconds: Estimate  # training seconds to the target
    tokens: float  # mean training tokens to the target, None if not known
    step_ms: Estimate
    record: Record
    saved_steps: Change = Change()
    saved_seconds: Change = Change()
    overhead: Change = Change()  # in the time of a step


def read_facts(folder):
    """What the run.json in `folder` says, {} without one. SystemExit if it cannot be read."""
    path = Path(folder) / "run.json"
    try:
        facts = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(facts, dict) or not isinstance(facts.get("config", {}), dict):
            raise ValueError("it is not that of a run")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {path} cannot be read: {getattr(error, 'strerror', None) or error}")
    return facts


def read_log(path):
    """The Run in a log.txt, or a folder that has one, whatever stands before its lines. SystemExit if there is none."""
    path = Path(path)
    log = path / "log.txt" if path.is_dir() else path
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        sys.exit(f"error: {log} cannot be read: {error.strerror}")
    parts = RULER.split(text)
    found = next(filter(None, map(EVALUATION.findall, reversed(parts))), None)
    if not found:
        sys.exit(f"error: {log} has no line such as 'step:125/6200 val_loss:5.2017 train_time:24564ms'; is it the log of a run?")
    rows = []
    for step, total, loss, time, unit in found:
        while rows and rows[-1][0] >= int(step):  # an example in the code, or what a resumed run did again
            rows.pop()
        rows.append((int(step), float(loss), float(time) / (1000 if unit == "ms" else 1)))
    code = (parts[0] if parts[1:] else text[:EVALUATION.search(text).start()]).strip()
    return Run(log.resolve().parent.name if log.name == "log.txt" else log.stem, read_facts(log.parent), *map(list, zip(*rows)),
               int(total), hashlib.sha256(code.encode()).hexdigest() if code else str(log.resolve()))


def find_logs(path):
    """What read_log can read at or below `path`: folders of runs, then published logs (*.txt, *.log). SystemExit if nothing."""
    path = Path(path)
    if not path.is_dir() or (path / "log.txt").exists():
        return [path]
    logs = sorted(log.parent for log in path.rglob("log.txt"))
    logs += sorted(log for log in path.rglob("*.*") if log.suffix in (".txt", ".log") and log.name != "log.txt"
                   and EVALUATION.search(log.read_text(encoding="utf-8", errors="replace")))
    return logs or sys.exit(f"error: no log.txt and no published log in {path} or below it")


def without_copies(runs):
    """The runs, but for those with the measurements of another and its run.json or, as what a terminal showed, none."""
    kept = []
    for run in sorted(runs, key=lambda run: not run.facts):
        same = [other for other in kept if (other.losses, other.seconds) == (run.losses, run.seconds)]
        if not any(run.facts in ({}, other.facts) for other in same):
            kept.append(run)
    return kept


def track(run):
    """What compared runs must share, {name: value}, as far as run.json says it. Of the shards those that the run reads count."""
    facts = {name: value for name, value in {**run.facts, **run.config}.items() if name in (*SPEEDRUN, "parameters")}
    T = run.config.get("sequence_length", 1)
    for kind, tokens in (("train", run.total * run.facts.get("tokens_per_step", 0)), ("val", run.config.get("val_tokens", 0))):
        for i, shard in enumerate(run.facts.get(f"{kind}_shards", ())):
            if tokens > 0:
                hashes = (shard.get(f"sha256_of_{part}", "")[:12] for part in ("header_and_size", "first_mebibyte"))
                facts[f"{kind} shard {i + 1}"] = " ".join([str(shard.get("name")), *hashes])
                tokens -= (shard.get("tokens", 1) - 1) // T * T
        if tokens > 0 and f"{kind}_shards" in run.facts:
            facts[f"{kind} shard {len(run.facts[f'{kind}_shards']) + 1}"] = "the first again"
    return facts


def check_track(runs):
    """SystemExit, naming the differences, if runs have different data, model, batch or validation. What run.json lacks passes."""
    known = {}
    for run in runs:
        differences = [f"{name} ({known[name][0]}: {known[name][1]}, {run.name}: {value})" for name, value in track(run).items()
                       if known.setdefault(name, (run.name, value))[1] != value]
        if differences:
            sys.exit(f"error: the runs are of different tracks, so not comparable; they differ in {'; '.join(differences[:4])}")


def settings(run):
    """What makes a run's group. dtype is the resolved one, the configuration's may be "auto"."""
    own = {name: value for name, value in run.config.items() if name not in NEUTRAL}
    return {**own, "dtype": run.facts.get("dtype"), "optimizer_sha256": run.facts.get("optimizer_sha256")} if own else {"log": run.source}


def groups(runs):
    """Groups of the finished runs, lowest mean final loss first. SystemExit if the runs are of different tracks."""
    check_track(runs)
    members = {}
    for run in runs:
        if not run.fault:
            members.setdefault(json.dumps(settings(run), sort_keys=True), []).append(run)
    found = []
    for group in sorted(members.values(), key=lambda group: np.mean([run.losses[-1] for run in group])):
        first, optimizer = group[0], group[0].config.get("optimizer", "")
        others = [settings(other[0]) for other in members.values() if other[0].config.get("optimizer", "") == optimizer]
        differ = [f"{name}={json.dumps(value)}".replace('"', "") for name, value in settings(first).items()
                  if any(value != other.get(name) for other in others)]
        label = " ".join([optimizer, *differ]) if optimizer else first.name + (f" and {len(group) - 1} more" if group[1:] else "")
        while label in [other.label for other in found]:
            label += "'"
        found.append(Group(label, optimizer, group))
    return found


def find_baseline(groups, name=None):
    """The group of this label or, if it is the only one, this optimizer; by default muon's first, else the first."""
    if name is None:
        return next((group for group in groups if group.optimizer == "muon"), groups[0])
    fits = [group for group in groups if group.label == name] or [group for group in groups if group.optimizer == name]
    if len(fits) != 1:
        labels = [group.label for group in groups]
        near = difflib.get_close_matches(name, labels, n=1, cutoff=0)[0]
        sys.exit(f"error: {'several groups are' if fits else 'no group is'} the baseline '{name}'; the nearest is '{near}', "
                 f"all are: {', '.join(map(repr, labels))}")
    return fits[0]


def common_target(runs):
    """The target_val_loss of all runs; 3.28, the speedrun's, if none has one. SystemExit if they differ."""
    targets = sorted({run.config["target_val_loss"] for run in runs if "target_val_loss" in run.config})
    if len(targets) > 1:
        sys.exit(f"error: the runs have different targets ({', '.join(map(str, targets))}); choose one with --target")
    return targets[0] if targets else 3.28


def estimate(values, bounds=()):
    """Estimate of the mean of `values`; for a value that is None its lower bound counts."""
    if None in values:
        return Estimate(values, at_least=float(np.mean([b if v is None else v for v, b in zip(values, bounds)])))
    mean = float(np.mean(values))
    if np.ptp(values) == 0:  # one run, or equal ones: nothing says how far off the next would be
        return Estimate(values, mean)
    low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
    boot = stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    return Estimate(values, mean, *map(float, (low, high, *boot)))


def change(new, old, sign):
    """Change sign * (r - 1), with r = exp(mean(log new) - mean(log old)); p that r < 1. See the head of the file."""
    if None in new + old or min(new + old) <= 0:
        return Change()
    a, b = np.log(new), np.log(old)
    mean = sign * math.expm1(a.mean() - b.mean())
    if min(len(a), len(b)) < 2 or np.ptp(a) == np.ptp(b) == 0:
        return Change(mean)
    with warnings.catch_warnings(action="ignore"):  # about a side whose values are equal
        ends = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        p = stats.ttest_ind(a, b, equal_var=False, alternative="less").pvalue
    low, high = sorted(sign * math.expm1(end) for end in ends)
    va, vb = a.var(ddof=1), b.var(ddof=1)
    return Change(mean, low, high, float(p), math.sqrt(va + vb), (va + vb) ** 2 / (va ** 2 + vb ** 2))


def runs_needed(distance, sd, alpha=0.01, df=1, known_sd=False):
    """Smallest number n of runs, of each side, with q sd / sqrt(n) < distance; None if distance <= 0.

    q is the 1 - alpha quantile of t with df * (n - 1) degrees of freedom, of the normal distribution for a known sd: a mean
    `distance` away from a value then excludes it, one-sided at level alpha. For two sides sd^2 is the sum of their variances, and
    df = sd^4 / (the sum of the variances' squares), as in Welch's test.
    """
    if distance <= 0:
        return None
    z = stats.norm.ppf(1 - alpha)
    n = max(1 if known_sd else 2, math.floor((z * sd / distance) ** 2))
    while (z if known_sd else stats.t.ppf(1 - alpha, df * (n - 1))) * sd / math.sqrt(n) >= distance:
        n += 1
    return n


def record(finals, target, known_sd=None):
    """Record of these final losses, by a t-test or, with a known sd, a z-test."""
    n, mean = len(finals), float(np.mean(finals))
    if mean >= target:
        return Record(False, f"no: the mean is {'above' if mean > target else 'at'} the target, no number of runs would do")
    if not known_sd and np.ptp(finals) == 0:
        return Record(False, "not yet: 1 more run, at least" if n == 1 else "not yet: no spread, 1 more run, at least", more=1)
    if known_sd:
        sd, p, test = known_sd, float(stats.norm.cdf((mean - target) / (known_sd / math.sqrt(n)))), f"z-test, sd {known_sd}"
    else:
        sd, p, test = np.std(finals, ddof=1), float(stats.ttest_1samp(finals, target, alternative="less").pvalue), "t-test"
    if p < 0.01:
        return Record(True, f"yes ({test})", p, 0)
    total = runs_needed(target - mean, sd, known_sd=bool(known_sd))
    if known_sd and total >= FEW:  # then it will be a t-test
        total = max(FEW, runs_needed(target - mean, sd))
    more = total - n
    return Record(False, f"not yet: about {more} more run{'s' * (more > 1)} ({test})", p, more)


def is_speedrun(run):
    """Whether the run is on the speedrun's track, as far as its run.json tells."""
    return all(run.config.get(name, value) == value for name, value in SPEEDRUN.items()) and (
        "fineweb_val" in str(run.facts.get("val_shards", "fineweb_val")))


def step_ms(run):
    return 1000 * run.seconds[-1] / max(1, run.steps[-1])


def compare(groups, baseline, target):
    """A Summary of each of the `groups`, in their order; `baseline` is for find_baseline."""
    base, summaries = groups.index(find_baseline(groups, baseline)), []
    for label, _, runs in groups:
        finals = [run.losses[-1] for run in runs]
        steps, seconds = map(list, zip(*(run.to_target(target) or (None, None) for run in runs)))
        steps, seconds = estimate(steps, [run.steps[-1] for run in runs]), estimate(seconds, [run.seconds[-1] for run in runs])
        per_step = runs[0].facts.get("tokens_per_step")  # of the track
        if any(run.config.get("stop_at_target") for run in runs):
            verdict = Record(False, "n/a: runs that stop at the target prove nothing by their final loss")
        else:
            verdict = record(finals, target, 0.0013 if len(runs) < FEW and target == 3.28 and all(map(is_speedrun, runs)) else None)
            if verdict.p is not None and len(runs) < FEW and not all(run.config for run in runs):
                verdict = verdict._replace(verdict=verdict.verdict.replace(")", ", if the speedrun's)"))
        summaries.append(Summary(
            label, runs, float(np.mean(finals)), float(np.std(finals, ddof=1)) if runs[1:] else None,
            sum(value is not None for value in steps.values), steps, seconds,
            steps.mean * per_step if steps.mean and per_step else None, estimate([step_ms(run) for run in runs]), verdict))
    old = summaries[base]
    for new in summaries[:base] + summaries[base + 1:]:
        new.saved_steps = change(new.steps.values, old.steps.values, -1)
        new.saved_seconds = change(new.seconds.values, old.seconds.values, -1)
        new.overhead = change(new.step_ms.values, old.step_ms.values, 1)
    return summaries


def shown(spec, *values):
    return "n/a" if values[0] is None else " to ".join(format(value, spec) for value in values)


def tables(summaries, baseline, target):
    """[(title, rows of text, the first of headers, what they mean)]"""
    several = any(s.runs[1:] for s in summaries)
    runs = [("run", "group", f"steps to {target:g}", f"seconds to {target:g}", "final loss", "steps", "seconds", "ms/step")]
    final = [("group", "runs", "reached", "final loss", "sd", "ms/step", "p", "valid record")]
    reach = [("group", "steps", "95 % by t", "bootstrap", "seconds", "95 % by t", "bootstrap", "M tokens")]
    versus = [("group", "steps saved", "95 %", "p", "time saved", "95 %", "p", "overhead/step", "95 %")]
    for s in summaries:
        runs += [(run.name, s.label, *(("not reached",) * 2 if steps is None else (f"{steps:.0f}", f"{seconds:.1f}")),
                  f"{run.losses[-1]:.4f}", f"{run.steps[-1]}", f"{run.seconds[-1]:.1f}", f"{step_ms(run):.1f}")
                 for run, steps, seconds in zip(s.runs, s.steps.values, s.seconds.values)]
        final.append((s.label, f"{len(s.runs)}", f"{s.reached} of {len(s.runs)}", f"{s.final_mean:.4f}", shown(".4f", s.final_sd),
                      f"{s.step_ms.mean:.1f}", shown(".2g", s.record.p), s.record.verdict))
        cells = [(f"> {e.at_least:{spec}}" if e.mean is None else shown(spec, e.mean), shown(spec, e.low, e.high),
                  shown(spec, e.boot_low, e.boot_high)) for e, spec in ((s.steps, ".0f"), (s.seconds, ".1f"))]
        reach.append((s.label, *cells[0], *cells[1], shown(".1f", s.tokens and s.tokens / 1e6)))
        if s.label != baseline:
            cells = [(shown(spec, c.mean), shown(spec, c.low, c.high), shown(".2g", c.p)) for c, spec in (
                (s.saved_steps, "z.1%"), (s.saved_seconds, "z.1%"), (s.overhead, "+z.1%"))]
            versus.append((s.label, *cells[0], *cells[1], *cells[2][:2]))
    found = [("Runs", runs, f"to {target:g}: where the straight line between two evaluations meets it; seconds: of training"),
             ("Groups", final, f"p: chance of losses this low if their true mean were {target:g}; a valid record has p < 0.01")]
    if several:
        found.append((f"To {target:g}", reach,
                      "95 %: interval for the true mean, by Student's t and by bootstrap (too narrow for few runs)"
                      "\n>: a lower bound, since a run missed the target"))
    if versus[1:]:
        found.append((f"Against {baseline}", versus,
                      "95 %: interval for the true change; p: chance of this if the group were no better"
                      "\nn/a: a side has a single run, which gives no interval, or a run that missed the target"))
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


def machines(runs):
    """The hardware of the runs, sorted; that of a resumed run's later parts too."""
    parts = [part for run in runs for part in (run.facts, *run.facts.get("resumed", ())) if "machine" in part]
    return sorted({f"{part.get('world_size')} x {m.get('gpu') or '{} threads of {}'.format(m.get('cpu_threads'), m.get('cpu'))}"
                   for part in parts for m in [part["machine"]]})


def notes(runs, counted, target):
    """Sentences on what the tables do not show: runs that were left out, and what makes the others less comparable."""
    found = [f"{run.name} is left out: {run.fault}" for run in runs if run.fault]
    known = [run for run in counted if run.config]
    if len(known) < len(counted):
        found.append(f"{len(counted) - len(known)} of {len(counted)} runs have no run.json: their track could not be checked")
    early = sum(run.losses[0] <= target for run in counted)
    if early:
        found.append(f"{early} of {len(counted)} runs are at the target in their first evaluation: they met it then or earlier")
    if len(machines(known)) > 1:
        found.append(f"the runs had different machines ({'; '.join(machines(known))}): their seconds do not compare")
    if len({run.facts.get("code_sha256") for run in known}) > 1:
        found.append("the runs had different versions of train_gpt2.py")
    if len({json.dumps([settings(run), run.config.get("seed")]) for run in known}) < len(known):
        found.append("a group has several runs of one seed: they are not independent, and its intervals are too narrow")
    return found


def plot(summaries, target, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    runs = [run for s in summaries for run in s.runs]
    lowest = min(min(run.losses) for run in runs)
    top = max(run.losses[len(run.losses) // 5] for run in runs)  # the first fifth would hide the differences of the rest
    for axis, what in zip(axes, ("steps", "seconds")):
        for i, s in enumerate(summaries):
            for run in s.runs:
                axis.plot(getattr(run, what), run.losses, color=f"C{i}", linewidth=1, marker=".", markersize=4,
                          label=s.label if run is s.runs[0] else None)
        axis.axhline(target, color="grey", linestyle=":", linewidth=1, label=f"target {target:g}")
        axis.set_xlabel({"steps": "step", "seconds": "training time (s)"}[what])
        axis.set_ylim(lowest - 0.05 * (top - lowest), top)
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("validation loss")
    axes[1].legend()
    figure.savefig(path, dpi=130)


def write_html(summaries, target, found, remarks, path):
    """One file with the curves, the tables and the notes: scripts/compare.html with the data put in."""
    data = dict(target=target, notes=remarks, tables=found, groups=[dict(label=s.label, runs=[
        dict(name=run.name, steps=run.steps, seconds=run.seconds, losses=run.losses) for run in s.runs]) for s in summaries])
    page = Path(__file__).with_name("compare.html").read_text(encoding="utf-8")
    Path(path).write_text(page.replace("__DATA__", json.dumps(data).replace("<", "\\u003c")), encoding="utf-8")


def report(runs, groups, baseline, target, png=None, html=None):
    """Prints tables and notes on the `groups` of `runs`, writes plot and page where a path is given, returns the Summaries."""
    summaries, baseline = compare(groups, baseline, target), find_baseline(groups, baseline).label
    results, remarks = tables(summaries, baseline, target), notes(runs, [run for group in groups for run in group.runs], target)
    for title, rows, meaning in results:
        print(f"{textwrap.fill(title, 128)}\n{plain(rows)}\n{textwrap.indent(meaning, '  ')}\n")
    for remark in remarks:
        print(textwrap.fill(f"note: {remark}", 128, subsequent_indent="      "))
    for path in filter(None, (png, html)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    if png:
        plot(summaries, target, png)
        print(f"plot: {png}")
    if html:
        write_html(summaries, target, results, remarks, html)
        print(f"page: {html}")
    return summaries


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="+", help="runs or logs, or folders that have them")
    parser.add_argument("--baseline", metavar="GROUP", help="group to compare with (default: muon if there is one)")
    parser.add_argument("--target", type=float, help="target loss (default: target_val_loss of the runs, else 3.28)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a plot of loss against steps and seconds")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the curves, to explore in a browser, and the tables")
    args = parser.parse_args()
    if args.target is not None and not math.isfinite(args.target):
        sys.exit(f"error: --target {args.target}: must be a number")
    if args.png and args.png.suffix not in (".png", ".pdf", ".svg"):
        sys.exit(f"error: --png {args.png}: the name must end in .png, .pdf or .svg")
    try:
        logs = dict.fromkeys(log.resolve() for path in args.path for log in find_logs(path))
        runs = without_copies([read_log(log) for log in logs])
        target = common_target(runs) if args.target is None else args.target
        found = groups(runs)
        if not found:
            sys.exit(f"error: there is no finished run to compare: {'; '.join(f'{run.name}: {run.fault}' for run in runs)}")
        summaries = report(runs, found, args.baseline, target, args.png, args.html)
    except OSError as error:
        sys.exit(f"error: {error.filename or 'the output'}: {error.strerror}")
    if len(runs) < len(logs):
        print(f"note: copies of runs left out: {len(logs) - len(runs)}")
    if not any(s.reached for s in summaries):
        lowest = min(min(run.losses) for s in summaries for run in s.runs)
        sys.exit(f"error: no run reached {target:g}; the lowest loss is {lowest:.4f}, choose a --target above it")


if __name__ == "__main__":
    main()
