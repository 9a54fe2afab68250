"""SF-NorMuon: schedule-free NorMuon; gradients at a mix of its iterate and their average, evaluation at the average (arXiv:2605.23061).

W is y where gradients are taken, and x where the loss is evaluated; z and x start at the initial weights.

    M <- momentum M + (1 - momentum) G                               G at y
    O =  sqrt(max(m, n)) newton_schulz(M)
    v <- beta2 v + (1 - beta2) mean over the columns of O^2          (m,), from 0
    D =  O / (sqrt(v) + eps), scaled to the norm of O
    z <- (1 - lr weight_decay) z - lr D
    x <- (1 - c) x + c z,  c = lr^2 / (sum of lr^2 over all steps so far)
    y =  (1 - beta1) z + beta1 x

lr means what it means in Muon, because the norm of D is that of O. The paper's rate is constant after a warm-up. Where a trainer lets lr
fall at the end, the last z weigh less, by lr^2 as the equations say. train() loads y and eval() loads x. Both can be called at any time,
and evaluations change nothing in the training, bit for bit, because x and z are kept and y is always computed from them.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.sf_normuon:SFNorMuon --warmdown_iters 0
"""
import math

from optimizers import TwoPointOptimizer, average
from optimizers.normuon import normalize_rows
from train_gpt2 import newton_schulz


class SFNorMuon(TwoPointOptimizer):
    def __init__(self, params, lr=2e-3, momentum=0.8, beta1=0.9, beta2=0.95, eps=1e-8, ns_steps=5, weight_decay=0.0):
        super().__init__(params, lr=lr, momentum=momentum, beta1=beta1, beta2=beta2, eps=eps, ns_steps=ns_steps, weight_decay=weight_decay)

    def update(self, W, G, state, group):
        if not state:
            state.update(z=W.clone(), x=W.clone(), squares_of_rates=0.0)
        M = average(state, "momentum_buffer", G, group["momentum"])
        O = newton_schulz(M, group["ns_steps"]).to(M.dtype) * math.sqrt(max(M.shape[-2:]))
        D = normalize_rows(O, [state], group)
        state["z"].mul_(1 - group["lr"] * group["weight_decay"]).sub_(D, alpha=group["lr"])
        state["squares_of_rates"] += group["lr"] ** 2
        state["x"].lerp_(state["z"], group["lr"] ** 2 / (state["squares_of_rates"] or 1))
        self.load(W, state, group)

    def load(self, W, state, group):
        W.copy_(state["z"].lerp(state["x"], group["beta1"]) if group["training"] else state["x"])
