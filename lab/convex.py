"""Can Muon fail on a convex function, and does error feedback mend that?

    f(W) = c |W_11 + W_22| + |W_11 - W_22|,  0 < c < 1,  W (2, 2) diagonal, min f = 0.

Its subgradient diag(c s_1 + s_2, c s_1 - s_2), with s_1, s_2 the signs of W_11 + W_22 and W_11 - W_22, has msgn s_2 diag(1, -1): Muon never
changes W_11 + W_22, whatever the rates, so that f stays above c |W_11 + W_22|. With momentum m the same holds for c = (1 - m) / (2 (1 + m)), rates
1 / t and W = diag(1 + ln 2, 1 - ln 2) at first. Error feedback keeps what a step left out:

    P = rate M + E,   D = (||P||_* / rank P) msgn(P),   W <- W - D,   E <- P - D,   M the moving average of the gradients.

At a kink s = 1 is one of the subgradients' signs, and used here: it keeps the above exact. With s = 0 rounding matters, see the table.
Chosen here: without momentum c = 1/2, W = diag(0.75, 0.5) at first, rates t^-0.51, 1 / t and 0.01; error feedback's rate t^-0.5; 3000 steps. Then the
trainer's Muon, whose Newton-Schulz factor is not exact. What error feedback costs: 100 steps of the CPU configuration with batches of 8, five
Newton-Schulz steps for both (||P||_* by <P, msgn P>), the best of 4 rates with seed 100, then seeds 0 to 2; mean training loss of the last 10 steps.
"""
import torch
from matplotlib.figure import Figure

from lab import Result, msgn
from train_gpt2 import Muon, as_blocks, newton_schulz

SOURCE = '"Muon Does Not Converge on Convex Lipschitz Functions", [arXiv:2605.08980](https://arxiv.org/abs/2605.08980)'


class ErrorFeedbackMuon(torch.optim.Optimizer):
    """Muon with error feedback, as above; lr in units of a weight per gradient. exact: msgn by SVD instead of Newton-Schulz."""

    def __init__(self, params, lr=1.0, momentum=0.95, exact=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, exact=exact))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for W in group["params"]:
                M, E = (self.state[W].setdefault(key, torch.zeros_like(W)) for key in "ME")
                M.lerp_(W.grad, 1 - group["momentum"])
                P = as_blocks(M * group["lr"] + E)
                O = msgn(P) if group["exact"] else newton_schulz(P)
                rank = O.square().sum((-2, -1), keepdim=True).clamp(min=1e-30) if group["exact"] else min(P.shape[-2:])
                D = (P * O).sum((-2, -1), keepdim=True) / rank * O
                W.sub_(D.view_as(W))
                E.copy_((P - D).view_as(W))


class ExactMuon(torch.optim.SGD):
    """Momentum without Nesterov, then msgn by SVD."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for W in group["params"]:
                M = self.state[W].setdefault("M", torch.zeros_like(W)).mul_(group["momentum"]).add_(W.grad)
                W.sub_(msgn(M), alpha=group["lr"])


def descend(optimizer, momentum, c, start, rate, steps, kink=1, **options):
    """Diagonals of W (steps + 1, 2) and the values of f there, from diag(start), with rate(t) at step t = 1, 2, ...; kink is s(0)."""
    W = torch.diag(torch.tensor(start, dtype=torch.float64)).requires_grad_()
    optimizer, path = optimizer([W], lr=1.0, momentum=momentum, **options), [W.detach().diagonal().clone()]
    for t in range(1, steps + 1):
        a, b = path[-1].tolist()
        s = [(x > 0) - (x < 0) or kink for x in (a + b, a - b)]
        W.grad = torch.diag(torch.tensor([c * s[0] + s[1], c * s[0] - s[1]], dtype=torch.float64))
        optimizer.param_groups[0]["lr"] = rate(t)
        optimizer.step()
        path.append(W.detach().diagonal().clone())
    path = torch.stack(path)
    return path, c * path.sum(-1).abs() + path.diff(dim=-1)[:, 0].abs()


def cost(seed):
    """{name: training losses (seeds, steps)} of Muon and error feedback on the CPU configuration, each at its best rate; and those rates."""
    from lab.training import cpu_config, new_model, open_shards, training_steps

    def losses(seed, **fields):
        config = cpu_config(num_iterations=100, batch_size=8, seed=seed, data_seed=seed, **fields)
        return torch.tensor(list(training_steps(config, *new_model(config), open_shards(config))))

    curves, best = {}, {}
    for name, optimizer, rates in (("Muon", "muon", (0.002, 0.004, 0.008, 0.016)),
                                   ("error feedback", "lab.convex:ErrorFeedbackMuon", (0.25, 1.0, 4.0, 16.0))):
        final = {rate: losses(100 + seed, optimizer=optimizer, hidden_learning_rate=rate)[-10:].mean().nan_to_num(99).item() for rate in rates}
        best[name] = min(final, key=final.get)
        curves[name] = torch.stack([losses(seed + i, optimizer=optimizer, hidden_learning_rate=best[name]) for i in range(3)])
        print(name, final)
    return curves, best
