"""Dion: orthonormal updates of low rank, by a power iteration that continues from step to step
(Ahn et al., arXiv:2504.05295).

    B = M + G                                                   (m, n)
    P = orthonormal columns of B Q, by QR                       (m, k)
    S = B^T P                                                   (n, k)
    M <- B - (1 - momentum) P S^T
    Q <- S, each column scaled to norm 1                        (n, k), at first Gaussian, from `seed`
    W <- (1 - lr weight_decay) W - lr sqrt(m n / k) P Q^T

with k = rank_fraction min(m, n), rounded, at least 1. The part of M that P captures decays; M keeps the
rest in full (error feedback).

OrthDion ("Orth-Dion", arXiv:2605.16341) also makes the columns of Q orthonormal, so that all singular
values of P Q^T are 1, and M keeps only what was not captured:

    M <- momentum (B - P S^T)
    Q <- orthonormal columns of S = Q R by QR, with signs such that the diagonal of R is positive
         (a column whose diagonal element of R is 0 becomes 0)

Without those signs <B, P Q^T> = tr R would have terms of both signs. At full rank M is 0, and OrthDion
has no momentum; the paper's rule has none either.

lr is the root mean square of an element's update, as in Muon, because ||P Q^T||_F = sqrt(k). The papers
scale by sqrt(m / n) instead of sqrt(m n / k). P, S and Q have the weight's precision.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.dion:OrthDion \\
        --optimizer_args '{"rank_fraction": 0.5}'
"""
import math

import torch

from optimizers import MatrixOptimizer, apply_update


class Dion(MatrixOptimizer):
    def __init__(self, params, lr=3.6e-4, momentum=0.95, rank_fraction=0.25, weight_decay=0.0, seed=0):
        if not 0 < rank_fraction <= 1:
            raise ValueError(f"rank_fraction = {rank_fraction}: must be above 0 and at most 1")
        super().__init__(params, lr=lr, momentum=momentum, rank_fraction=rank_fraction,
                         weight_decay=weight_decay, seed=seed)

    def update(self, W, G, state, group):
        blocks, m, n = W.shape
        k = max(1, round(group["rank_fraction"] * min(m, n)))
        if not state:
            generator = torch.Generator(W.device).manual_seed(group["seed"])
            state["momentum_buffer"] = torch.zeros_like(W)
            state["Q"] = torch.randn(blocks, n, k, generator=generator, dtype=W.dtype, device=W.device)
        B = state["momentum_buffer"] + G
        P, _ = torch.linalg.qr(B @ state["Q"])
        S = B.mT @ P
        state["momentum_buffer"] = self.next_momentum(B, P, S, group["momentum"])
        state["Q"] = self.next_basis(S)
        apply_update(W, P @ state["Q"].mT, group, scale=math.sqrt(m * n / k))

    def next_momentum(self, B, P, S, momentum):
        return B - (1 - momentum) * P @ S.mT

    def next_basis(self, S):
        return torch.nn.functional.normalize(S, dim=-2)


class OrthDion(Dion):
    def next_momentum(self, B, P, S, momentum):
        return momentum * (B - P @ S.mT)

    def next_basis(self, S):
        Q, R = torch.linalg.qr(S)
        signs = R.diagonal(dim1=-2, dim2=-1).sign()  # (blocks, k)
        return Q * signs.unsqueeze(-2)
