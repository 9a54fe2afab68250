"""What the arms cost: writes costs.json, from which study.py --page takes two columns.

    python records/cpu/2026-11-30_where_the_gain_comes_from/costs.py    four minutes, with nothing beside it

The arms take turns in one process, as in scripts/bench.py: in each of 21 rounds 10 steps and a refresh of
each. A step's time is its mean with one refresh in refresh_interval steps, relative to Muon's in the same
round: the median over the rounds, with its 95 % interval. State: bytes per hidden parameter, fp32.
"""
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(Path(__file__).parent)]
from harness.command import command
from harness.zoo.table import Point
from harness.zoo.training import fields, state_bytes

import train_gpt2  # before torch: it says how CPU threads wait
import torch
from bench import build, interval, mean_steps, take_turns, write_json
from study import ARMS, CENTRE, COMPILED, HERE

ROUNDS = 21
STEPS = 10


@command(interrupted="stopped; nothing was written")
def main():
    os.chdir(ROOT)
    configs = {}
    for name, entry in ARMS.items():
        point = Point(name, 600, *CENTRE, "", 0)
        configs[name] = train_gpt2.load_config(["configs/cpu_muon.toml", *COMPILED, *fields(entry, point)])
    config = configs["muon"]
    device = train_gpt2.start_processes(config)
    dtype = train_gpt2.training_dtype(config, device)
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(config.vocab_size, (config.batch_size, config.sequence_length), generator=generator)
    sides = {}
    for name in ARMS:
        sides[name] = build(name, configs[name], device, dtype, idx)
        print(f"{name}: ready after {sides[name].warm_up_s} s", flush=True)
    for i in range(ROUNDS):
        take_turns(sides, STEPS, device, backwards=i % 2 == 0)
    muon = mean_steps(sides["muon"], ROUNDS)
    costs = {}
    for name, side in sides.items():
        ratios = [mine / theirs for mine, theirs in zip(mean_steps(side, ROUNDS), muon)]
        costs[name] = {"state_bytes": state_bytes(configs[name]), "mean_step": statistics.median(ratios),
                       **interval(ratios)}
    machine = train_gpt2.describe_machine(device)
    facts = {key: machine[key] for key in ("cpu", "cpu_threads", "torch", "git_commit")}
    write_json(HERE / "costs.json", {**facts, "arms": costs})


if __name__ == "__main__":
    main()
