"""What is filed of the comparison: the final losses in runs.csv, and the costs of a step in overhead.json."""
import csv
import io
import json
import math
import threading
from typing import NamedTuple

import numpy as np

from harness.tuning import FIRST_TUNING_SEED
from train_gpt2 import UserError, write_atomically

TUNING_SEEDS = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + 2)
SEEDS = range(1, 7)  # of the results
HASHES = ("code_sha256", "optimizer_sha256")  # in run.json: of the trainer and of the optimizer's file


class Point(NamedTuple):
    """What is run: all that a line of runs.csv says besides the loss and the code."""
    optimizer: str
    steps: int
    learning_rate: float
    hidden_learning_rate: float
    setting: str  # the value of the entry's setting, as JSON; empty: its default
    seed: int


class Table:
    """runs.csv of a track.

    `losses` is {Point: final loss}, nan for a run that diverged. A finished run is added to the file at once.
    """

    def __init__(self, path):
        self.path = path
        self.losses = {}
        self.lock = threading.Lock()
        if path.exists():
            try:
                self.read()
            except (OSError, KeyError, TypeError, ValueError) as error:
                fault = f"{type(error).__name__}: {error}"
                raise UserError(f"{path} cannot be read ({fault}); restore it from git") from None

    def read(self):
        text = self.path.read_text()
        if not text.endswith("\n"):
            raise ValueError("its last line breaks off")
        for row in csv.DictReader(io.StringIO(text)):
            if None in row or None in row.values():
                raise ValueError("a line has too many columns or too few")
            values = [kind(row[name]) for name, kind in Point.__annotations__.items()]
            self.losses[Point(*values)] = float(row["final_val_loss"])

    def add(self, point, loss, facts):
        """Adds a finished run, whose run.json is `facts`."""
        hashes = [(facts.get(name) or "")[:12] for name in HASHES]
        with self.lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            there = self.path.exists()
            text = io.StringIO(newline="")
            lines = csv.writer(text, lineterminator="\n")
            if not there:
                lines.writerow((*Point._fields, "final_val_loss", *HASHES))
            lines.writerow((*point, loss, *hashes))
            before = self.path.read_bytes() if there else b""
            write_atomically(self.path, before + text.getvalue().encode())
            self.losses[point] = loss

    def mean(self, optimizer, steps, learning_rate, hidden_learning_rate, setting, seeds):
        """Mean final loss over those of the seeds that were run, infinite if one diverged."""
        found = []
        for seed in seeds:
            point = Point(optimizer, steps, learning_rate, hidden_learning_rate, setting, seed)
            if point in self.losses:
                found.append(self.losses[point])
        loss = np.mean(found)
        return loss if math.isfinite(loss) else math.inf

    def tried(self, optimizer, steps):
        """{(optimizer, steps, learning_rate, hidden_learning_rate, setting): mean loss} of its tuning."""
        found = {}
        for *point, seed in list(self.losses):  # a copy: other threads add to it
            if point[:2] == [optimizer, steps] and seed in TUNING_SEEDS:
                found[tuple(point)] = self.mean(*point, TUNING_SEEDS)
        return found

    def results_by_point(self, optimizer, steps):
        """{(learning_rate, hidden_learning_rate, setting): {seed: final loss}} of all runs but tuning."""
        found = {}
        for point, loss in self.losses.items():
            if point.optimizer == optimizer and point.steps == steps and point.seed not in TUNING_SEEDS:
                found.setdefault(point[2:5], {})[point.seed] = loss
        return found

    def results(self, optimizer, steps, point=None, newer=None):
        """{seed: final loss} of the runs that are not tuning, those of `point` if it is given.

        Other points then have older results, from before the tuning went on. UserError if these are not
        complete, except those of the point `newer`, and if there are several points without `point`.
        """
        found = self.results_by_point(optimizer, steps)
        if point:
            chosen = found.pop(point[2:5], {})
            if newer:
                found.pop(newer[2:5], None)
            alone = all(set(finals) >= set(SEEDS) for finals in found.values())
        else:
            chosen = next(iter(found.values()), {})
            alone = len(found) < 2
        if not alone:
            raise UserError(f"{self.path} has results of {optimizer} with several rates or settings; "
                            "remove the lines of all but one")
        return chosen


def read_overhead(path):
    """{name: costs} of the file that Track.measure writes; {} without it.

    The costs are {"state_bytes": ...} and, except for Muon, "mean_step", "low", "high" and "machine".
    """
    try:
        measured = json.loads(path.read_text()) if path.exists() else {}
        for name, costs in measured.items():
            figures = ["state_bytes"]
            if "machine" in costs:
                figures += ["mean_step", "low", "high"]
            if not all(isinstance(costs[key], (int, float)) for key in figures):
                raise ValueError(f"a figure of {name} is no number")
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} cannot be read ({fault}); restore it from git") from None
    return measured
