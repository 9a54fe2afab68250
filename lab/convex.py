"""Can Muon fail on a convex function, and does error feedback mend that?

    f(W) = c |W_11 + W_22| + |W_11 - W_22|,  0 < c < 1,  W (2, 2) diagonal, min f = 0.

Its subgradient diag(c s_1 + s_2, c s_1 - s_2), with s_1, s_2 the signs of W_11 + W_22 and W_11 - W_22, has
msgn s_2 diag(1, -1). So Muon never changes W_11 + W_22, whatever the rates, and f stays above c |W_11 +
W_22|. With momentum m the same holds for c = (1 - m) / (2 (1 + m)), rates 1 / t and W = diag(1 + ln 2, 1 -
ln 2) at first. Error feedback adds what a step left out to the next (optimizers/ef_muon.py).

Chosen here: without momentum c = 1/2, W = diag(0.75, 0.5) at first, rates t^-0.51, 1 / t and 0.01; error
feedback's rate t^-0.5; 3000 steps. At a kink s = 1, the sign of one of the subgradients: that keeps the
above exact. With s = 0 rounding matters, see the table. Then the trainer's Muon, whose Newton-Schulz factor
is not exact. What error feedback costs: 100 steps of the CPU configuration with batches of 8, five
Newton-Schulz steps for both, the best of 4 rates with seed 100, then seeds 0 to 2; mean training loss of
the last 10 steps.
"""
import math

import numpy as np
import torch

from lab import interval, judge, legend_below, look, new_figure, thinned
from lab.training import cpu_config, new_model, open_shards, training_steps
from optimizers.ef_muon import EFMuon
from optimizers.polar_muon import msgn
from train_gpt2 import Muon

SOURCE = ('"Muon Does Not Converge on Convex Lipschitz Functions", '
          "[arXiv:2605.08980](https://arxiv.org/abs/2605.08980)")
STILL = dict(c=0.5, start=(0.75, 0.5), momentum=0)
MOVING = dict(c=0.1 / 3.8, start=(1 + math.log(2), 1 - math.log(2)), momentum=0.9)
CONSERVED = ("exact, rate t^-0.51", "exact, rate 1 / t", "exact, rate 0.01", "exact, momentum")
NOT_IN_THE_PAPER = ("exact, s(0) = 0", "Newton-Schulz", "Newton-Schulz, momentum")
FEEDBACK = ("error feedback", "error feedback, momentum")
COSTS = {"Muon": ("muon", (0.002, 0.004, 0.008, 0.016)),
         "error feedback": ("optimizers.ef_muon:EFMuon", (0.25, 1.0, 4.0, 16.0))}


