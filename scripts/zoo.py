"""Compare the optimizers of optimizers/ with Muon, all tuned alike: records/zoo/README.md.

    python scripts/zoo.py --jobs 2                     every optimizer on the CPU track: 25 runs and half an hour on two cores for each
    python scripts/zoo.py --optimizers soap,normuon    these, and Muon, with which all are compared
    python scripts/zoo.py --track mini                 the same on a GPU, on the configurations configs/mini_*.toml
    python scripts/zoo.py --page                       only writes the page of what has been run
    python scripts/zoo.py --records logs/wide --n_embd 128    a comparison of one's own, by fields of the configuration

Tuning: 12 points of an optimizer, each with the seeds 100 and 101 (seed and data_seed alike), by the mean of the final losses;
the second seed is skipped where the first ends 0.02 above the best, three standard deviations of Muon's runs on the CPU track: such a
point would hardly win. The centre of the pairs is set for that track; elsewhere it scales with the rates of the track's Muon configuration.
3 x 3 pairs of learning_rate and hidden_learning_rate, a factor of 2 apart; at the best pair two other values of the setting that
matters most; at the best of these 11 one pair more: the first untried neighbour, at a factor of 2 or else of the square root of 2.
Results: the best point with the seeds 1 to 6, and Muon also at 0.5 to 1.5 of the steps, which says how many steps a loss is worth.
Time: scripts/bench.py, which alternates 10 steps of the optimizer with 10 of Muon's, before anything is trained.

Every finished run is a line of records/zoo/TRACK/runs.csv and is not run again: the same command continues, on any machine that has
that file. To run something again, after a change of its code, remove its lines there and its folders in logs/zoo_TRACK/. A run that
diverges has the loss nan and stays.
"""
import argparse
import ast
import csv
import importlib
import inspect
import io
import json
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import ROOT, command
import numpy as np
import torch
from matplotlib.figure import Figure

from harness import estimates, runs
from harness.jobs import PLANNED_FIELDS, Jobs, fetch_data, finished, start
from scripts import records as filing
from scripts import tune
from train_gpt2 import GPT, MAY_CHANGE_ON_RESUME, UserError, build_optimizers, code_sha256, load_config, write_atomically

RECORDS = ROOT / "records" / "zoo"
TUNING_SEEDS, SEEDS = range(tune.FIRST_TUNING_SEED, tune.FIRST_TUNING_SEED + 2), range(1, 7)
HOPELESS = 0.02  # a point whose first seed ends so far above the best is not run again
HASHES = ("code_sha256", "optimizer_sha256")  # in run.json: of the trainer and of the optimizer's file
LENGTHS = (1.0, 0.94, 0.5, 0.75, 1.25, 1.5)  # of Muon, in the track's steps


@dataclass
class Entry:
    """An optimizer of the comparison."""
    optimizer: str  # as in a configuration
    setting: str  # the setting that matters most, besides the learning rates
    values: tuple  # what is tried for it besides its default
    source: str
    arguments: dict = field(default_factory=dict)
    rates: tuple = (0.02, 0.002)  # centre of the tuning on the CPU track: learning_rate, hidden_learning_rate


# no optimizer starts with a longer memory than this, unless that is its tuned setting: FILED says why
SHORTER_MEMORY = {"momentum": 0.9}

