"""Check the paper's claim: train the arms of the comparison with several seeds, compare them, give a verdict.

    python scripts/replicate.py --seeds 5                    the CPU track, five runs of each arm
    python scripts/replicate.py --track speedrun --seeds 3   the claim itself, on all GPUs of this machine
    python scripts/replicate.py --track optimizer --seeds 5  on the speedrun's benchmark for optimizers
    python scripts/replicate.py --num_iterations 450         fields of the configuration go to train_gpt2.py

It fetches the data with data/shakespeare.py or data/fineweb.py, unless --input_bin names others. If there
is to be a verdict, it then measures the overhead of a step with bench.py. Runs and overhead.json are in
--log_dir. What is finished there is not done again, and a broken run resumes from its last checkpoint. So
the same command continues after an interruption, and a larger --seeds adds to what is there. On the CPU
track the runs of one seed run at the same time and share the cores: less time in all, and the same load for
each. How long a step takes on its own is measured by bench.py only.

The claim (arXiv:2604.01472): Newton-Muon reaches the loss of Muon in 6 % fewer steps, and in about 4 % less
time. The arms: Muon with all N steps of the configuration, Newton-Muon with N and with 0.94 N (its warm-down
scaled too), and the other optimizers with N. Run i of each has seed i and data_seed i. Seed 0 is the files'
order (the speedrun's own), others are permutations of it. The CPU track begins with 1: in the files' order a
batch is a piece of a scene, and Muon's final loss is 0.11 higher.

Steps saved at equal final loss: with B, C and D the mean final losses of Muon, of Newton-Muon with N and with
0.94 N steps, it is 0.06 (B - C) / (D - C), with a 95 % interval (harness/estimates.py). With the overhead of
Newton-Muon's step, measured before the runs by alternating with Muon's, this gives the time saved.

The verdict answers two questions:
  Does Newton-Muon need fewer steps than Muon?
      yes if the interval is above 0, no if it is below
  Does it save 6 % of the steps, as claimed?
      no if the interval is below 5.5 %; otherwise yes if it is above 3 %
and is one of
  reproduced        yes and yes
  partly            yes and no
  not reproduced    the second answer is no, and the first is not yes
  undecided         otherwise; it says how many runs of each arm would decide it
Looking again: to add seeds until a question is decided makes wrong answers more likely. So the largest number
of seeds is fixed before the first run, by --planned_seeds (10 if nothing is said), and kept in plan.json in
--log_dir with the looks so far. Each look has a wider interval, so that all together are right in 95 % of
comparisons (harness/sequential.py). records/power/README.md says how many seeds tell how small a saving.

One seed gives no verdict: the shorter arm and the overhead wait for a second. A run that diverges counts: its
arm has no result. On the speedrun's tracks every evaluation is shown beside a published one of Muon, so that
a wrong set-up shows after 125 steps. The optimizer track counts steps only: no overhead is measured there,
and the table has its two rules ("valid record" and "track 3").
"""
import argparse
import dataclasses
import json
import math
import os
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command, locked
import numpy as np
import torch

from harness import estimates, jobs, runs, sequential
from scripts import compare
from train_gpt2 import Config, UserError, code_sha256, load_config, make_model

FIRST_SEED = {"cpu": 1, "mini": 0, "speedrun": 0, "optimizer": 0}
PREFIX = {"optimizer": "track3"}  # of the names of its configurations
PUBLISHED = {  # the curve in records/speedrun/ that is shown beside the runs
    "speedrun": ("record4", "record 4 of the speedrun, Muon with 6200 steps"),
    "optimizer": ("track3_muon", "result 36 of the optimizer track, Muon with 3250 steps, mean of ten runs")}
CLAIM = {"steps": 0.06, "time": 0.04}  # arXiv:2604.01472, abstract


# the arms


class PlannedRun(NamedTuple):
    folder: Path
    arguments: list  # of train_gpt2.py
    config: Config


def config_file(configs, track, optimizer):
    return configs / f"{PREFIX.get(track, track)}_{optimizer}.toml"


