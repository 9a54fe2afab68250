"""Reading runs: the folders that train_gpt2.py writes, and logs that others published in the speedrun's text format.

A log's evaluations are its lines such as `step:125/6200 val_loss:5.2017 train_time:24564ms step_avg:213.60ms`, wherever they stand and
whatever stands between the fields. A file may hold several runs, one after the other. All errors here are UserErrors.
"""
import hashlib
import json
import math
import os
import re
import stat
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from harness.command import ROOT, printable
from train_gpt2 import UserError

LINE = re.compile(r"^step:(\d{1,12})/(\d{1,12}) (.*\btrain_time:.*)$", re.MULTILINE)
NUMBER = r"([-+]?(?:nan|inf|infinity|\d+(?:\.\d*)?(?:e[-+]?\d+)?))"
RULER = re.compile(r"^={20,}$", re.MULTILINE)  # stands between the parts of a log: code, machine, evaluations
LARGEST_LOG = 2 ** 26  # bytes
DIVERGED = 1e6  # a loss above it is as good as none
SPEEDRUN = dict(batch_size=512, sequence_length=1024, n_layer=12, n_head=12, n_embd=768, vocab_size=50257, val_tokens=10485760)
# settings in which the runs of a group may differ: the track's, the seeds, and those that change neither the weights nor what is measured
FREE_SETTINGS = {*SPEEDRUN, "input_bin", "input_val_bin", "allow_repeat", "seed", "data_seed", "target_val_loss", "device",
                 "device_batch_size", "compile", "dtype", "collective_timeout", "log_dir", "run_name", "log_every", "save_every", "resume",
                 "wandb_project"}


# What run.json, metrics.jsonl and track.toml may hold. "?" marks a name that may be missing, "*" is for every other name.

IS = {
    "a non-negative integer": lambda v: type(v) is int and 0 <= v < 2 ** 63,
    "a non-negative integer or null": lambda v: v is None or type(v) is int and 0 <= v < 2 ** 63,
    "a finite number": lambda v: type(v) in (int, float) and abs(v) < 1e15,
    "a number or NaN": lambda v: type(v) is float or type(v) is int and abs(v) < 1e15,
    "true or false": lambda v: type(v) is bool,
    "a string": lambda v: type(v) is str,
    "a string or null": lambda v: v is None or type(v) is str,
    "a string, a finite number, true, false or null":
        lambda v: v is None or type(v) in (str, bool) or type(v) is float and math.isfinite(v) or type(v) is int and abs(v) < 2 ** 63,
}
COUNT, COUNT_OR_NULL, FINITE, NUMBER_OR_NAN, FLAG, TEXT, TEXT_OR_NULL, SIMPLE = IS
SHARD = {"name": TEXT, "tokens": COUNT, "sha256_of_first_mebibyte?": TEXT, "sha256_of_header_and_size?": TEXT}
MACHINE = {"torch": TEXT, "cpu": TEXT_OR_NULL, "cpu_threads": COUNT_OR_NULL, "gpu": TEXT_OR_NULL,
           "git_commit": TEXT_OR_NULL, "git_changes": FLAG}
CONFIG = {**dict.fromkeys((*SPEEDRUN, "num_iterations", "val_loss_every", "log_every", "seed", "data_seed?"), COUNT),
          "target_val_loss": FINITE, "stop_at_target": FLAG, "allow_repeat": FLAG, "optimizer": TEXT, "run_name": TEXT, "*": SIMPLE}
RUN_JSON = {"config": CONFIG, "machine": MACHINE, "world_size": COUNT, "dtype": TEXT, "code_sha256": TEXT,
            "optimizer_sha256?": TEXT_OR_NULL, "parameters": COUNT, "tokens_per_step": COUNT,
            "train_shards": [SHARD], "val_shards": [SHARD], "resumed": [{"machine": MACHINE, "world_size": COUNT}],
            "start": TEXT, "end?": TEXT, "steps?": COUNT, "final_val_loss?": FINITE}
