"""Does Muon move along flatter directions than Adam?"""
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab import Result
from lab.training import SMALL, cpu_config, new_model, open_shards, training_steps
from optimizers.polar_muon import msgn
from train_gpt2 import Muon

SIGN = "sign (Adam's first step)"
RATES = {"Adam": ("adamw", (0.005, 0.01, 0.02)), "Muon": ("muon", (0.0025, 0.005, 0.01))}  # of the hidden matrices of the small GPT


def directional_sharpness(u, Hu):
    return float((u * Hu).sum() / u.square().sum())


def curvature(h, rotated, generator):
    """Matrix with the eigenvalues h and eigenvectors that are random, or the axes."""
    Q = torch.linalg.qr(torch.randn(len(h), len(h), generator=generator))[0] if rotated else torch.eye(len(h))
    return Q * h @ Q.T


def first_directions(H, W):
    """Directional sharpness of the direction of each rule at W, for f(W) = tr(W^T H W) / 2."""
    G = H @ W
    return {rule: directional_sharpness(u, H @ u) for rule, u in (("gradient descent", G), (SIGN, G.sign()), ("msgn", msgn(G)))}


def quadratic_run(rule, rate, H, start, steps):
    """(loss after `steps` steps with a rate that falls to 0, mean directional sharpness of the steps)."""
    W = torch.nn.Parameter(start.clone())
    optimizer = Muon([W], lr=rate) if rule == "Muon" else torch.optim.AdamW([W], lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    found = []
    for step in range(steps):
        W.grad, before = H @ W.detach(), W.detach().clone()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
        u = W.detach() - before
        found.append(directional_sharpness(u, H @ u))
    return float((W * (H @ W)).detach().sum() / 2), np.mean(found)


def gpt_run(optimizer, rate, seed, steps, every):
    """(loss, directional sharpness, |u|, first-order fall -<g, u>) of the hidden matrices' update u in every `every`-th step, on its own batch."""
    config = cpu_config(**SMALL, seed=seed, data_seed=seed + 1, num_iterations=steps + 1, warmdown_iters=0, optimizer=optimizer,
                        hidden_learning_rate=rate)
    (model, optimizers), shards, points = new_model(config), open_shards(config), []
    everything, matrices = list(model.parameters()), list(model.hidden_matrices().values())
    for step, loss in enumerate(training_steps(config, model, optimizers, shards)):
        if step and step % every == 0:  # the update of the step before is known now: back to where it began
            after = [p.detach().clone() for p in everything]
            u = [p.detach() - b for p, b in zip(matrices, before_hidden)]
            with torch.no_grad():
                torch._foreach_copy_(everything, before)
            with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
                gradient = torch.autograd.grad(model(*batch)[0], matrices, create_graph=True)
                slope = sum((g * v).sum() for g, v in zip(gradient, u))
                Hu = torch.autograd.grad(slope, matrices)
            with torch.no_grad():
                torch._foreach_copy_(everything, after)
            u, Hu = (torch.cat([t.flatten() for t in ts]) for ts in (u, Hu))
            points.append((last_loss, directional_sharpness(u, Hu), float(u.norm()), -float(slope.detach())))
        if (step + 1) % every == 0:
            before, before_hidden = ([p.detach().clone() for p in ps] for ps in (everything, matrices))
            batch, last_loss = shards.batch(range(step * config.batch_size, (step + 1) * config.batch_size)), loss
    return np.array(points)


def run(size="full", seed=0):
    """A step u changes the loss by <g, u> + |u|^2 NDS / 2 with the normalised directional sharpness NDS = u^T H u / |u|^2. Prediction: Muon's
    is lower than Adam's (and, the theorem, than that of gradient descent), at a similar first-order fall and length.

    f(W) = tr(W^T H W) / 2 with eigenvalues h: msgn(H W) of a square matrix has NDS = mean(h) exactly; gradient descent has sum h^3 |w|^2 /
    sum h^2 |w|^2, above it. A sign has mean(h) too if the eigenvectors are the axes, so they are random in one of the cases.

    Choices. h log-spaced from 100 to 0.1, W Gaussian 32 x 32; runs of 100 steps with the trainer's Muon and torch's Adam, rates falling
    linearly, each the best of a grid. Small GPT: 2 layers of width 32, 150 steps of 16 x 64 tokens, u the update of all hidden matrices, H
    of the loss of its batch by double backward; the better of a few rates for each; compared at equal loss, medians.
    """
    full = size == "full"
    generator = torch.Generator().manual_seed(seed)
    n, seeds = (32, 3) if full else (8, 1)
    h = torch.logspace(2, -1, n)
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes, rows = figure.subplots(1, 3), []
    for axis, where in zip(axes, ("eigenvectors along the axes", "random eigenvectors")):
        firsts, runs = [], {"Adam": [], "Muon": []}
        for _ in range(5 if full else 2):
            H, W = curvature(h, where == "random eigenvectors", generator), torch.randn(n, n, generator=generator)
            firsts.append(first_directions(H, W))
            for rule in runs:
                runs[rule].append(min(quadratic_run(rule, rate, H, W, 100 if full else 10) for rate in (0.03, 0.06, 0.1, 0.2, 0.3, 0.6, 1.2, 2.4)))
        first = {rule: np.array([f[rule] for f in firsts]) for rule in firsts[0]}
        run_mean = {rule: np.array(r)[:, 1] for rule, r in runs.items()}
        off = abs(first["msgn"] / float(h.mean()) - 1).max()
        rows.append((f"quadratic, {where}: msgn's first step has NDS = mean(h) = {float(h.mean()):.2f}, gradient descent's is higher",
                     f"msgn {first['msgn'].mean():.2f} (off by {off:.0e}), gradient descent {first['gradient descent'].mean():.1f}",
                     bool(off < 1e-3 and first["gradient descent"].min() > float(h.mean()))))
        rows.append((f"quadratic, {where}: lower than that of Adam's first step", f"msgn {first['msgn'].mean():.2f}, sign {first[SIGN].mean():.2f}",
                     bool(first["msgn"].max() < 0.99 * first[SIGN].min())))
        rows.append((f"quadratic, {where}: Muon's mean NDS over a run is lower than Adam's", ", ".join(
            f"{rule} {r.mean():.1f} +- {r.std():.1f}" for rule, r in run_mean.items()), bool(run_mean["Muon"].mean() < run_mean["Adam"].mean())))
        bars = {**first, "Adam, mean of a run": run_mean["Adam"], "Muon, mean of a run": run_mean["Muon"]}
        axis.bar(range(5), [v.mean() for v in bars.values()], yerr=[v.std() for v in bars.values()], capsize=4, color=["C3", "C1", "C0", "C1", "C0"])
        axis.axhline(float(h.mean()), color="black", ls="--", lw=1, label="mean(h), predicted for msgn")
        axis.set_xticks(range(5), [name.replace(" (", "\n(").replace(", ", ",\n") for name in bars], rotation=30, fontsize=8)
        axis.set(title=f"Quadratic, {where}", ylabel="normalised directional sharpness")
        axis.legend()

    steps, every = (150, 10) if full else (8, 1)
    chosen, curves = {}, {}
    for rule, (optimizer, rates) in RATES.items():
        tried = {rate: gpt_run(optimizer, rate, seed, steps, every) for rate in rates[:3 if full else 1]}
        chosen[rule] = min(tried, key=lambda rate: tried[rate][-5:, 0].mean())
        others = [gpt_run(optimizer, chosen[rule], s, steps, every) for s in range(seed + 1, seed + seeds)]
        curves[rule] = np.array([tried[chosen[rule]], *others])
        axes[2].semilogy(curves[rule][..., 0].ravel(), curves[rule][..., 1].ravel().clip(1e-3), "o", mfc="none",
                         color={"Adam": "C1", "Muon": "C0"}[rule], label=f"{rule}, rate {chosen[rule]}")
    axes[2].set(title=f"Small GPT along its training, {seeds} seeds (below 0.001: drawn there)", xlabel="training loss (falls to the right)",
                ylabel="normalised directional sharpness of the step")
    axes[2].invert_xaxis()
    axes[2].legend()
    low, high = max(c[..., 0].min() for c in curves.values()), min(c[..., 0].max() for c in curves.values())
    common = {rule: c[(c[..., 0] >= low) & (c[..., 0] <= high)] for rule, c in curves.items()}
    median = {rule: np.median(c, axis=0) for rule, c in common.items()}
    by_seed = {rule: [np.median(c[:, 1]) for c in cs] for rule, cs in curves.items()}
    adam, muon = median["Adam"], median["Muon"]
    rows += [(f"small GPT, at losses of {low:.2f} to {high:.2f}: Muon's NDS is lower than Adam's", "median: " + ", ".join(
                 f"{rule} {median[rule][1]:.3f} (seeds {min(by_seed[rule]):.3f} to {max(by_seed[rule]):.3f})" for rule in curves),
              bool(muon[1] < adam[1])),
             ("small GPT: their lengths |u| are similar (within a factor of 2)", f"Adam {adam[2]:.2f}, Muon {muon[2]:.2f}",
              bool(0.5 < muon[2] / adam[2] < 2)),
             ("small GPT: their first-order falls are similar (within a factor of 2)", f"Adam {adam[3]:.3f}, Muon {muon[3]:.3f}",
              bool(0.5 < muon[3] / adam[3] < 2)),
             ("small GPT: the curvature's penalty |u|^2 NDS / 2 is smaller for Muon", ", ".join(
                 f"{rule} {np.median(c[:, 1] * c[:, 2] ** 2) / 2:.4f}" for rule, c in common.items()),
              bool(np.median(common["Muon"][:, 1] * common["Muon"][:, 2] ** 2) < np.median(common["Adam"][:, 1] * common["Adam"][:, 2] ** 2)))]
    summary = (f"On a quadratic the first step of Muon has exactly the mean curvature ({float(h.mean()):.1f}), and Adam's sign has more "
               f"only if the eigenvectors are not the axes ({first[SIGN].mean():.0f}); over whole runs there the mean is "
               f"{run_mean['Muon'].mean():.1f} for Muon and {run_mean['Adam'].mean():.1f} for Adam. Along the training of a small GPT, "
               f"at equal loss, the directional sharpness of Muon's steps was {muon[1]:.3f} and that of Adam's {adam[1]:.3f}, while "
               f"Muon's steps were {muon[2] / adam[2]:.1f} times as long.")
    return Result(rows, figure, summary,
                  "Muon outperforms Adam by reducing curvature penalty via lower normalized directional sharpness, arXiv:2606.04662")
