"""The speedrun's step on several H100s of one machine, on paper: where its milliseconds go.

    python scripts/eight_gpus.py                                eight GPUs, everything assumed
    python scripts/eight_gpus.py --compute 128 --interval 64    with a measured time, and rarer refreshes

Facts, from the trainer's code: bytes of gradients, updates and sums; FLOPs of Newton-Schulz, and how Muon
shares the matrices among their owners; which memory traffic an optimizer step needs; that DDP sends
gradients in buckets while the backward pass goes on, and the tied table's last, when nothing is left to
overlap with; that every GPU updates the whole table.

Assumed, unless given: all inputs below. Each is a range of two numbers, or one number that was measured. The
first defaults are estimates of scripts/estimate_step.py, which have been 3 to 10 % optimistic against
published times; the others are what such machines are usually reported to reach. A bus bandwidth is that of
nccl-tests: on n GPUs an all-reduce moves 2 (n - 1) / n times its bytes, an all-gather (n - 1) / n times.

Not counted: reading data, the log, evaluation, checkpoints, a GPU that waits for slower ones.
"""
import argparse
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command
import train_gpt2
from train_gpt2 import GPT, Config, Muon, UserError
import torch

BUCKET = 25 * 2**20  # bytes, DDP's own choice
OPERATIONS = 88  # of a step of Muon that touch data: records/bench/counts.py
INPUTS = {  # name: (best, worst, what)
    "compute": (117.0, 141.3, "ms of a forward and backward pass of 65,536 tokens, as DDP compiles it"),
    "statistics": (10.5, 21.7, "ms that Z Z^T adds to such a pass"),
    "factorisation": (0.6, 8.0, "ms in which an owner of an eighth of the blocks factorises them"),
    "backward": (0.67, 0.67, "share of the backward pass in --compute"),
    "contention": (0.0, 0.15, "share of a GPU that an all-reduce takes from the backward pass while it runs"),
    "bucket": (300, 150, "GB/s, bus bandwidth for 25 MiB"),
    "bus": (450, 300, "GB/s, bus bandwidth for 100 MB and more"),
    "latency": (20, 40, "microseconds of a collective, whatever its size"),
    "newton_schulz": (450, 200, "TFLOP/s in batches of 768 x 768 products in bf16"),
    "tf32": (350, 150, "TFLOP/s in G P"),
    "memory": (2.9, 2.5, "TB/s"),
    "launch": (0, 5, "microseconds that a GPU waits for each operation of Muon"),
}


def overlapped(backward, sending):
    """Time of a backward pass and of sending its buckets, which it fills at even intervals."""
    end = 0.0
    for i, seconds in enumerate(sending, start=1):
        end = max(end, backward * (i / len(sending))) + seconds
    return max(end, backward)


