"""Check the paper's claim: train the arms of the comparison with several seeds, compare them, and give a verdict.

    python scripts/replicate.py --seeds 5                           the CPU track, five runs of each arm
    python scripts/replicate.py --track speedrun --seeds 3          the claim itself, on all GPUs of this machine
    python scripts/replicate.py --track mini --num_iterations 450   fields of the configuration are passed on to train_gpt2.py

First it fetches the data with data/shakespeare.py or data/fineweb.py, unless --input_bin names others; then, if there is to be a verdict,
it measures the overhead of a step with bench.py.
Runs and overhead.json are in --log_dir. What is finished there is not done again, and a broken run resumes from its last checkpoint, so the
same command continues after an interruption, and a larger --seeds adds to what is there. On the CPU track the runs of one seed run in
parallel and share the cores: less time in all, and the same load for each; only bench.py measures how long a step takes on its own.

The claim (arXiv:2604.01472): Newton-Muon reaches the loss of Muon in 6 % fewer steps, and in about 4 % less time.
The arms: Muon with all N steps of the configuration, Newton-Muon with N and with 0.94 N, its warm-down scaled too, and the other
optimizers with N. Run i of each has seed i and data_seed i: 0 is the files' order (the speedrun's own), others are permutations of it.
The CPU track begins with 1: in the files' order a batch is a piece of a scene, and Muon's final loss 0.11 higher.
The final losses of Muon, B, and of Newton-Muon with N and 0.94 N, C and D, give the steps saved at equal final loss,
0.06 (B - C) / (D - C), with a 95 % interval (harness/estimates.py);
with the overhead of Newton-Muon's step, measured before the runs by alternating with Muon's, they give the time saved.
Two questions: fewer steps than Muon? Yes if the interval is above 0, no if it is below.
               As many fewer as claimed? No if it is below 5.5 %; else yes if it is above 3 %.
reproduced        yes, yes
partly            yes, no
not reproduced    the second is no, the first is not yes
undecided         else; with the number of runs of each arm that would decide it if losses and spread stayed the same
One seed gives no verdict: the shorter arm and the overhead wait for a second. A run that diverges counts: its arm has no result.
On the speedrun track every evaluation is shown beside that of record 4, as published, so that a wrong set-up shows after 125 steps.
"""
import argparse
import dataclasses
import json
import math
import os
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command, locked
import numpy as np
import torch

from harness import estimates, jobs, runs
from scripts import compare
from train_gpt2 import GPT, UserError, code_sha256, load_config

FIRST_SEED = {"cpu": 1, "mini": 0, "speedrun": 0}
CLAIM = {"steps": 0.06, "time": 0.04}  # arXiv:2604.01472, abstract


def plan_runs(track, configs, optimizers, seeds, logs, fields):
    """{(optimizer, steps): {seed: (folder, arguments, configuration)}} of all runs."""
    plan = {}
    for optimizer in sorted(optimizers, key=lambda name: name != "muon"):  # the baseline first
        path = str(configs / f"{track}_{optimizer}.toml")
        full = load_config([path, *fields])
        lengths = {full.num_iterations: []}
        if optimizer == "newton_muon" and "muon" in optimizers:
            short = round((1 - CLAIM["steps"]) * full.num_iterations)
            if short == full.num_iterations or ("muon", full.num_iterations) not in plan:
                raise UserError(f"num_iterations = {full.num_iterations} of Newton-Muon: must be that of Muon, and 9 or more")
            schedule = {name: round(getattr(full, name) * short / full.num_iterations) for name in ("warmup_iters", "warmdown_iters")}
            if seeds > 1:  # this arm is for the verdict, which one seed does not give
                schedule["num_iterations"] = short
                lengths[short] = [text for name, value in schedule.items() for text in (f"--{name}", str(value))]
        for steps, schedule in lengths.items():
            plan[optimizer, steps] = {}
            for seed in range(FIRST_SEED[track], FIRST_SEED[track] + seeds):
                folder = logs / f"{optimizer}_{steps}_seed-{seed}"
                arguments = [path, "--save_every", "250", *fields, *schedule, "--seed", str(seed), "--data_seed", str(seed), "--log_dir",
                             str(logs), "--run_name", folder.name, "--resume", "auto"]
                plan[optimizer, steps][seed] = folder, arguments, load_config(arguments)
    return plan


