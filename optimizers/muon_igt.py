"""MuonIGT: Muon with implicit gradient transport: gradients are taken at an extrapolated point
(arXiv:2605.05577, arXiv:2605.18528).

    G at Y = W + momentum / (1 - momentum) (W - V)      V is the W of the previous step; at first Y = V = W
    M <- momentum M + (1 - momentum) G
    V <- W
    W <- (1 - lr weight_decay) W - lr sqrt(max(m, n)) newton_schulz(M)

An average of old gradients lags behind W by momentum / (1 - momentum) steps. Gradients at Y undo this:
where the gradient is linear and all steps are equal, M is the gradient at W, apart from the first steps.
lr means what it means in Muon. weight_decay is not in the papers.

In train mode, which is the initial mode, the parameters hold Y; in eval mode, W. Call eval() before an
evaluation and train() before the next gradient. The state has W and V, so a run continues from a
checkpoint of either mode.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.muon_igt:MuonIGT
"""
import math

import torch

from optimizers import TwoPointOptimizer, average
from train_gpt2 import newton_schulz


class MuonIGT(TwoPointOptimizer):
    def __init__(self, params, lr=3.6e-4, momentum=0.9, ns_steps=5, weight_decay=0.0):
        super().__init__(params, lr=lr, momentum=momentum, ns_steps=ns_steps, weight_decay=weight_decay)

    def update(self, Y, G, state, group):
        M = average(state, "momentum_buffer", G, group["momentum"])
        W = state["W"] if "W" in state else Y.clone()
        D = newton_schulz(M, group["ns_steps"]) * math.sqrt(max(W.shape[-2:]))
        state["V"] = W
        state["W"] = W * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * D
        self.load(Y, state, group)

    def load(self, p, state, group):
        """p <- Y in train mode, W in eval mode."""
        W = state["W"]
        momentum = group["momentum"]
        if group["training"]:
            p.copy_(torch.add(W, W - state["V"], alpha=momentum / (1 - momentum)))
        else:
            p.copy_(W)
