"""Is Muon's largest stable step set by the mean singular value of the gradient, and that of gradient descent by the largest curvature?"""
import dataclasses
import math

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view

from lab import Result, exponent, judge
from lab.training import SMALL, cpu_config, new_model, open_shards, training_steps
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz


def random_basis(n, generator):
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def problem(power, curvature, condition, n, generator):
    """(gradient, B, A, error W - W*, largest curvature) of f = tr((W - W*)^T B (W - W*) A) / 2, the gradient's singular values i^-power."""
    U, V = random_basis(n, generator), random_basis(n, generator)
    largest = 10 ** float(2 * torch.rand((), generator=generator) - 1)
    G = U * torch.arange(1, n + 1) ** -power @ V.T
    spectrum = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    if curvature == "random bases":
        U, V = random_basis(n, generator), random_basis(n, generator)
    B, A = largest * U * spectrum @ U.T, V * spectrum @ V.T
    return G, B, A, torch.linalg.solve(B, torch.linalg.solve(A, G, left=False)), largest


def largest_stable_step(direction, steps, B, A, D):
    """By bisection, the largest step at which f is not above its start after `steps` steps along -direction(gradient)."""
    def stable(step):
        E = D
        for _ in range(steps):
            E = E - step * direction(B @ E @ A)
        return (E * (B @ E @ A)).sum() <= (D * (B @ D @ A)).sum()

    low, high = 0.0, 1.0
    while stable(high):
        low, high = high, 2 * high
    for _ in range(40):
        low, high = ((low + high) / 2, high) if stable((low + high) / 2) else (low, (low + high) / 2)
    return low


def log_fit(x, y):
    """(exponent of the power law y = c x^exponent, half-width of its 95 % interval, R^2)."""
    return *exponent(x, y), np.corrcoef(np.log(x), np.log(y))[0, 1] ** 2


def losses_at(optimizer, rms, config, shards):
    """Losses of a run whose first update of the hidden matrices has that root-mean-square; no momentum, no warm-down."""
    model, optimizers = new_model(config)
    if optimizer == "sgd" and rms:
        next(training_steps(config, model, optimizers, shards))
        rms /= float(torch.cat([p.grad.flatten() for p in model.hidden_matrices().values()]).square().mean().sqrt())
    config = dataclasses.replace(config, optimizer=optimizer, hidden_learning_rate=rms)
    return list(training_steps(config, *new_model(config), shards))


