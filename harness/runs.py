"""Reading runs, and making groups of them.

A run is a folder that train_gpt2.py wrote, or lies in a log that others published in the speedrun's text
format (harness/logs.py). A file may hold several runs, one after the other. All errors here are UserErrors.
"""
import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from harness.command import ROOT, printable
from harness.estimates import t_quantile
from harness.forms import RUN_JSON, SPEEDRUN, read_bytes, read_json, read_text
from harness.logs import evaluations, has_lines, logged_code, losses_in
from train_gpt2 import UserError

DIVERGED = 1e6  # a loss above it is as good as none
MOST_LINKED = 10_000  # files and folders behind links to folders that are looked at
MOST_SENTENCES = 20  # on single files that are left out
# Settings in which the runs of a group may differ: the track's, the seeds, and those that change neither the
# weights nor what is measured.
FREE_SETTINGS = {
    *SPEEDRUN, "input_bin", "input_val_bin", "allow_repeat", "seed", "data_seed", "target_val_loss", "device",
    "device_batch_size", "compile", "dtype", "collective_timeout", "log_dir", "run_name", "log_every",
    "save_every", "resume", "wandb_project",
}


@dataclass
class Run:
    """A run's evaluations: step, loss and training seconds of each, in order."""
    name: str
    facts: dict  # run.json, empty without one
    steps: list
    losses: list
    seconds: list
    planned: int = 0  # steps of its schedule
    untimed: int = 0  # steps at the start that its seconds leave out
    # where it was read: folder, code (a hash) and file, see make_groups(), and the folder's title below the
    # one that was searched
    origin: dict = field(default_factory=dict)

    @property
    def config(self):
        return self.facts.get("config", {})

    @property
    def final(self):
        """The last loss; from run.json where that has it, as log.txt rounds."""
        logged = self.losses[-1]
        exact = self.facts.get("final_val_loss", math.inf)
        if abs(exact - logged) < 1e-4 and self.facts.get("steps") == self.steps[-1]:
            return exact
        return logged

    @property
    def diverged(self):
        """A sentence, if a loss is not finite; else ""."""
        for step, loss in zip(self.steps, self.losses):
            if not abs(loss) < DIVERGED:
                return f"{self.name} diverged: its loss is {loss:g} at step {step}"
        return ""

    @property
    def stopped_at_target(self):
        if self.steps[-1] >= self.planned or not self.config.get("stop_at_target", False):
            return False
        return self.losses[-1] <= self.config.get("target_val_loss", 0)

    @property
    def step_ms(self):
        """Mean time of a timed step."""
        return 1000 * self.seconds[-1] / max(1, self.steps[-1] - self.untimed)

    def until(self, step):
        """The run as it was at `step`."""
        n = sum(s <= step for s in self.steps)
        if n == 0:
            return self
        return replace(self, steps=self.steps[:n], losses=self.losses[:n], seconds=self.seconds[:n])

    def first_crossing(self, target):
        """(steps, seconds) at which the loss first met `target`, by linear interpolation; None if never."""
        points = list(zip(self.steps, self.losses, self.seconds))
        if points[0][1] <= target:
            return points[0][0], points[0][2]
        for (step0, loss0, time0), (step, loss, time) in pairwise(points):
            if loss <= target:
                part = (loss0 - target) / (loss0 - loss) if abs(loss0) < DIVERGED else 1
                return step0 + part * (step - step0), time0 + part * (time - time0)
        return None


# reading


def read_facts(folder, complete=False):
    """What the run.json in `folder` says, {} without one.

    `complete`: it must be there, with all that train_gpt2.py writes.
    """
    path = Path(folder) / "run.json"
    if not complete and not os.path.lexists(path):
        return {}
    return read_json(read_text(path), RUN_JSON, path, complete)


def untimed_steps(evaluations):
    """Steps at the start that the times leave out.

    Old logs do not time the first 10 steps. The first average tells: later ones may cover only the steps
    since the last evaluation.
    """
    for evaluation in evaluations:
        if evaluation.step > 10:
            average = evaluation.step_avg
            if average and abs(evaluation.seconds / average - (evaluation.step - 10)) < 0.4:
                return 10
            return 0
    return 0


