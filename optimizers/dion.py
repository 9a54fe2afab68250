"""Dion: orthonormal updates of low rank by a power iteration that continues from step to step (Ahn et al., arXiv:2504.05295).

    B = M + G
    P = orthonormal columns of B Q by QR                                (m, k), k = rank_fraction min(m, n), rounded, at least 1
    S = B^T P                                                           (n, k)
    M <- B - (1 - momentum) P S^T                                       what P captures decays, the rest is kept: error feedback
    Q <- S, each column scaled to norm 1                                (n, k), at first Gaussian, from `seed`
    W <- (1 - lr weight_decay) W - lr sqrt(m n / k) P Q^T

OrthDion ("Orth-Dion", arXiv:2605.16341) has orthonormal columns in Q too, so that P Q^T has singular values of 1, and drops what was
captured:

    M <- momentum (B - P S^T)
    Q <- orthonormal columns of S = Q R by QR, signs such that R has a positive diagonal; 0 where that is 0

Without those signs <B, P Q^T> = tr R would have terms of both signs. At full rank OrthDion's M is 0: it has no momentum, as its rule
has it. lr is the root-mean-square of an element's update, as in Muon, since ||P Q^T||_F = sqrt(k); the papers scale by sqrt(m / n)
instead of sqrt(m n / k). P, S and Q are in the weight's precision.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.dion:OrthDion --optimizer_args '{"rank_fraction": 0.5}'
"""
import math

import torch

from optimizers import MatrixOptimizer


class Dion(MatrixOptimizer):
    def __init__(self, params, lr=3.6e-4, momentum=0.95, rank_fraction=0.25, weight_decay=0.0, seed=0):
        if not 0 < rank_fraction <= 1:
            raise ValueError(f"rank_fraction = {rank_fraction}: must be above 0 and at most 1")
        super().__init__(params, lr=lr, momentum=momentum, rank_fraction=rank_fraction, weight_decay=weight_decay, seed=seed)

    def update(self, W, G, state, group):
        b, m, n = W.shape
        k = max(1, round(group["rank_fraction"] * min(m, n)))
        if not state:
            generator = torch.Generator(W.device).manual_seed(group["seed"])
            state["momentum_buffer"] = torch.zeros_like(W)
            state["Q"] = torch.randn(b, n, k, generator=generator, dtype=W.dtype, device=W.device)
        B = state["momentum_buffer"] + G
        P = torch.linalg.qr(B @ state["Q"])[0]
        state["momentum_buffer"], state["Q"] = self.keep(B, P, B.mT @ P, group["momentum"])
        W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(P @ state["Q"].mT, alpha=group["lr"] * math.sqrt(m * n / k))

    def keep(self, B, P, S, momentum):
        """(M, Q) of the next step."""
        return B - (1 - momentum) * P @ S.mT, torch.nn.functional.normalize(S, dim=-2)


class OrthDion(Dion):
    def keep(self, B, P, S, momentum):
        Q, R = torch.linalg.qr(S)
        return momentum * (B - P @ S.mT), Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
