"""Train one configuration with every combination of some fields' values, and list the final validation losses, best first.

    python scripts/tune.py configs/cpu_muon.toml --learning_rate 0.005,0.01,0.02 --hidden_learning_rate 0.001,0.002,0.004 --jobs 2

Any field of the configuration can be given, with values separated by commas. Runs lie in --log_dir; those that are finished there
are not run again, so a grid can be widened step by step. With --jobs N, N runs share the CPU cores; the losses do not depend
on it, the times do.
"""
import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train_gpt2 import Config


def final_loss(folder):
    """Final validation loss of a finished run, else None."""
    try:
        return json.loads((folder / "run.json").read_text()).get("final_val_loss")
    except (OSError, ValueError):
        return None


def train(config, folder, settings, threads):
    """Runs train_gpt2.py into `folder`, unless it is done; returns the final validation loss, None if the run failed."""
    if final_loss(folder) is None:
        command = [sys.executable, str(ROOT / "train_gpt2.py"), config, "--log_dir", str(folder.parent), "--run_name", folder.name,
                   "--resume", "auto", *(part for name, value in settings.items() for part in (f"--{name}", value))]
        result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
        if result.returncode:
            print(f"{folder.name}: {result.stderr.strip()}", file=sys.stderr, flush=True)
    return final_loss(folder)


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
    points = [dict(zip(grid, values)) for values in itertools.product(*(text.split(",") for text in grid.values()))]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    losses = {}

    def one(settings):
        name = "_".join([Path(config).stem, *(f"{key}-{value}" for key, value in settings.items())])
        losses[name] = train(config, log_dir / name.replace("/", "-"), settings, threads)
        print(f"{len(losses)}/{len(points)} {name}: {losses[name]}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, points))
    print("\nfinal validation loss, best first")
    for name, loss in sorted(losses.items(), key=lambda item: (item[1] is None, item[1])):
        print(f"{'failed' if loss is None else f'{loss:.4f}'}  {name}")


if __name__ == "__main__":
    main()