def read_log(path, loss="val_loss"):
    """The Runs in a log, or in the folder of a run, with the loss of that name."""
    path = Path(path)
    log = path / "log.txt" if path.is_dir() else path
    text = read_text(log)
    facts = read_facts(log.parent)
    found = evaluations(text, loss)
    if not found:
        others = [name for name in losses_in(text) if name not in ("train_loss", loss)]
        remedy = f"; --loss could be {', '.join(others)}" if others else "; is it the log of a run?"
        raise UserError(f"{log} has no line such as 'step:125/6200 {loss}:5.2017 train_time:24564ms'{remedy}")
    real = log.resolve()
    code = logged_code(text)
    origin = {
        "folder": str(real.parent),
        "file": str(real),
        "code": hashlib.sha256(code.encode()).hexdigest() if code else str(real),
    }
    name = real.parent.name if log.name == "log.txt" else log.stem
    runs = []
    for i, rows in enumerate(found, start=1):
        own_name = f"{name} {i}" if len(found) > 1 else name
        seconds = [row.seconds for row in rows]
        known = [second for second in seconds if math.isfinite(second)]
        backwards = any(later < earlier for earlier, later in pairwise([0.0, *known]))
        if backwards:
            seconds = [math.nan] * len(seconds)
        runs.append(Run(
            name=printable(own_name),
            facts=facts,
            steps=[row.step for row in rows],
            losses=[row.loss for row in rows],
            seconds=seconds,
            planned=rows[-1].planned,
            untimed=0 if backwards else untimed_steps(rows),
            origin=dict(origin),
        ))
    return runs


def read_run(folder):
    """The one run in the folder that train_gpt2.py wrote."""
    found = read_log(folder)
    if len(found) > 1:
        raise UserError(f"{folder} has {len(found)} runs in its log.txt, one after the other")
    return found[0]


def diverged(folder):
    """Whether `folder` holds a run that ended with a loss that is not a number."""
    try:
        return bool(read_run(folder).diverged)
    except UserError:  # no log, or none with an evaluation
        return False


def refresh_interval(config):
    """Steps between the refreshes of the optimizer in a run's `config`; None if it has none."""
    if config.get("optimizer") == "newton_muon":
        return config.get("refresh_interval")
    try:
        return json.loads(config.get("optimizer_args", "{}")).get("refresh_interval")
    except (ValueError, TypeError, AttributeError):  # no JSON object
        return None


