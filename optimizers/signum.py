"""Signum: the sign of the momentum (Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD", ICML 2018).

    M <- momentum M + (1 - momentum) G              M = 0 at first
    U =  momentum M + (1 - momentum) G  (Nesterov), or M
    W <- (1 - lr weight_decay) W - lr sign(U)

nesterov, which is the default here, is not in the paper.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.signum:Signum \\
        --hidden_learning_rate 0.002
"""
from optimizers import MatrixOptimizer, apply_update, average, sign


class Signum(MatrixOptimizer):
    def __init__(self, params, lr=1e-3, momentum=0.95, nesterov=True, weight_decay=0.0):
        super().__init__(params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)

    def update(self, W, G, state, group):
        M = average(state, "momentum_buffer", G, group["momentum"])
        U = G.lerp(M, group["momentum"]) if group["nesterov"] else M
        apply_update(W, sign(U), group)