class ExactMuon(torch.optim.SGD):
    """Momentum without Nesterov, then msgn by SVD."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for W in group["params"]:
                M = self.state[W].setdefault("M", torch.zeros_like(W))
                M.mul_(group["momentum"]).add_(W.grad)
                W.sub_(msgn(M), alpha=group["lr"])


def sign(x, kink):
    """Of x, with `kink` for that of 0."""
    if x == 0:
        return kink
    return 1 if x > 0 else -1


def descend(optimizer, problem, rate, steps, kink=1, **options):
    """Diagonals of W (steps + 1, 2) and the values of f there.

    The rate is rate(t) at step t = 1, 2, ...; kink is s(0).
    """
    c = problem["c"]
    W = torch.diag(torch.tensor(problem["start"], dtype=torch.float64)).requires_grad_()
    optimizer = optimizer([W], lr=1.0, momentum=problem["momentum"], **options)
    path = [W.detach().diagonal().clone()]
    for t in range(1, steps + 1):
        a, b = path[-1].tolist()
        s_1 = sign(a + b, kink)
        s_2 = sign(a - b, kink)
        W.grad = torch.diag(torch.tensor([c * s_1 + s_2, c * s_1 - s_2], dtype=torch.float64))
        optimizer.param_groups[0]["lr"] = rate(t)
        optimizer.step()
        path.append(W.detach().diagonal().clone())
    path = torch.stack(path)
    return path, c * path.sum(-1).abs() + path.diff(dim=-1)[:, 0].abs()


def descents(steps):
    """{name: (path, values of f)}."""
    root = 2 ** 0.5  # the trainer's Muon multiplies its rate by it here
    return {
        "exact, rate t^-0.51": descend(ExactMuon, STILL, lambda t: t ** -0.51, steps),
        "exact, rate 1 / t": descend(ExactMuon, STILL, lambda t: 1 / t, steps),
        "exact, rate 0.01": descend(ExactMuon, STILL, lambda t: 0.01, steps),
        "exact, momentum": descend(ExactMuon, MOVING, lambda t: 1 / t, steps),
        "exact, s(0) = 0": descend(ExactMuon, STILL, lambda t: t ** -0.51, steps, kink=0),
        "Newton-Schulz": descend(Muon, STILL, lambda t: t ** -0.51 / root, steps, nesterov=False),
        "Newton-Schulz, momentum": descend(Muon, MOVING, lambda t: 1 / t / root, steps, nesterov=False),
        "error feedback": descend(EFMuon, STILL, lambda t: t ** -0.5, steps, exact=True),
        "error feedback, momentum": descend(EFMuon, MOVING, lambda t: t ** -0.5, steps, exact=True)}


def described(path, f, window):
    """What rows and figure need of a descent."""
    means = f.unfold(0, window, 1).mean(-1)
    places, curve = thinned(means)
    return dict(start=f[0].item(), end=means[-1].item(), smallest=f.min().item(), largest=f.max().item(),
                drift=(path.sum(-1) - path[0].sum()).abs().max().item(),
                steps=[place + window - 1 for place in places], curve=curve, path=path[:200].tolist())


def losses(seed, **fields):
    """Training losses (100,) on the CPU configuration."""
    config = cpu_config(num_iterations=100, batch_size=8, seed=seed, data_seed=seed, **fields)
    return list(training_steps(config, *new_model(config), open_shards(config)))


def final_loss(losses):
    """Mean over the last ten steps; a diverged run counts as 99."""
    mean = np.mean(np.asarray(losses)[..., -10:], axis=-1)
    return np.nan_to_num(mean, nan=99)


def measure_cost(seed):
    """{name: rate, losses (3 seeds, 100 steps)} on the CPU configuration."""
    found = {}
    for name, (optimizer, rates) in COSTS.items():
        tried = {}
        for rate in rates:
            tried[rate] = final_loss(losses(100 + seed, optimizer=optimizer, hidden_learning_rate=rate))
        best = min(tried, key=tried.get)
        curves = [losses(seed + i, optimizer=optimizer, hidden_learning_rate=best) for i in range(3)]
        found[name] = dict(rate=best, losses=curves)
    return found


def measure(size="full", seed=0):
    steps = 3000 if size == "full" else 1000
    window = steps // 30
    runs = {name: described(path, f, window) for name, (path, f) in descents(steps).items()}
    cost = measure_cost(seed) if size == "full" else None
    return dict(window=window, runs=runs, cost=cost)


def problem_of(name):
    return MOVING if "momentum" in name else STILL


def least_f(problem):
    """c |W_11 + W_22|, which exact Muon does not change."""
    return problem["c"] * sum(problem["start"])


def cost_found(cost):
    """(mean, half-width of its 95 % interval, both as text) of what error feedback adds to Muon's loss."""
    final = {name: np.mean(np.array(arm["losses"])[:, -10:], axis=1) for name, arm in cost.items()}
    mean, width = interval(final["error feedback"] - final["Muon"])
    return mean, width, f"{mean:.3f} ± {width:.3f} above Muon's {final['Muon'].mean():.3f}"


def cost_row(cost):
    mean, width, text = cost_found(cost)
    rates = f"rates {cost['error feedback']['rate']:g} and {cost['Muon']['rate']:g}"
    return ("error feedback costs loss on the CPU configuration", f"{text}; {rates}",
            judge(mean, width, low=0))


def rows(numbers):
    runs = numbers["runs"]
    found = []
    for name in CONSERVED:
        run = runs[name]
        least = least_f(problem_of(name))
        found.append((f"Muon, {name}: W_11 + W_22 is conserved, f stays above {least:.4f}",
                      f"moved by {run['drift']:.0e}, f from {run['start']:.3f} to {run['end']:.4f}",
                      run["drift"] < 1e-9 and run["smallest"] > least - 1e-9))
    for name in NOT_IN_THE_PAPER:
        run = runs[name]
        found.append((f"Muon, {name}: not in the paper",
                      f"f from {run['start']:.3f} to {run['end']:.4f} (largest {run['largest']:.1f})", None))
    for name in FEEDBACK:
        run = runs[name]
        found.append((f"{name}: f comes within a tenth of its start",
                      f"f from {run['start']:.3f} to {run['end']:.4f}", run["end"] < run["start"] / 10))
    if numbers["cost"]:
        found.append(cost_row(numbers["cost"]))
    return found