ZOO = {
    "muon": Entry("muon", "momentum", (0.9, 0.98), "K. Jordan et al., 2024"),
    "newton_muon": Entry("newton_muon", "momentum", (0.9, 0.98), "arXiv:2604.01472", rates=(0.014, 0.002)),
    "adamw": Entry("adamw", "beta2", (0.9, 0.99), "arXiv:1711.05101", rates=(0.01, 0.0057)),
    "torch_muon": Entry("torch.optim:Muon", "momentum", (0.9, 0.98), "torch",
                        arguments={"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}, rates=(0.02, 0.01)),
    "polar_muon": Entry("optimizers.polar_muon:PolarMuon", "momentum", (0.9, 0.98), "arXiv:2505.16932"),
    "exact_muon": Entry("optimizers.polar_muon:PolarMuon", "momentum", (0.9, 0.98), "Muon, by SVD", arguments={"exact": True}),
    "normuon": Entry("optimizers.normuon:NorMuon", "beta2", (0.9, 0.99), "arXiv:2510.05491", arguments=SHORTER_MEMORY),
    "sf_normuon": Entry("optimizers.sf_normuon:SFNorMuon", "beta1", (0.8, 0.95), "arXiv:2605.23061", rates=(0.02, 0.008)),
    "muon_igt": Entry("optimizers.muon_igt:MuonIGT", "momentum", (0.8, 0.95), "arXiv:2605.05577"),
    "scion": Entry("optimizers.scion:Scion", "radius", (10.0, 250.0), "arXiv:2502.07529"),
    "stiefel_muon": Entry("optimizers.stiefel_muon:StiefelMuon", "momentum", (0.9, 0.98), "arXiv:2605.09238", rates=(0.02, 0.0005)),
    "low_rank_muon": Entry("optimizers.low_rank_muon:LowRankMuon", "rank_fraction", (0.125, 0.5), "arXiv:2509.11983",
                           arguments=SHORTER_MEMORY),
    "dion": Entry("optimizers.dion:Dion", "rank_fraction", (0.125, 0.5), "arXiv:2504.05295", arguments=SHORTER_MEMORY),
    "orth_dion": Entry("optimizers.dion:OrthDion", "rank_fraction", (0.125, 0.5), "arXiv:2605.16341", arguments=SHORTER_MEMORY),
    "ef_muon": Entry("optimizers.ef_muon:EFMuon", "momentum", (0.9, 0.98), "arXiv:2605.08980", rates=(0.02, 4.0)),
    "dp_muon": Entry("optimizers.dp_muon:DPMuon", "noise_multiplier", (0.003, 0.03), "arXiv:2605.12994", arguments=SHORTER_MEMORY),
    "power_newton_muon": Entry("optimizers.power_newton_muon:PowerNewtonMuon", "power", (0.25, 0.75), "arXiv:2604.01472",
                               arguments=SHORTER_MEMORY),
    "shampoo": Entry("optimizers.shampoo:Shampoo", "beta2", (0.9, 0.98), "arXiv:1802.09568"),
    "soap": Entry("optimizers.soap:SOAP", "beta2", (0.9, 0.98), "arXiv:2409.11321", arguments={"beta1": 0.9}, rates=(0.02, 0.004)),
    "soap_one_sided": Entry("optimizers.soap:SOAP", "beta2", (0.9, 0.98), "arXiv:2409.11321", arguments={"beta1": 0.9, "one_sided": True},
                            rates=(0.02, 0.004)),
    "pmuon": Entry("optimizers.pmuon:PMuon", "power", (0.2, 0.4), "modded-nanogpt, optimizer track, record 18", arguments=SHORTER_MEMORY),
    "soap_muon": Entry("optimizers.soap_muon:SOAPMuon", "beta2", (0.8, 0.95), "modded-nanogpt, optimizer track, record 44",
                       arguments=SHORTER_MEMORY),
    "signum": Entry("optimizers.signum:Signum", "momentum", (0.9, 0.98), "signSGD, ICML 2018"),
    "lion": Entry("optimizers.lion:Lion", "beta2", (0.95, 0.995), "arXiv:2302.06675", rates=(0.02, 0.001)),
    "adopt": Entry("optimizers.adopt:ADOPT", "beta2", (0.95, 0.999), "arXiv:2411.02853", arguments={"beta2": 0.99}, rates=(0.02, 0.004)),
}


class Point(NamedTuple):
    """What is run: all that a line of runs.csv says besides the loss and the code."""
    optimizer: str
    steps: int
    learning_rate: float
    hidden_learning_rate: float
    setting: str  # the value of the entry's setting; empty: its default
    seed: int


def fields(entry, point):
    """Command-line arguments of train_gpt2.py that make the track's Muon configuration that run."""
    arguments = {**entry.arguments, **({entry.setting: json.loads(point.setting)} if point.setting else {})}
    if ":" in entry.optimizer:
        arguments = {"optimizer_args": json.dumps(arguments)}
    arguments = {"optimizer": entry.optimizer, **arguments, **{rate: getattr(point, rate) for rate in tune.RATES},
                 "seed": point.seed, "data_seed": point.seed, "num_iterations": point.steps}
    return [text for name, value in arguments.items() for text in (f"--{name}", str(value))]


class Table:
    """runs.csv of a track: {Point: final loss, nan if it diverged}, to which every finished run is added at once."""

    def __init__(self, path):
        self.path, self.losses, self.lock = path, {}, threading.Lock()
        if self.path.exists():
            try:
                with open(self.path, newline="") as file:
                    if not file.read().endswith("\n"):
                        raise ValueError("its last line breaks off")
                    file.seek(0)
                    for row in csv.DictReader(file):
                        if None in row or None in row.values():
                            raise ValueError("a line has too many columns or too few")
                        point = Point(*(kind(row[name]) for name, kind in Point.__annotations__.items()))
                        self.losses[point] = float(row["final_val_loss"])
            except (OSError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{self.path} cannot be read ({type(error).__name__}: {error}); restore it from git") from None

    def add(self, point, loss, facts):
        """Adds a finished run, whose run.json is `facts`."""
        with self.lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = io.StringIO(newline="")
            lines = csv.writer(text, lineterminator="\n")
            if not self.path.exists():
                lines.writerow((*Point._fields, "final_val_loss", *HASHES))
            lines.writerow((*point, loss, *((facts.get(name) or "")[:12] for name in HASHES)))
            write_atomically(self.path, (self.path.read_bytes() if self.path.exists() else b"") + text.getvalue().encode())
            self.losses[point] = loss

    def mean(self, optimizer, steps, learning_rate, hidden_learning_rate, setting, seeds):
        """Mean final loss over those of the seeds that were run, infinite if one diverged."""
        points = [Point(optimizer, steps, learning_rate, hidden_learning_rate, setting, seed) for seed in seeds]
        loss = np.mean([self.losses[point] for point in points if point in self.losses])
        return loss if math.isfinite(loss) else math.inf

    def results(self, optimizer, steps):
        """{seed: final loss} of the runs that are not tuning."""
        found = {p: loss for p, loss in self.losses.items() if p.optimizer == optimizer and p.steps == steps and p.seed not in TUNING_SEEDS}
        if len({p._replace(seed=0) for p in found}) > 1:
            raise UserError(f"{self.path} has results of {optimizer} with several rates or settings; remove the lines of all but one")
        return {p.seed: loss for p, loss in found.items()}


def read_overhead(path):
    """{name: {"state_bytes": ..., and but for Muon "mean_step", "low", "high", "machine"}}, as Track.measure writes it; {} without
    the file."""
    try:
        measured = json.loads(path.read_text()) if path.exists() else {}
        for name, found in measured.items():
            figures = ("state_bytes", "mean_step", "low", "high") if "machine" in found else ("state_bytes",)
            if not all(isinstance(found[key], (int, float)) for key in figures):
                raise ValueError(f"a figure of {name} is no number")
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); restore it from git") from None
    return measured


class Track:
    """The runs of a track: which there are, and the training of those that are missing."""

    def __init__(self, name, jobs, logs, given, table):
        self.jobs, self.logs, self.given, self.table = jobs, logs, given, table
        self.training, self.free = Jobs(jobs), threading.Semaphore(jobs)  # for all threads that train
        self.config = f"configs/{name}_muon.toml"
        self.full = load_config([self.config, *given])
        self.steps = self.full.num_iterations

    def centre(self, entry):
        """The entry's rates, in proportion to those of the track's Muon configuration."""
        return tuple(rate * (getattr(self.full, name) / muons) for rate, name, muons in zip(entry.rates, tune.RATES, ZOO["muon"].rates))

    def train(self, points):
        """Runs those of `points` that are not in the table. UserError if one does not end; then none is begun any more."""
        missing, failed = [point for point in dict.fromkeys(points) if point not in self.table.losses], []

        def one(point):
            name = "_".join(str(value) for value in point if value != "")
            shorter = [text for name in ("warmup_iters", "warmdown_iters")
                       for text in (f"--{name}", str(round(getattr(self.full, name) * point.steps / self.steps)))]
            arguments = [self.config, "--save_every", "250", *self.given, *fields(ZOO[point.optimizer], point), *shorter,
                         "--val_loss_every", "0", "--log_dir", str(self.logs), "--run_name", name, "--resume", "auto"]
            with self.free:
                if failed or self.training.stopped:
                    return
                try:
                    finished(self.logs / name, load_config(arguments))  # refuses what other code has left there
                except UserError as error:
                    failed.append(str(error))
                    return
                loss = self.training.train(arguments, self.logs / name)
                if loss is None and not runs.diverged(self.logs / name):
                    failed.append(f"the run {name} in {self.logs} did not end; the same command resumes it")
                    return
            loss = math.nan if loss is None else loss
            self.table.add(point, loss, {"code_sha256": code_sha256(), **runs.read_facts(self.logs / name)})
            print(f"{name}: {loss:.4f}", flush=True)

        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(one, missing))
        if failed or self.training.stopped:
            raise UserError(failed[0] if failed else "interrupted")

    def losses_of(self, points, best=math.inf):
        """{point: mean loss over the tuning seeds} of points without a seed, after their training; `best` is the least loss so far."""
        self.train([Point(*point, TUNING_SEEDS[0]) for point in points])
        first = {point: self.table.mean(*point, TUNING_SEEDS[:1]) for point in points}
        bound = min(best, *first.values()) + HOPELESS
        self.train([Point(*point, seed) for point in points if first[point] <= bound for seed in TUNING_SEEDS])
        return {point: self.table.mean(*point, TUNING_SEEDS) for point in points}

    def tune(self, name):
        """(learning_rate, hidden_learning_rate, setting) of the best of 12 points."""
        entry, centre, tried, at = ZOO[name], self.centre(ZOO[name]), {}, {}  # (pair, setting) -> mean loss, point

        def best_of(*points):
            """The best point so far, after these have been tried."""
            new = {(pair, setting): (name, self.steps, *tune.rates(centre, pair), setting) for pair, setting in points}
            losses = self.losses_of(new.values(), min(tried.values(), default=math.inf))
            tried.update({point: losses[new[point]] for point in new})
            at.update(new)
            while True:
                best = min(tried, key=tried.get)
                before, tried[best] = tried[best], self.losses_of([at[best]])[at[best]]
                if tried[best] == before:  # it has had all seeds
                    return best

        pair, _ = best_of(*((pair, "") for pair in tune.next_pairs({})))
        _, setting = best_of(*((pair, json.dumps(value)) for value in entry.values))
        further, = tune.next_pairs({pair: loss for (pair, s), loss in tried.items() if s == setting})
        pair, setting = best_of((further, setting))
        return *tune.rates(centre, pair), setting

    def measure(self, name):
        """Adds the time of a step and the bytes of state to overhead.json, if they are not there."""
        path, entry = self.table.path.with_name("overhead.json"), ZOO[name]
        measured = read_overhead(path)
        if name in measured:
            return
        config = load_config([self.config, *self.given, *fields(entry, Point(name, self.steps, *self.centre(entry), "", 0))])
        found = {}
        if entry.optimizer != "muon":
            out = self.logs / "bench.json"
            self.logs.mkdir(parents=True, exist_ok=True)
            start(["scripts/bench.py", self.config, "--sides", f"muon,{entry.optimizer}", "--rounds", "12", "--steps", "10",
                             "--json", str(out), "--optimizer_args", config.optimizer_args, *self.given],
                            "the time of a step was not measured; run the same command again to continue")
            bench = json.loads(out.read_text())
            ratio = bench["ratios"][f"{entry.optimizer}/muon"]
            found = {"machine": bench["machine"], **{key: ratio[key] for key in ("mean_step", "low", "high")}}
        measured[name] = {**found, "state_bytes": state_bytes(config)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(measured, indent=1).encode() + b"\n")

    def compare(self, name):
        """Tunes one optimizer and runs it."""
        best = self.tune(name)
        lengths = LENGTHS if name == "muon" else (1.0,)
        self.train([Point(name, round(length * self.steps), *best, seed) for length in lengths for seed in SEEDS])


def state_bytes(config):
    """Bytes of state per hidden parameter, after a refresh and two steps: for some rules the first step only initialises."""
    model = GPT(config)
    hidden, matrices = build_optimizers(model, config)[1], list(model.hidden_matrices().values())
    for p in matrices:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    if hasattr(hidden, "refresh"):
        hidden.refresh([torch.eye(min(p.shape)).repeat(p.size(1) // min(p.shape), 1, 1) for p in matrices], 1)
    for _ in range(2):
        hidden.step()
    tensors = [value for state in hidden.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(t.numel() * t.element_size() for t in tensors) / sum(p.numel() for p in matrices)


def lines_of_code(entry):
    """Lines of the optimizer's module that are neither empty, comments nor its docstring; None for torch's own."""
    module = entry.optimizer.partition(":")[0]
    if not module.startswith("optimizers."):
        return None
    source = inspect.getsource(importlib.import_module(module))
    docstring = ast.parse(source).body[0].end_lineno
    return sum(1 for line in source.splitlines()[docstring:] if line.strip() and not line.strip().startswith("#"))


# the page


def mean_loss(finals):
    """Estimate of the mean of {seed: final loss}; nan if one diverged."""
    values = [*finals.values()]
    return estimates.mean_interval(values) if np.isfinite(values).all() else estimates.Estimate(math.nan)


def steps_saved(gap, curve, steps):
    """Text: 1 - steps / s with its interval, where s steps take Muon to a loss that is `gap`, an Estimate, above its own after `steps`.

    `curve` is {steps: mean final loss} of Muon, between whose points the loss is linear in the logarithm of the steps.
    """
    lengths, losses = zip(*sorted(curve.items(), reverse=True))  # rising losses

    def share(change):
        loss = curve[steps] + change
        if not losses[0] <= loss <= losses[-1]:
            return f"above {1 - steps / lengths[0]:.0%}" if loss < losses[0] else f"below {1 - steps / lengths[-1]:.0%}"
        return f"{1 - steps / math.exp(np.interp(loss, losses, np.log(lengths))):z.1%}"
    ends = [share(change) for change in (gap.high, gap.low) if change is not None]
    return share(gap.mean) + (f" ({' to '.join(ends)})" if set(ends) - {share(gap.mean)} else "")


def at_ends(table, point):
    """Names of the rates and of the setting whose value in `point`, the best, is the smallest or largest of those tried."""
    tried = [p for p in table.losses if p[:2] == point[:2] and p.seed in TUNING_SEEDS]
    rates = [rate for rate in tune.RATES if tried and getattr(point, rate) in (end(getattr(p, rate) for p in tried) for end in (min, max))]
    settings = {json.loads(p.setting) for p in (*tried, point) if p.setting}  # the default lies between the two of the 12 points
    return rates + [ZOO[point.optimizer].setting] * bool(point.setting and json.loads(point.setting) in (min(settings), max(settings)))


def row(table, name, point, measured, muon, curve):
    """What the page says of an optimizer: (Estimate of the mean final loss, cells of the table)."""
    entry, steps = ZOO[name], point.steps
    finals = table.results(name, steps)
    loss = mean_loss(finals)
    against, saved = "", ""
    if name != "muon" and math.isfinite(loss.mean):
        gap = estimates.mean_interval([finals[seed] - muon[seed] for seed in finals])
        against = f"{gap.mean:+.4f}"
        if gap.low is not None:
            against += f" ({gap.low:+.4f} to {gap.high:+.4f})" + ("" if gap.low * gap.high > 0 else " =")
        saved = steps_saved(gap, curve, steps)
    time = "" if "mean_step" not in measured else f"{measured['mean_step']:.2f} ({measured['low']:.2f} to {measured['high']:.2f})"
    rates = f"{point.learning_rate:g}, {point.hidden_learning_rate:g}" + (f", {entry.setting} {point.setting}" if point.setting else "")
    code = lines_of_code(entry)
    final = f"{loss.mean:.4f} ({loss.low:.4f} to {loss.high:.4f})" if loss.low is not None else f"{loss.mean:.4f}"
    return loss, (f"`{name}`", final, against, saved, time, f"{measured['state_bytes']:.1f}", str(code or ""), rates, entry.source)


def section(folder):
    """The part of the page on the track in `folder`, and the points of its plot: (text, [(name, time of a step, final loss), ...])."""
    table = Table(folder / "runs.csv")
    steps = max((point.steps for point in table.losses if point.seed in TUNING_SEEDS), default=0)
    measured = read_overhead(folder / "overhead.json")
    muon = {round(length * steps): table.results("muon", round(length * steps)) for length in LENGTHS}
    curve = {length: float(np.mean([*finals.values()])) for length, finals in muon.items() if set(finals) == set(SEEDS)}
    complete = [name for name in ZOO if name in measured and len(curve) == len(LENGTHS) and set(table.results(name, steps)) == set(SEEDS)]
    best = {name: next(p for p in table.losses if p.optimizer == name and p.steps == steps and p.seed in SEEDS) for name in complete}
    found = {name: row(table, name, best[name], measured[name], muon[steps], curve) for name in complete}
    ends = [f"`{name}` ({', '.join(found_there)})" for name, point in best.items() if (found_there := at_ends(table, point))]
    rows = sorted(found.values(), key=lambda row: math.inf if math.isnan(row[0].mean) else row[0].mean)
    waiting = [name for name in ZOO if name not in complete]
    text = [f"## {folder.name}\n", f"{steps} steps, {len(SEEDS)} seeds; {len(rows)} of {len(ZOO)} optimizers.\n",
            filing.markdown([("optimizer", "final loss (95 %)", "against Muon, by pairs", "steps saved", "time of a step",
                              "state, bytes", "lines", "rates, setting", "source"), *(cells for _, cells in rows)])]
    if ends:
        text.append("Best at an end of the values tried, so perhaps better beyond it: " + ", ".join(ends) + ".\n")
    if waiting:
        text.append("Not run yet, or not to the end: " + ", ".join(f"`{name}`" for name in waiting) + ".\n")
    text.append(f"![loss against the time of a step]({folder.name}/loss_time.png)\n")
    return "\n".join(text), [(name, measured[name].get("mean_step", 1.0), loss) for name, (loss, _) in found.items()]


HEAD = """# The optimizers people ask about

`python scripts/zoo.py` tunes each with the same effort, runs it with six other seeds, and writes this page; `--help` says how.
Every run behind the table is a line of `runs.csv`. Rows are sorted by final loss. **=** marks what cannot be told from Muon:
the 95 % interval of the difference over the seeds, which all optimizers share, contains 0. Of the optimizers that equal Muon,
one in twenty will look different. Steps saved: of the steps in which Muon would reach the same loss, the share that the
optimizer does without; Muon's steps come from its mean losses at 0.5 to 1.5 of the steps, interpolated linearly in the
logarithm of the steps; the interval is that of the difference in loss, converted the same way. The time of a step is its ratio
to Muon's, the two taking turns in one process, on the machine that `overhead.json` names. The state is in bytes per hidden
parameter (fp32), without the buffer through which Muon and what is built on it share updates. Lines are lines of code in the
optimizer's file, without what it imports from others. Which setting is tuned was our choice: one of the optimizer's own where
it has any, else the momentum.
"""
FILED = """
On the runs of the CPU track:

- **Code.** The lines of `runs.csv` are of the trainers of commits 9e09ea1 (a39201df5e45: the CPU record's tuning), 2c78ab1 (62da8cbbcb79)
  and 349c328 (d539f47be0cd). Over 30 steps (`python train_gpt2.py configs/cpu_newton_muon.toml --learning_rate 0.028 --num_iterations 30
  --warmdown_iters 0`) the losses of the first agree with those of the last to six digits, those of the second exactly. The lines of the
  last come from another kind of CPU, on which seed 1 of the Muon, Newton-Muon and AdamW configurations ends at 1.5184, 1.5136 and 1.6451;
  on the first kind it ends at 1.5183, 1.5136 and 1.6443 ([two_cpus.csv](../bench/two_cpus.csv)). `optimizer_sha256` is that of the
  optimizer's file at commit 7004722, LowRankMuon's at 57bfb31; the lines of the earlier trainers lack it. Since then these files have
  changed in their prose, in a constant of SOAP's that has a name now, in when StiefelMuon refuses a matrix, and in what NorMuon makes of
  rows of zeros and Lion and Signum of NaN, but not in their rules.
- **Momentum.** Muon was tuned first, and ends 0.02 lower with a momentum of 0.9 than with the speedrun's 0.95, which is more than
  separates it from Newton-Muon. To keep defaults from deciding the comparison, no other optimizer starts with a momentum above 0.9,
  unless that is the setting that is tuned. By then AdamW and torch's Muon had been run in part, whose entries stay as they were, and
  Newton-Muon had been run with another setting, the ridge (0.8 is best), and a momentum of 0.95: 1.5186 in the mean of six seeds
  ([newton_muon_ridge.csv](cpu/newton_muon_ridge.csv), the same command at commit 5d6b04f). Now its setting is the momentum, as Muon's is.
  The rates were not tuned again after the momentum: where they were, with 20 seeds, Newton-Muon saves 2.2 % (0.4 to 4.0) of Muon's steps
  ([record](../cpu/2026-11-28_momentum_0.9/README.md), which also says how far the two results agree).
- **Centres.** Muon's nine pairs surround the best one of the CPU record; Newton-Muon's and AdamW's are placed so that the record's pairs
  are among them. The others follow from what the rate means: Muon's where it is the root-mean-square of an update, twice that for SOAP
  and ADOPT, whose updates are Adam's, half for Lion, 0.01 for torch's Muon, which scales by 0.2; EF-Muon's has another unit. SF-NorMuon's
  gradients feel only (1 - beta1) of a step, so it needs larger rates: its centre was moved from a hidden rate of 0.002 to 0.008 after
  three points had shown the loss to fall up to the edge of the nine (1.857, 1.724 and 1.633 at 0.001, 0.002 and 0.004); they stay in
  `runs.csv`. So with StiefelMuon, whose weights keep the size that they start with, so that a rate turns them more than Muon's, which
  grow: its centre was moved from 0.002 to 0.0005 after three points with a loss that rose from edge to edge (1.916, 2.040 and 2.221 at
  0.001, 0.002 and 0.004).
- **Ends.** Where the best value is at an end of those tried (listed below the table), one beyond it might be better still. No setting is
  tried there, and of rates only the pair that is the twelfth point. In addition to the 12 points, with the two tuning seeds
  ([beyond.csv](cpu/beyond.csv)), Dion ends at 1.5174 with a rank_fraction of 1 (1.5643 with 0.5; LowRankMuon with 1 is Muon), PMuon at
  1.4825 with a power of 0.5 (1.4833 with 0.4), Lion at 1.6310 with a beta2 of 0.9 (1.6239 with 0.95), and Muon at 1.5094 with a momentum
  of 0.8 (1.5021 with 0.9; `runs.csv` has these two runs by the earlier trainer as well).
- **Another twelve seeds.** Planned on 2026-11-27, before the runs: Newton-Muon with a power of 1/2 is, of what takes no more than 2 %
  longer for a step than Muon, the best of those above, and the best of several looks better than it is. So it and Muon are to run again,
  at the points of the table, with the seeds 7 to 18, and by these alone it is said whether it saves steps: yes if the 95 % interval of
  the paired difference of the final losses lies below 0. Run on 2026-11-28 ([confirm.csv](cpu/confirm.csv)): 1.5009 against 1.5050, by
  pairs -0.0041 (-0.0062 to -0.0020), **so yes**: 3.2 % of the steps (1.6 to 4.9 %), converted as in the table. The commands, for each seed
  $i: `python train_gpt2.py configs/cpu_muon.toml --momentum 0.9 --seed $i --data_seed $i`, and with `--optimizer
  optimizers.power_newton_muon:PowerNewtonMuon --optimizer_args '{"momentum": 0.9}'` instead of `--momentum 0.9`.
- **Other differences.** torch's Muon takes the fused q, k, v as one matrix, and rounds to bf16. AdamW's beta2 is also that of the table's
  AdamW. All run under the track's schedule, SF-NorMuon too, for which its paper has a constant rate: with one (`--warmdown_iters 0`) it
  ends at 1.5571 instead of 1.5771, at its best point, with the two tuning seeds ([beyond.csv](cpu/beyond.csv)).
"""


def plot(points):
    """Loss against the time of a step, of all and of those near Muon; `points` are those of section()."""
    points = sorted((point for point in points if math.isfinite(point[2].mean)), key=lambda point: point[2].mean)
    muon = next((loss.mean for name, _, loss in points if name == "muon"), math.inf)
    near = [point for point in points if abs(point[2].mean - muon) < 0.05]
    far = [point for point in points if point not in near]
    figure = Figure(figsize=(13, 6), layout="constrained")
    for axes, title, shown, labelled in zip(figure.subplots(1, 2), ("all", "within 0.05 of Muon"), (points, near), (far, near)):
        for name, time, loss in shown:
            half = 0 if loss.low is None else loss.high - loss.mean
            axes.errorbar(time, loss.mean, half, fmt="o", color="C1" if name == "muon" else "C0", capsize=2)
        for i, (name, time, loss) in enumerate(labelled):  # in a column, as many points have nearly the same place
            axes.annotate(name, (time, loss.mean), xytext=(1.03, (i + 0.5) / len(labelled)), textcoords="axes fraction", fontsize=9,
                          va="center", arrowprops=dict(arrowstyle="-", color="0.7", linewidth=0.6))
        axes.set(title=title, xlabel="time of a step, relative to Muon's", ylabel="final loss, mean and 95 % interval")
    return figure


def write_page(records, check=False):
    sections = {path.parent.name: section(path.parent) for path in sorted(records.glob("*/runs.csv"))}
    text, path = HEAD + FILED * (records == RECORDS) + "".join("\n" + text for text, _ in sections.values()), records / "README.md"
    if check:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path} is stale; run `python scripts/zoo.py --page`")
        return
    path.write_text(text, encoding="utf-8")
    for track, (_, points) in sections.items():
        plot(points).savefig(records / track / "loss_time.png", dpi=110)
    print(f"{path}: {', '.join(f'{track} {len(points)}' for track, (_, points) in sections.items()) or 'no'} optimizers")


@command()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="%(prog)s [options] [--field value ...]")
    parser.add_argument("--optimizers", default=",".join(ZOO), metavar="NAME,...", help=f"of {', '.join(ZOO)} (default: all)")
    parser.add_argument("--track", choices=("cpu", "mini"), default="cpu", help="(default: cpu)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the CPU cores (default: 1)")
    parser.add_argument("--log_dir", type=Path, help="folder of the runs, relative to the repository (default: logs/zoo_TRACK)")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="FOLDER",
                        help="of the page and its tables, for one choice of fields (default: records/zoo)")
    args, given = parser.parse_known_args()
    args.records = args.records.resolve()
    os.chdir(ROOT)  # configurations name their data from there
    names = args.optimizers.split(",")
    unknown = [name for name in names if name not in ZOO]
    if unknown:
        raise UserError(f"there is no optimizer '{unknown[0]}' here; there are {', '.join(ZOO)}")
    harmless = MAY_CHANGE_ON_RESUME.difference(PLANNED_FIELDS)
    other = [field for field in given if field.startswith("--") and field[2:].split("=")[0] not in harmless]
    if other and args.records == RECORDS:
        raise UserError(f"{other[0]} makes this a different comparison from {RECORDS}; give it a folder of its own with --records FOLDER")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    if not (args.page or args.check):
        track = Track(args.track, args.jobs, args.log_dir or Path("logs") / f"zoo_{args.track}", given,
                      Table(args.records / args.track / "runs.csv"))
        fetch_data(args.track, given)
        names = list(dict.fromkeys(["muon", *names]))  # all are compared with Muon
        for name in names:
            track.measure(name)
        failed = []
        with ThreadPoolExecutor(args.jobs) as pool:  # while one optimizer waits for a run that decides its next, another trains
            try:
                for name, ending in [(name, pool.submit(track.compare, name)) for name in names]:
                    error = ending.exception()  # waits
                    if error:
                        if not isinstance(error, (UserError, OSError)):
                            raise error
                        failed.append(f"{name}: {error}")
                        print(f"error: {failed[-1]}", file=sys.stderr, flush=True)
                    write_page(args.records)
            except BaseException:
                track.training.stop()
                raise
        if failed:
            raise UserError(f"not complete: {'; '.join(failed)}")
    else:
        write_page(args.records, args.check)


if __name__ == "__main__":
    main()