METRICS = {"step": COUNT, "train_time_ms": FINITE, "val_loss?": NUMBER_OR_NAN, "train_loss?": NUMBER_OR_NAN}


def mismatch(value, kind, name, complete):
    """How `value`, called `name`, differs from `kind`: a key of IS, [kind], or {name: kind}; "" if it does not.

    `complete`: a missing name is a difference too.
    """
    parts = []
    if isinstance(kind, list) and isinstance(value, list):
        parts = [(part, kind[0], f"{name}[{i}]") for i, part in enumerate(value)]
    elif isinstance(kind, dict) and isinstance(value, dict):
        missing = [key for key in kind if complete and key[-1] not in "?*" and key not in value]
        if missing:
            return f"{name} lacks {missing[0]}"
        known = {key.rstrip("?"): part for key, part in kind.items()}
        parts = [(part, known.get(key, known.get("*")), f"{name}.{key}") for key, part in value.items() if {key, "*"} & {*known}]
    elif not (isinstance(kind, str) and IS[kind](value)):
        shown = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else repr(value)[:40]
        return f"{name} is {shown}, not {kind if isinstance(kind, str) else 'a list' if isinstance(kind, list) else 'an object'}"
    return next(filter(None, (mismatch(*part, complete) for part in parts)), "")


def read_bytes(path):
    """What is in a file. UserError if it cannot be read, or is no regular file: a pipe would never end."""
    try:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is not a regular file")
        if facts.st_size > LARGEST_LOG:
            raise ValueError(f"it has {facts.st_size:,} bytes, more than any log")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_text(path):
    return read_bytes(path).decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")


def read_json(text, kind, name, complete=False):
    """The JSON object in `text`, checked by `mismatch`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} cannot be read: it is not valid JSON ({str(error):.80})") from None
    wrong = mismatch(value, kind, "it", complete)
    if wrong:
        raise UserError(f"{name} cannot be read: {wrong}")
    return value


def read_facts(folder, complete=False):
    """What the run.json in `folder` says, {} without one; `complete`: it must be there, with all that train_gpt2.py writes."""
    path = Path(folder) / "run.json"
    return read_json(read_text(path), RUN_JSON, path, complete) if complete or os.path.lexists(path) else {}


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
    origin: dict = field(default_factory=dict)  # without a run.json: its folder, code (a hash) and file, see make_groups()

    @property
    def config(self):
        return self.facts.get("config", {})

    @property
    def final(self):
        """The last loss; from run.json where that has it, as log.txt rounds."""
        exact = self.facts.get("final_val_loss", math.inf)
        return exact if abs(exact - self.losses[-1]) < 1e-4 and self.facts.get("steps") == self.steps[-1] else self.losses[-1]

    @property
    def diverged(self):
        """A sentence, if a loss is not finite."""
        bad = next(((step, loss) for step, loss in zip(self.steps, self.losses) if not abs(loss) < DIVERGED), None)
        return f"{self.name} diverged: its loss is {bad[1]:g} at step {bad[0]}" if bad else ""

    @property
    def stopped_at_target(self):
        config = self.config
        return self.steps[-1] < self.planned and config.get("stop_at_target", False) and self.losses[-1] <= config.get("target_val_loss", 0)

    @property
    def step_ms(self):
        return 1000 * self.seconds[-1] / max(1, self.steps[-1] - self.untimed)

    def until(self, step):
        """The run as it was at `step`."""
        n = sum(s <= step for s in self.steps)
        return replace(self, steps=self.steps[:n], losses=self.losses[:n], seconds=self.seconds[:n]) if n else self

    def first_crossing(self, target):
        """(steps, seconds) at which the loss first met `target`, by linear interpolation; None if it never did."""
        points = list(zip(self.steps, self.losses, self.seconds))
        if points[0][1] <= target:
            return points[0][0], points[0][2]
        for (step0, loss0, time0), (step, loss, time) in pairwise(points):
            if loss <= target:
                part = (loss0 - target) / (loss0 - loss) if abs(loss0) < DIVERGED else 1
                return step0 + part * (step - step0), time0 + part * (time - time0)
        return None


def number(text, unit=""):
    """The number in a field such as 3.2785 or, with the unit s, in 24564ms or 24.564s; None if it is none."""
    found = re.fullmatch(NUMBER + (f"(m?){unit}" if unit else "()"), text or "", re.IGNORECASE)
    return float(found[1]) / (1000 if found[2] else 1) if found else None


def evaluations(text, loss):
    """Of each run in a log's `text` the evaluations with the loss of that name: [[(step, loss, seconds, planned, step_avg), ...], ...]."""
    runs = []
    for step, planned, rest in LINE.findall(text):
        step, fields = int(step), dict(re.findall(r"(\w+):(\S+)", rest))
        value, training = number(fields.get(loss)), number(fields.get("train_loss"))
        if value is None and training is not None and not math.isfinite(training):  # the last that a run says before it ends
            value = training
        if value is None:
            continue
        time, average = (number(fields.get(name), "s") for name in ("train_time", "step_avg"))
        time = time if time is not None and abs(time) < 1e12 else 0.0 if step <= 10 else math.nan
        if not runs or step <= runs[-1][0][0]:
            runs.append([])
        while runs[-1] and runs[-1][-1][0] >= step:  # what a resumed run did again
            runs[-1].pop()
        runs[-1].append((step, value, time, int(planned), average))
    # a single early evaluation followed by more runs is an example in the logged code
    return [rows for i, rows in enumerate(runs) if rows[1:] or rows[0][0] == rows[0][3] or i == len(runs) - 1]


