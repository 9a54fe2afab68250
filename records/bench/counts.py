"""Counts of the 124 M model: operations of a step of Muon, and bytes that a forward pass keeps.

    PYTHONPATH=. python records/bench/counts.py

The operations are those that touch data: views and slices launch nothing, and a foreach operation counts as
one. The bytes are those of all buffers behind tensors saved for the backward pass in bf16, uncompiled, up to
the head, without copies of the weights. For the compiled model scripts/estimate_step.py counts them.
"""
from collections import Counter

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from train_gpt2 import GPT, Config, Muon

VIEWS = {"unsqueeze", "view", "select", "slice", "expand", "transpose", "_unsafe_view", "split", "detach",
         "alias", "permute"}


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "aten":
            self.counts[operation._schema.name.partition("::")[2]] += 1
        return operation(*args, **(kwargs or {}))


def muon_operations(model):
    """Operations of a step of Muon on the hidden matrices, after the first, which makes its state."""
    matrices = [torch.nn.Parameter(p.to("meta")) for p in model.hidden_matrices().values()]
    muon = Muon(matrices)
    for p in matrices:
        p.grad = torch.empty_like(p)
    muon.step()
    with Operations() as operations:
        muon.step()
    count = sum(n for name, n in operations.counts.items() if name not in VIEWS)
    return len(matrices), count


def kept_bytes(model, config):
    """Bytes for each token that a forward pass keeps."""
    kept = {}
    weights = {size for p in model.parameters() for size in (p.shape, p.T.shape)}

    def pack(tensor):
        if tensor.shape not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.features(torch.zeros(1, config.sequence_length, dtype=torch.long))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / config.sequence_length


config = Config()
model = GPT(config)
matrices, operations = muon_operations(model)
print(f"a step of Muon on {matrices} matrices: {operations} operations")
kept = kept_bytes(model, config)
unit = config.n_layer * config.n_embd
print(f"kept for the backward pass: {kept:,.0f} bytes a token, {kept / unit:.1f} L C")
