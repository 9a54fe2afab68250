"""Muon with error feedback ("Muon Does Not Converge on Convex Lipschitz Functions", arXiv:2605.08980): keeps what a step left out.

    M <- momentum M + (1 - momentum) G
    P =  lr M + E
    D =  (||P||_* / rank P) msgn(P),  W <- W - D,  E <- P - D

lr is in units of a weight per gradient. exact: msgn by SVD; else Newton-Schulz, and ||P||_* is <P, msgn P>.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.ef_muon:EFMuon --hidden_learning_rate 4
"""
import torch

from optimizers import MatrixOptimizer, average
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz


class EFMuon(MatrixOptimizer):
    def __init__(self, params, lr=1.0, momentum=0.95, exact=False):
        super().__init__(params, lr=lr, momentum=momentum, exact=exact)

    def update(self, W, G, state, group):
        P = average(state, "momentum_buffer", G, group["momentum"]) * group["lr"] + state.get("error", torch.zeros_like(W))
        O = msgn(P) if group["exact"] else newton_schulz(P)
        rank = O.square().sum((-2, -1), keepdim=True).clamp(min=1) if group["exact"] else min(P.shape[-2:])
        D = (P * O).sum((-2, -1), keepdim=True) / rank * O
        W.sub_(D)
        state["error"] = P - D