def read_log(path, loss="val_loss"):
    """The Runs in a log, or in the folder of a run, with the loss of that name."""
    path = Path(path)
    log = path / "log.txt" if path.is_dir() else path
    text, facts = read_text(log), read_facts(log.parent)
    found = evaluations(text, loss)
    if not found:
        others = sorted({name for _, _, rest in LINE.findall(text) for name in re.findall(r"(\w+loss):", rest)} - {"train_loss", loss})
        raise UserError(f"{log} has no line such as 'step:125/6200 {loss}:5.2017 train_time:24564ms'"
                       + (f"; --loss could be {', '.join(others)}" if others else "; is it the log of a run?"))
    parts = [part.strip() for part in RULER.split(text)]
    code = next(filter(None, parts[:-1]), "") if parts[1:] else text[:LINE.search(text).start()].strip()
    name = log.resolve().parent.name if log.name == "log.txt" else log.stem
    origin = dict(folder=str(log.resolve().parent), file=str(log.resolve()),
                  code=hashlib.sha256(code.encode()).hexdigest() if code else str(log.resolve()))
    runs = []
    for i, rows in enumerate(found):
        steps, losses, seconds, planned, averages = map(list, zip(*rows))
        if any(b < a for a, b in pairwise([0.0, *filter(math.isfinite, seconds)])):  # backwards
            seconds = [math.nan] * len(seconds)
        # Old logs do not time the first 10 steps. The first average tells; later ones may cover only the steps since the last evaluation.
        step, time, average = next(((s, t, a) for s, t, a in zip(steps, seconds, averages) if s > 10), (0, 0, 0))
        untimed = 10 if average and abs(time / average - (step - 10)) < 0.4 else 0
        numbered = printable(name + f" {i + 1}" * (len(found) > 1))
        runs.append(Run(numbered, facts, steps, losses, seconds, planned[-1], untimed, dict(origin)))
    return runs


def read_run(folder):
    """The one run in the folder that train_gpt2.py wrote."""
    found = read_log(folder)
    if len(found) > 1:
        raise UserError(f"{folder} has {len(found)} runs in its log.txt, one after the other")
    return found[0]


