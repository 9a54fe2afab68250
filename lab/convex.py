"""Can Muon fail on a convex function, and does error feedback mend that?

    f(W) = c |W_11 + W_22| + |W_11 - W_22|,  0 < c < 1,  W (2, 2) diagonal, min f = 0.

Its subgradient diag(c s_1 + s_2, c s_1 - s_2), with s_1, s_2 the signs of W_11 + W_22 and W_11 - W_22, has msgn s_2 diag(1, -1):
Muon never changes W_11 + W_22, whatever the rates, so that f stays above c |W_11 + W_22|. With momentum m the same holds for
c = (1 - m) / (2 (1 + m)), rates 1 / t and W = diag(1 + ln 2, 1 - ln 2) at first. Error feedback adds what a step left out to the next
(optimizers/ef_muon.py).

Chosen here: without momentum c = 1/2, W = diag(0.75, 0.5) at first, rates t^-0.51, 1 / t and 0.01; error feedback's rate t^-0.5; 3000
steps. At a kink s = 1, the sign of one of the subgradients: that keeps the above exact. With s = 0 rounding matters, see the table.
Then the trainer's Muon, whose Newton-Schulz factor is not exact. What error feedback costs: 100 steps of the CPU configuration
with batches of 8, five Newton-Schulz steps for both, the best of 4 rates with seed 100, then seeds 0 to 2; mean training loss of the
last 10 steps.
"""
import math

import numpy as np
import torch
from matplotlib.figure import Figure

from lab import Result, judge, mean_interval
from optimizers.ef_muon import EFMuon
from optimizers.polar_muon import msgn
from train_gpt2 import Muon

SOURCE = '"Muon Does Not Converge on Convex Lipschitz Functions", [arXiv:2605.08980](https://arxiv.org/abs/2605.08980)'
STILL = dict(c=0.5, start=(0.75, 0.5), momentum=0)
MOVING = dict(c=0.1 / 3.8, start=(1 + math.log(2), 1 - math.log(2)), momentum=0.9)