def plan_runs(track, configs, optimizers, seeds, logs, fields):
    """{(optimizer, steps): {seed: PlannedRun}} of all runs, Muon's first."""
    plan = {}
    for optimizer in sorted(optimizers, key=lambda name: name != "muon"):
        path = str(config_file(configs, track, optimizer))
        full = load_config([path, *fields])
        lengths = {full.num_iterations: []}  # steps -> arguments
        if optimizer == "newton_muon" and "muon" in optimizers:
            short = round((1 - CLAIM["steps"]) * full.num_iterations)
            if short == full.num_iterations or ("muon", full.num_iterations) not in plan:
                raise UserError(f"num_iterations = {full.num_iterations} of Newton-Muon: "
                                "must be that of Muon, and 9 or more")
            if seeds > 1:  # this arm is for the verdict, which one seed does not give
                lengths[short] = schedule(full, short)
        for steps, changes in lengths.items():
            plan[optimizer, steps] = {}
            for seed in range(FIRST_SEED[track], FIRST_SEED[track] + seeds):
                folder = logs / f"{optimizer}_{steps}_seed-{seed}"
                arguments = [path, "--save_every", "250", *fields, *changes,
                             "--seed", str(seed), "--data_seed", str(seed),
                             "--log_dir", str(logs), "--run_name", folder.name, "--resume", "auto"]
                plan[optimizer, steps][seed] = PlannedRun(folder, arguments, load_config(arguments))
    return plan


def schedule(full, steps):
    """Arguments that shorten the configuration `full` to so many steps.

    Its warm-up and warm-down become shorter in proportion.
    """
    arguments = []
    for name in ("warmup_iters", "warmdown_iters"):
        arguments += [f"--{name}", str(round(getattr(full, name) * steps / full.num_iterations))]
    return [*arguments, "--num_iterations", str(steps)]


def train_missing(missing, launcher, together, published):
    """Trains the runs in `missing`, in their order; those of one seed at once if `together`."""
    batches = {}
    for run in missing:
        key = run.config.seed if together else run.folder
        batches.setdefault(key, []).append(run)
    for batch in batches.values():
        commands = {run.folder.name: [*launcher, "train_gpt2.py", *run.arguments] for run in batch}
        for run, code in zip(batch, jobs.launch(commands, published)):
            if code and not runs.diverged(run.folder):
                raise UserError(f"the run in {run.folder} ended with code {code}; "
                                "the same command resumes it from its last checkpoint")
            if code:
                print(f"{run.folder.name} diverged: its arm has no result", flush=True)


# what the verdict needs besides the losses


def read_overhead(path, config=None, processes=1):
    """Estimate of the overhead in the time of a step of Newton-Muon, from what bench.py --json wrote.

    None if that was not measured with the model and batch of `config`, this code and so many processes.
    """
    try:
        measured = json.loads(Path(path).read_text())
        if config and not is_measured_with(measured, config, processes):
            return None
        ratio = measured["ratios"]["newton_muon/muon"]
        values = [ratio[name] for name in ("mean_step", "low", "high")]
        return estimates.Estimate(*(None if value is None else float(value) - 1 for value in values))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); "
                        "bench.py --sides muon,newton_muon --json writes it") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not what bench.py --sides muon,newton_muon --json writes; "
                        "measure it again") from None


def is_measured_with(measured, config, processes):
    with torch.device("meta"):
        parameters = make_model(config).num_parameters()
    ours = dict(parameters=parameters, batch_size=config.batch_size, sequence_length=config.sequence_length,
                processes=processes, code_sha256=code_sha256())
    return all(measured[name] == value for name, value in ours.items())


def measure_overhead(path, config_path, launcher, fields):
    """Writes the file `path` with bench.py."""
    unfinished = path.with_suffix(".tmp")
    jobs.start([*launcher, "scripts/bench.py", str(config_path), "--sides", "muon,newton_muon",
                "--json", str(unfinished), *fields],
               "the overhead of a step was not measured; run the same command again to continue")
    unfinished.rename(path)


