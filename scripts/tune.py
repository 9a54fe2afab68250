"""Find learning rates: by the protocol that every optimizer of a track gets, or over a grid of any fields.

    python scripts/tune.py --protocol configs/cpu_adamw.toml configs/cpu_muon.toml configs/cpu_newton_muon.toml --jobs 2
    python scripts/tune.py configs/cpu_muon.toml --learning_rate 0.005,0.01,0.02 --hidden_learning_rate 0.001,0.002,0.004 --jobs 2

The protocol varies learning_rate and hidden_learning_rate of each configuration, all else as it stands there, and takes the pair
with the lowest mean final loss over the tuning seeds: 100, 101, ..., which no result may use (seed and data_seed alike).
Every configuration gets the same number of pairs: first 3 x 3, a factor of 2 apart, with the configuration's own in the middle;
then, one at a time, the untried neighbours of the best pair so far, at a factor of 2 and, once these are tried, of the square
root of 2. It ends after --points pairs, or later, when no best pair lies at an edge of what was tried. All pairs and losses are
written to LOG_DIR/tuning.csv.

The grid tries every combination of the values, separated by commas, that are given for fields of one configuration.

Finished runs in --log_dir are not run again (if code and configuration are the same), so the same command resumes a search, and
a grid can be widened step by step. With --jobs N, N runs share the CPU cores; losses do not depend on it, times do.
"""
import argparse
import csv
import dataclasses
import itertools
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command
from harness.jobs import Jobs, finished
from harness.runs import diverged, read_facts
from train_gpt2 import Config, UserError, load_config

RATES = ("learning_rate", "hidden_learning_rate")
FIRST_TUNING_SEED = 100
AXES = ((1, 0), (-1, 0), (0, 1), (0, -1))
DIAGONALS = ((1, 1), (-1, -1), (1, -1), (-1, 1))


