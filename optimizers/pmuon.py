"""PMuon: Muon between fractional powers of the momentum's covariances on both sides
(record 18 of modded-nanogpt's optimizer track).

    M, U as in Muon
    A <- beta A + (1 - beta) U U^T                  A = 0 at first
    L =  beta A + (1 - beta) U U^T
    Q <- orthogonal factor of L Q, by QR            at first the left singular vectors of U
    e =  max(diag(Q^T L Q), eps tr(L) / m)
    P_L = Q diag(e^-power) Q^T, and P_R from U^T U in the same way
    W <- (1 - lr weight_decay) W - lr sqrt(max(m, n)) newton_schulz(P_L U P_R)

lr means what it means in Muon, and power = 0 is Muon. The record's text has G G^T, but its code computes
U U^T, as here. The record starts with Q = I and adds 1e-6 I to L, which depends on the gradients' scale.
Here eps is relative to the mean eigenvalue; the scale of P_L cancels.

Nothing is added to L in the QR step. Where a matrix is not square, rounding chooses some of the
directions, so that equal runs on different machines drift apart.

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
        blocks = len(as_blocks(matrices[0]))
        products = []
        for p, part in zip(matrices, U.split(blocks)):  # part: (blocks, m, n) of matrix p
            left = self.power(part, self.state[p], "left", group)
            right = self.power(part.mT, self.state[p], "right", group)
            products.append(left @ part @ right)
        return super().orthogonalize(matrices, torch.cat(products), group)

    def power(self, U, state, side, group):
        """P_L (blocks, m, m) of U (blocks, m, n)."""
        basis = f"{side}_basis"
        C = U @ U.mT
        A = average(state, side, C, group["beta"])
        L = C.lerp(A, group["beta"])
        if basis in state:
            Q, _ = torch.linalg.qr(L @ state[basis])
        else:
            Q, _, _ = torch.linalg.svd(U)
        state[basis] = Q
        e = (Q * (L @ Q)).sum(-2)  # (blocks, m)
        e = e.maximum(group["eps"] * L.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True))
        e = e.clamp(min=1e-30)  # above 0 for gradients of zeros, too
        return Q * e.unsqueeze(-2) ** -group["power"] @ Q.mT
