"""TrackMuon, TrackNewtonMuon and TrackPowerNewtonMuon: Muon and its preconditioned variants as on the
speedrun's benchmark for optimizers (its track 3, models/optimizer_track.py).

    M <- momentum M + (1 - momentum) G
    U =  momentum M + (1 - momentum) G  (Nesterov), or M
    X <- U / (||U||_F + 1e-7), transposed if m > n
    ns_steps times:
        A =  X X^T
        X <- 2 X - 1.5 A X + 0.5 A A X
    W <- (1 - lr weight_decay) W - lr sqrt(max(1, m / n)) X

Five steps of Muon's iteration leave singular values between 0.68 and 1.2. Twelve of this one bring those
from 1e-3 on to 1. Computed in bf16 on GPUs that have it, as in Muon.

Rates are the benchmark's: lr is the spectral norm of the update, if m <= n. For the same update of a matrix
(m, n), Muon's lr is lr / sqrt(n), and its weight_decay is weight_decay sqrt(n). That M is an average, where
Muon adds up, makes no difference, since X forgets the norm of U.

The other two precondition G before the average, as NewtonMuon and PowerNewtonMuon do.

    python train_gpt2.py configs/cpu_track3_muon.toml
    python train_gpt2.py configs/cpu_track3_newton_muon.toml
"""
import math

import torch

from optimizers import average, check
from optimizers.power_newton_muon import PowerNewtonMuon
from train_gpt2 import Muon, NewtonMuon, as_blocks, fast_dtype


def orthogonal(U, steps=12):
    """Nearly P Q^T of the singular value decomposition U = P S Q^T of each matrix in U (..., m, n)."""
    tall = U.size(-2) > U.size(-1)
    X = U.to(fast_dtype(U.device, U.dtype))
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = -1.5 * A + 0.5 * A @ A
        X = 2 * X + B @ X
    return X.mT if tall else X


class TrackMuon(Muon):
    def __init__(self, params, lr=0.025, ns_steps=12, **settings):
        check(lr=lr, ns_steps=ns_steps, **settings)
        super().__init__(params, lr, ns_steps=ns_steps, **settings)

    def compute_updates(self, matrices, group):
        blocks = {}
        for p in matrices:
            G = self.precondition(p, p.grad)
            M = average(self.state[p], "momentum_buffer", G, group["momentum"])
            blocks[p] = as_blocks(G.lerp(M, group["momentum"]) if group["nesterov"] else M)
        for shape in {U.shape for U in blocks.values()}:  # those of one shape as one batch
            same = [p for p in matrices if blocks[p].shape == shape]
            X = orthogonal(torch.cat([blocks[p] for p in same]), group["ns_steps"])
            X = X * math.sqrt(max(1, shape[1] / shape[2]))
            torch._foreach_copy_([as_blocks(self.update[p]) for p in same], X.split(shape[0]))


class TrackNewtonMuon(NewtonMuon):
    def __init__(self, params, lr=0.025, ns_steps=12, **settings):
        check(lr=lr, ns_steps=ns_steps, **settings)
        super().__init__(params, lr, ns_steps=ns_steps, **settings)

    compute_updates = TrackMuon.compute_updates


class TrackPowerNewtonMuon(PowerNewtonMuon):
    def __init__(self, params, lr=0.025, ns_steps=12, **settings):
        super().__init__(params, lr, ns_steps=ns_steps, **settings)

    compute_updates = TrackMuon.compute_updates
