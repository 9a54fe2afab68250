"""Check the paper's claim: train each optimizer with several seeds, compare, and say whether Newton-Muon saves what it is said to save.

    python scripts/replicate.py                                     the CPU track, three seeds: about 10 minutes on 2 cores
    python scripts/replicate.py --track speedrun                    the claim itself, on all GPUs of this machine
    python scripts/replicate.py --track mini --num_iterations 450   fields of the configuration are passed on to train_gpt2.py

The data come first, by data/shakespeare.py or data/fineweb.py, unless --input_bin names others.
Runs lie in --log_dir. Those that are finished there are not run again and a broken one goes on from its last checkpoint, so the same
command continues after an interruption, and a larger --seeds adds to what is there. The optimizers take turns, seed by seed.

The claim (arXiv:2604.01472): Newton-Muon meets the target loss after 6 % fewer steps, and about 4 % less time, than Muon. With the
95 % interval of what was saved here (see scripts/compare.py) it is
reproduced        if all of the interval is above 0 and some of it at or above the claim,
not reproduced    if all of it is below the claim, or Newton-Muon misses a target that Muon meets with every seed,
undecided         else; with the number of runs of each, in all, at which an interval of this spread would leave out 0, or the claim.
"""
import argparse
import dataclasses
import hashlib
import importlib.util
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import compare
from train_gpt2 import FREE_FIELDS, UserError, code_sha256, load_config

CLAIM = {"steps": 0.06, "time": 0.04}  # arXiv:2604.01472, abstract


def finished(folder, config):
    """Whether `folder` holds the finished run of `config` by this code. Raises UserError if it holds one of another code or configuration."""
    facts = compare.read_facts(folder)
    if not facts:
        return False
    if facts.get("code_sha256") != code_sha256():
        raise UserError(f"{folder} is from another version of train_gpt2.py; choose another --log_dir, or delete it")
    for name, value in dataclasses.asdict(config).items():
        if name not in FREE_FIELDS - {"stop_at_target"} and facts["config"].get(name) != value:
            raise UserError(f"{folder} has {name} = {facts['config'].get(name)!r}, this run {value!r}; choose another --log_dir, or delete it")
    if ":" in config.optimizer:
        module = importlib.util.find_spec(config.optimizer.split(":")[0])
        if module and hashlib.sha256(Path(module.origin).read_bytes()).hexdigest() != facts.get("optimizer_sha256", ""):
            raise UserError(f"{folder} is from another version of {module.origin}; choose another --log_dir, or delete it")
    return "end" in facts


def verdict(saved, claim):
    """(verdict, sentence) on `saved`, a compare.Change, for a claim such as 0.06."""
    if saved.mean is None:
        return "undecided", "a run met the target before its first step, so there is nothing to compare"
    if saved.low is None:
        return "undecided", f"{saved.mean:.1%} saved, without an interval: 2 or more seeds of each, with different results, are needed"
    interval = f"{saved.mean:.1%} saved (95 %: {saved.low:.1%} to {saved.high:.1%}), {claim:.0%} claimed"
    if saved.high < claim:
        return "not reproduced", interval
    if saved.low > 0:
        return "reproduced", interval
    ratio = math.log1p(-saved.mean)
    runs = [compare.runs_needed(distance, saved.sd, 0.025, saved.df) for distance in (-ratio, ratio - math.log1p(-claim))]
    return "undecided", f"{interval}: about {min(n for n in runs if n)} runs of each are needed in all"


def conclude(summaries, names):
    """The lines of the verdict on the groups named `names` = (Newton-Muon's, Muon's) of compare.compare's summaries."""
    newton, muon = (next(s for s in summaries if s.label == name) for name in names)
    if newton.reached < len(newton.runs) and muon.reached == len(muon.runs):
        return [f"verdict: not reproduced: {len(newton.runs) - newton.reached} of {len(newton.runs)} runs with Newton-Muon missed the target, "
                "which Muon met with every seed"]
    if muon.reached < len(muon.runs):
        return [f"verdict: undecided: {len(muon.runs) - muon.reached} of {len(muon.runs)} runs with Muon missed the target"]
    parts = {what: verdict(saved, CLAIM[what]) for what, saved in (("steps", newton.saved_steps), ("time", newton.saved_seconds))}
    words = {word for word, _ in parts.values()}
    overall = next(word for word in ("not reproduced", "undecided", "reproduced") if word in words)
    return [f"{what:6} {word}: {text}" for what, (word, text) in parts.items()] + [f"verdict: {overall}"]