def refresh_times(run):
    """(ms of a step, ms that a refresh of Newton-Muon adds, half width of its 95 % interval) of a run.

    By least squares from the times between training losses. None if the run has no refreshes, or its log does
    not tell.
    """
    interval = refresh_interval(run.config)
    if not interval:
        return None
    try:
        logged, = read_log(run.origin["file"], "train_loss")
    except (UserError, ValueError):  # no training losses, or those of several runs
        return None
    steps = np.array([0, *logged.steps])
    work = np.stack((np.diff(steps), np.diff(steps // interval)), axis=1)  # steps and refreshes in between
    seconds = np.diff([0, *logged.seconds])
    df = len(seconds) - 2
    if df < 1 or not np.isfinite(seconds).all() or np.linalg.matrix_rank(work) < 2:
        return None
    times = np.linalg.lstsq(work, seconds)[0]
    variance = np.square(seconds - work @ times).sum() / df * np.linalg.inv(work.T @ work)
    half = t_quantile(0.975, df) * math.sqrt(variance[1, 1])
    return 1000 * times[0], 1000 * times[1], 1000 * half


def read_curve(path=ROOT / "records/speedrun/record4.csv"):
    """A published validation curve: [(step, loss, training seconds), ...].

    Lines that start with # say where it is from.
    """
    rows = [line.split(",") for line in read_text(path).splitlines() if not line.startswith("#")]
    try:
        return [(int(step), float(loss), float(seconds)) for step, loss, seconds in rows[1:]]
    except ValueError:
        raise UserError(f"{path} is not a table of step, val_loss and train_time_s") from None


# finding


def find_logs(path, left_out):
    """Yields the files at or below the folder `path` that may be logs.

    Links to folders are followed, but not up to a folder that holds `path`, and not to more than MOST_LINKED
    files. What is left out is said in the list `left_out`.
    """
    def unreadable(error):
        left_out.append(printable(f"{error.filename} cannot be read: {error.strerror}; it is left out"))

    top = Path(os.path.realpath(path))
    linked = 0
    seen = set()
    for folder, folders, files in os.walk(path, onerror=unreadable, followlinks=True):
        folder = Path(folder)
        real = Path(os.path.realpath(folder))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if real in top.parents:
            left_out.append(printable(f"{folder} is a link to {real}, which holds {path}; it is left out"))
            folders.clear()
            continue
        if top != real and top not in real.parents:
            within_bound = linked <= MOST_LINKED
            linked += 1 + len(files)
            if linked > MOST_LINKED:
                folders.clear()
                if within_bound:
                    left_out.append(printable(f"links lead to more than {MOST_LINKED} files; those in "
                                              f"{folder} and what follows are left out"))
                continue
        folders.sort()
        if "run.json" in files:  # all that lies in and below the folder of a run is that run's
            folders.clear()
            files = ["log.txt"]
        for file in sorted(files):
            yield folder / file


def holds_runs(log):
    """Whether a file has a line with the training time."""
    if b"train_time:" not in read_bytes(log):  # the bytes first: to decode what is no text takes long
        return False
    return has_lines(read_text(log))


def find_runs(path, loss="val_loss"):
    """(Runs at or below `path`, sentences on what was left out there). UserError if there is no run."""
    path = Path(path)
    if not path.is_dir() or (path / "run.json").exists():
        return read_log(path, loss), []
    runs = []
    left_out = []  # sentences
    without = []  # files
    for log in find_logs(path, left_out):
        try:
            if log.name != "log.txt" and not holds_runs(log):
                without.append(log)
                continue
            found = read_log(log, loss)
        except UserError as error:
            left_out.append(printable(f"{error}; it is left out"))
            continue
        if log.parent != path:
            for run in found:
                run.origin["title"] = str(log.parent.relative_to(path))
        runs += found
    if not runs:
        reasons = "".join(f"; {sentence}" for sentence in left_out[:3])
        raise UserError(f"no log.txt and no published log in {path} or below it{reasons}")
    if len(left_out) > MOST_SENTENCES:
        more = len(left_out) - MOST_SENTENCES
        left_out = [*left_out[:MOST_SENTENCES], f"{more} more files or folders are left out for such reasons"]
    if without:
        names = sorted(str(log.relative_to(path)) for log in without)
        more = ", ..." if len(names) > 5 else ""
        listed = ", ".join(names[:5]) + more
        left_out.append(printable(f"files in {path} without evaluations: {len(without)} ({listed})"))
    return runs, left_out


def without_copies(runs):
    """The runs, but for copies.

    A copy's evaluations are all among another's, and its run.json is the same or missing. Of copies that say
    the same, one stays that has other runs beside it, and lies deepest: neither a stray log nor a capture of
    all runs takes them away from their groups.
    """
    in_folder = Counter(run.origin.get("folder", "") for run in runs)

    def preference(run):
        folder = run.origin.get("folder", "")
        alone = in_folder[folder] == 1
        return not run.facts, -len(run.steps), alone, -folder.count(os.sep), -in_folder[folder]

    chosen = set()
    having = defaultdict(list)  # {evaluation: the runs that have it, each with all of its evaluations}
    for run in sorted(runs, key=preference):
        # str, as nan is not equal to itself
        own = set(zip(run.steps, map(str, run.losses), map(str, run.seconds)))
        rarest = min(own, key=lambda evaluation: len(having[evaluation]))
        if any(own <= theirs and run.facts in ({}, other.facts) for other, theirs in having[rarest]):
            continue
        chosen.add(id(run))
        for evaluation in own:
            having[evaluation].append((run, own))
    return [run for run in runs if id(run) in chosen]


# tracks


def shards_read(run, kind, tokens, all_count):
    """{name: value} of the shards that a run reads, `kind` is "train" or "val".

    Those are the ones that hold its first `tokens` tokens or, if `all_count`, all.
    """
    facts = {}
    T = max(1, run.config.get("sequence_length", 1))
    shards = run.facts.get(f"{kind}_shards", ())
    for i, shard in enumerate(shards, start=1):
        if tokens > 0 or all_count:
            start = shard.get("sha256_of_first_mebibyte", "")[:12]
            facts[f"{kind} shard {i}"] = f"{shard.get('name', '')} {shard.get('tokens', 0):,} {start}"
        tokens -= (shard.get("tokens", 1) - 1) // T * T
    if shards and (tokens > 0 or all_count):
        facts[f"{kind} shard {len(shards) + 1}"] = "the first again" if tokens > 0 else "none"
    return facts


def track(run):
    """What compared runs must share, {name: value}, as far as run.json says it.

    Only the shards that the run reads count: in the files' order the first ones, in any other order all.
    """
    facts = {}
    for name, value in {**run.facts, **run.config}.items():
        if name in SPEEDRUN or name == "parameters":
            facts[name] = value
    trained = run.planned * run.facts.get("tokens_per_step", 0)
    facts.update(shards_read(run, "train", trained, run.config.get("data_seed")))
    facts.update(shards_read(run, "val", run.config.get("val_tokens", 0), False))
    return facts


def is_same_shard(a, b):
    """Whether two shards in run.json are one file, whatever its name: by the hashes, without them by name."""
    if a.get("tokens") != b.get("tokens"):
        return False
    content = "sha256_of_first_mebibyte"
    if content in a and content in b:
        return a[content] == b[content]
    return "name" in a and a["name"] == b.get("name")


def validation_fault(facts):
    """A sentence, if a shard in run.json's `facts` is among those of training and of validation; else ""."""
    for val in facts.get("val_shards", ()):
        for train in facts.get("train_shards", ()):
            if is_same_shard(val, train):
                name = val.get("name")
                alias = "" if train.get("name") == name else f", there as {train.get('name')}"
                return (f"the validation shard {name} is among the training shards{alias}: "
                        "its loss is not one of unseen data")
    return ""


def check_track(runs):
    """UserError, naming the differences, if runs have different data, model, batch or validation, or if one
    could train on its validation data.

    What run.json lacks is not checked.
    """
    known = {}
    for run in runs:
        fault = validation_fault(run.facts)
        if fault:
            raise UserError(printable(f"{run.name}: {fault}; leave this run out"))
        differences = []
        for name, value in track(run).items():
            first, expected = known.setdefault(name, (run.name, value))
            if value != expected:
                differences.append(f"{name} ({first}: {expected}, {run.name}: {value})")
        if differences:
            raise UserError("the runs are of different tracks, so not comparable; "
                            f"they differ in {'; '.join(differences[:4])}")


def is_speedrun(run):
    """Whether the run is on the speedrun's track, as far as its run.json tells."""
    if "fineweb_val" not in str(run.facts.get("val_shards", "fineweb_val")):
        return False
    return all(run.config.get(name, value) == value for name, value in SPEEDRUN.items())


# groups


@dataclass
class Group:
    """Runs of one configuration and number of steps, as they were at the step at which they are judged."""
    label: str  # the optimizer or the folder, and the settings in which groups of it differ
    optimizer: str  # empty for logs without run.json
    runs: list
    fault: str  # why it has no result; empty if it has
    remark: str = ""


def settings(run, group_by):
    """What makes a run's group. dtype is the resolved one, the configuration's may be "auto"."""
    own = {name: value for name, value in run.config.items() if name not in FREE_SETTINGS}
    if own:
        return {**own, "dtype": run.facts.get("dtype"), "optimizer_sha256": run.facts.get("optimizer_sha256")}
    return {"log": run.origin.get(group_by, run.name), "num_iterations": run.planned}


def judged(label, optimizer, runs, at_step):
    """The Group of these runs at `at_step`.

    If that is None, it is judged at the end of the schedule or, for published logs, where all of them end.
    """
    fault = ""
    remark = ""
    if at_step is not None:
        for run in runs:
            if at_step not in run.steps and not run.diverged:
                fault = f"{run.name} has no evaluation at step {at_step}"
                break
        runs = [run if run.diverged else run.until(at_step) for run in runs]
    short = [run for run in runs if not run.diverged and run.steps[-1] < run.planned]
    if any(run.stopped_at_target for run in runs):
        fault = "the final losses of runs that stop at the target prove nothing"
    elif at_step is None and short:
        first = short[0]
        ends = {run.steps[-1] for run in runs}
        if len(ends) > 1 or len(runs) == 1 or any(run.facts for run in runs):
            fault = (f"{first.name} ends at step {first.steps[-1]} of {first.planned}; "
                     "--at_step compares where all runs have an evaluation")
        else:
            remark = f"{label} is judged at step {max(ends)} of {first.planned}, where all its runs end"
    for run in runs:
        if run.diverged:
            fault = run.diverged
            break
    return Group(label, optimizer, runs, fault, remark)


def versions_of_code(runs):
    """How many versions of the code these logs hold, as far as that tells; else 1.

    Where each log has a code of its own, only the seed may differ.
    """
    files = {run.origin.get("file"): run.origin.get("code") for run in runs if not run.facts}
    versions = len(set(files.values()))
    return versions if versions < len(files) else 1


def mean_loss(runs):
    """The mean of the final losses; infinite if a run diverged."""
    mean = float(np.mean([run.final for run in runs]))
    return mean if math.isfinite(mean) else math.inf


def members_by_settings(runs, group_by):
    """[(settings, the runs that have them), ...], lowest mean final loss first."""
    members = {}
    for run in runs:
        own = settings(run, group_by)
        _, same = members.setdefault(json.dumps(own, sort_keys=True), (own, []))
        same.append(run)
    return sorted(members.values(), key=lambda member: mean_loss(member[1]))


def family_of(own):
    """Which of a group's settings names it, and its value."""
    family = "optimizer" if "optimizer" in own else "log"
    return family, own.get(family)


def group_label(own, runs, others, group_by):
    """The optimizer or the log's folder, code or file, and the settings in which it differs from `others`."""
    family, _ = family_of(own)
    first = runs[0]
    if family == "log" and group_by != "folder":
        title = first.name
        if group_by == "code" and len(runs) > 1:
            title += f" and {len(runs) - 1} more"
    elif "log" in own:
        title = first.origin.get("title") or Path(own["log"]).name
    else:
        title = own.get("optimizer") or first.name
    words = [title]
    for name, value in own.items():
        if any(value != other.get(name) for other in others):
            words.append(f"{name}={json.dumps(value)}".replace('"', ""))
    return printable(" ".join(words))


def make_groups(runs, group_by="folder", at_step={}):
    """Groups of the runs, lowest mean final loss first, those without a result last.

    Logs without a run.json are a group if they have the same folder, code or file, whichever `group_by` says,
    and the same number of steps; a folder is not joined with those below it.
    `at_step` is {label: the step at which that group is judged}; the label None is for all. UserError if the
    runs are of different tracks.
    """
    check_track(runs)
    members = members_by_settings(runs, group_by)
    families = defaultdict(list)
    for own, _ in members:
        families[family_of(own)].append(own)
    found = {}
    for own, same in members:
        label = group_label(own, same, families[family_of(own)], group_by)
        while label in found:
            label += "'"
        found[label] = same
    unknown = set(at_step) - {None, *found}
    if unknown:
        raise UserError(f"--at_step names no group '{min(unknown)}'; the groups are {', '.join(found)}")
    groups = []
    for label, same in found.items():
        optimizer = same[0].config.get("optimizer", "")
        group = judged(label, optimizer, same, at_step.get(label, at_step.get(None)))
        versions = versions_of_code(same)
        if versions > 1 and group_by == "folder":
            found_code = f"the logs of {label} hold {versions} versions of the code"
            group.remark = "; ".join(filter(None, [group.remark, f"{found_code}: see --group_by code"]))
        groups.append(group)
    return sorted(groups, key=lambda group: (bool(group.fault), mean_loss(group.runs)))


def machines(runs):
    """The hardware of the runs, sorted; that of a resumed run's later parts too."""
    found = set()
    for run in runs:
        for part in (run.facts, *run.facts.get("resumed", ())):
            if "machine" not in part:
                continue
            machine = part["machine"]
            processor = machine.get("gpu") or f"{machine.get('cpu_threads')} threads of {machine.get('cpu')}"
            found.add(printable(f"{part.get('world_size')} x {processor}"))
    return sorted(found)
