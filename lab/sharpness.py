"""Does Muon move along flatter directions than Adam?"""
import math
from itertools import product

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab import Result, judge, mean_interval
from lab.training import SMALL, cpu_config, new_model, open_shards, parallel, training_steps
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
    """(loss, directional sharpness, |u|, first-order fall -<g, u>) in every `every`-th step, for the update u of the hidden matrices and
    the loss of its own batch.
    """
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


def gpt_task(task):
    return gpt_run(*task)


def choose_rates(tried):
    """({rule: rate with the lowest final loss}, {rule: rate} with the most similar median |u|) from {rule: {rate: points of a run}}."""
    length = {rule: {rate: np.median(points[:, 2]) for rate, points in runs.items()} for rule, runs in tried.items()}
    tuned = {rule: min(runs, key=lambda rate: runs[rate][-5:, 0].mean()) for rule, runs in tried.items()}
    return tuned, dict(zip(tried, min(product(*tried.values()), key=lambda pair: abs(math.log(
        length["Adam"][pair[0]] / length["Muon"][pair[1]])))))


def compare(curves):
    """(lowest and highest loss that both rules have, {quantity: (median of Adam, of Muon, mean of log(Muon / Adam) over the seeds,
    half-width of its 95 % interval)}) from {rule: (seeds, points, 4)}. Medians are over the points at those losses.
    """
    low, high = max(c[..., 0].min() for c in curves.values()), min(c[..., 0].max() for c in curves.values())
    common = {rule: [run[(run[:, 0] >= low) & (run[:, 0] <= high)].T for run in runs] for rule, runs in curves.items()}
    found = {}
    for name, values in {"NDS": lambda _, nds, u, fall: nds, "length": lambda _, nds, u, fall: u, "fall": lambda _, nds, u, fall: fall,
                         "penalty": lambda _, nds, u, fall: nds * u ** 2 / 2}.items():
        adam, muon = (np.array([np.median(values(*run)) for run in common[rule]]) for rule in ("Adam", "Muon"))
        found[name] = adam.mean(), muon.mean(), *mean_interval(np.log(muon / adam))
    return low, high, found