def find_runs(path, loss="val_loss"):
    """(Runs at or below `path`, sentences on files there that were left out). UserError if there is no run."""
    path = Path(path)
    if not path.is_dir() or (path / "run.json").exists():
        return read_log(path, loss), []
    runs, left_out, without, seen = [], [], [], set()
    unreadable = lambda error: left_out.append(printable(f"{error.filename} cannot be read: {error.strerror}; it is left out"))
    for folder, folders, files in os.walk(path, onerror=unreadable, followlinks=True):
        folder, real = Path(folder), os.path.realpath(folder)
        if real in seen or "run.json" in files:  # all that lies in and below the folder of a run is that run's
            folders.clear()
        files = [] if real in seen else ["log.txt"] if "run.json" in files else sorted(files)
        seen.add(real)
        folders.sort()
        for log in (folder / file for file in files):
            try:
                if log.name == "log.txt" or LINE.search(read_text(log)):
                    runs += read_log(log, loss)
                else:
                    without.append(log)
            except UserError as error:
                left_out.append(printable(f"{error}; it is left out"))
    if not runs:
        raise UserError(f"no log.txt and no published log in {path} or below it" + "".join(f"; {sentence}" for sentence in left_out[:3]))
    if without:
        names = ", ".join(sorted(str(log.relative_to(path)) for log in without)[:5]) + ", ..." * (len(without) > 5)
        left_out.append(printable(f"files in {path} without evaluations: {len(without)} ({names})"))
    with_logs = {Path(run.origin["folder"]) for run in runs}
    for run in runs:  # their folder is the topmost that has logs itself, as there may be copies below it
        own = Path(run.origin["folder"])
        run.origin["folder"] = str(min({own, *own.parents} & with_logs, key=lambda folder: len(folder.parts)))
    return runs, left_out


def without_copies(runs):
    """The runs, but for copies: those whose evaluations are all among another's, and whose run.json is the same or missing."""
    kept = []
    for run in sorted(runs, key=lambda run: (not run.facts, -len(run.steps))):
        own = set(zip(run.steps, map(str, run.losses), map(str, run.seconds)))  # str, as nan is not equal to itself
        if not any(own <= theirs and run.facts in ({}, other.facts) for other, theirs in kept):
            kept.append((run, own))
    return [run for run in runs if any(run is other for other, _ in kept)]


def track(run):
    """What compared runs must share, {name: value}, as far as run.json says it. Only the shards that the run reads count: in the
    files' order the first ones, in any other order all."""
    facts = {name: value for name, value in {**run.facts, **run.config}.items() if name in (*SPEEDRUN, "parameters")}
    T = max(1, run.config.get("sequence_length", 1))
    trained = run.planned * run.facts.get("tokens_per_step", 0)
    for kind, tokens, all_count in (("train", trained, run.config.get("data_seed")), ("val", run.config.get("val_tokens", 0), False)):
        shards = run.facts.get(f"{kind}_shards", ())
        for i, shard in enumerate(shards):
            if tokens > 0 or all_count:
                hashes = (shard.get(f"sha256_of_{part}", "")[:12] for part in ("header_and_size", "first_mebibyte"))
                facts[f"{kind} shard {i + 1}"] = " ".join([shard.get("name", ""), *hashes])
            tokens -= (shard.get("tokens", 1) - 1) // T * T
        if shards and (tokens > 0 or all_count):
            facts[f"{kind} shard {len(shards) + 1}"] = "the first again" if tokens > 0 else "none"
    return facts


def check_track(runs):
    """UserError, naming the differences, if runs have different data, model, batch or validation. What run.json lacks is not checked."""
    known = {}
    for run in runs:
        differences = [f"{name} ({known[name][0]}: {known[name][1]}, {run.name}: {value})" for name, value in track(run).items()
                       if known.setdefault(name, (run.name, value))[1] != value]
        if differences:
            raise UserError(f"the runs are of different tracks, so not comparable; they differ in {'; '.join(differences[:4])}")


def is_speedrun(run):
    """Whether the run is on the speedrun's track, as far as its run.json tells."""
    return all(run.config.get(name, value) == value for name, value in SPEEDRUN.items()) and (
        "fineweb_val" in str(run.facts.get("val_shards", "fineweb_val")))