class ExactMuon(torch.optim.SGD):
    """Momentum without Nesterov, then msgn by SVD."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for W in group["params"]:
                M = self.state[W].setdefault("M", torch.zeros_like(W)).mul_(group["momentum"]).add_(W.grad)
                W.sub_(msgn(M), alpha=group["lr"])


def descend(optimizer, problem, rate, steps, kink=1, **options):
    """Diagonals of W (steps + 1, 2) and the values of f there, with rate(t) at step t = 1, 2, ...; kink is s(0)."""
    c, W = problem["c"], torch.diag(torch.tensor(problem["start"], dtype=torch.float64)).requires_grad_()
    optimizer, path = optimizer([W], lr=1.0, momentum=problem["momentum"], **options), [W.detach().diagonal().clone()]
    for t in range(1, steps + 1):
        a, b = path[-1].tolist()
        s = [(x > 0) - (x < 0) or kink for x in (a + b, a - b)]
        W.grad = torch.diag(torch.tensor([c * s[0] + s[1], c * s[0] - s[1]], dtype=torch.float64))
        optimizer.param_groups[0]["lr"] = rate(t)
        optimizer.step()
        path.append(W.detach().diagonal().clone())
    path = torch.stack(path)
    return path, c * path.sum(-1).abs() + path.diff(dim=-1)[:, 0].abs()


def cost(seed, axes):
    """The row on the CPU configuration, and its sentence; draws the losses."""
    from lab.training import cpu_config, new_model, open_shards, training_steps

    def losses(seed, **fields):
        config = cpu_config(num_iterations=100, batch_size=8, seed=seed, data_seed=seed, **fields)
        return torch.tensor(list(training_steps(config, *new_model(config), open_shards(config))))

    final, best = {}, {}
    for name, optimizer, rates in (
            ("Muon", "muon", (0.002, 0.004, 0.008, 0.016)),
            ("error feedback", "optimizers.ef_muon:EFMuon", (0.25, 1.0, 4.0, 16.0))):
        tried = {rate: losses(100 + seed, optimizer=optimizer, hidden_learning_rate=rate)[-10:].mean().nan_to_num(99) for rate in rates}
        best[name] = min(tried, key=tried.get)
        curves = torch.stack([losses(seed + i, optimizer=optimizer, hidden_learning_rate=best[name]) for i in range(3)])
        final[name] = curves[:, -10:].mean(-1)
        axes.plot(range(1, 101), curves.mean(0), label=f"{name}, rate {best[name]:g}")
        axes.fill_between(range(1, 101), curves.amin(0), curves.amax(0), alpha=0.3)
    axes.set(xlabel="step", ylabel="training loss (mean and range of 3 seeds)", title="the CPU configuration, 100 steps")
    axes.legend()
    gap = (final["error feedback"] - final["Muon"]).numpy()
    found = "{:.3f} ± {:.3f} above Muon's {:.3f}".format(*mean_interval(gap), final["Muon"].mean())
    return (("error feedback costs loss on the CPU configuration",
             f"{found}; rates {best['error feedback']:g} and {best['Muon']:g}", judge(*mean_interval(gap), low=0)),
            f"On the CPU configuration the loss with error feedback is {found} after 100 steps.")


def run(size="full", seed=0):
    steps, root = (3000 if size == "full" else 1000), 2 ** 0.5  # the trainer's Muon multiplies its rate by sqrt(2) here
    runs = {
        "exact, rate t^-0.51": descend(ExactMuon, STILL, lambda t: t ** -0.51, steps),
        "exact, rate 1 / t": descend(ExactMuon, STILL, lambda t: 1 / t, steps),
        "exact, rate 0.01": descend(ExactMuon, STILL, lambda t: 0.01, steps),
        "exact, momentum": descend(ExactMuon, MOVING, lambda t: 1 / t, steps),
        "exact, s(0) = 0": descend(ExactMuon, STILL, lambda t: t ** -0.51, steps, kink=0),
        "Newton-Schulz": descend(Muon, STILL, lambda t: t ** -0.51 / root, steps, nesterov=False),
        "Newton-Schulz, momentum": descend(Muon, MOVING, lambda t: 1 / t / root, steps, nesterov=False),
        "error feedback": descend(EFMuon, STILL, lambda t: t ** -0.5, steps, exact=True),
        "error feedback, momentum": descend(EFMuon, MOVING, lambda t: t ** -0.5, steps, exact=True)}
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    plane, values, losses = figure.subplots(1, 3)
    rows, late, window = [], {}, steps // 30
    for i, (name, (path, f)) in enumerate(runs.items()):
        start, late[name] = f[0].item(), f[-window:].mean().item()
        found = f"f from {start:.3f} to {late[name]:.4f}"
        if i < 4:
            drift, bound = (path.sum(-1) - path[0].sum()).abs().max().item(), (MOVING if "momentum" in name else STILL)["c"] * path[0].sum()
            rows.append((f"Muon, {name}: W_11 + W_22 is conserved, f stays above {bound:.4f}", f"moved by {drift:.0e}, {found}",
                         drift < 1e-9 and bool(f.min() > bound - 1e-9)))
        elif i < 7:
            rows.append((f"Muon, {name}: not in the paper", f"{found} (largest {f.max():.1f})", None))
        else:
            rows.append((f"{name}: f comes within a tenth of its start", found, late[name] < start / 10))
        line = "--" if "momentum" in name else "-"
        values.loglog(range(window, len(f) + 1), f.unfold(0, window, 1).mean(-1), line, color=f"C{i}", label=name)
    for problem in (STILL, MOVING):
        values.axhline(problem["c"] * sum(problem["start"]), color="gray", linestyle=":")
    values.set(xlabel="step", ylabel=f"f, mean of the last {window} steps", title="dotted: predicted least f of Muon", ylim=(1e-3, 1e3))
    values.legend(fontsize=7, ncols=2)
    x, y = np.meshgrid(np.linspace(-0.6, 1.4, 80), np.linspace(-0.8, 1.4, 80))
    plane.contour(x, y, 0.5 * np.abs(x + y) + np.abs(x - y), levels=12, colors="lightgray", linewidths=0.7)
    plane.axline((0.75, 0.5), slope=-1, color="gray", linestyle=":", label="predicted: Muon stays on this line")
    for i, name in enumerate(("exact, rate t^-0.51", "error feedback")):
        plane.plot(*runs[name][0][:200].T, ".-", markersize=3, linewidth=0.5, color=f"C{7 * i}", label=name)
    plane.plot(0, 0, "k*", markersize=10, label="minimum")
    plane.set(xlabel="$W_{11}$", ylabel="$W_{22}$", title="200 steps without momentum, c = 1/2", xlim=(-0.6, 1.4), ylim=(-0.8, 1.4))
    plane.legend(fontsize=7)
    summary = (f"Exact Muon never moves W_11 + W_22 and stops at f = {late['exact, rate t^-0.51']:.3f} (0.625 predicted), error feedback "
               f"gets to {late['error feedback']:.3f}; the trainer's inexact factor moves the sum, but the wrong way, to "
               f"f = {late['Newton-Schulz']:.1f} without momentum, and with it ends at {late['Newton-Schulz, momentum']:.3f}.")
    if size == "full":
        row, sentence = cost(seed, losses)
        rows.append(row)
        summary += " " + sentence
    else:
        losses.remove()
    return Result(rows, figure, summary, SOURCE)
