"""What can be counted of the 124 M model without a GPU: operations of a step of Muon, and bytes that a forward pass keeps.

    PYTHONPATH=. python records/bench/counts.py

The operations are those that touch data: views and slices launch nothing, and a foreach operation counts as one. The bytes are those of
all tensors saved for the backward pass in bf16, not compiled, up to the head, without copies of the weights. The first line can be had
for the trainer of commit 9e09ea1 too, which has no GPT.features() for the second.
"""
from collections import Counter

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from train_gpt2 import GPT, Config, Muon

VIEWS = {"unsqueeze", "view", "select", "slice", "expand", "transpose", "_unsafe_view", "split", "detach", "alias", "permute"}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "aten":
            self.counts[operation._schema.name.partition("::")[2]] += 1
        return operation(*args, **(kwargs or {}))


config = Config()
model = GPT(config)

matrices = [torch.nn.Parameter(p.to("meta")) for p in model.hidden_matrices().values()]
muon = Muon(matrices)
for p in matrices:
    p.grad = torch.empty_like(p)
muon.step()
with Operations() as operations:
    muon.step()
print(f"a step of Muon on {len(matrices)} matrices: {sum(n for name, n in operations.counts.items() if name not in VIEWS)} operations")

kept = {}
weights = {size for p in model.parameters() for size in (p.shape, p.T.shape)}
with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t), torch.autocast("cpu", torch.bfloat16):
    model.features(torch.zeros(1, config.sequence_length, dtype=torch.long))
size = sum(t.untyped_storage().nbytes() for t in kept.values() if t.shape not in weights) / config.sequence_length
print(f"kept for the backward pass: {size:,.0f} bytes a token, {size / config.n_layer / config.n_embd:.1f} L C")
