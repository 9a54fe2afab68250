"""Train one configuration with every combination of some fields' values, and list the final validation losses, best first.

    python scripts/tune.py configs/cpu_muon.toml --learning_rate 0.005,0.01,0.02 --hidden_learning_rate 0.001,0.002,0.004 --jobs 2

Any field of the configuration can be given, with values separated by commas. Runs lie in --log_dir; those that are finished there
are not run again (if code and configuration are the same), so a grid can be widened step by step. With --jobs N, N runs share the CPU cores; the losses do not depend
on it, the times do.
"""
import argparse
import dataclasses
import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.compare import read_facts
from scripts.replicate import finished
from train_gpt2 import Config, UserError, load_config


def train(arguments, folder, threads):
    """Runs train_gpt2.py with `arguments`, into `folder`; returns the final validation loss, None if the run failed."""
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *arguments]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if result.returncode:
        print(f"{folder.name}: {result.stderr.strip()}", file=sys.stderr, flush=True)
        return None
    return read_facts(folder)["final_val_loss"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG.toml")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--log_dir", type=Path, default=Path("logs/tune"), help="folder of the runs (default: logs/tune)")
    for field in dataclasses.fields(Config):
        if field.name not in ("log_dir", "run_name", "resume"):
            parser.add_argument(f"--{field.name}", metavar="V1,V2,...", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    grid = vars(parser.parse_args())
    config, jobs, log_dir = (grid.pop(name) for name in ("config", "jobs", "log_dir"))
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    values = [re.split(r",(?![^{]*\})", text) for text in grid.values()]  # not at the commas within a JSON object
    runs = {}  # folder -> (arguments, whether that run is finished), for all points before the first is run
    for point in itertools.product(*values):
        settings = dict(zip(grid, point))
        name = "_".join([Path(config).stem, *(f"{key}-{value}" for key, value in settings.items())]).replace("/", "-")
        arguments = [config, "--log_dir", str(log_dir), "--run_name", name, "--resume", "auto",
                     *(part for key, value in settings.items() for part in (f"--{key}", value))]
        runs[log_dir / name] = arguments, finished(log_dir / name, load_config(arguments))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    losses = {}

    def one(folder):
        arguments, done = runs[folder]
        losses[folder.name] = read_facts(folder)["final_val_loss"] if done else train(arguments, folder, threads)
        print(f"{len(losses)}/{len(runs)} {folder.name}: {losses[folder.name] or 'failed'}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, runs))
    print("\nfinal validation loss, best first")
    for name, loss in sorted(losses.items(), key=lambda item: (item[1] is None, item[1])):
        print(f"{'failed' if loss is None else f'{loss:.4f}'}  {name}")
    sys.exit(None in losses.values())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
