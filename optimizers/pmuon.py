"""PMuon: Muon between fractional powers of the momentum's covariances on both sides (record 18 of modded-nanogpt's optimizer track).

    M, U as in Muon
    A <- beta A + (1 - beta) U U^T                                    from 0
    L =  beta A + (1 - beta) U U^T
    Q <- orthogonal factor of the QR decomposition of L Q             at first the left singular vectors of U
    e =  max(diag(Q^T L Q), eps tr(L) / m)
    P_L = Q diag(e^-power) Q^T, and P_R from U^T U in the same way
    W <- (1 - lr weight_decay) W - lr sqrt(max(m, n)) newton_schulz(P_L U P_R)

lr means what it means in Muon; power = 0 is Muon. The record's text has G G^T, but its code computes U U^T, as here. It starts with Q = I
and adds 1e-6 I to L, which depends on the gradients' scale: hence eps relative to the mean eigenvalue. The scale of P_L cancels.
In the QR step nothing is added to L: where a matrix is not square, rounding chooses some directions, so runs drift apart.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.pmuon:PMuon
"""
import torch

from optimizers import average, check
from train_gpt2 import Muon, as_blocks


class PMuon(Muon):
    def __init__(self, params, lr=3.6e-4, beta=0.95, power=0.3, eps=1e-6, **settings):
        check(lr=lr, beta=beta, eps=eps, **settings)
        if not 0 <= power <= 0.5:
            raise ValueError(f"power = {power}: must be 0 or more, and at most 0.5")
        super().__init__(params, lr, more=dict(beta=beta, power=power, eps=eps), **settings)

    def orthogonalize(self, matrices, U, group):
        parts = U.split(len(as_blocks(matrices[0])))  # (blocks, m, n) of each matrix
        PU = torch.cat([self.power(part, self.state[p], "left", group) @ part for p, part in zip(matrices, parts)])
        PUP = [y @ self.power(part.mT, self.state[p], "right", group) for p, part, y in zip(matrices, parts, PU.split(len(parts[0])))]
        return super().orthogonalize(matrices, torch.cat(PUP), group)

    def power(self, U, state, side, group):
        """P_L of U (blocks, m, n)."""
        C, basis = U @ U.mT, f"{side}_basis"
        L = C.lerp(average(state, side, C, group["beta"]), group["beta"])
        Q = state[basis] = torch.linalg.qr(L @ state[basis])[0] if basis in state else torch.linalg.svd(U)[0]
        e = (Q * (L @ Q)).sum(-2).maximum(group["eps"] * L.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True))
        e = e.clamp(min=1e-30)  # above 0 also for gradients of zeros
        return Q * e.unsqueeze(-2) ** -group["power"] @ Q.mT
