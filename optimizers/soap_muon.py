"""SOAP-Muon: Muon on a momentum normalised elementwise in SOAP's eigenbasis (record 44 of modded-nanogpt's optimizer track).

    M, U as in Muon
    V =  Q_L^T U Q_R
    v <- beta2 v + (1 - beta2) V^2                                    from 0
    N =  Q_L (V / max(sqrt(v), eps sqrt(mean v))) Q_R^T
    W <- (1 - lr weight_decay) W - lr sqrt(max(m, n)) newton_schulz(N)
    L <- beta2 L + (1 - beta2) G G^T,  R <- beta2 R + (1 - beta2) G^T G,  then Q_L, Q_R as in SOAP (soap.py) with refresh_interval 1

In the first step there is no basis, and N = U. lr means what it means in Muon. This is the core of the record. Left out, because they are
tied to its length or are rules of their own: the schedules of momentum and rate, EMA-Nesterov, the trust blend of the attention's
projections, the floor of an update relative to its weights, the radial brake and the fixed norm of the weights, and its 12 Newton-Schulz
steps with other coefficients. Rescaling N to the norm of U would change nothing here, because newton_schulz divides by the norm. The floor
under sqrt(v) is 1e-8 in the record; here it is relative, so that the gradients' scale cancels as in Muon.
In fp32 the order of nearly equal eigenvalues is up to rounding: runs that differ only in device_batch_size drift apart.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.soap_muon:SOAPMuon
"""
import torch

from optimizers import average, check
from optimizers.soap import observe, rotate
from train_gpt2 import Muon, as_blocks


class SOAPMuon(Muon):
    def __init__(self, params, lr=3.6e-4, beta2=0.9, eps=1e-3, **settings):
        check(lr=lr, beta2=beta2, eps=eps, **settings)
        super().__init__(params, lr, more=dict(beta2=beta2, eps=eps), **settings)

    def orthogonalize(self, matrices, U, group):
        parts = U.split(len(as_blocks(matrices[0])))  # (blocks, m, n) of each matrix
        N = [self.normalize(as_blocks(p.grad), part, self.state[p], group) for p, part in zip(matrices, parts)]
        return super().orthogonalize(matrices, torch.cat(N), group)

    def normalize(self, G, U, state, group):
        if "left_basis" in state:
            V = rotate(U, state)
            v = average(state, "mean_squares", V.square(), group["beta2"])
            floor = (group["eps"] * v.mean((-2, -1), keepdim=True).sqrt()).clamp(min=1e-30)  # above 0 also for gradients of zeros
            U = rotate(V / v.sqrt().maximum(floor), state, back=True)
        observe(state, G, group["beta2"], ("left", "right"), refresh=True)
        return U