def start(arguments, otherwise):
    """Runs `python ARGUMENTS`, as it says. Raises UserError with `otherwise` if that fails."""
    print(f"\n$ {shlex.join(['python', *arguments])}", flush=True)
    code = subprocess.run([sys.executable, *arguments]).returncode
    if code:
        raise UserError(f"that command ended with code {code}: {otherwise}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="%(prog)s [options] [--field value ...]")
    parser.add_argument("--track", choices=("cpu", "mini", "speedrun"), default="cpu", help="(default: cpu)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each optimizer, with the seeds 0, 1, ... (default: 3)")
    parser.add_argument("--optimizers", default="muon,newton_muon,adamw", metavar="NAME,...",
                        help="of the configurations TRACK_NAME.toml in configs/ (default: muon,newton_muon,adamw)")
    parser.add_argument("--gpus", type=int, help="processes, one on each GPU (default: all GPUs, but one process on the cpu track)")
    parser.add_argument("--log_dir", type=Path, help="folder of the runs, from that of the repository (default: logs/TRACK)")
    parser.add_argument("--png", type=Path, help="plot (default: TRACK.png in the folder above the runs)")
    args, fields = parser.parse_known_args()
    os.chdir(ROOT)  # configurations name their data from there
    logs = args.log_dir or Path("logs") / args.track
    optimizers = args.optimizers.split(",")
    if args.seeds < 1 or len(set(optimizers)) < len(optimizers):
        raise UserError(f"--seeds {args.seeds} --optimizers {args.optimizers}: seeds must be at least 1, each optimizer named once")
    for field in fields:
        if field.split("=")[0] in ("--seed", "--run_name", "--resume", "--optimizer"):
            raise UserError(f"{field}: every run here has its own; --seeds and --optimizers say which runs there are")
    processes = args.gpus
    if processes is None:
        import torch
        processes = 1 if args.track == "cpu" else torch.cuda.device_count()
    if processes < 1:
        raise UserError(f"the {args.track} track needs a GPU and torch finds none; --track cpu does without")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    plan = {}  # folder -> (arguments, configuration)
    for seed in range(args.seeds):
        for optimizer in optimizers:
            folder = logs / f"{optimizer}_seed-{seed}"
            arguments = [f"configs/{args.track}_{optimizer}.toml", "--seed", str(seed), "--log_dir", str(logs), "--run_name", folder.name,
                         "--resume", "auto", "--save_every", "250", *fields]
            plan[folder] = arguments, load_config(arguments)
    targets = {config.target_val_loss for _, config in plan.values()}
    if len(targets) > 1:
        raise UserError(f"the configurations have different targets ({', '.join(map(str, targets))}); give one by --target_val_loss")
    missing = [folder for folder, (_, config) in plan.items() if not finished(folder, config)]
    if missing and not any(field.startswith("--input_bin") for field in fields):
        start(["data/shakespeare.py"] if args.track == "cpu" else ["data/fineweb.py", f"configs/{args.track}_muon.toml"],
              "the data are not there; the same command goes on")
    print(f"{len(plan) - len(missing)} of {len(plan)} runs in {logs} are finished", flush=True)
    for folder in missing:
        start([*launcher, "train_gpt2.py", *plan[folder][0]], f"the run in {folder} did not end; the same command goes on from its last checkpoint")
    png = args.png or logs.parent / f"{logs.name}.png"
    print(flush=True)
    runs = [compare.read_log(folder) for folder in plan]
    groups = compare.groups(runs)
    names = [next((group.label for group in groups if group.optimizer == optimizer), None) for optimizer in ("newton_muon", "muon")]
    summaries = compare.report(runs, groups, names[1], targets.pop(), png=png)
    if None not in names:
        print(f"\nThe claim, on the {args.track} track" + ("" if args.track == "speedrun" else " (it was made for the speedrun track)"))
        print("\n".join(conclude(summaries, names)))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on")
