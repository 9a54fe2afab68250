"""Shampoo: a gradient between inverse fourth roots of its second moments on both sides (Gupta, Koren, Singer, arXiv:1802.09568).

    M <- momentum M + (1 - momentum) G
    L <- beta2 L + (1 - beta2) G G^T,  R <- beta2 R + (1 - beta2) G^T G        from 0
    P_L = (A + eps (tr(A) / m) I)^(-1/4), A = L / (1 - beta2^t), or 0 for L = 0, in steps t = 1, 1 + refresh_interval, ..., and in every
    step until it is not 0; P_R from R in the same way
    W <- (1 - lr weight_decay) W - lr sqrt(max(m, n)) P_L M P_R

With momentum = beta2 = 0 the update is that of Muon, so lr means about what it means there; gradients that change from step to step make it
smaller, except in steps 2 to refresh_interval, whose P_L and P_R know one gradient: with noise alone up to 1.6 lr in square matrices and
3.9 lr where one side is 4 times the other. The paper sums where we average, adds a fixed eps I, and has no momentum; there is no grafting.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.shampoo:Shampoo
"""
import math

import torch

from optimizers import MatrixOptimizer, average


def inverse_fourth_root(A, eps):
    """(A + eps (tr(A) / n) I)^(-1/4) of each A (..., n, n), 0 if A is 0, not finite if A is not."""
    values, Q = torch.linalg.eigh(A.nan_to_num(0, 0, 0))  # eigh raises for non-finite numbers: here they reach the weights instead
    mean = A.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    roots = torch.where(mean == 0, 0, (values.clamp(min=0) + eps * mean).clamp(min=1e-30) ** -0.25)
    return Q * roots.unsqueeze(-2) @ Q.mT


class Shampoo(MatrixOptimizer):
    def __init__(self, params, lr=1e-3, momentum=0.9, beta2=0.95, eps=1e-5, weight_decay=0.0, refresh_interval=5):
        super().__init__(params, lr=lr, momentum=momentum, beta2=beta2, eps=eps, weight_decay=weight_decay,
                         refresh_interval=refresh_interval)

    def update(self, W, G, state, group):
        M = average(state, "momentum_buffer", G, group["momentum"])
        L, R = average(state, "left", G @ G.mT, group["beta2"]), average(state, "right", G.mT @ G, group["beta2"])
        t = state["step"] = state.get("step", 0) + 1
        if (t - 1) % group["refresh_interval"] == 0 or not state["started"]:
            for name, A in (("left_root", L), ("right_root", R)):
                state[name] = inverse_fourth_root(A / (1 - group["beta2"] ** t), group["eps"])
            state["started"] = bool(L.any(-1).any(-1).all())  # each block has had a gradient
        step = group["lr"] * math.sqrt(max(G.shape[-2:]))
        W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(state["left_root"] @ M @ state["right_root"], alpha=step)