def filed_spread(track, configs):
    """(standard deviation, degrees of freedom) of the final losses in records/TRACK; None without any.

    Only runs like those of `configs` count, except for the seeds.
    """
    groups = {}
    for path in runs.ROOT.glob(f"records/{track}/[!.]*/*/run.json"):  # not what a broken add left
        facts = runs.read_facts(path.parent)
        if "final_val_loss" not in facts:
            continue
        for i, config in enumerate(configs):
            fields = dataclasses.asdict(config)
            same = all(facts["config"].get(name, value) == value for name, value in fields.items()
                       if name not in runs.FREE_SETTINGS)
            if same:
                groups.setdefault(i, []).append(facts["final_val_loss"])
    df = sum(len(group) - 1 for group in groups.values())
    if not df:
        return None
    squares = sum(np.var(group) * len(group) for group in groups.values())
    return math.sqrt(squares / df), df


# the verdict


def conclude(baseline, candidate, shorter, fraction, overhead, spread=None, level=0.95, planned=None):
    """The lines of the verdict on three arms {seed: final loss}, nan for a run that diverged.

    `spread` is what filed_spread() returns, `level` the confidence of this look among those of the
    comparison, `planned` its number of seeds, None if there is no plan. `overhead` is None where only steps
    count.
    """
    seeds = len(baseline)
    if seeds == 1:
        return ["one seed gives no verdict; --seeds 5 adds runs and gives one", noise_of_one_seed(spread)]
    saved = estimates.steps_saved(baseline, candidate, shorter, fraction)
    saved = sequential.at_level(saved, fraction, seeds, level)
    found = estimates.verdict(saved, CLAIM["steps"])
    lines = []
    if planned and level > 0.9501:  # not if it is the only look
        lines.append(f"look at {seeds} of {planned} planned seeds: its intervals are of {level:.1%}, "
                     "so that all looks together are right in 95 %")
    lines.append(f"steps saved: {estimates.saved_text(saved)}; {CLAIM['steps']:.0%} claimed")
    if overhead:
        time = estimates.time_saved(saved, overhead)
        lines.append(f"time saved: {estimates.saved_text(time)}; about {CLAIM['time']:.0%} claimed")
    questions = {"Does Newton-Muon need fewer steps than Muon?": found.fewer,
                 f"Does it save {CLAIM['steps']:.0%} of the steps, as claimed?": found.as_claimed}
    for question, answer in questions.items():
        line = f"{question} {answer.word}"
        if answer.runs:
            needed = sequential.runs_at_level(answer.runs, level)
            line += (f": about {needed:,} runs of each arm in all would decide it, "
                     "with the same means and spread")
            if planned and needed > planned:
                line += f"; {planned} are planned, and a larger plan needs another --log_dir"
        lines.append(line)
    return [*lines, f"verdict: {found.word}"]


def noise_of_one_seed(spread):
    """A sentence: which difference between two runs means nothing."""
    if not spread:
        return ("how large a difference can be mere noise is not known for this configuration: "
                "two or more seeds would tell")
    return ("two runs of Muon, or of Newton-Muon, that differ only in the seed have final losses within "
            f"{estimates.noise(*spread):.4f} of each other (95 % of pairs; "
            f"standard deviation {spread[0]:.4f}): a smaller difference means nothing")


def print_expectation(track, seeds, plan_file):
    """Says how small a saving so many seeds can show, with the noise of the track's filed runs."""
    noise = sequential.read_noise(track)
    if noise is None:
        return
    level, planned = sequential.level_of_look(plan_file, seeds)
    smallest = sequential.detectable(noise, seeds, level)
    print(f"\n{seeds} of {planned} planned seeds: a true saving of {smallest:.1%} of the steps would be told "
          "from none in 80 % of comparisons, with the noise of this track (records/power/README.md)")


