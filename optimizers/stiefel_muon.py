"""StiefelMuon: steepest descent in the spectral norm on the Stiefel manifold
(for the geometry see iMuon, arXiv:2605.09238).

W = radius X with X^T X = I. (For m < n: X X^T = I, and everything below is transposed.) The first step
moves W to the nearest point of the manifold, X = msgn(W). radius is the root mean square of the singular
values of the initial W, ||W||_F / sqrt(min(m, n)), and stays the same.

    M <- momentum M + (1 - momentum) G
    A =  msgn(M X^T - X M^T)                        (m, m), skew
    eta = lr sqrt(max(m, n)) / radius
    W <- radius msgn(X - eta A X)
    M <- M - X (X^T M + M^T X) / 2                  the tangent part of M at the new X

where msgn(Y) is U V^T of the singular value decomposition Y = U S V^T.

Why A: of all tangents D (X^T D + D^T X = 0) with ||D||_2 <= 1, D = A X has the largest <M, D>. This closed
form is not from a paper. It is tested against the dual bound <M, D> <= ||M + X L||_* for all symmetric L.
Manifold Muon (J. Bernstein, "Modular manifolds", 2025) finds the same D by an inner loop of dual ascent.
SPEL (arXiv:2601.21487) takes msgn of the gradient's tangent part, which is not a tangent.

How it is computed: the rank of A is at most 2 n, so A X is found in an orthonormal basis of [X, M].
X - eta A X has singular values between 1 and sqrt(1 + eta^2). After division by the larger one, 5 steps
X <- (3 X - X X^T X) / 2 are exact to 1e-6 for eta up to 1.

lr is the root mean square of an element's update, as in Muon, where A has no kernel. There is no weight
decay, which would do nothing.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.stiefel_muon:StiefelMuon
"""
import math

import torch

from optimizers import MatrixOptimizer, average
from optimizers.polar_muon import msgn
from train_gpt2 import as_blocks


def descent(X, G):
    """The tangent D at X (..., m, n), X^T X = I, with ||D||_2 <= 1 and the largest <G, D>."""
    Q, _ = torch.linalg.qr(torch.cat([X, G], -1))
    QX = Q.mT @ X
    K = Q.mT @ G @ QX.mT
    return Q @ (msgn(K - K.mT) @ QX)


class StiefelMuon(MatrixOptimizer):
    def __init__(self, params, lr=3.6e-4, momentum=0.95):
        super().__init__(params, lr=lr, momentum=momentum)
        for group in self.param_groups:
            for p in group["params"]:
                blocks = as_blocks(p.detach())
                if (torch.linalg.matrix_rank(blocks) < min(blocks.shape[-2:])).any():
                    raise ValueError(f"a matrix of shape {tuple(p.shape)} does not have full rank: "
                                     "the manifold has no unique nearest point")

    def step(self, closure=None):
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # TF32 would keep the constraint only to 1e-3
        try:
            return super().step(closure)
        finally:
            torch.set_float32_matmul_precision(precision)

    def update(self, W, G, state, group):
        M = average(state, "momentum_buffer", G, group["momentum"])
        if W.size(-2) < W.size(-1):  # views: what changes them changes W and M
            W = W.mT
            M = M.mT
        m, n = W.shape[-2:]
        if "radius" not in state:
            state["radius"] = W.norm(dim=(-2, -1), keepdim=True) / math.sqrt(n)
            X = msgn(W)
        else:
            X = W / state["radius"]
        eta = group["lr"] * math.sqrt(m) / state["radius"]
        X = (X - eta * descent(X, M)) / (1 + eta ** 2).sqrt()
        for _ in range(5):
            X = 1.5 * X - 0.5 * X @ (X.mT @ X)
        W.copy_(state["radius"] * X)
        S = X.mT @ M
        M.sub_(X @ (S + S.mT), alpha=0.5)