def train_all(settings, log_dir, jobs):
    """{name: final validation loss, None if the run failed} of a run for each (path of a configuration, {field: value}) in `settings`."""
    runs = {}  # folder -> (arguments, whether that run is finished), for all before the first is run
    for config, fields in settings:
        name = "_".join([Path(config).stem, *(f"{key}-{value}" for key, value in fields.items())]).replace("/", "-")
        arguments = [config, "--log_dir", str(log_dir), "--run_name", name, "--resume", "auto",
                     *(part for key, value in fields.items() for part in (f"--{key}", str(value)))]
        runs[log_dir / name] = arguments, finished(log_dir / name, load_config(arguments))
    training, losses = Jobs(jobs), {}

    def one(folder):
        arguments, done = runs[folder]
        losses[folder.name] = read_facts(folder).get("final_val_loss") if done else training.train(arguments, folder)
        print(f"{len(losses)}/{len(runs)} {folder.name}: {losses[folder.name] or 'failed'}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(one, runs))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            training.stop()
            raise
    return {folder.name: losses[folder.name] for folder in runs}


def next_pairs(tried):
    """The pairs to try next, as exponents of the square root of 2 on both rates, after `tried`, {pair: mean loss}."""
    if not tried:
        return [(i, j) for i in (-2, 0, 2) for j in (-2, 0, 2)]
    best = min(tried, key=tried.get)
    steps = [(factor * i, factor * j) for factor in (2, 1) for i, j in AXES + DIAGONALS]
    return [(best[0] + i, best[1] + j) for i, j in steps if (best[0] + i, best[1] + j) not in tried][:1]


def at_edge(tried):
    """Whether a rate of the best pair is the smallest or the largest that was tried."""
    return any(rate in (min(tried_rates), max(tried_rates)) for rate, tried_rates in zip(min(tried, key=tried.get), zip(*tried)))


def rates(centre, pair):
    """[learning_rate, hidden_learning_rate] of a pair of exponents of the square root of 2 on those in `centre`."""
    return [float(f"{middle * 2 ** (exponent / 2):.3g}") for middle, exponent in zip(centre, pair)]


def protocol(configs, fields, points, seeds, log_dir, jobs):
    """Tunes the two rates of each configuration and writes tuning.csv. Returns {path: (learning_rate, hidden_learning_rate)}."""
    centre = {path: [getattr(load_config([path]), rate) for rate in RATES] for path in configs}
    for path, pair in centre.items():
        if 0 in pair:
            raise UserError(f"{path} has {RATES[pair.index(0)]} = 0, of which no other rate is a multiple; set one above 0")
    tried, rows = {path: {} for path in configs}, {path: [] for path in configs}

    while any(len(pairs) < points or at_edge(pairs) for pairs in tried.values()):
        wanted = [(path, pair) for path in configs for pair in next_pairs(tried[path])]
        if not wanted:
            break
        settings = [(path, {**fields, **dict(zip(RATES, rates(centre[path], pair))), "seed": seed, "data_seed": seed})
                    for path, pair in wanted for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)]
        losses = train_all(settings, log_dir, jobs)
        if broken := [name for name, loss in losses.items() if loss is None and not diverged(log_dir / name)]:
            raise UserError(f"the run in {log_dir / broken[0]} did not end; the same command resumes it")
        losses = iter(losses.values())
        for path, pair in wanted:
            finals = [math.inf if loss is None else loss for loss in itertools.islice(losses, seeds)]
            tried[path][pair] = sum(finals) / seeds
            rows[path].append((path, *rates(centre[path], pair), *finals, tried[path][pair]))
        log_dir.mkdir(parents=True, exist_ok=True)
        with open(log_dir / "tuning.csv", "w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["config", *RATES, *(f"seed {FIRST_TUNING_SEED + i}" for i in range(seeds)), "mean"])
            table.writerows(row for path in configs for row in rows[path])
    best = {path: min(tried[path], key=tried[path].get) for path in configs}
    print(f"\n{len(tried[configs[0]])} pairs of each, {seeds} seeds; all losses: {log_dir / 'tuning.csv'}")
    for path, pair in best.items():
        found = ", ".join(f"{rate} = {value:g}" for rate, value in zip(RATES, rates(centre[path], pair)))
        print(f"{path}: {found}  (mean final loss {tried[path][pair]:.4f})")
    return {path: tuple(rates(centre[path], pair)) for path, pair in best.items()}


@command()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="%(prog)s [--protocol] CONFIG.toml ... [--field V1,V2,...] [options]")
    parser.add_argument("config", nargs="+", metavar="CONFIG.toml")
    parser.add_argument("--protocol", action="store_true", help="tune both learning rates of each configuration, with equal effort")
    parser.add_argument("--points", type=int, default=12, help="least number of pairs of rates that the protocol tries (default: 12)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each pair, from 2 (default: 2)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--log_dir", type=Path, default=Path("logs/tune"), help="folder of the runs (default: logs/tune)")
    for field in dataclasses.fields(Config):
        if field.name not in ("log_dir", "run_name", "resume"):
            parser.add_argument(f"--{field.name}", metavar="V1,V2,...", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    grid = vars(parser.parse_args())
    configs, by_protocol, points, seeds, jobs, log_dir = (
        grid.pop(name) for name in ("config", "protocol", "points", "seeds", "jobs", "log_dir"))
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    if by_protocol:
        taken = [name for name in grid if name in (*RATES, "seed", "data_seed")]
        if seeds < 2 or points < 1 or taken or len({Path(config).stem for config in configs}) < len(configs):
            raise UserError(f"--protocol takes configurations of different names, 2 seeds or more (--seeds {seeds}), 1 point or more "
                            f"(--points {points}), and chooses {', '.join((*RATES, 'seed'))} and data_seed itself"
                            + (f": leave out {', '.join(taken)}" if taken else ""))
        protocol(configs, grid, points, seeds, log_dir, jobs)
        return
    if len(configs) > 1:
        raise UserError(f"{len(configs)} configurations: a grid takes only one; --protocol tunes several alike")
    values = [re.split(r",(?![^{]*\})", text) for text in grid.values()]  # not at the commas within a JSON object
    losses = train_all([(configs[0], dict(zip(grid, point))) for point in itertools.product(*values)], log_dir, jobs)
    print("\nfinal validation loss, best first")
    for name, loss in sorted(losses.items(), key=lambda item: (item[1] is None, item[1])):
        print(f"{'failed' if loss is None else f'{loss:.4f}'}  {name}")
    sys.exit(None in losses.values())


if __name__ == "__main__":
    main()
