"""The runs of the comparison on one track: which there are, and the training of those that are missing."""
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from harness import runs
from harness.jobs import Jobs, finished, start
from harness.tuning import RATES, at_edge, next_pairs, rates
from harness.zoo.optimizers import ZOO
from harness.zoo.table import SEEDS, TUNING_SEEDS, Point, read_overhead
from train_gpt2 import UserError, build_optimizers, code_sha256, load_config, make_model, write_atomically

MORE_POINTS = 12  # at most, of an optimizer whose tuning goes on
HOPELESS = 0.02  # a point whose first seed ends so far above the best is not run again
LENGTHS = (1.0, 0.94, 0.5, 0.75, 1.25, 1.5)  # of Muon's runs, in the track's steps


def fields(entry, point):
    """Command-line arguments that turn the track's Muon configuration into that run."""
    arguments = dict(entry.arguments)
    if point.setting:
        arguments[entry.setting] = json.loads(point.setting)
    if ":" in entry.optimizer:
        arguments = {"optimizer_args": json.dumps(arguments)}
    values = {"optimizer": entry.optimizer, **arguments}
    if entry.groups:
        values["groups"] = json.dumps(entry.groups)
    for rate in RATES:
        values[rate] = getattr(point, rate)
    values |= {"seed": point.seed, "data_seed": point.seed, "num_iterations": point.steps}
    return flags(values)


def flags(values):
    """["--name", "value", ...] of a dictionary."""
    arguments = []
    for name, value in values.items():
        arguments += [f"--{name}", str(value)]
    return arguments