def read_overhead(path, config=None, processes=1):
    """Estimate of Newton-Muon's overhead in the time of a step, from what bench.py --json wrote; None if that is not of `config`, this code
    and so many processes."""
    try:
        measured = json.loads(Path(path).read_text())
        if config:
            with torch.device("meta"):
                ours = dict(parameters=GPT(config).num_parameters(), batch_size=config.batch_size, sequence_length=config.sequence_length,
                            processes=processes, code_sha256=code_sha256())
            if any(measured[name] != value for name, value in ours.items()):
                return None
        ratio = measured["ratios"]["newton_muon/muon"]
        return estimates.Estimate(*(None if ratio[name] is None else float(ratio[name]) - 1 for name in ("mean_step", "low", "high")))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); bench.py --sides muon,newton_muon --json writes it") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not what bench.py --sides muon,newton_muon --json writes; measure it again") from None


def filed_spread(track, configs):
    """(sd, degrees of freedom) of final losses in records/TRACK, of runs like those of `configs` but for the seeds; None without any."""
    groups = {}
    for path in runs.ROOT.glob(f"records/{track}/[!.]*/*/run.json"):  # not what a broken add left
        facts = runs.read_facts(path.parent)
        for i, config in enumerate(configs):
            fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in runs.FREE_SETTINGS}
            if "final_val_loss" in facts and all(facts["config"].get(name, value) == value for name, value in fields.items()):
                groups.setdefault(i, []).append(facts["final_val_loss"])
    df = sum(len(group) - 1 for group in groups.values())
    return (math.sqrt(sum(np.var(group) * len(group) for group in groups.values()) / df), df) if df else None


def conclude(baseline, candidate, shorter, fraction, overhead, spread=None):
    """The lines of the verdict on three arms {seed: final loss}, nan for a run that diverged; `spread` is what filed_spread() returns."""
    lines = []
    if len(baseline) == 1:
        lines.append("one seed gives no verdict; --seeds 5 adds runs and gives one")
        if spread:
            lines.append("two runs of Muon, or of Newton-Muon, that differ only in the seed have final losses within "
                         f"{estimates.noise(*spread):.4f} of each other (95 % of pairs; standard deviation {spread[0]:.4f}): "
                         "a smaller difference means nothing")
        else:
            lines.append("how large a difference can be mere noise is not known for this configuration: two or more seeds would tell")
        return lines
    saved = estimates.steps_saved(baseline, candidate, shorter, fraction)
    found = estimates.verdict(saved, CLAIM["steps"])
    lines.append(f"steps saved: {estimates.saved_text(saved)}; {CLAIM['steps']:.0%} claimed")
    lines.append(f"time saved: {estimates.saved_text(estimates.time_saved(saved, overhead))}; about {CLAIM['time']:.0%} claimed")
    for question, answer in (("fewer steps than Muon", found.fewer), ("as many fewer as claimed", found.as_claimed)):
        lines.append(f"{question}? {answer.word}")
        if answer.runs:
            lines[-1] += f": about {answer.runs:,} runs of each arm in all would decide it, if means and spread stayed the same"
    return [*lines, f"verdict: {found.word}"]


