"""LowRankMuon: Muon that orthogonalizes the momentum within the range of a random sketch
("Low-rank Orthogonalization", arXiv:2509.11983).

    M, U as in Muon
    k = rank_fraction min(m, n), rounded, at least 1
    Q = orthonormal columns of U U^T U Z, by QR                 (m, k); Z (n, k) is Gaussian
    O = Q newton_schulz(Q^T U)
    W <- (1 - lr weight_decay) W - lr sqrt(m n / k) O

lr is the root mean square of an element's update for every k, as in Muon, because ||O||_F = sqrt(k).
With k = min(m, n), the rule is Muon and draws no numbers: Q Q^T U = U whatever Q is. Z is a function of
`seed` and the step, and is the same for all matrices.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.low_rank_muon:LowRankMuon
"""
import math

import torch

from optimizers import check
from train_gpt2 import Muon, newton_schulz


class LowRankMuon(Muon):
    def __init__(self, params, lr=3.6e-4, rank_fraction=0.25, seed=0, **settings):
        if not 0 < rank_fraction <= 1:
            raise ValueError(f"rank_fraction = {rank_fraction}: must be above 0 and at most 1")
        check(lr=lr, seed=seed, **settings)
        super().__init__(params, lr, more=dict(rank_fraction=rank_fraction, seed=seed, steps=0), **settings)

    def step(self):
        for group in self.param_groups:
            group["steps"] += 1
        super().step()

    def orthogonalize(self, matrices, U, group):
        m, n = U.shape[-2:]
        k = max(1, round(group["rank_fraction"] * min(m, n)))
        if k == min(m, n):
            return super().orthogonalize(matrices, U, group)
        generator = torch.Generator(U.device).manual_seed(10 ** 6 * group["seed"] + group["steps"])
        Z = torch.randn(n, k, generator=generator, dtype=U.dtype, device=U.device)
        largest = U.abs().amax((-2, -1), keepdim=True)
        X = U / largest.clamp(min=torch.finfo(U.dtype).tiny)  # so that its cube stays in range
        Q, _ = torch.linalg.qr(X @ (X.mT @ (X @ Z)))
        O = Q @ newton_schulz(Q.mT @ U, group["ns_steps"]).to(Q.dtype)
        return O * math.sqrt(m * n / k)
