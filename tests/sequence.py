"""Runs train_gpt2.py many times after one import of torch:

    sequence.py '[[PROCESSES, [[ARGUMENT, ...], ...]], ...]'

For each group, PROCESSES forks of this process join as torchrun would join them, and do the group's runs
one after another. For each run and process, it prints the bytes of the optimizer's state, and the bytes
that the trainer's own collectives received and sent.
"""
import json
import os
import socket
import sys
from collections import Counter

import torch
import torch._dynamo  # an optimizer imports this when it is made: 2 s, here once for all forks
import torch.distributed as dist
from torch.multiprocessing import start_processes

import train_gpt2

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def counted(name, function, counts):
    """`function`, a collective, which also adds the bytes of its tensor to counts[name]."""
    key = "all_gather" if name == GATHER else name
    position = 1 if name == GATHER else 0  # of the tensor that this process sends

    def call(*args, **kwargs):
        tensor = args[position]
        if tensor.numel() > 8:  # not the numbers that are logged
            counts[key] += tensor.nbytes
        return function(*args, **kwargs)
    return call


def process(rank, port, world, runs):
    """One of `world` processes, which does all the runs."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(world), RANK=str(rank),
                      LOCAL_RANK=str(rank))
    counts = Counter()
    for name in (GATHER, "reduce", "all_reduce"):
        setattr(dist, name, counted(name, getattr(dist, name), counts))

    made = []
    build = train_gpt2.build_optimizers

    def build_and_keep(*args):
        made.append(build(*args))
        return made[-1]

    init = dist.init_process_group

    def init_once(*args, **kwargs):  # one process group serves all runs
        if not dist.is_initialized():
            init(*args, **kwargs)

    train_gpt2.build_optimizers = build_and_keep
    dist.init_process_group = init_once
    for words in runs:
        made.clear()
        counts.clear()
        assert train_gpt2.run(train_gpt2.load_config(words)) == 0
        report = dict(
            rank=train_gpt2.rank(),
            world=train_gpt2.world_size(),
            run=words[words.index("--run_name") + 1],
            state=state_bytes(made[0][1]),  # the second pair of optimizers is the warm-up's
            **counts)
        os.write(1, f"REPORT {json.dumps(report)}\n".encode())  # in one piece


def state_bytes(optimizer):
    total = 0
    for state in optimizer.state.values():
        total += sum(value.nbytes for value in state.values() if torch.is_tensor(value))
    return total


if __name__ == "__main__":
    torch.set_num_threads(1)
    for processes, runs in json.loads(sys.argv[1]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        start_processes(process, (port, processes, runs), processes, start_method="fork")
