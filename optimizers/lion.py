"""Lion: the sign of a momentum in which the newest gradient counts more (Chen et al., arXiv:2302.06675).

    U =  sign(beta1 M + (1 - beta1) G)
    M <- beta2 M + (1 - beta2) G                M = 0 at first
    W <- (1 - lr weight_decay) W - lr U

lr is the step of each element. Except where U is 0, this is also the root mean square of an update, as
in Muon. The paper's lr is 3 to 10 times smaller than AdamW's.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.lion:Lion \\
        --hidden_learning_rate 0.001
"""
import torch

from optimizers import MatrixOptimizer, apply_update, average, sign


class Lion(MatrixOptimizer):
    def __init__(self, params, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.0):
        super().__init__(params, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)

    def update(self, W, G, state, group):
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(G)
        U = sign(G.lerp(state["momentum_buffer"], group["beta1"]))
        average(state, "momentum_buffer", G, group["beta2"])
        apply_update(W, U, group)
