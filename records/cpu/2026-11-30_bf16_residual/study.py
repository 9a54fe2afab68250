"""Does a residual stream in bf16 cost anything? The CPU track in bf16, two models, ten seeds each.

    python records/cpu/2026-11-30_bf16_residual/study.py --jobs 2    run what is missing, and write results.md

README.md has the plan. Every finished run is a line of fp32.csv or bf16.csv: the same command continues.
"""
import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from harness import estimates, runs
from harness.command import command
from harness.zoo.optimizers import Entry
from harness.zoo.table import Point, Table
from harness.zoo.training import Track
from train_gpt2 import load_config

HERE = Path(__file__).resolve().parent
MODELS = {"fp32": "models.faster:GPT", "bf16": "models.faster:BF16GPT"}  # by their residual stream
SEEDS = range(61, 71)


def train(jobs):
    """{residual stream: {seed: final loss}}, after the training of what is missing."""
    config = load_config(["configs/cpu_muon.toml"])
    rates = (config.learning_rate, config.hidden_learning_rate)
    entries = {"muon": Entry("muon", setting="momentum", values=(), source="", rates=rates)}
    finals = {}
    for name, model in MODELS.items():
        given = ["--dtype", "bfloat16", "--compile", "true", "--model", model]
        table = Table(HERE / f"{name}.csv")
        track = Track("cpu", jobs, Path("logs/bf16_residual") / name, given, table, entries)
        track.train([Point("muon", track.steps, *rates, "", seed) for seed in SEEDS])
        finals[name] = table.results("muon", track.steps)
    return finals


def write_page(finals):
    lines = ["Written by study.py.", "", "| seed | residual stream in fp32 | in bf16 | difference |",
             "|" + " --- |" * 4]
    for seed in SEEDS:
        fp32, bf16 = (finals[name][seed] for name in MODELS)
        lines.append(f"| {seed} | {fp32:.4f} | {bf16:.4f} | {bf16 - fp32:+.4f} |")
    means = [sum(losses.values()) / len(losses) for losses in finals.values()]
    gap = estimates.mean_interval([finals["bf16"][seed] - finals["fp32"][seed] for seed in SEEDS])
    lines.append(f"| mean | {means[0]:.4f} | {means[1]:.4f} "
                 f"| {gap.mean:+.4f} (95 %: {gap.low:+.4f} to {gap.high:+.4f}) |")
    (HERE / "results.md").write_text("\n".join(lines) + "\n")


@command(interrupted="stopped; the same command continues")
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    args = parser.parse_args()
    os.chdir(runs.ROOT)
    write_page(train(args.jobs))


if __name__ == "__main__":
    main()
