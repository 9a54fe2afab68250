"""PowerNewtonMuon: Newton-Muon with a fractional power of its preconditioner, a variant of
arXiv:2604.01472 (where the power is 1).

    P = (K + (ridge tr(K) / n + 1e-8) I)^-power,    0 <= power <= 1, by eigenvalues

The rest is Newton-Muon, lr included. Power 0 is Muon: such a matrix keeps no K and no P, and nothing is
computed for it. So the preconditioner can be limited to some matrices, by a power for each group:

    python train_gpt2.py configs/cpu_newton_muon.toml \\
        --optimizer optimizers.power_newton_muon:PowerNewtonMuon \\
        --optimizer_args '{"power": 0}' --groups '{"h.*.mlp_proj.weight": {"power": 0.5}}'
"""
import math

import torch

from optimizers import check
from train_gpt2 import NewtonMuon


class PowerNewtonMuon(NewtonMuon):
    def __init__(self, params, lr=4e-4, power=0.5, **settings):
        check(lr=lr, **settings)
        super().__init__(params, lr, **settings)
        self.defaults["power"] = power
        for group in self.param_groups:
            group.setdefault("power", power)
            if not 0 <= group["power"] <= 1:
                raise ValueError(f"power = {group['power']}: must be 0 or more and at most 1")
        self.preconditioned = [p for group in self.param_groups if group["power"] for p in group["params"]]

    def refresh_blocks(self, grams, tokens, group):
        self.power = group["power"]
        super().refresh_blocks(grams, tokens, group)

    def invert(self, A):
        """A^-self.power of each A (blocks, n, n), and whether it is right (blocks,)."""
        finite = A.isfinite().all(-1).all(-1)
        eye = torch.eye(A.size(-1), dtype=A.dtype, device=A.device)
        try:
            values, V = torch.linalg.eigh(torch.where(finite[:, None, None], A, eye))
        except torch.linalg.LinAlgError:  # eigh does not converge
            values = A.new_full(A.shape[:-1], math.nan)
            V = A
        P = V * values[:, None, :].pow(-self.power) @ V.mT  # NaN where an eigenvalue is negative
        return P, finite & P.isfinite().all(-1).all(-1)
