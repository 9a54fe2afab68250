"""Runs train_gpt2.py many times after one import of torch: sequence.py '[[PROCESSES, [[ARGUMENT, ...], ...]], ...]'.

Each number of processes is so many forks of this one, joined as torchrun joins them, which do their runs one after another. Prints for
each run and process the bytes of its optimizer state, and what it received and sent by the trainer's own collectives.
"""
import json
import os
import socket
import sys
from collections import Counter

import torch
import torch._dynamo  # as every optimizer does when it is made: two seconds, once instead of in each fork
import torch.distributed as dist
from torch.multiprocessing import start_processes

import train_gpt2

torch.set_num_threads(1)
counts, made = Counter(), []
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def counted(name, function):
    key, which = ("all_gather", 1) if name == GATHER else (name, 0)

    def call(*args, **kwargs):
        if args[which].numel() > 8:  # not the numbers that are logged
            counts[key] += args[which].nbytes
        return function(*args, **kwargs)
    return call


def process(rank, port, world, runs):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank))
    for name in (GATHER, "reduce", "all_reduce"):
        setattr(dist, name, counted(name, getattr(dist, name)))
    build, init = train_gpt2.build_optimizers, dist.init_process_group
    train_gpt2.build_optimizers = lambda *args: made.append(build(*args)) or made[-1]
    dist.init_process_group = lambda *args, **kwargs: dist.is_initialized() or init(*args, **kwargs)  # one group serves all runs
    for arguments in runs:
        made.clear()
        counts.clear()
        assert train_gpt2.run(train_gpt2.load_config(arguments)) == 0
        hidden = made[0][1]  # the second pair is the warm-up's
        state = sum(t.nbytes for entry in hidden.state.values() for t in entry.values() if torch.is_tensor(t))
        report = dict(rank=train_gpt2.rank(), world=train_gpt2.world_size(), run=arguments[arguments.index("--run_name") + 1], state=state)
        os.write(1, f"REPORT {json.dumps({**report, **counts})}\n".encode())


for processes, runs in json.loads(sys.argv[1]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start_processes(process, (port, processes, runs), processes, start_method="fork")