@dataclass
class Group:
    """Runs of one configuration and number of steps, as they were at the step at which the group is judged."""
    label: str  # the optimizer, and the settings in which groups of that optimizer differ; or the folder
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
    """The Group of these runs at `at_step`; if that is None, at the end of their schedule or, for published logs, where all of them end."""
    fault = remark = ""
    if at_step is not None:
        lacking = next((run for run in runs if at_step not in run.steps and not run.diverged), None)
        runs = [run if run.diverged else run.until(at_step) for run in runs]
        if lacking:
            fault = f"{lacking.name} has no evaluation at step {at_step}"
    short = [run for run in runs if not run.diverged and run.steps[-1] < run.planned]
    if any(run.stopped_at_target for run in runs):
        fault = "the final losses of runs that stop at the target prove nothing"
    elif at_step is None and short:
        ends = {run.steps[-1] for run in runs}
        if len(ends) > 1 or not runs[1:] or any(run.facts for run in runs):
            fault = (f"{short[0].name} ends at step {short[0].steps[-1]} of {short[0].planned}; "
                     "--at_step compares where all runs have an evaluation")
        else:
            remark = f"{label} is judged at step {max(ends)} of {short[0].planned}, where all its runs end"
    return Group(label, optimizer, runs, next((run.diverged for run in runs if run.diverged), fault), remark)


def mean_loss(runs):
    mean = float(np.mean([run.final for run in runs]))
    return mean if math.isfinite(mean) else math.inf


def make_groups(runs, group_by="folder", at_step={}):
    """Groups of the runs, lowest mean final loss first, those without a result last. UserError if the runs are of different tracks.

    Logs without a run.json are a group if they have the same folder, code or file, whichever `group_by` says. `at_step` is
    {label: the step at which that group is judged}; the label None is for all.
    """
    check_track(runs)
    members = {}
    for run in runs:
        members.setdefault(json.dumps(settings(run, group_by), sort_keys=True), []).append(run)
    own = {id(same[0]): settings(same[0], group_by) for same in members.values()}
    found = {}
    for same in sorted(members.values(), key=mean_loss):
        first, mine = same[0], own[id(same[0])]
        family = "optimizer" if "optimizer" in mine else "log"
        others = [other for other in own.values() if other.get(family) == mine.get(family)]
        differ = [f"{name}={json.dumps(value)}".replace('"', "") for name, value in mine.items()
                  if any(value != other.get(name) for other in others)]
        title = mine.get("optimizer") or Path(mine.get("log", first.name)).name
        if family == "log" and group_by != "folder":
            title = first.name + f" and {len(same) - 1} more" * (group_by == "code" and len(same) > 1)
        label = printable(" ".join([title, *differ]))
        while label in found:
            label += "'"
        found[label] = same
    unknown = {*at_step} - {None, *found}
    if unknown:
        raise UserError(f"--at_step names no group '{min(unknown)}'; the groups are {', '.join(found)}")
    groups = [judged(label, same[0].config.get("optimizer", ""), same, at_step.get(label, at_step.get(None)))
              for label, same in found.items()]
    return sorted(groups, key=lambda group: (bool(group.fault), mean_loss(group.runs)))


def machines(runs):
    """The hardware of the runs, sorted; that of a resumed run's later parts too."""
    parts = [part for run in runs for part in (run.facts, *run.facts.get("resumed", ())) if "machine" in part]
    return sorted({printable(f"{part.get('world_size')} x {m.get('gpu') or '{} threads of {}'.format(m.get('cpu_threads'), m.get('cpu'))}")
                   for part in parts for m in [part["machine"]]})


def diverged(folder):
    """Whether `folder` holds a run that ended with a loss that is not a number."""
    try:
        return bool(read_run(folder).diverged)
    except UserError:  # no log, or none with an evaluation
        return False


def read_curve(path=ROOT / "records/speedrun/record4.csv"):
    """A published validation curve: [(step, loss, training seconds), ...]. Lines that start with # say where it is from."""
    rows = [line.split(",") for line in read_text(path).splitlines() if not line.startswith("#")]
    try:
        return [(int(step), float(loss), float(seconds)) for step, loss, seconds in rows[1:]]
    except ValueError:
        raise UserError(f"{path} is not a table of step, val_loss and train_time_s") from None
