"""EFMuon: Muon with error feedback, which adds to each step what the previous ones left out
("Muon Does Not Converge on Convex Lipschitz Functions", arXiv:2605.08980).

    M <- momentum M + (1 - momentum) G
    P =  lr M + E                               E = 0 at first
    D =  (||P||_* / rank P) msgn(P)
    W <- W - D
    E <- P - D

lr is in units of a weight per gradient. With exact, msgn is by SVD. Without it, msgn is Newton-Schulz,
and <P, msgn(P)> takes the place of ||P||_*.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.ef_muon:EFMuon \\
        --hidden_learning_rate 4
"""
import torch

from optimizers import MatrixOptimizer, average
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz


class EFMuon(MatrixOptimizer):
    def __init__(self, params, lr=1.0, momentum=0.95, exact=False):
        super().__init__(params, lr=lr, momentum=momentum, exact=exact)

    def update(self, W, G, state, group):
        M = average(state, "momentum_buffer", G, group["momentum"])
        if "error" not in state:
            state["error"] = torch.zeros_like(W)
        P = M * group["lr"] + state["error"]
        if group["exact"]:
            O = msgn(P)
            rank = O.square().sum((-2, -1), keepdim=True).clamp(min=1)
        else:
            O = newton_schulz(P)
            rank = min(P.shape[-2:])
        D = (P * O).sum((-2, -1), keepdim=True) / rank * O
        W.sub_(D)
        state["error"] = P - D