def run(size="full", seed=0):
    """The largest step of gradient descent is 2 / lambda_max, whatever the gradient; that of Muon, 2 mean(sigma) / lambda_max, follows it.

    f(W) = tr((W - W*)^T B (W - W*) A) / 2 has the gradient G = B (W - W*) A and the largest curvature lambda_max = max(B) max(A). A step W
    - eta O with O = msgn(G) changes f by -eta r mean(sigma) + eta^2 tr(O^T B O A) / 2, sigma the r singular values of G. Where all
    curvatures are lambda, its sign flips at eta = 2 mean(sigma) / lambda exactly; elsewhere that is a lower bound.

    Choices where the statement leaves them open. Gradient descent: f is not above its start after 100 steps. Muon: not above it after
    one step, for with a constant step its loss neither converges nor diverges. Matrices are 24 x 24, sigma_i = s i^-p with p from 0 to 2,
    B and A log-spaced with condition 10 each, their bases random or those of the gradient; s and lambda_max are random, 0.1 to 10. Small
    GPT: SGD and the trainer's Muon, both without momentum, 60 steps from the same weights; a step size is the root-mean-square of the
    first update of the hidden matrices; the table has AdamW at 0.005. A run diverges if its loss ends above its start; a step is too long
    if the loss ends above that of a run whose hidden matrices stay as they are. Losses are means of 5 steps.
    """
    n, repeats, powers, seeds, steps = (24, 6, 5, 3, 60) if size == "full" else (8, 1, 3, 1, 8)
    config = cpu_config(**SMALL, num_iterations=steps, warmdown_iters=0, learning_rate=0.005, momentum=0.0, nesterov=False)
    open_shards(config)  # before a minute of work
    generator = torch.Generator().manual_seed(seed)
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes, rows, fits = figure.subplots(1, 3), [], {}
    for kind, condition in {"all curvatures equal": 1, "random bases": 10, "gradient's bases": 10}.items():
        points = []
        for power in torch.linspace(0, 2, powers).repeat(repeats):
            G, B, A, D, largest = problem(power, kind, condition, n, generator)
            scale = 10 ** float(2 * torch.rand((), generator=generator) - 1)
            D, sigma = scale * D, scale * torch.linalg.svdvals(G)
            points.append([2 * sigma.mean() / largest, 2 * sigma[0] / largest, largest_stable_step(msgn, 1, B, A, D),
                           largest_stable_step(newton_schulz, 1, B, A, D), 2 / largest, largest_stable_step(lambda G: G, 100, B, A, D)])
        by_mean, by_largest, muon, schulz, by_curvature, descent = np.array(points, dtype=float).T
        ratio, (slope, width, r2), exact = muon / by_mean, log_fit(by_mean, muon), condition == 1
        fits[kind] = r2, *(log_fit(x, muon)[2] for x in (by_largest, by_curvature))
        rows.append((f"Muon, {kind}: largest step " + ("= 2 mean(sigma) / lambda_max" if exact else
                     "at least 2 mean(sigma) / lambda_max, and proportional (exponent 1 within 0.05)"),
                     f"{ratio.min():.4f} to {ratio.max():.4f} times it, exponent {slope:.3f} ± {width:.3f}, R2 {r2:.3f} (with the largest "
                     f"sigma instead {fits[kind][1]:.3f}, with 2 / lambda_max alone {fits[kind][2]:.3f})",
                     bool(abs(ratio - 1).max() < 1e-6) if exact else ratio.min() > 1 - 1e-6 and judge(slope, width, 0.95, 1.05)))
        ratio, (slope, width, r2) = schulz / by_mean, log_fit(by_mean, schulz)
        rows.append((f"the same with the trainer's five Newton-Schulz steps, {kind}: not in the paper",
                     f"{ratio.min():.2f} to {ratio.max():.2f} times it, exponent {slope:.3f} ± {width:.3f}, R2 {r2:.3f}", None))
        ratio, (slope, width, r2) = descent / by_curvature, log_fit(by_curvature, descent)
        rows.append((f"gradient descent, {kind}: largest step = 2 / lambda_max within 5 %, whatever the gradient",
                     f"{ratio.min():.3f} to {ratio.max():.3f} times it, exponent {slope:.3f} ± {width:.3f}, R2 {r2:.4f}",
                     judge((ratio.min() + ratio.max()) / 2, np.ptp(ratio) / 2, 0.95, 1.05)))  # open if some are within 5 %, some not
        axes[0].loglog(by_mean, muon, "o", mfc="none", label=kind)
        axes[1].loglog(by_curvature, descent, "o", mfc="none", label=kind)
    for axis, name, law in ((axes[0], "Muon (exact msgn)", "2 mean(sigma) / lambda_max"), (axes[1], "gradient descent", "2 / lambda_max")):
        axis.axline((1, 1), (2, 2), color="black", lw=1, label="the law: equal")
        axis.set(title=f"Quadratics: {name}", xlabel=f"predicted largest step, {law}", ylabel="largest stable step, by bisection")
        axis.legend()

    sizes = 2.0 ** np.arange(-11, 1) if size == "full" else 2.0 ** np.array([-8, 0])
    curves = {"sgd": [], "muon": [], "fixed": []}
    for s in range(seed, seed + seeds):
        config = dataclasses.replace(config, seed=s % 2 ** 32, data_seed=(s + 1) % 2 ** 32)  # the largest seed is followed by 0
        shards = open_shards(config)
        curves["fixed"].append([losses_at("sgd", 0.0, config, shards)])
        for optimizer in ("sgd", "muon"):
            curves[optimizer].append([losses_at(optimizer, rms, config, shards) for rms in sizes])
    smooth = {name: sliding_window_view(np.array(c), 5, axis=-1).mean(-1) for name, c in curves.items()}  # (seeds, sizes, steps)
    end = {name: c[..., -1] for name, c in smooth.items()}
    start = np.array(curves["fixed"])[..., 0].mean()
    diverged = {name: sizes[~(end[name].mean(0) < start)] for name in ("sgd", "muon")}
    useful = {name: max(sizes[end[name].mean(0) < end["fixed"].mean()], default=0.0) for name in ("sgd", "muon")}
    target = 3.0
    to_target = {name: np.where((c < target).any(-1), (c < target).argmax(-1) + 5, np.inf).mean(0) for name, c in smooth.items()}
    fewer, either = to_target["muon"] < to_target["sgd"], np.isfinite(to_target["muon"]) | np.isfinite(to_target["sgd"])
    rows += [("small GPT: some step sizes make SGD diverge, and Muon not", "SGD diverges at {} of {} step sizes, Muon at {}".format(
                 len(diverged["sgd"]), len(sizes), len(diverged["muon"])), len(diverged["sgd"]) > len(diverged["muon"])),
             ("small GPT: the longest step that is not too long is larger for Muon", f"SGD {useful['sgd']:.3g}, Muon {useful['muon']:.3g}",
              bool(useful["muon"] > useful["sgd"])),
             (f"small GPT: at equal step size Muon reaches a loss of {target} in fewer steps",
              f"at {sum(fewer)} of the {sum(either)} step sizes where either does; best step size: SGD {to_target['sgd'].min():.0f} steps, "
              f"Muon {to_target['muon'].min():.0f}",
              bool(either.any() and fewer[either].all()))]
    for name, label, color in (("sgd", "SGD", "C3"), ("muon", "Muon", "C0")):
        axes[2].semilogx(sizes, end[name].mean(0), "o-", color=color, label=label)
        axes[2].fill_between(sizes, end[name].min(0), end[name].max(0), color=color, alpha=0.2)
    axes[2].axhline(end["fixed"].mean(), color="black", ls="--", lw=1, label="hidden matrices fixed")
    axes[2].set(title=f"Small GPT, {seeds} seeds (band: lowest to highest)", xscale="log",
                xlabel="step size: RMS of the first update of the hidden matrices", ylabel=f"training loss after {steps} steps")
    axes[2].legend()
    r2, r2_largest, r2_curvature = fits["random bases"]
    summary = ("On quadratics the largest step that lowers the loss follows the mean singular value of the gradient for Muon (R2 "
               f"{r2:.3f} over random curvature; {r2_largest:.3f} with the largest singular value instead, {r2_curvature:.3f} with the "
               "curvature alone), and the largest curvature alone for gradient descent. On a small GPT, whose normalisations keep the loss "
               "finite, SGD diverged at "
               f"{len(diverged['sgd'])} and Muon at {len(diverged['muon'])} of {len(sizes)} step sizes; the longest step that was better "
               f"than leaving the hidden matrices alone was {useful['sgd']:.2g} for SGD and {useful['muon']:.2g} for Muon.")
    return Result(rows, figure, summary, "Spectral Flattening Is All Muon Needs, arXiv:2605.13079")
