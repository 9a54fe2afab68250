"""InputMoments: Newton-Muon in any model. It gives the optimizer the second moments of the layers' inputs.

    hidden = NewtonMuon([p for p in model.blocks.parameters() if p.ndim == 2], lr=4e-4)
    moments = InputMoments(model, hidden)
    for step, batches in enumerate(steps):
        with moments.collecting(step):  # all forward and backward passes of this step
            for x, y in batches:
                loss(model(x), y).backward()
        hidden.step()
        model.zero_grad()

The rest of the model (embeddings, head, biases, norms) needs another optimizer, such as AdamW. To resume,
load the state_dict of both. examples/newton_muon_elsewhere.py is a whole program. This file and train_gpt2.py
can be copied into any project.

weights     of nn.Linear. Pass Transposed(weight) of transformers' Conv1D, which keeps (inputs, outputs). A
            warning names all other matrices, which get Muon's steps. train_gpt2.py says which shapes
            NewtonMuon takes, and that a matrix (3 n, n) counts as a fused q, k, v.
masks       Set moments.mask before each forward pass: tokens where it is 0 do not count. It has the shape of
            the layers' inputs without the last dimension. The end of the block removes it.
processes   N is counted over all of them. DDP works, sharded weights (FSDP) do not.
compile     Steps that refresh run without torch.compile, in the memory that this needs. Compiled graphs have
            no hooks, and are not compiled again.
and also    autocast, activation checkpointing, layers that are called several times: every call in the
            block counts. A layer that is not called in a step keeps its K.

Cost: none but in steps that refresh, one of refresh_interval. In them a layer with n inputs and m outputs
needs min(n, m) / (3 m) more FLOPs, at most a third, and n min(n, m) numbers in fp32.
"""
import contextlib
import functools
import warnings
from collections import Counter

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from train_gpt2 import NewtonMuon, gram, rank, world_size


class Transposed(nn.Parameter):
    """A weight (inputs, outputs) as a parameter (outputs, inputs), with the same memory and gradient."""

    def __new__(cls, weight):
        parameter = super().__new__(cls, weight.detach().mT)
        parameter.weight = weight
        return parameter

    @property
    def grad(self):
        if self.data_ptr() != self.weight.data_ptr():
            raise RuntimeError(f"a weight of shape {tuple(self.weight.shape)} has moved after "
                               "Transposed(weight): move the model first, then make the optimizer")
        return None if self.weight.grad is None else self.weight.grad.mT

    @grad.setter
    def grad(self, value):
        self.weight.grad = None if value is None else value.mT


def is_conv1d(module):
    return type(module).__name__ == "Conv1D"  # transformers' own, which need not be installed


def multiplies_by(weight, module):
    """Whether a call of the module multiplies its input by this weight."""
    if isinstance(module, NonDynamicallyQuantizableLinear):  # which nn.MultiheadAttention never calls
        return False
    return (isinstance(module, nn.Linear) or is_conv1d(module)) and module.weight is weight


class InputMoments:
    """Refreshes `optimizer`, a NewtonMuon, with the second moments of the inputs of layers in `model`.

    ValueError for a matrix of the optimizer that is not in the model, or is an embedding.
    """

    def __init__(self, model, optimizer):
        if not isinstance(optimizer, NewtonMuon):
            raise ValueError(f"InputMoments takes NewtonMuon or a subclass, not {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.mask = None
        self.refreshed = None  # the last step that was
        self.layers = {}  # {matrix: modules}
        self.names = {}
        owners = {}  # {parameter: {name: module}}
        for prefix, module in model.named_modules():
            for name, weight in module.named_parameters(prefix, recurse=False):
                owners.setdefault(weight, {})[name] = module
        for p in optimizer.preconditioned:
            weight = p.weight if isinstance(p, Transposed) else p
            if weight not in owners:
                raise ValueError(f"a matrix of shape {tuple(p.shape)} in the optimizer is not in the model: "
                                 "pass the model that it belongs to")
            self.names[p] = " = ".join(owners[weight])
            modules = list(owners[weight].values())
            if any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in modules):
                raise ValueError(f"{self.names[p]} is an embedding: train it with AdamW, say")
            if any(map(is_conv1d, modules)) != isinstance(p, Transposed):
                raise ValueError(f"{self.names[p]}: the optimizer takes Transposed(weight) of transformers' "
                                 "Conv1D, and any other weight as it is")
            if all(multiplies_by(weight, module) for module in modules):
                self.layers[p] = modules
        others = [name for p, name in self.names.items() if p not in self.layers]
        if others and rank() == 0:
            warnings.warn(f"no weights of linear layers, so they get Muon's steps: {', '.join(others)}",
                          stacklevel=2)

    @contextlib.contextmanager
    def collecting(self, step):
        """Around all forward and backward passes of step `step`, from 0. If the optimizer refreshes in this
        step, it does so at the end of the block. RuntimeError if a layer's inputs are missing."""
        due = (step + 1) % self.optimizer.defaults["refresh_interval"] == 0
        if due and step == self.refreshed:
            raise RuntimeError(f"step {step} has been refreshed: put all its micro-batches into one block")
        sums = {}
        tokens = Counter()
        with contextlib.ExitStack() as stack:
            if due:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                for p, modules in self.layers.items():
                    n = min(p.shape)
                    sums[p] = torch.zeros(p.size(1) // n, n, n, device=p.device)
                    hook = functools.partial(self.add, p, sums[p], tokens)
                    for module in modules:
                        stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        if due:
            self.refresh(sums, tokens, step)
        self.mask = None

    @torch.no_grad()  # checkpointing counts what is saved for the backward pass
    def add(self, p, total, tokens, module, args, kwargs):
        """Adds z z^T of the inputs z of this call to `total`, and their number to tokens[p]."""
        if torch._C._current_graph_task_id() != -1:  # a backward pass: activation checkpointing calls again
            return
        z, = args or kwargs.values()
        if self.mask is not None:
            if z.shape[:-1] not in (self.mask.shape, self.mask.flatten().shape):
                raise ValueError(f"{self.names[p]} has inputs of shape {tuple(z.shape)}, moments.mask is of "
                                 f"shape {tuple(self.mask.shape)}: set another mask, or give it to Muon")
            z = z.reshape(-1, z.size(-1))[self.mask.flatten().bool()]
        total += gram(z, total.size(-1))
        tokens[p] += z.numel() // z.size(-1)

    def refresh(self, sums, tokens, step):
        N = torch.tensor([tokens[p] for p in sums], device=self.optimizer.failures.device)
        if world_size() > 1:
            dist.all_reduce(N)
        N = {p: n for p, n in zip(sums, N.tolist()) if n}
        missing = [self.names[p] for p in sums if p not in N and (p.grad is not None or not N)]
        if missing:
            raise RuntimeError(f"step {step} saw no inputs of {', '.join(missing)}: do its forward passes in "
                               "the block, and give Muon what is used without a call of its layer")
        self.optimizer.preconditioned = list(N)
        self.optimizer.refresh([sums[p] / n for p, n in N.items()], 1)
        self.refreshed = step
