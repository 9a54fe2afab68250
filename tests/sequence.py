"""Runs train_gpt2.py several times in the same processes, which saves the import of torch: sequence.py '[[ARGUMENT, ...], ...]'.

Prints for each run and process the bytes of its optimizer state, and what it received and sent by the trainer's own collectives.
"""
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

import train_gpt2

torch.set_num_threads(1)
counts = {}


def counted(name, function):
    def call(*args, **kwargs):
        tensor = args[1] if name == "all_gather_into_tensor" else args[0]
        if tensor.numel() > 8:  # not the numbers that are logged
            counts[name] = counts.get(name, 0) + tensor.numel() * tensor.element_size()
        return function(*args, **kwargs)
    return call


for name in ("all_gather_into_tensor", "reduce", "all_reduce"):
    setattr(dist, name, counted(name, getattr(dist, name)))
made = []
build = train_gpt2.build_optimizers
train_gpt2.build_optimizers = lambda *args: made.append(build(*args)) or made[-1]
# one process group serves all runs
init = dist.init_process_group
dist.init_process_group = lambda *args, **kwargs: dist.is_initialized() or init(*args, **kwargs)
for arguments in json.loads(sys.argv[1]):
    made.clear()
    counts.clear()
    assert train_gpt2.run(train_gpt2.load_config(arguments)) == 0
    hidden = made[0][1]  # the second pair is the warm-up's
    state = sum(t.numel() * t.element_size() for entry in hidden.state.values() for t in entry.values() if torch.is_tensor(t))
    sys.stdout.write("REPORT " + json.dumps(dict(rank=train_gpt2.rank(), state=state, **counts)) + "\n")
    sys.stdout.flush()
os._exit(0)  # as main() does