def summary(numbers):
    end = {name: run["end"] for name, run in numbers["runs"].items()}
    text = (f"Exact Muon never moves W_11 + W_22 and stops at f = {end['exact, rate t^-0.51']:.3f} (0.625 "
            f"predicted), error feedback gets to {end['error feedback']:.3f}; the trainer's inexact factor "
            f"moves the sum, but the wrong way, to f = {end['Newton-Schulz']:.1f} without momentum, and "
            f"with it ends at {end['Newton-Schulz, momentum']:.3f}.")
    if numbers["cost"]:
        text += (" On the CPU configuration the loss with error feedback is "
                 f"{cost_found(numbers['cost'])[2]} after 100 steps.")
    return text


LOOKS = {"exact, rate t^-0.51": look("muon", marker=""),
         "exact, rate 1 / t": look("muon", marker="", linestyle=":"),
         "exact, rate 0.01": look("muon", marker="", linestyle="-."),
         "exact, momentum": look("muon", marker="", linestyle="--"),
         "exact, s(0) = 0": look("muon", marker="", linewidth=3, alpha=0.4),
         "Newton-Schulz": look("muon", markerfacecolor="white", markevery=15),
         "Newton-Schulz, momentum": look("muon", markerfacecolor="white", markevery=15, linestyle="--"),
         "error feedback": look("error feedback", marker="", linestyle="-"),
         "error feedback, momentum": look("error feedback", marker="", linestyle="--")}


def draw_plane(axes, runs):
    x, y = np.meshgrid(np.linspace(-0.6, 1.4, 80), np.linspace(-0.8, 1.4, 80))
    f = STILL["c"] * np.abs(x + y) + np.abs(x - y)
    axes.contour(x, y, f, levels=12, colors="lightgray", linewidths=0.7)
    axes.axline(STILL["start"], slope=-1, color="gray", linestyle=":", linewidth=3, alpha=0.5,
                label="predicted for Muon")
    for name, label, optimizer in (("exact, rate t^-0.51", "Muon, exact", "muon"),
                                   ("error feedback", "error feedback", "error feedback")):
        style = look(optimizer, linestyle="-", markersize=3, linewidth=0.5)
        axes.plot(*np.array(runs[name]["path"]).T, label=label, **style)
    axes.plot(0, 0, "k*", markersize=10, label="minimum")
    axes.set(xlabel="$W_{11}$", ylabel="$W_{22}$", title="200 steps without momentum", xlim=(-0.6, 1.4),
             ylim=(-0.8, 1.4))


def draw_cost(axes, cost):
    for name, optimizer in (("Muon", "muon"), ("error feedback", "error feedback")):
        curves = np.array(cost[name]["losses"])
        steps = range(1, curves.shape[1] + 1)
        style = look(optimizer, linestyle="-" if name == "Muon" else "--", marker="")
        axes.plot(steps, curves.mean(0), label=f"{name}, rate {cost[name]['rate']:g}", **style)
        axes.fill_between(steps, curves.min(0), curves.max(0), alpha=0.3, color=style["color"])
    axes.set(xlabel="step", ylabel="training loss", title="CPU configuration, 3 seeds (band: range)")
    legend_below(axes)


def figure(numbers):
    runs = numbers["runs"]
    picture = new_figure(9)
    panels = picture.subplot_mosaic([["values", "values"], ["plane", "cost"]])
    values = panels["values"]
    for name, run in runs.items():
        label = name if name in FEEDBACK else f"Muon, {name}"
        values.loglog(run["steps"], run["curve"], label=label, **LOOKS[name])
    for problem in (STILL, MOVING):
        values.axhline(least_f(problem), color="gray", linewidth=5, alpha=0.3)
    values.set(xlabel="step", ylabel=f"f, mean of {numbers['window']} steps", ylim=(1e-3, 1e3),
               title="The convex function (grey: predicted least f of exact Muon)")
    legend_below(values, columns=3)
    draw_plane(panels["plane"], runs)
    legend_below(panels["plane"], columns=2)
    if numbers["cost"]:
        draw_cost(panels["cost"], numbers["cost"])
    else:
        panels["cost"].remove()
    return picture