def sizes(gpus):
    """What the trainer's code says of the speedrun's model; the busiest owner's are those of one GPU."""
    config = Config()
    with torch.device("meta"), patch.object(train_gpt2, "world_size", lambda: gpus):
        model = GPT(config)
        muon = Muon(model.hidden_matrices().values())

    def busiest(cost):
        return max(sum(cost(p) for p in muon.matrices if muon.owner[p] == i) for i in range(gpus))
    return SimpleNamespace(
        hidden=sum(p.numel() for p in muon.matrices),
        table=model.wte.weight.numel(),
        blocks=sum(max(1, p.size(1) // p.size(0)) for p in muon.matrices),  # with a K each
        owned=muon.updates.size(1),  # elements of the longest row of the all-gather
        newton_schulz=config.ns_steps * busiest(muon.cost),  # FLOPs of the busiest owner
        preconditioning=busiest(lambda p: 2 * p.numel() * min(p.shape)))  # the same


def parts(gpus, given, interval):
    """{what: milliseconds} of a step, from one value for each of INPUTS; what a refresh adds is divided by
    `interval`."""
    size = sizes(gpus)
    micro_batches = 8 // gpus
    several = gpus > 1
    traffic = 1e9 * given["memory"]  # bytes in a millisecond
    latency = several * given["latency"] / 1e3
    reduced = 2 * (gpus - 1) / gpus
    backward = given["backward"] * given["compute"]
    buckets = math.ceil(4 * size.hidden / BUCKET)
    sending = [several * (latency + 4 * size.hidden / buckets * reduced / (1e6 * given["bucket"]))] * buckets
    sums = 4 * size.blocks * Config.n_embd ** 2  # bytes
    collectives = 4 * Config.n_layer  # of a refresh: a reduce for each matrix
    return {
        "forward and backward passes": micro_batches * given["compute"],
        "DDP copies gradients into buckets": several * 8 * (size.hidden + size.table) / traffic,
        "the all-reduce slows the backward pass": given["contention"] * min(sum(sending), backward),
        "hidden matrices' gradients, sent after the backward pass": overlapped(backward, sending) - backward,
        "the tied table's gradient, sent last": latency + 4 * size.table * reduced / (1e6 * given["bus"]),
        "Newton-Schulz of the busiest owner": size.newton_schulz / (1e9 * given["newton_schulz"]),
        # momentum, Nesterov, one batch for each shape, to bf16 and back; then all weights
        "memory traffic around it": (60 * size.owned + 10 * size.hidden) / traffic,
        "waiting for Muon's operations": OPERATIONS * given["launch"] / 1e3,
        "all-gather of updates in bf16": latency + 2 * size.owned * (gpus - 1) / (1e6 * given["bus"]),
        "AdamW of the table": 28 * size.table / traffic,
        "Newton-Muon: G P": size.preconditioning / (1e9 * given["tf32"]),
        "Newton-Muon: Z Z^T": micro_batches * given["statistics"] / interval,
        "Newton-Muon: its sums to the owners":
            several * (collectives * latency + sums / (1e6 * given["bucket"])) / interval,
        "Newton-Muon: factorisation": 8 / gpus * given["factorisation"] / interval,
    }


def total(found, newton_muon=True):
    return sum(value for name, value in found.items() if newton_muon or not name.startswith("Newton-Muon"))


@command(interrupted="interrupted")
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8, choices=(1, 2, 4, 8), help="(default: 8)")
    parser.add_argument("--interval", type=int, default=32, help="steps between refreshes (default: 32)")
    for name, (best, worst, what) in INPUTS.items():
        parser.add_argument(f"--{name}", type=float, nargs="+", default=[best, worst],
                            help=f"{what} (assumed: {best:g} to {worst:g})")
    args = parser.parse_args()
    if args.interval < 1:
        raise UserError(f"--interval {args.interval}: must be at least 1")
    given = {}
    for name, (best, worst, what) in INPUTS.items():
        values = getattr(args, name)
        if len(values) > 2 or min(values) < 0 or (worst < best and min(values) == 0):
            raise UserError(f"--{name} {' '.join(map(str, values))}: must be one number or two, "
                            f"{'above 0' if worst < best else '0 or more'}")
        given[name] = sorted(values, reverse=worst < best)
        source = "assumed" if values == [best, worst] else "given"
        print(f"{source:>7}  --{name:<13} {' to '.join(f'{value:g}' for value in values):<14} {what}")
    print(f"\n{args.gpus} GPUs, on each {8 // args.gpus} x 65,536 tokens a step; milliseconds:")
    ends = [{name: values[i] for name, values in given.items()} for i in (0, -1)]
    found = [parts(args.gpus, end, args.interval) for end in ends]
    refresh = [parts(args.gpus, end, 1) for end in ends]
    lines = [(name, [f[name] for f in found]) for name in found[0]]
    lines += [("a step with Muon", [total(f, newton_muon=False) for f in found]),
              ("Newton-Muon's mean step", [total(f) for f in found]),
              ("its longest step, with a refresh", [total(f) for f in refresh])]
    for name, (best, worst) in lines:
        print(f"{best:8.2f} to {worst:7.2f}  {name}")


if __name__ == "__main__":
    main()
