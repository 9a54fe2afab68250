"""PolarMuon: Muon with the Polar Express iteration, or with an exact SVD
(Amsel et al., "The Polar Express", arXiv:2505.16932).

    M, U as in Muon
    X <- U / (1.01 ||U||_F + 1e-7), transposed if m > n
    ns_steps times:
        A =  X X^T
        X <- a / s X + (b / s^3 A + c / s^5 A A) X
    W <- (1 - lr weight_decay) W - lr sqrt(max(m, n)) X

Five steps bring singular values to 0.88 to 1.12, where Newton-Schulz leaves 0.68 to 1.2; more steps bring
them closer to 1. The paper's (a, b, c) differ from step to step. Each triple is the best one for where
the earlier steps have brought singular values of 1e-3 to 1. From the eighth step on, they repeat.
s = 1.01 is a margin for rounding, in all steps but the last. Computed in bf16 on GPUs that have it, as in
Muon.

With exact, X is P Q^T of the singular value decomposition U = P S Q^T, where singular values below
rounding give 0. lr means what it means in Muon.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.polar_muon:PolarMuon
"""
import math

import torch

from optimizers import check
from train_gpt2 import Muon, fast_dtype

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def polar_express(U, steps=5):
    """Approximately P Q^T of the singular value decomposition U = P S Q^T of each matrix in U (..., m, n)."""
    tall = U.size(-2) > U.size(-1)
    X = U.to(fast_dtype(U.device)) if U.is_cuda else U
    X = X.mT if tall else X
    X = X / (1.01 * X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for i in range(steps):
        a, b, c = POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)]
        s = 1.01 if i < steps - 1 else 1.0
        A = X @ X.mT
        X = a / s * X + (b / s ** 3 * A + c / s ** 5 * A @ A) @ X
    return X.mT if tall else X


def msgn(X):
    """The matrix sign U V^T of X = U S V^T (..., m, n), exactly, by SVD.

    Singular values below rounding count as 0. The result is NaN for a matrix that is not finite.
    """
    finite = X.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    U, S, Vh = torch.linalg.svd(torch.where(finite, X, 0), full_matrices=False)
    rounding = S[..., :1] * max(X.shape[-2:]) * torch.finfo(S.dtype).eps
    kept = S > rounding
    return torch.where(finite, (U * kept.unsqueeze(-2)) @ Vh, math.nan)


class PolarMuon(Muon):
    def __init__(self, params, lr=3.6e-4, exact=False, **settings):
        check(lr=lr, exact=exact, **settings)
        super().__init__(params, lr, more=dict(exact=exact), **settings)

    def orthogonalize(self, matrices, U, group):
        X = msgn(U) if group["exact"] else polar_express(U, group["ns_steps"])
        return X * math.sqrt(max(U.shape[-2:]))
