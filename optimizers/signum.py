"""Signum: sign of the momentum (Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD", ICML 2018).

    M <- momentum M + (1 - momentum) G
    U =  momentum M + (1 - momentum) G  (Nesterov), or M
    W <- (1 - lr weight_decay) W - lr sign(U)

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.signum:Signum --hidden_learning_rate 0.002
"""
import torch


class Signum(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, momentum=0.95, nesterov=True, weight_decay=0.0):
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1:
            raise ValueError(f"lr = {lr}, weight_decay = {weight_decay}, momentum = {momentum}: must be 0 or more, momentum below 1")
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                M = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                U = p.grad.lerp(M, group["momentum"]) if group["nesterov"] else M
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(U.sign(), alpha=-group["lr"])
        return loss
