"""train_gpt2.py whose DDP has buckets of a few kilobytes: torchrun ... compiled_ddp.py CONFIG.toml

The environment variable BACKEND is torch.compile's backend: inductor is the usual one, and aot_eager does
the same to the graphs but compiles no kernels, which takes most of the time.

DDP averages a bucket of gradients as soon as all of them are there, while the rest of the backward pass
goes on. So that this still works under torch.compile, it splits the model's graph at the buckets. The
speedrun's model has several buckets; a tiny model has several only if they are small. Prints the number of
parts of each graph.
"""
import os

import torch
import torch.distributed as dist
import torch._dynamo.backends.distributed as splitting
from torch.nn.parallel import DistributedDataParallel

import train_gpt2

BUCKET_BYTES = 4 * 1024  # the gradients of a model with one layer are 16 KiB


class SmallBuckets(DistributedDataParallel):
    def __init__(self, model, **options):
        super().__init__(model, bucket_cap_mb=BUCKET_BYTES / 2 ** 20, **options)


class Splitter(splitting.DDPOptimizer):
    def compile_fn(self, *args, **options):
        compiled = super().compile_fn(*args, **options)
        print(f"GRAPH OF {len(self.buckets)} PARTS", flush=True)
        return compiled


def compile_by(backend, compile=torch.compile):
    """torch.compile with this backend. `options` are only for inductor."""
    def compile_model(model, dynamic=None, options=None):
        if backend != "inductor":
            options = None
        return compile(model, dynamic=dynamic, options=options, backend=backend)
    return compile_model


if __name__ == "__main__":
    dist._DEFAULT_FIRST_BUCKET_BYTES = BUCKET_BYTES
    splitting.DDPOptimizer = Splitter
    train_gpt2.DistributedDataParallel = SmallBuckets
    torch.compile = compile_by(os.environ["BACKEND"])
    train_gpt2.main()
