"""ADOPT: Adam that normalizes each gradient by the squares of earlier gradients only
(Taniguchi et al., arXiv:2411.02853).

    first step: v = G^2, M = 0, and W stays as it is. Then, for t = 1, 2, ...
    N =  G / max(sqrt(v), eps), each element clipped to [-t^(1/4), t^(1/4)]
    M <- beta1 M + (1 - beta1) N
    W <- (1 - lr weight_decay) W - lr M
    v <- beta2 v + (1 - beta2) G^2

lr is about the step of an element, as in Adam. The rule converges for any beta2; the paper's 0.9999 is
meant for more than 10,000 steps. clip = False gives the paper's first version: if the first gradient of
an element happens to be small, its steps are then many times lr.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.adopt:ADOPT \\
        --optimizer_args '{"beta2": 0.99}'
"""
from optimizers import MatrixOptimizer, apply_update, average


class ADOPT(MatrixOptimizer):
    def __init__(self, params, lr=1e-3, beta1=0.9, beta2=0.9999, eps=1e-6, clip=True, weight_decay=0.0):
        super().__init__(params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, clip=clip,
                         weight_decay=weight_decay)

    def update(self, W, G, state, group):
        if not state:
            state["step"] = 0
            state["mean_squares"] = G.square()
            return
        state["step"] += 1
        N = G / state["mean_squares"].sqrt().clamp(min=group["eps"])
        if group["clip"]:
            limit = state["step"] ** 0.25
            N = N.clamp(-limit, limit)
        M = average(state, "momentum_buffer", N, group["beta1"])
        apply_update(W, M, group)
        average(state, "mean_squares", G.square(), group["beta2"])
