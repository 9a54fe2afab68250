"""SOAP-Muon: Muon on a momentum that is normalized elementwise in SOAP's eigenbasis
(the core of record 44 of modded-nanogpt's optimizer track).

    M, U as in Muon
    V =  Q_L^T U Q_R
    v <- beta2 v + (1 - beta2) V^2                  v = 0 at first
    N =  Q_L (V / max(sqrt(v), eps sqrt(mean v))) Q_R^T
    W <- (1 - lr weight_decay) W - lr sqrt(max(m, n)) newton_schulz(N)
    L <- beta2 L + (1 - beta2) G G^T,   R <- beta2 R + (1 - beta2) G^T G
    Q_L and Q_R from L and R as in SOAP (soap.py), with refresh_interval 1

In the first step there is no basis yet, and N = U. lr means what it means in Muon. The floor under sqrt(v)
is relative to v, so that the scale of the gradients cancels, as in Muon; in the record it is 1e-8.

In fp32, rounding decides the order of nearly equal eigenvalues: runs that differ only in
device_batch_size drift apart.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.soap_muon:SOAPMuon
"""
import torch

from optimizers import average, check
from optimizers.soap import observe, rotate, rotate_back
from train_gpt2 import Muon, as_blocks


class SOAPMuon(Muon):
    def __init__(self, params, lr=3.6e-4, beta2=0.9, eps=1e-3, **settings):
        check(lr=lr, beta2=beta2, eps=eps, **settings)
        super().__init__(params, lr, more=dict(beta2=beta2, eps=eps), **settings)

    def orthogonalize(self, matrices, U, group):
        blocks = len(as_blocks(matrices[0]))
        normalized = []
        for p, part in zip(matrices, U.split(blocks)):  # part: (blocks, m, n) of matrix p
            normalized.append(self.normalize(as_blocks(p.grad), part, self.state[p], group))
        return super().orthogonalize(matrices, torch.cat(normalized), group)

    def normalize(self, G, U, state, group):
        """N of the equations, and the averages and bases of the next step."""
        N = U
        if "left_basis" in state:
            V = rotate(U, state)
            v = average(state, "mean_squares", V.square(), group["beta2"])
            floor = group["eps"] * v.mean((-2, -1), keepdim=True).sqrt()
            floor = floor.clamp(min=1e-30)  # above 0 for gradients of zeros, too
            N = rotate_back(V / v.sqrt().maximum(floor), state)
        observe(state, G, group["beta2"], ("left", "right"), refresh=True)
        return N
