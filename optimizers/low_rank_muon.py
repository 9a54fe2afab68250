"""LowRankMuon: Muon that orthogonalizes the momentum within the range of a random sketch ("Low-rank Orthogonalization", arXiv:2509.11983).

    M, U as in Muon
    k = rank_fraction min(m, n), rounded, at least 1
    Q = orthonormal columns of U U^T U Z by QR, Z (n, k) Gaussian       (m, k)
    O = Q newton_schulz(Q^T U)
    W <- (1 - lr weight_decay) W - lr sqrt(m n / k) O

lr is the root-mean-square of an element's update at every k, as in Muon, since ||O||_F = sqrt(k). With k = min(m, n), Q Q^T U = U
and O = newton_schulz(U), whatever Q is, so the rule is Muon and draws nothing. Chosen here: one power step U U^T, where the paper allows
none or several (its code takes k columns of U instead of U Z), and a fraction of the rank, where its code has k = 200 and Muon for
matrices below 500: 0.25 is about that for GPT-2's 768. Z comes from `seed` and the number of the step, the same for all matrices.

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
        X = U / U.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(U.dtype).tiny)  # its cube neither overflows nor vanishes
        Q = torch.linalg.qr(X @ (X.mT @ (X @ Z)))[0]
        return Q @ newton_schulz(Q.mT @ U, group["ns_steps"]).to(Q.dtype) * math.sqrt(m * n / k)