@command()
def main():
    parser = argparse.ArgumentParser(description=__doc__.replace("%", "%%"), formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, usage="%(prog)s [options] [--field value ...]")
    parser.add_argument("--track", choices=("cpu", "mini", "speedrun"), default="cpu", help="(default: cpu)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm (default: 1)")
    parser.add_argument("--optimizers", default="muon,newton_muon,adamw", metavar="NAME,...",
                        help="of the configurations TRACK_NAME.toml in --configs (default: muon,newton_muon,adamw)")
    parser.add_argument("--configs", type=Path, default=Path("configs"), metavar="FOLDER",
                        help="relative to the repository (default: configs)")
    parser.add_argument("--gpus", type=int, help="processes, one on each GPU (default: all GPUs, but one process on the cpu track)")
    parser.add_argument("--overhead", type=Path, metavar="FILE", help="what bench.py --json wrote, instead of measuring a step's overhead")
    parser.add_argument("--log_dir", type=Path, help="folder of the runs, relative to the repository (default: logs/TRACK)")
    parser.add_argument("--png", type=Path, help="plot (default: TRACK.png in the folder above the runs)")
    args, fields = parser.parse_known_args()
    args.png, args.overhead = (path and path.resolve() for path in (args.png, args.overhead))
    os.chdir(runs.ROOT)  # configurations name their data from there
    logs = args.log_dir or Path("logs") / args.track
    png = args.png or logs.parent / f"{logs.name}.png"
    if png.suffix not in compare.PLOTS:
        raise UserError(f"--png {png}: the name must end in {', '.join(compare.PLOTS)}")
    optimizers = args.optimizers.split(",")
    if args.seeds < 1 or len(set(optimizers)) < len(optimizers):
        raise UserError(f"--seeds {args.seeds} --optimizers {args.optimizers}: seeds must be at least 1, each optimizer named once")
    for field in fields:
        if field.startswith("--") and field[2:].split("=")[0] in jobs.PLANNED_FIELDS:
            raise UserError(f"{field}: every run here has its own, and goes to its end; --seeds and --optimizers say which runs there are")
    processes = args.gpus
    if processes is None:
        processes = 1 if args.track == "cpu" else torch.cuda.device_count()
    if args.gpus is not None and args.gpus < 1:
        raise UserError(f"--gpus {args.gpus}: must be at least 1")
    if processes < 1:
        raise UserError(f"the {args.track} track needs a GPU and torch finds none; --track cpu does without")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    plan = plan_runs(args.track, args.configs, optimizers, args.seeds, logs, fields)
    planned = [run for seed_runs in zip(*(arm.values() for arm in plan.values())) for run in seed_runs]  # one seed after the other
    targets = {config.target_val_loss for _, _, config in planned}
    if len(targets) > 1:
        raise UserError(f"the configurations have different targets ({', '.join(map(str, targets))}); set one with --target_val_loss")
    claim = {"muon", "newton_muon"} <= set(optimizers)
    timed = claim and (args.seeds > 1 or args.overhead)
    overhead = args.overhead or logs / "overhead.json"
    if args.overhead and claim:
        read_overhead(overhead)
    with locked(logs, "--log_dir", wait=False):  # two would disturb each other's benchmark
        missing = [run for run in planned if not jobs.ended(run[0], run[2])]
        if missing:
            jobs.fetch_data(args.track, fields)
        if timed and not (overhead.exists() and (args.overhead or read_overhead(overhead, planned[0][2], processes))):
            unfinished = overhead.with_suffix(".tmp")
            jobs.start([*launcher, "scripts/bench.py", str(args.configs / f"{args.track}_newton_muon.toml"),
                        "--sides", "muon,newton_muon", "--json", str(unfinished), *fields],
                       "the overhead of a step was not measured; run the same command again to continue")
            unfinished.rename(overhead)
        print(f"\n{len(planned) - len(missing)} of {len(planned)} runs in {logs} are finished", flush=True)
        curve = {step: loss for step, loss, _ in runs.read_curve()} if args.track == "speedrun" else None
        if curve and missing:
            print("published: record 4 of the speedrun, Muon with 6200 steps; ours should be within 0.01 of it")
        together = {}
        for run in missing:
            together.setdefault(run[2].seed if args.track == "cpu" and processes == 1 else run[0], []).append(run)
        for batch in together.values():
            codes = jobs.launch({folder.name: [*launcher, "train_gpt2.py", *arguments] for folder, arguments, _ in batch}, curve)
            for (folder, _, _), code in zip(batch, codes):
                if code and not runs.diverged(folder):
                    raise UserError(f"the run in {folder} ended with code {code}; the same command resumes it from its last checkpoint")
                if code:
                    print(f"{folder.name} diverged: its arm has no result", flush=True)

    print(flush=True)
    groups = runs.make_groups([runs.read_run(folder) for folder, _, _ in planned])
    baseline = next((group.label for group in groups if group.optimizer == "muon"), None)
    compare.report(groups, baseline, targets.pop(), png=png)
    if claim:
        arms = {arm: {seed: math.nan if runs.diverged(folder) else runs.read_facts(folder)["final_val_loss"]
                      for seed, (folder, _, _) in seeds.items()} for arm, seeds in plan.items()}
        lengths = [steps for optimizer, steps in arms if optimizer == "newton_muon"]
        N, short = max(lengths), min(lengths)
        measured = read_overhead(overhead) if timed else None
        print("\nThe claim" + ("" if args.track == "speedrun" else f", made for the speedrun, on the {args.track} track"))
        for (optimizer, steps), losses in arms.items():
            values = list(losses.values())
            print(f"final loss of {optimizer} after {steps} steps: {np.mean(values):.4f}"
                  + (f" (standard deviation {np.std(values, ddof=1):.4f}, {len(values)} runs)" if values[1:] else ""))
        if timed:
            print(f"overhead of Newton-Muon's step: {measured.mean:+.1%}"
                  + ("" if measured.low is None else f" (95 %: {measured.low:+.1%} to {measured.high:+.1%})"))
        spread = filed_spread(args.track, [next(iter(arm.values()))[2] for (name, _), arm in plan.items() if name.endswith("muon")])
        if args.track == "speedrun":
            spread = estimates.SPEEDRUN_SD, math.inf
        for line in conclude(arms["muon", N], arms["newton_muon", N], arms["newton_muon", short], 1 - short / N, measured, spread):
            print(textwrap.fill(line, 128, subsequent_indent="    "))


if __name__ == "__main__":
    main()