def print_claim(plan, track, overhead, plan_file):
    """Prints the final losses, the overhead (an Estimate, or None) and the verdict."""
    print("\nThe claim" + ("" if track == "speedrun" else f", made for the speedrun, on the {track} track"))
    arms = {}
    for arm, planned in plan.items():
        arms[arm] = {seed: final_loss(run.folder) for seed, run in planned.items()}
        values = list(arms[arm].values())
        line = f"final loss of {arm[0]} after {arm[1]} steps: {np.mean(values):.4f}"
        if len(values) > 1:
            line += f" (standard deviation {np.std(values, ddof=1):.4f}, {len(values)} runs)"
        print(line)
    if overhead:
        line = f"overhead of Newton-Muon's step: {overhead.mean:+.1%}"
        if overhead.low is not None:
            line += f" (95 %: {overhead.low:+.1%} to {overhead.high:+.1%})"
        print(line)
    if track in PUBLISHED:
        spread = estimates.SPEEDRUN_SD, math.inf
    else:
        configs = []
        for (optimizer, _), planned in plan.items():
            if optimizer in ("muon", "newton_muon"):
                configs.append(next(iter(planned.values())).config)
        spread = filed_spread(track, configs)
    lengths = [steps for optimizer, steps in arms if optimizer == "newton_muon"]
    N = max(lengths)
    short = min(lengths)
    seeds = len(arms["muon", N])
    level = 0.95
    planned = None
    if seeds > 1:
        sequential.note_look(plan_file, seeds)
        level, planned = sequential.level_of_look(plan_file, seeds)
    lines = conclude(arms["muon", N], arms["newton_muon", N], arms["newton_muon", short], 1 - short / N,
                     overhead, spread, level, planned)
    for line in lines:
        print(textwrap.fill(line, 128, subsequent_indent="    "))


def final_loss(folder):
    """The final loss of the run in `folder`, nan if it diverged."""
    return math.nan if runs.diverged(folder) else runs.read_facts(folder)["final_val_loss"]


# the command


