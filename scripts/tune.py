"""Find learning rates: by the protocol that every optimizer of a track gets, or over a grid of any fields.

    python scripts/tune.py --protocol configs/cpu_muon.toml configs/cpu_newton_muon.toml --jobs 2
    python scripts/tune.py configs/cpu_muon.toml --learning_rate 0.01,0.02 --momentum 0.9,0.95 --jobs 2

The protocol varies learning_rate and hidden_learning_rate of each configuration; all else stays as it
is there. It takes the pair with the lowest mean final loss over the tuning seeds 100, 101, ..., which
no result may use (seed and data_seed alike).
Every configuration gets the same number of pairs. The first are 3 x 3, a factor of 2 apart, with the
configuration's own in the middle. Then, one at a time, come the untried neighbours of the best pair so
far: at a factor of 2 and, once these are tried, of the square root of 2. It ends after --points pairs,
or later, when no best pair lies at an edge of what was tried. All pairs and losses are written to
LOG_DIR/tuning.csv.

The grid tries every combination of the values, separated by commas, that are given for fields of one
configuration.

Finished runs in --log_dir are not run again if code and configuration are the same. So the same command
resumes a search, and a grid can be widened step by step. With --jobs N, N runs share the CPU cores;
losses do not depend on it, times do.
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
from harness.tuning import FIRST_TUNING_SEED, RATES, at_edge, next_pairs, rates
from train_gpt2 import Config, UserError, load_config


def command_line(config, fields, log_dir):
    """(folder, arguments of train_gpt2.py) of the run of the file `config` with `fields`, {name: value}."""
    parts = [Path(config).stem, *(f"{key}-{value}" for key, value in fields.items())]
    name = "_".join(parts).replace("/", "-")
    arguments = [config, "--log_dir", str(log_dir), "--run_name", name, "--resume", "auto"]
    for key, value in fields.items():
        arguments += [f"--{key}", str(value)]
    return log_dir / name, arguments


def train_all(settings, log_dir, jobs):
    """{name: final validation loss, None if the run failed} of a run for each setting.

    A setting is (path of a configuration, {field: value}).
    """
    commands = {}  # folder -> arguments
    done = {}  # folder -> whether that run is finished: for all, before the first is run
    for config, fields in settings:
        folder, arguments = command_line(config, fields, log_dir)
        commands[folder] = arguments
        done[folder] = finished(folder, load_config(arguments))
    training = Jobs(jobs)
    losses = {}

    def train_one(folder):
        if done[folder]:
            loss = read_facts(folder).get("final_val_loss")
        else:
            loss = training.train(commands[folder], folder)
        losses[folder.name] = loss
        print(f"{len(losses)}/{len(commands)} {folder.name}: {loss or 'failed'}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(train_one, commands))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            training.stop()
            raise
    return {folder.name: losses[folder.name] for folder in commands}


def protocol(configs, fields, points, seeds, log_dir, jobs):
    """Tunes the two rates of each configuration and writes tuning.csv.

    Returns {path: (learning_rate, hidden_learning_rate)}.
    """
    centre = {}
    for path in configs:
        config = load_config([path])
        centre[path] = [getattr(config, rate) for rate in RATES]
        for name, rate in zip(RATES, centre[path]):
            if rate == 0:
                raise UserError(f"{path} has {name} = 0, of which no other rate is a multiple; "
                                "set one above 0")
    tried = {path: {} for path in configs}  # pair -> mean loss
    rows = {path: [] for path in configs}  # of tuning.csv

    while any(len(pairs) < points or at_edge(pairs) for pairs in tried.values()):
        wanted = [(path, pair) for path in configs for pair in next_pairs(tried[path])]
        if not wanted:
            break
        for (path, pair), finals in losses_of(wanted, centre, fields, seeds, log_dir, jobs).items():
            tried[path][pair] = sum(finals) / seeds
            rows[path].append((path, *rates(centre[path], pair), *finals, tried[path][pair]))
        write_table(log_dir, seeds, itertools.chain(*rows.values()))

    print(f"\n{len(tried[configs[0]])} pairs of each, {seeds} seeds; all losses: {log_dir / 'tuning.csv'}")
    best = {}
    for path, losses in tried.items():
        pair = min(losses, key=losses.get)
        best[path] = tuple(rates(centre[path], pair))
        found = ", ".join(f"{rate} = {value:g}" for rate, value in zip(RATES, best[path]))
        print(f"{path}: {found}  (mean final loss {losses[pair]:.4f})")
    return best


def losses_of(wanted, centre, fields, seeds, log_dir, jobs):
    """{(path, pair): [final loss for each seed]} of what is `wanted`, after its training.

    The loss of a run that diverged is infinite.
    """
    settings = []
    for path, pair in wanted:
        chosen = dict(zip(RATES, rates(centre[path], pair)))
        for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds):
            settings.append((path, {**fields, **chosen, "seed": seed, "data_seed": seed}))
    losses = train_all(settings, log_dir, jobs)
    for name, loss in losses.items():
        if loss is None and not diverged(log_dir / name):
            raise UserError(f"the run in {log_dir / name} did not end; the same command resumes it")
    finals = [math.inf if loss is None else loss for loss in losses.values()]
    return {key: finals[i * seeds:(i + 1) * seeds] for i, key in enumerate(wanted)}


def write_table(log_dir, seeds, rows):
    log_dir.mkdir(parents=True, exist_ok=True)
    with open(log_dir / "tuning.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        names = [f"seed {FIRST_TUNING_SEED + i}" for i in range(seeds)]
        table.writerow(["config", *RATES, *names, "mean"])
        table.writerows(rows)


def grid(config, fields, log_dir, jobs):
    """Trains every combination of the values in `fields`, {name: "V1,V2,..."}.

    Returns {name of the run: final loss, None if it failed}.
    """
    # not split at the commas in a JSON object
    values = [re.split(r",(?![^{]*\})", text) for text in fields.values()]
    settings = [(config, dict(zip(fields, point))) for point in itertools.product(*values)]
    losses = train_all(settings, log_dir, jobs)
    print("\nfinal validation loss, best first")
    for name, loss in sorted(losses.items(), key=lambda item: (item[1] is None, item[1])):
        print(f"{'failed' if loss is None else f'{loss:.4f}'}  {name}")
    return losses


def parse():
    """(options, {field of the configuration: values}) of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s [--protocol] CONFIG.toml ... [--field V1,V2,...] [options]")
    parser.add_argument("config", nargs="+", metavar="CONFIG.toml")
    parser.add_argument("--protocol", action="store_true",
                        help="tune both learning rates of each configuration, with equal effort")
    parser.add_argument("--points", type=int, default=12,
                        help="least number of pairs of rates that the protocol tries (default: 12)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each pair, from 2 (default: 2)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--log_dir", type=Path, default=Path("logs/tune"),
                        help="folder of the runs (default: logs/tune)")
    options = ("config", "protocol", "points", "seeds", "jobs", "log_dir")
    for field in dataclasses.fields(Config):
        if field.name not in ("log_dir", "run_name", "resume"):
            parser.add_argument(f"--{field.name}", metavar="V1,V2,...", default=argparse.SUPPRESS,
                                help=argparse.SUPPRESS)
    args = parser.parse_args()
    return args, {name: value for name, value in vars(args).items() if name not in options}


def check_protocol(args, fields):
    """UserError if the protocol cannot do what the command line asks for."""
    taken = [name for name in fields if name in (*RATES, "seed", "data_seed")]
    same_name = len({Path(config).stem for config in args.config}) < len(args.config)
    if args.seeds < 2 or args.points < 1 or taken or same_name:
        remedy = f": leave out {', '.join(taken)}" if taken else ""
        raise UserError("--protocol takes configurations of different names, "
                        f"2 seeds or more (--seeds {args.seeds}), 1 point or more (--points {args.points}), "
                        f"and chooses {', '.join(RATES)}, seed and data_seed itself{remedy}")


@command()
def main():
    args, fields = parse()
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    if args.protocol:
        check_protocol(args, fields)
        protocol(args.config, fields, args.points, args.seeds, args.log_dir, args.jobs)
        return
    if len(args.config) > 1:
        raise UserError(f"{len(args.config)} configurations: a grid takes only one; "
                        "--protocol tunes several alike")
    losses = grid(args.config[0], fields, args.log_dir, args.jobs)
    sys.exit(None in losses.values())


if __name__ == "__main__":
    main()