class Track:
    """The runs of a track, `jobs` at a time, into folders of `logs`.

    `given` are the fields of the configuration from the command line; finished runs are added to `table`.
    `entries` are the optimizers, {name in the table: Entry}.
    """

    def __init__(self, name, jobs, logs, given, table, entries=ZOO):
        self.entries = entries
        self.jobs = jobs
        self.logs = logs
        self.given = given
        self.table = table
        self.training = Jobs(jobs)
        self.free = threading.Semaphore(jobs)  # shared by all threads that train
        self.config = f"configs/{name}_muon.toml"
        self.full = load_config([self.config, *given])
        self.steps = self.full.num_iterations

    def centre(self, entry):
        """The entry's rates, in proportion to those of the track's Muon configuration."""
        scales = [getattr(self.full, rate) / usual for rate, usual in zip(RATES, ZOO["muon"].rates)]
        return tuple(rate * scale for rate, scale in zip(entry.rates, scales))

    def train(self, points):
        """Runs those of `points` that the table lacks.

        UserError if one does not end; no other is begun then.
        """
        missing = [point for point in dict.fromkeys(points) if point not in self.table.losses]
        failed = []

        def train_one(point):
            with self.free:
                if failed or self.training.stopped:
                    return
                try:
                    loss, facts = self.run(point)
                except UserError as error:
                    failed.append(error)
                    return
            self.table.add(point, loss, facts)
            print(f"{run_name(point)}: {loss:.4f}", flush=True)

        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(train_one, missing))
        if failed:
            raise failed[0]
        if self.training.stopped:
            raise UserError("interrupted")

    def run(self, point):
        """(final loss, run.json) of the run, after its training; the loss is nan if it diverged.

        UserError if it did not end.
        """
        name = run_name(point)
        folder = self.logs / name
        schedule = {}
        for key in ("warmup_iters", "warmdown_iters"):
            schedule[key] = round(getattr(self.full, key) * point.steps / self.steps)
        last = {"val_loss_every": 0, "log_dir": self.logs, "run_name": name, "resume": "auto"}
        arguments = [self.config, "--save_every", "250", *self.given,
                     *fields(self.entries[point.optimizer], point), *flags(schedule), *flags(last)]
        finished(folder, load_config(arguments))  # refuses what other code has left there
        loss = self.training.train(arguments, folder)
        if loss is None:
            if not runs.diverged(folder):
                raise UserError(f"the run {name} in {self.logs} did not end; the same command resumes it")
            loss = math.nan
        return loss, {"code_sha256": code_sha256(), **runs.read_facts(folder)}

    def losses_of(self, points, best=math.inf):
        """{point: mean loss over the tuning seeds} of points without a seed, after their training.

        `best` is the lowest loss so far. A point whose first seed ends far above it gets no second seed.
        """
        self.train([Point(*point, TUNING_SEEDS[0]) for point in points])
        first = {point: self.table.mean(*point, TUNING_SEEDS[:1]) for point in points}
        bound = min(best, *first.values()) + HOPELESS
        hopeful = [point for point in points if first[point] <= bound]
        self.train([Point(*point, seed) for point in hopeful for seed in TUNING_SEEDS])
        return {point: self.table.mean(*point, TUNING_SEEDS) for point in points}

    def tune(self, name):
        """The 12 points that every optimizer gets, after their training, each without a seed."""
        entry = self.entries[name]
        centre = self.centre(entry)
        tried = {}  # (pair, setting) -> mean loss

        def point_of(pair, setting):
            return (name, self.steps, *rates(centre, pair), setting)

        def best_of(*candidates):
            """The best (pair, setting) so far, after the candidates have been tried."""
            points = {candidate: point_of(*candidate) for candidate in candidates}
            losses = self.losses_of(points.values(), min(tried.values(), default=math.inf))
            for candidate, point in points.items():
                tried[candidate] = losses[point]
            while True:  # until the best has had all seeds
                best = min(tried, key=tried.get)
                before = tried[best]
                point = point_of(*best)
                tried[best] = self.losses_of([point])[point]
                if tried[best] == before:
                    return best

        pair, _ = best_of(*((pair, "") for pair in next_pairs({})))
        _, setting = best_of(*((pair, json.dumps(value)) for value in entry.values))
        same_setting = {pair: loss for (pair, other), loss in tried.items() if other == setting}
        neighbour, = next_pairs(same_setting)
        best_of((neighbour, setting))
        return [point_of(*candidate) for candidate in tried]

    def tune_rates(self, name, pairs=12):
        """(learning_rate, hidden_learning_rate) of the best pair by the protocol of harness/tuning.py.

        From the entry's rates on, `pairs` pairs or more, until the best is not at an edge.
        """
        centre = self.entries[name].rates
        tried = {}  # pair -> mean loss over the tuning seeds that it has had

        def mean_loss(pair):
            point = (name, self.steps, *rates(centre, pair), "")
            return self.losses_of([point], min(tried.values(), default=math.inf))[point]

        while len(tried) < pairs or at_edge(tried):
            following = next_pairs(tried)
            if not following:
                break
            for pair in following:
                tried[pair] = mean_loss(pair)
        while True:  # until the best has had both seeds
            best = min(tried, key=tried.get)
            before = tried[best]
            tried[best] = mean_loss(best)
            if tried[best] == before:
                return rates(centre, best)

    def side_by_side(self, tune, names):
        """{name: tune(name)}: the tuning of all these optimizers at once, `jobs` runs at a time.

        If one fails, the runs of the others end too.
        """
        with ThreadPoolExecutor(len(names)) as pool:
            try:
                return dict(zip(names, pool.map(tune, names)))
            except BaseException:
                self.training.stop()
                raise

    def best(self, points):
        """The best of the points, after it has had all tuning seeds."""
        while True:
            losses = {point: self.table.mean(*point, TUNING_SEEDS) for point in points}
            best = min(losses, key=losses.get)
            if self.losses_of([best])[best] == losses[best]:
                return best

    def refine(self, name, points):
        """Goes on after `points`, a neighbour of the best at a time, until that is inside on every axis.

        It ends after MORE_POINTS of them, too. Returns all points.
        """
        points = list(points)
        for _ in range(MORE_POINTS):
            best = self.best(points)
            neighbours = self.entries[name].neighbours(best, points)
            if not neighbours:
                break
            *_, point = neighbours[0]
            self.losses_of([point], self.table.mean(*best, TUNING_SEEDS))
            points.append(point)
        return points

    def compare(self, name, refine=False):
        """Tunes one optimizer and runs it with the seeds of the results."""
        points = self.tune(name)
        if refine:
            self.refine(name, points)
        _, _, *best = self.best(self.table.tried(name, self.steps))
        lengths = LENGTHS if name == "muon" else (1.0,)
        steps = [round(length * self.steps) for length in lengths]
        self.train([Point(name, number, *best, seed) for number in steps for seed in SEEDS])

    def measure(self, name):
        """Adds the time of a step and the bytes of state to overhead.json, unless they are there."""
        path = self.table.path.with_name("overhead.json")
        measured = read_overhead(path)
        if name in measured:
            return
        entry = self.entries[name]
        untuned = Point(name, self.steps, *self.centre(entry), "", 0)
        config = load_config([self.config, *self.given, *fields(entry, untuned)])
        costs = {} if entry.optimizer == "muon" else self.time_of_step(config)
        measured[name] = {**costs, "state_bytes": state_bytes(config)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(measured, indent=1).encode() + b"\n")

    def time_of_step(self, config):
        """The time of a step relative to Muon's, with its interval, by scripts/bench.py."""
        out = self.logs / "bench.json"
        self.logs.mkdir(parents=True, exist_ok=True)
        start(["scripts/bench.py", self.config, "--sides", f"muon,{config.optimizer}",
               "--rounds", "12", "--steps", "10", "--json", str(out),
               "--optimizer_args", config.optimizer_args, *self.given],
              "the time of a step was not measured; run the same command again to continue")
        bench = json.loads(out.read_text())
        ratio = bench["ratios"][f"{config.optimizer}/muon"]
        return {"machine": bench["machine"], **{key: ratio[key] for key in ("mean_step", "low", "high")}}


def run_name(point):
    return "_".join(str(value) for value in point if value != "")


def state_bytes(config):
    """Bytes of state per hidden parameter.

    It is read after a refresh and two steps, because the first step of some rules only initialises.
    """
    model = make_model(config)
    hidden = build_optimizers(model, config)[1]
    matrices = list(model.hidden_matrices().values())
    for p in matrices:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    if hasattr(hidden, "refresh"):
        grams = []
        for p in hidden.preconditioned:
            n = min(p.shape)  # a wide matrix has a gram for each block of n inputs
            grams.append(torch.eye(n).repeat(p.size(1) // n, 1, 1))
        hidden.refresh(grams, 1)
    for _ in range(2):
        hidden.step()
    tensors = [value for state in hidden.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(t.numel() * t.element_size() for t in tensors) / sum(p.numel() for p in matrices)