def parse():
    """(options, fields of the configuration as they were given) of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.replace("%", "%%"), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, usage="%(prog)s [options] [--field value ...]")
    parser.add_argument("--track", choices=FIRST_SEED, default="cpu", help="(default: cpu)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm (default: 1)")
    parser.add_argument("--planned_seeds", type=int, metavar="N",
                        help="the largest number of seeds that this comparison may get, fixed before the "
                             f"first run (default: {sequential.PLANNED_SEEDS}, or --seeds if that is more)")
    parser.add_argument("--optimizers", metavar="NAME,...",
                        help="of the configurations TRACK_NAME.toml in --configs, track3_NAME.toml for the "
                             "optimizer track (default: muon,newton_muon,adamw; there without adamw)")
    parser.add_argument("--configs", type=Path, default=Path("configs"), metavar="FOLDER",
                        help="relative to the repository (default: configs)")
    parser.add_argument("--gpus", type=int,
                        help="processes, one on each GPU (default: all GPUs; 1 on the cpu track)")
    parser.add_argument("--overhead", type=Path, metavar="FILE",
                        help="what bench.py --json wrote, instead of measuring a step's overhead")
    parser.add_argument("--log_dir", type=Path,
                        help="folder of the runs, relative to the repository (default: logs/TRACK)")
    parser.add_argument("--png", type=Path, help="plot (default: TRACK.png in the folder above the runs)")
    args, fields = parser.parse_known_args()
    if args.png:
        args.png = args.png.resolve()
    if args.overhead:
        args.overhead = args.overhead.resolve()
    usual = "muon,newton_muon" if args.track == "optimizer" else "muon,newton_muon,adamw"
    args.optimizers = (args.optimizers or usual).split(",")
    args.log_dir = args.log_dir or Path("logs") / args.track
    args.png = args.png or args.log_dir.parent / f"{args.log_dir.name}.png"
    if args.gpus is None:
        processes = 1 if args.track == "cpu" else torch.cuda.device_count()
    else:
        processes = args.gpus
    check(args, fields, processes)
    args.gpus = processes
    return args, fields


def check(args, fields, processes):
    """UserError if an option cannot be used."""
    if args.png.suffix not in compare.PLOTS:
        raise UserError(f"--png {args.png}: the name must end in {', '.join(compare.PLOTS)}")
    if args.seeds < 1 or len(set(args.optimizers)) < len(args.optimizers):
        raise UserError(f"--seeds {args.seeds} --optimizers {','.join(args.optimizers)}: "
                        "seeds must be at least 1, each optimizer named once")
    if args.planned_seeds is not None and args.planned_seeds < max(2, args.seeds):
        raise UserError(f"--planned_seeds {args.planned_seeds}: "
                        f"must be 2 or more, and at least --seeds {args.seeds}")
    for field in fields:
        if field.startswith("--") and field[2:].split("=")[0] in jobs.PLANNED_FIELDS:
            raise UserError(f"{field}: every run here has its own, and goes to its end; "
                            "--seeds and --optimizers say which runs there are")
    if args.gpus is not None and args.gpus < 1:
        raise UserError(f"--gpus {args.gpus}: must be at least 1")
    if processes < 1:
        raise UserError(f"the {args.track} track needs a GPU and torch finds none; --track cpu does without")


@command()
def main():
    args, fields = parse()
    os.chdir(runs.ROOT)  # configurations name their data from there
    plan = plan_runs(args.track, args.configs, args.optimizers, args.seeds, args.log_dir, fields)
    planned = []  # one seed after the other
    for of_one_seed in zip(*(arm.values() for arm in plan.values())):
        planned += of_one_seed
    targets = {run.config.target_val_loss for run in planned}
    if len(targets) > 1:
        raise UserError(f"the configurations have different targets ({', '.join(map(str, targets))}); "
                        "set one with --target_val_loss")
    launcher = []
    if args.gpus > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.gpus)]
    claim = {"muon", "newton_muon"} <= set(args.optimizers)
    timed = claim and args.track != "optimizer" and (args.seeds > 1 or args.overhead)
    overhead = args.overhead or args.log_dir / "overhead.json"
    if args.overhead and claim:
        read_overhead(overhead)  # refuses another file before the first run

    plan_file = args.log_dir / "plan.json"
    with locked(args.log_dir, "--log_dir", wait=False):  # two would disturb each other's benchmark
        if claim and args.seeds > 1:
            sequential.make_plan(plan_file, args.seeds, args.planned_seeds)
            print_expectation(args.track, args.seeds, plan_file)
        missing = [run for run in planned if not jobs.ended(run.folder, run.config)]
        if missing:
            jobs.fetch_data(PREFIX.get(args.track, args.track), fields)
        if timed and not args.overhead:
            if not (overhead.exists() and read_overhead(overhead, planned[0].config, args.gpus)):
                measure_overhead(overhead, config_file(args.configs, args.track, "newton_muon"), launcher,
                                 fields)
        done = len(planned) - len(missing)
        print(f"\n{done} of {len(planned)} runs in {args.log_dir} are finished", flush=True)
        published = None
        if args.track in PUBLISHED:
            name, what = PUBLISHED[args.track]
            curve = runs.read_curve(runs.ROOT / f"records/speedrun/{name}.csv")
            published = {step: loss for step, loss, _ in curve}
            if missing:
                print(f"published: {what}; ours should be within 0.01 of it")
        train_missing(missing, launcher, args.track == "cpu" and args.gpus == 1, published)

    print(flush=True)
    groups = runs.make_groups([runs.read_run(run.folder) for run in planned])
    muon = {run.folder.name for arm in plan if arm[0] == "muon" for run in plan[arm].values()}
    baseline = next((group.label for group in groups if group.runs[0].name in muon), None)
    compare.report(groups, baseline, targets.pop(), png=args.png)
    if claim:
        print_claim(plan, args.track, read_overhead(overhead) if timed else None, plan_file)


if __name__ == "__main__":
    main()
