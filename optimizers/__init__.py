"""Optimizers of the hidden matrices, one file each, compared by scripts/zoo.py in records/zoo/.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.lion:Lion --hidden_learning_rate 0.002

A new rule subclasses MatrixOptimizer and defines update(). A rule that only changes what Muon orthogonalizes, or how, subclasses Muon
and overrides precondition() or orthogonalize(), and so shares the work between the processes; `more` takes its settings. Both
are torch.optim.Optimizers for any trainer whose weights are in fp32 or fp64, which torch.linalg needs; those that subclass Muon take no
closure, and neither copies nor groups that are added later.
"""
import torch

from train_gpt2 import as_blocks


def check(**settings):
    """Raises ValueError unless rates and decays are 0 or more, weights of an average below 1, counts and seeds whole numbers in range,
    switches True or False."""
    for name, value in settings.items():
        averages = name.startswith(("beta", "momentum"))
        if (averages and not 0 <= value < 1) or (name in ("lr", "weight_decay", "eps") and not 0 <= value < float("inf")):
            raise ValueError(f"{name} = {value}: must be 0 or more" + (" and below 1" if averages else ", and finite"))
        if name in ("ns_steps", "refresh_interval", "seed"):
            least = 0 if name == "seed" else 1
            if type(value) is not int or not least <= value < 2 ** 32:
                raise ValueError(f"{name} = {value}: must be a whole number, {least} or more and below 2^32")
        if name in ("nesterov", "exact", "one_sided", "constrained", "clip") and value not in (True, False):
            raise ValueError(f"{name} = {value!r}: must be true or false")


class MatrixOptimizer(torch.optim.Optimizer):
    """Calls update(W, G, state, group) for each matrix, which changes W in place: W and its gradient G are (blocks, m, n), three
    blocks for a fused q, k, v and otherwise one; `state` is a dict, empty before the first step; `group` has the settings.

    Every process computes all updates, and nothing else keeps their weights equal: they need the same kind of machine, and as many
    threads each. Raises ValueError for a setting out of range, or a parameter that is not a matrix.
    """

    def __init__(self, params, **settings):
        super().__init__(params, settings)
        check(**settings)
        if other := [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]:
            raise ValueError(f"a parameter of shape {other[0]}: {type(self).__name__} updates matrices only")

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
    """A MatrixOptimizer whose gradients are taken at other weights than its loss is evaluated at: load(W, state, group) copies the former
    into W if group["training"], else the latter, both from the state.

    train(), the initial mode, and eval() switch between them, at any time and as often as you like. The mode is saved with the state: a
    checkpoint at the end of a run has the weights of its loss, one that was saved without an evaluation those of the gradients.
    """

    def __init__(self, params, **settings):
        super().__init__(params, training=True, **settings)

    def step(self, closure=None):
        if not all(group["training"] for group in self.param_groups):
            raise RuntimeError("step() after eval(): call train() first, which loads the weights at which gradients are taken")
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
                if p in self.state:  # else there was no step, and both are the initial weights
                    self.load(as_blocks(p), self.state[p], group)


def average(state, name, value, beta):
    """state[name] <- beta state[name] + (1 - beta) value, from 0, in place. Returns it."""
    if name not in state:
        state[name] = torch.zeros_like(value)
    return state[name].lerp_(value, 1 - beta)


def sign(U):
    """Signs of the elements of U, where torch.sign would make 0 of one that is not a number, and hide it."""
    return torch.where(U.isnan(), U, U.sign())
