"""Shampoo: the momentum between inverse fourth roots of the gradient's second moments on both sides
(Gupta, Koren, Singer, arXiv:1802.09568).

    M <- momentum M + (1 - momentum) G
    L <- beta2 L + (1 - beta2) G G^T                L = 0 at first
    R <- beta2 R + (1 - beta2) G^T G                R = 0 at first
    P_L = (A + eps (tr(A) / m) I)^(-1/4),   A = L / (1 - beta2^t); P_R from R in the same way
    W <- (1 - lr weight_decay) W - lr sqrt(max(m, n)) P_L M P_R

P_L and P_R are computed in steps t = 1, 1 + refresh_interval, ..., and in every step until L is not 0.
For L = 0, P_L = 0.

The paper adds up where this rule averages, adds a fixed eps I, and has no momentum. There is no grafting.

With momentum = beta2 = 0 the update is Muon's with exact orthogonalization, so lr means about what it
means there. Gradients that change from step to step make the update smaller, except in steps 2 to
refresh_interval, whose P_L and P_R know a single gradient: with pure noise it is up to 1.6 lr in square
matrices, and 3.9 lr where one side is 4 times the other.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.shampoo:Shampoo
"""
import math

import torch

from optimizers import MatrixOptimizer, apply_update, average


def inverse_fourth_root(A, eps):
    """(A + eps (tr(A) / n) I)^(-1/4) of each A (..., n, n): 0 if A is 0, not finite if A is not."""
    # eigh raises for numbers that are not finite; `mean` passes them on to the weights instead
    values, Q = torch.linalg.eigh(A.nan_to_num(0, 0, 0))
    mean = A.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    roots = (values.clamp(min=0) + eps * mean).clamp(min=1e-30) ** -0.25
    roots = torch.where(mean == 0, 0, roots)
    return Q * roots.unsqueeze(-2) @ Q.mT


class Shampoo(MatrixOptimizer):
    def __init__(self, params, lr=1e-3, momentum=0.9, beta2=0.95, eps=1e-5, weight_decay=0.0,
                 refresh_interval=5):
        super().__init__(params, lr=lr, momentum=momentum, beta2=beta2, eps=eps, weight_decay=weight_decay,
                         refresh_interval=refresh_interval)

    def update(self, W, G, state, group):
        M = average(state, "momentum_buffer", G, group["momentum"])
        L = average(state, "left", G @ G.mT, group["beta2"])
        R = average(state, "right", G.mT @ G, group["beta2"])
        state["step"] = state.get("step", 0) + 1
        t = state["step"]
        if (t - 1) % group["refresh_interval"] == 0 or not state["started"]:
            correction = 1 - group["beta2"] ** t
            state["left_root"] = inverse_fourth_root(L / correction, group["eps"])
            state["right_root"] = inverse_fourth_root(R / correction, group["eps"])
            state["started"] = bool(L.any(-1).any(-1).all())  # every block has had a gradient
        D = state["left_root"] @ M @ state["right_root"]
        apply_update(W, D, group, scale=math.sqrt(max(G.shape[-2:])))
