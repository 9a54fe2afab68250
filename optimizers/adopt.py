"""ADOPT: Adam that normalises a gradient by the squares of those before it (Taniguchi et al., arXiv:2411.02853).

    the first step only sets v = G^2, M = 0; step t = 1, 2, ... after it does
    N =  G / max(sqrt(v), eps), each element clipped to [-t^(1/4), t^(1/4)]
    M <- beta1 M + (1 - beta1) N
    W <- (1 - lr weight_decay) W - lr M
    v <- beta2 v + (1 - beta2) G^2

lr is about the step of an element, as in Adam. It converges with any beta2; the paper's 0.9999 is for more than 10,000 steps.
clip = False leaves the clipping out, as the paper's first version did: an element whose first gradient happens to be small then takes
steps of many times lr.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.adopt:ADOPT --optimizer_args '{"beta2": 0.99}'
"""
from optimizers import MatrixOptimizer, average


class ADOPT(MatrixOptimizer):
    def __init__(self, params, lr=1e-3, beta1=0.9, beta2=0.9999, eps=1e-6, clip=True, weight_decay=0.0):
        super().__init__(params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, clip=clip, weight_decay=weight_decay)

    def update(self, W, G, state, group):
        if not state:
            state.update(step=0, mean_squares=G.square())
            return
        state["step"] += 1
        N = G / state["mean_squares"].sqrt().clamp(min=group["eps"])
        if group["clip"]:
            N = N.clamp(-state["step"] ** 0.25, state["step"] ** 0.25)
        M = average(state, "momentum_buffer", N, group["beta1"])
        W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(M, alpha=group["lr"])
        average(state, "mean_squares", G.square(), group["beta2"])
