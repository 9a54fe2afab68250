"""Optimizers of the hidden matrices, one file each. scripts/zoo.py compares them in records/zoo/.
input_moments.py is for Newton-Muon in a model of your own.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.lion:Lion \\
        --hidden_learning_rate 0.002

There are two ways to write a new one:
- A rule of its own subclasses MatrixOptimizer and defines update().
- A rule that only changes what Muon orthogonalizes, or how, subclasses train_gpt2.Muon and overrides
  precondition() or orthogonalize(). It then shares the work between processes as Muon does. Its own
  settings go into Muon's argument `more`.

Both kinds are torch.optim.Optimizers that work in any trainer with fp32 or fp64 weights. (torch.linalg
needs one of these types.) Subclasses of Muon take no closure, cannot be copied, and allow no
parameter groups to be added later.
"""
import math

import torch

from train_gpt2 import as_blocks

AVERAGES = ("beta", "momentum")  # prefixes of names: weights of an average
RATES = ("lr", "weight_decay", "eps")
WHOLE_NUMBERS = {"ns_steps": 1, "refresh_interval": 1, "seed": 0}  # and the least value of each
SWITCHES = ("nesterov", "exact", "one_sided", "constrained", "clip")


def check(**settings):
    """Raises ValueError for a setting out of range. What a setting may be depends on its name:

    beta..., momentum...              at least 0 and below 1
    lr, weight_decay, eps             0 or more, and finite
    ns_steps, refresh_interval, seed  an int in range
    nesterov, exact, ...              True or False
    """
    for name, value in settings.items():
        if name.startswith(AVERAGES) and not 0 <= value < 1:
            raise ValueError(f"{name} = {value}: must be 0 or more and below 1")
        if name in RATES and not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value}: must be 0 or more, and finite")
        if name in WHOLE_NUMBERS:
            least = WHOLE_NUMBERS[name]
            if type(value) is not int or not least <= value < 2 ** 32:
                raise ValueError(f"{name} = {value}: must be a whole number, {least} or more and below 2^32")
        if name in SWITCHES and value not in (True, False):
            raise ValueError(f"{name} = {value!r}: must be true or false")


class MatrixOptimizer(torch.optim.Optimizer):
    """An optimizer that updates one matrix at a time. A subclass defines

        update(W, G, state, group)

    which changes the weights W in place. W and its gradient G are (blocks, m, n): three blocks for a
    fused q, k, v, otherwise one. `state` is a dict that belongs to the matrix, empty before the first
    step. `group` holds the settings.

    Every process computes every update. Nothing else keeps the weights of the processes equal, so all
    of them need the same kind of machine and the same number of threads.

    Raises ValueError for a setting out of range, or a parameter that is not a matrix.
    """

    def __init__(self, params, **settings):
        super().__init__(params, settings)
        for group in self.param_groups:
            check(**{name: group[name] for name in settings})
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"a parameter of shape {tuple(p.shape)}: {type(self).__name__} "
                                     "updates matrices only")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(as_blocks(p), as_blocks(p.grad), self.state[p], group)
        return loss


class TwoPointOptimizer(MatrixOptimizer):
    """A MatrixOptimizer with two sets of weights: one where gradients are taken, one where the loss is
    evaluated. A subclass also defines

        load(W, state, group)

    which computes either set from the state, copies it into W, and picks the first set if
    group["training"] is True.

    train() and eval() switch between the sets. They can be called at any time and any number of times;
    the optimizer starts in train mode. The mode is saved with the state. So a checkpoint at the end of a
    run has the weights that were evaluated; one saved without an evaluation has those of the gradients.
    """

    def __init__(self, params, **settings):
        super().__init__(params, training=True, **settings)

    def step(self, closure=None):
        if not all(group["training"] for group in self.param_groups):
            raise RuntimeError("step() after eval(): call train() first, which loads the weights "
                               "at which gradients are taken")
        return super().step(closure)

    def train(self):
        self.switch(True)

    def eval(self):
        self.switch(False)

    @torch.no_grad()
    def switch(self, training):
        for group in self.param_groups:
            group["training"] = training
            for p in group["params"]:
                if p in self.state:  # without a step, both sets are the initial weights
                    self.load(as_blocks(p), self.state[p], group)


def average(state, name, value, beta):
    """state[name] <- beta state[name] + (1 - beta) value, in place, starting from 0. Returns it."""
    if name not in state:
        state[name] = torch.zeros_like(value)
    return state[name].lerp_(value, 1 - beta)


def apply_update(W, D, group, scale=1.0):
    """W <- (1 - lr weight_decay) W - lr scale D, in place."""
    W.mul_(1 - group["lr"] * group["weight_decay"])
    W.sub_(D, alpha=group["lr"] * scale)


def sign(U):
    """The sign of each element of U. NaN stays NaN, where torch.sign would turn it into 0 and hide it."""
    return torch.where(U.isnan(), U, U.sign())
