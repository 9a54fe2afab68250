"""NorMuon: Muon whose update has its rows normalized by their running size (arXiv:2510.05491).

    M, U as in Muon
    O =  sqrt(max(m, n)) newton_schulz(U)
    v <- beta2 v + (1 - beta2) mean over the columns of O^2     (m,); v = 0 at first
    D =  O / (sqrt(v) + eps), scaled to the norm of O
    W <- (1 - lr weight_decay) W - lr D

lr means what it means in Muon, because D has the norm of O. The three blocks of a fused q, k, v are
separate matrices here.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.normuon:NorMuon
"""
import torch

from optimizers import average, check
from train_gpt2 import Muon


def normalize_rows(O, states, group):
    """D for O (matrices x blocks, m, n). `states` has the state of each matrix, where its v is kept."""
    row_squares = O.square().mean(-1, keepdim=True)
    parts = row_squares.split(len(O) // len(states))  # (blocks, m, 1) of each matrix
    averages = [average(state, "row_squares", part, group["beta2"]) for state, part in zip(states, parts)]
    v = torch.cat(averages)
    D = O / (v.sqrt() + group["eps"]).clamp(min=1e-30)
    old_norm = O.norm(dim=(-2, -1), keepdim=True)
    new_norm = D.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    return D * (old_norm / new_norm)


class NorMuon(Muon):
    def __init__(self, params, lr=3.6e-4, beta2=0.95, eps=1e-8, **settings):
        check(lr=lr, beta2=beta2, eps=eps, **settings)
        super().__init__(params, lr, more=dict(beta2=beta2, eps=eps), **settings)

    def orthogonalize(self, matrices, U, group):
        O = super().orthogonalize(matrices, U, group)
        O = O.to(U.dtype)  # bf16 on a GPU, which is too coarse for an average
        return normalize_rows(O, [self.state[p] for p in matrices], group)
