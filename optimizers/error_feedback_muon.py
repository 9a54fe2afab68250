"""Muon with error feedback ("Muon Does Not Converge on Convex Lipschitz Functions", arXiv:2605.08980): keeps what a step left out.

    M <- momentum M + (1 - momentum) G
    P =  lr M + E
    D =  (||P||_* / rank P) msgn(P),  W <- W - D,  E <- P - D

lr is in units of a weight per gradient. exact: msgn by SVD; else the trainer's Newton-Schulz steps, ||P||_* as <P, msgn P>.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.error_feedback_muon:ErrorFeedbackMuon --hidden_learning_rate 4
"""
import torch

from lab import msgn
from train_gpt2 import as_blocks, newton_schulz


class ErrorFeedbackMuon(torch.optim.Optimizer):
    def __init__(self, params, lr=1.0, momentum=0.95, exact=False):
        if lr < 0 or not 0 <= momentum < 1:
            raise ValueError(f"lr = {lr}, momentum = {momentum}: must be 0 or more, momentum below 1")
        super().__init__(params, dict(lr=lr, momentum=momentum, exact=exact))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for W in group["params"]:
                if W.grad is None:
                    continue
                if not self.state[W]:
                    self.state[W].update(momentum_buffer=torch.zeros_like(W), error=torch.zeros_like(W))
                M, E = self.state[W]["momentum_buffer"], self.state[W]["error"]
                P = as_blocks(M.lerp_(W.grad, 1 - group["momentum"]) * group["lr"] + E)
                O = msgn(P) if group["exact"] else newton_schulz(P)
                rank = O.square().sum((-2, -1), keepdim=True).clamp(min=1) if group["exact"] else min(P.shape[-2:])
                D = (P * O).sum((-2, -1), keepdim=True) / rank * O
                W.sub_(D.view_as(W))
                E.copy_((P - D).view_as(W))
        return loss