def run(size="full", seed=0):
    """A step u changes the loss by <g, u> + |u|^2 NDS / 2 with the normalised directional sharpness NDS = u^T H u / |u|^2. Prediction:
    Muon's is lower than Adam's (and, the theorem, than that of gradient descent), at a similar first-order fall and length.

    f(W) = tr(W^T H W) / 2 with eigenvalues h: msgn(H W) of a square matrix has NDS = mean(h) exactly; gradient descent has sum h^3 |w|^2 /
    sum h^2 |w|^2, above it. A sign has mean(h) too if the eigenvectors are the axes, so they are random in one of the cases.

    Choices. h log-spaced from 100 to 0.1, W Gaussian 32 x 32; runs of 100 steps with the trainer's Muon and torch's Adam, rates falling
    linearly, each the best of a grid. Small GPT: 2 layers of width 32, 150 steps of 16 x 64 tokens, u the update of all hidden matrices, H
    of the loss of its batch by double backward; medians at equal loss. The longer a rule's steps, the lower their NDS. So the rules are
    compared at equal length, with the pair of rates whose median |u| is most similar, and then each at its best rate; both are chosen with
    seed + 100.
    """
    full = size == "full"
    generator = torch.Generator().manual_seed(seed)
    n, seeds = (32, 3) if full else (8, 1)
    h = torch.logspace(2, -1, n)
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes, rows = figure.subplots(2, 2).flatten(), []
    for axis, where in zip(axes, ("eigenvectors along the axes", "random eigenvectors")):
        firsts, runs = [], {"Adam": [], "Muon": []}
        for _ in range(5 if full else 2):
            H, W = curvature(h, where == "random eigenvectors", generator), torch.randn(n, n, generator=generator)
            firsts.append(first_directions(H, W))
            for rule in runs:
                runs[rule].append(min(quadratic_run(rule, rate, H, W, 100 if full else 10)
                                      for rate in (0.03, 0.06, 0.1, 0.2, 0.3, 0.6, 1.2, 2.4)))
        first = {rule: np.array([f[rule] for f in firsts]) for rule in firsts[0]}
        run_mean = {rule: np.array(r)[:, 1] for rule, r in runs.items()}
        off, off_sign = (abs(first[rule] / float(h.mean()) - 1).max() for rule in ("msgn", SIGN))
        rows.append((f"quadratic, {where}: msgn's first step has NDS = mean(h) = {float(h.mean()):.2f}, gradient descent's is higher",
                     f"msgn {first['msgn'].mean():.2f} (off by {off:.0e}), gradient descent {first['gradient descent'].mean():.1f}",
                     bool(off < 1e-3 and first["gradient descent"].min() > float(h.mean()))))
        found = f"msgn {first['msgn'].mean():.2f}, sign {first[SIGN].mean():.2f}"
        if where == "random eigenvectors":
            rows.append((f"quadratic, {where}: lower than that of Adam's first step", found,
                         bool(first["msgn"].max() < 0.99 * first[SIGN].min())))
        else:
            rows.append((f"quadratic, {where}: Adam's first step has NDS = mean(h) too", found, bool(off_sign < 1e-3)))
        rows.append((f"quadratic, {where}: Muon's mean NDS over a run is lower than Adam's", ", ".join(
            "{} {:.1f} ± {:.1f}".format(rule, *mean_interval(r)) for rule, r in run_mean.items()),
            judge(*mean_interval(run_mean["Muon"] - run_mean["Adam"]), high=0)))
        bars = {**first, "Adam, mean of a run": run_mean["Adam"], "Muon, mean of a run": run_mean["Muon"]}
        mean, width = zip(*map(mean_interval, bars.values()))
        axis.bar(range(5), mean, yerr=width, capsize=4, color=["C3", "C1", "C0", "C1", "C0"])
        axis.axhline(float(h.mean()), color="black", ls="--", lw=1, label="mean(h), predicted for msgn")
        axis.set_xticks(range(5), [name.replace(" (", "\n(").replace(", ", ",\n") for name in bars], rotation=30, fontsize=8)
        axis.set(title=f"Quadratic, {where} (bars: 95 %)", ylabel="normalised directional sharpness")
        axis.legend()

    length = (150, 10) if full else (8, 1)
    optimizers = {rule: optimizer for rule, (optimizer, _) in RATES.items()}
    pairs = [(rule, rate) for rule, (_, rates) in RATES.items() for rate in rates[:3 if full else 1]]
    tried = parallel(gpt_task, [(optimizers[rule], rate, seed + 100, *length) for rule, rate in pairs])
    tuned, matched = choose_rates({rule: {rate: points for (r, rate), points in zip(pairs, tried) if r == rule} for rule in RATES})
    pairs = [(rule, rate) for rule in RATES for rate in sorted({tuned[rule], matched[rule]})]
    found = parallel(gpt_task, [(optimizers[rule], rate, seed + i, *length) for rule, rate in pairs for i in range(seeds)])
    curves = dict(zip(pairs, np.array(found).reshape(len(pairs), seeds, -1, 4)))
    results = {}
    for axis, title, rates in ((axes[2], "at equal length", matched), (axes[3], "at the best rates", tuned)):
        mine = {rule: curves[rule, rates[rule]] for rule in RATES}
        for rule, color in (("Adam", "C1"), ("Muon", "C0")):
            axis.semilogy(mine[rule][..., 0].ravel(), mine[rule][..., 1].ravel().clip(1e-3), "o", mfc="none", color=color,
                          label=f"{rule}, rate {rates[rule]:g}")
        axis.set(title=f"Small GPT {title}, {seeds} seeds (below 0.001: there)", xlabel="training loss (falls to the right)",
                 ylabel="normalised directional sharpness of the step")
        axis.invert_xaxis()
        axis.legend(loc="lower right")
        low, high, results[title] = compare(mine)

        def row(quantity, prediction, digits, **limits):
            adam, muon, mean, width = results[title][quantity]
            span = " to ".join(f"{math.exp(mean + d):.2f}" for d in (-width, width)) if full else "?"
            rows.append((f"small GPT, {title}: {prediction}", f"Adam {adam:.{digits}f}, Muon {muon:.{digits}f}; ratio {math.exp(mean):.2f} "
                         f"(95 %: {span})", judge(mean, width, **limits)))

        similar = dict(low=-math.log(2), high=math.log(2))
        row("NDS", f"Muon's NDS is lower than Adam's (losses {low:.2f} to {high:.2f}, rates {rates['Muon']:g} and {rates['Adam']:g})", 3,
            high=0)
        row("length", "their lengths |u| are similar (within a factor of 2)" + ", as chosen" * (rates is matched), 2, **similar)
        row("fall", "their first-order falls are similar (within a factor of 2)", 3, **similar)
        row("penalty", "the curvature's penalty |u|^2 NDS / 2 is smaller for Muon", 4, high=0)
    equal, best = results.values()
    summary = (f"On a quadratic the first step of Muon has exactly the mean curvature ({float(h.mean()):.1f}), and Adam's sign has more "
               f"only if the eigenvectors are not the axes ({first[SIGN].mean():.0f}); over whole runs there the mean is "
               f"{run_mean['Muon'].mean():.1f} for Muon and {run_mean['Adam'].mean():.1f} for Adam. Along the training of a small GPT, at "
               f"equal loss and with steps of about equal length, the directional sharpness of Adam's steps is "
               f"{math.exp(-equal['NDS'][2]):.1f} times that of Muon's; each at its best rate, it is {math.exp(-best['NDS'][2]):.1f} times "
               f"that, but Muon's steps are {math.exp(best['length'][2]):.1f} times as long, and longer steps have less.")
    return Result(rows, figure, summary,
                  "Muon outperforms Adam by reducing curvature penalty via lower normalized directional sharpness, arXiv:2606.04662")
