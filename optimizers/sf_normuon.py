"""SF-NorMuon: schedule-free NorMuon. Gradients are taken at a mix of its iterate and the average of all
iterates; the loss is evaluated at the average (arXiv:2605.23061).

    M <- momentum M + (1 - momentum) G                          G is the gradient at y
    O =  sqrt(max(m, n)) newton_schulz(M)
    v <- beta2 v + (1 - beta2) mean over the columns of O^2     (m,); v = 0 at first
    D =  O / (sqrt(v) + eps), scaled to the norm of O
    z <- (1 - lr weight_decay) z - lr D
    x <- (1 - c) x + c z,   c = lr^2 / (sum of lr^2 over all steps so far)
    y =  (1 - beta1) z + beta1 x

z and x start at the initial weights. The parameters hold y in train mode and x in eval mode; train() and
eval() can be called at any time. x and z are kept, and y is always computed from them, so evaluations do
not change the training by a single bit.

lr means what it means in Muon, because D has the norm of O. The paper's rate is constant after a warm-up.
Where a trainer lets lr fall at the end, the last z get less weight, by lr^2, as the equations say.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.sf_normuon:SFNorMuon \\
        --warmdown_iters 0
"""
import math

from optimizers import TwoPointOptimizer, apply_update, average
from optimizers.normuon import normalize_rows
from train_gpt2 import newton_schulz


class SFNorMuon(TwoPointOptimizer):
    def __init__(self, params, lr=2e-3, momentum=0.8, beta1=0.9, beta2=0.95, eps=1e-8, ns_steps=5,
                 weight_decay=0.0):
        super().__init__(params, lr=lr, momentum=momentum, beta1=beta1, beta2=beta2, eps=eps,
                         ns_steps=ns_steps, weight_decay=weight_decay)

    def update(self, W, G, state, group):
        if not state:
            state["z"] = W.clone()
            state["x"] = W.clone()
            state["squares_of_rates"] = 0.0
        M = average(state, "momentum_buffer", G, group["momentum"])
        O = newton_schulz(M, group["ns_steps"]).to(M.dtype) * math.sqrt(max(M.shape[-2:]))
        D = normalize_rows(O, [state], group)
        apply_update(state["z"], D, group)
        square = group["lr"] ** 2
        state["squares_of_rates"] += square
        total = state["squares_of_rates"] or 1  # 0 while every rate was 0
        state["x"].lerp_(state["z"], square / total)
        self.load(W, state, group)

    def load(self, W, state, group):
        """W <- y in train mode, x in eval mode."""
        if group["training"]:
            W.copy_(state["z"].lerp(state["x"], group["beta1"]))
        else:
            W.copy_(state["x"])
