"""Lion: sign of a momentum in which the newest gradient weighs more (Chen et al., arXiv:2302.06675).

    U =  sign(beta1 M + (1 - beta1) G)
    M <- beta2 M + (1 - beta2) G        from 0
    W <- (1 - lr weight_decay) W - lr U

lr is the step of each element and so, zeros in U apart, the root-mean-square of an update, as in Muon. The paper's is 3 to 10 times
below AdamW's.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.lion:Lion --hidden_learning_rate 0.001
"""
import torch

from optimizers import MatrixOptimizer, average, sign


class Lion(MatrixOptimizer):
    def __init__(self, params, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.0):
        super().__init__(params, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)

    def update(self, W, G, state, group):
        M = state.get("momentum_buffer", torch.zeros_like(G))
        U = sign(G.lerp(M, group["beta1"]))
        average(state, "momentum_buffer", G, group["beta2"])
        W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(U, alpha=group["lr"])
