"""Is Muon's largest stable step set by the mean singular value of the gradient, and that of gradient
descent by the largest curvature?

f(W) = tr((W - W*)^T B (W - W*) A) / 2 has the gradient G = B (W - W*) A and the largest curvature
lambda_max = max(B) max(A). The largest step of gradient descent is 2 / lambda_max, whatever the gradient. A
step W - eta O with O = msgn(G) changes f by -eta r mean(sigma) + eta^2 tr(O^T B O A) / 2, with sigma the r
singular values of G. Where all curvatures are lambda, its sign flips at eta = 2 mean(sigma) / lambda
exactly; elsewhere that is a lower bound.

Choices where the statement leaves them open. Gradient descent: f is not above its start after 100 steps.
Muon: not above it after one step, for with a constant step its loss neither converges nor diverges.
Matrices are 24 x 24, sigma_i = s i^-p with p from 0 to 2, B and A log-spaced with condition 10 each, their
bases random or those of the gradient; s and lambda_max are random, 0.1 to 10. Small GPT: SGD and the
trainer's Muon, both without momentum, 60 steps from the same weights; a step size is the root-mean-square
of the first update of the hidden matrices; the table has AdamW at 0.005. A run diverges if its loss ends
above its start; a step is too long if the loss ends above that of a run whose hidden matrices stay as they
are. Losses are means of 5 steps.
"""
import dataclasses
import math

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from harness.pictures import COLORS
from lab import counted, exponent, judge, look, new_figure
from lab.training import SMALL, cpu_config, new_model, open_shards, training_steps
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz

SOURCE = "Spectral Flattening Is All Muon Needs, arXiv:2605.13079"
KINDS = {"all curvatures equal": 1, "random bases": 10, "gradient's bases": 10}  # condition number of B and A
WINDOW = 5  # steps whose mean counts as the loss
TARGET = 3.0


def random_basis(n, generator):
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def ten_to_a_random_power(generator):
    """From 0.1 to 10."""
    return 10 ** float(2 * torch.rand((), generator=generator) - 1)


def problem(power, curvature, condition, n, generator):
    """(gradient, B, A, error W - W*, largest curvature) of a quadratic, all matrices (n, n).

    The singular values of the gradient are i^-power.
    """
    U = random_basis(n, generator)
    V = random_basis(n, generator)
    largest = ten_to_a_random_power(generator)
    G = U * torch.arange(1, n + 1) ** -power @ V.T
    spectrum = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    if curvature == "random bases":
        U = random_basis(n, generator)
        V = random_basis(n, generator)
    B = largest * U * spectrum @ U.T
    A = V * spectrum @ V.T
    return G, B, A, torch.linalg.solve(B, torch.linalg.solve(A, G, left=False)), largest


def largest_stable_step(direction, steps, B, A, D):
    """By bisection, the largest step at which f is not above its start.

    It is compared after `steps` steps along -direction(gradient).
    """
    def f(D):
        return (D * (B @ D @ A)).sum()

    def stable(step):
        E = D
        for _ in range(steps):
            E = E - step * direction(B @ E @ A)
        return f(E) <= f(D)

    low = 0.0
    high = 1.0
    while stable(high):
        low = high
        high = 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        if stable(middle):
            low = middle
        else:
            high = middle
    return low


def measure_quadratics(kind, n, powers, repeats, generator):
    """Predicted and measured largest steps, a list of each with one entry for each problem."""
    names = ("by_mean", "by_largest", "by_curvature", "muon", "newton_schulz", "descent")
    found = {name: [] for name in names}
    for power in torch.linspace(0, 2, powers).repeat(repeats):
        G, B, A, D, largest = problem(power, kind, KINDS[kind], n, generator)
        scale = ten_to_a_random_power(generator)
        D = scale * D
        sigma = scale * torch.linalg.svdvals(G)
        found["by_mean"].append(float(2 * sigma.mean() / largest))
        found["by_largest"].append(float(2 * sigma[0] / largest))
        found["by_curvature"].append(2 / largest)
        found["muon"].append(largest_stable_step(msgn, 1, B, A, D))
        found["newton_schulz"].append(largest_stable_step(newton_schulz, 1, B, A, D))
        found["descent"].append(largest_stable_step(lambda G: G, 100, B, A, D))
    return found


def losses_at(optimizer, rms, config, shards):
    """Losses of a run whose first update of the hidden matrices has that root-mean-square; no momentum."""
    model, optimizers = new_model(config)
    rate = rms
    if optimizer == "sgd" and rms:
        next(training_steps(config, model, optimizers, shards))
        gradient = torch.cat([p.grad.flatten() for p in model.hidden_matrices().values()])
        rate = rms / float(gradient.square().mean().sqrt())
    config = dataclasses.replace(config, optimizer=optimizer, hidden_learning_rate=rate)
    return list(training_steps(config, *new_model(config), shards))


def measure_gpt(config, sizes, seeds):
    """{optimizer: losses (seeds, step sizes, steps)}; "fixed" are runs whose hidden matrices do not move."""
    losses = {"fixed": [], "sgd": [], "muon": []}
    for seed in seeds:  # the largest seed is followed by 0
        config = dataclasses.replace(config, seed=seed % 2 ** 32, data_seed=(seed + 1) % 2 ** 32)
        shards = open_shards(config)
        losses["fixed"].append([losses_at("sgd", 0.0, config, shards)])
        for optimizer in ("sgd", "muon"):
            losses[optimizer].append([losses_at(optimizer, rms, config, shards) for rms in sizes])
    return losses


def measure(size="full", seed=0):
    full = size == "full"
    n, repeats, powers, seeds, steps = (24, 6, 5, 3, 60) if full else (8, 1, 3, 1, 8)
    config = cpu_config(**SMALL, num_iterations=steps, warmdown_iters=0, learning_rate=0.005, momentum=0.0,
                        nesterov=False)
    open_shards(config)  # before a minute of work
    generator = torch.Generator().manual_seed(seed)
    quadratics = {kind: measure_quadratics(kind, n, powers, repeats, generator) for kind in KINDS}
    sizes = [2.0 ** i for i in (range(-11, 1) if full else (-8, 0))]
    return dict(quadratics=quadratics, step_sizes=sizes,
                losses=measure_gpt(config, sizes, range(seed, seed + seeds)))


def log_fit(x, y):
    """(exponent of the power law y = c x^exponent, half-width of its 95 % interval, R^2)."""
    return *exponent(x, y), np.corrcoef(np.log(x), np.log(y))[0, 1] ** 2


def arrays(found):
    return {name: np.array(values) for name, values in found.items()}


def muon_row(kind, found):
    ratio = found["muon"] / found["by_mean"]
    slope, width, r2 = log_fit(found["by_mean"], found["muon"])
    if KINDS[kind] == 1:
        prediction = "= 2 mean(sigma) / lambda_max"
        verdict = bool(abs(ratio - 1).max() < 1e-6)
    else:
        prediction = "at least 2 mean(sigma) / lambda_max, and proportional (exponent 1 within 0.05)"
        verdict = False if ratio.min() <= 1 - 1e-6 else judge(slope, width, 0.95, 1.05)
    others = [log_fit(found[name], found["muon"])[2] for name in ("by_largest", "by_curvature")]
    return (f"Muon, {kind}: largest step {prediction}",
            f"{ratio.min():.4f} to {ratio.max():.4f} times it, exponent {slope:.3f} ± {width:.3f}, R2 "
            f"{r2:.3f} "
            f"(with the largest sigma instead {others[0]:.3f}, with 2 / lambda_max alone {others[1]:.3f})",
            verdict)


def newton_schulz_row(kind, found):
    ratio = found["newton_schulz"] / found["by_mean"]
    slope, width, r2 = log_fit(found["by_mean"], found["newton_schulz"])
    return (f"the same with the trainer's five Newton-Schulz steps, {kind}: not in the paper",
            f"{ratio.min():.2f} to {ratio.max():.2f} times it, exponent {slope:.3f} ± {width:.3f}, R2 "
            f"{r2:.3f}",
            None)


def descent_row(kind, found):
    ratio = found["descent"] / found["by_curvature"]
    slope, width, r2 = log_fit(found["by_curvature"], found["descent"])
    # open if some are within 5 %, and some are not
    verdict = judge((ratio.min() + ratio.max()) / 2, np.ptp(ratio) / 2, 0.95, 1.05)
    return (f"gradient descent, {kind}: largest step = 2 / lambda_max within 5 %, whatever the gradient",
            f"{ratio.min():.3f} to {ratio.max():.3f} times it, exponent {slope:.3f} ± {width:.3f}, R2 "
            f"{r2:.4f}",
            verdict)


def smooth_losses(numbers):
    """{optimizer: means of 5 steps (seeds, step sizes, steps)}."""
    return {name: sliding_window_view(np.array(losses), WINDOW, axis=-1).mean(-1)
            for name, losses in numbers["losses"].items()}


def diverging(numbers):
    """{optimizer: number of step sizes at which the loss ends above its start}."""
    losses = smooth_losses(numbers)
    start = np.array(numbers["losses"]["fixed"])[..., 0].mean()
    return {name: int((~(losses[name][..., -1].mean(0) < start)).sum()) for name in ("sgd", "muon")}


def longest_useful(numbers):
    """{optimizer: longest step with which the loss ends below that with hidden matrices that do not move}."""
    losses = smooth_losses(numbers)
    sizes = np.array(numbers["step_sizes"])
    fixed = losses["fixed"][..., -1].mean()
    return {name: max(sizes[losses[name][..., -1].mean(0) < fixed], default=0.0) for name in ("sgd", "muon")}


def gpt_rows(numbers):
    sizes = numbers["step_sizes"]
    diverged = diverging(numbers)
    useful = longest_useful(numbers)
    first = {}  # steps to the target at each step size
    for name, losses in smooth_losses(numbers).items():
        below = losses < TARGET
        first[name] = np.where(below.any(-1), below.argmax(-1) + WINDOW, np.inf).mean(0)
    either = np.isfinite(first["muon"]) | np.isfinite(first["sgd"])
    fewer = first["muon"] < first["sgd"]
    return [("small GPT: some step sizes make SGD diverge, and Muon not",
             f"SGD diverges at {diverged['sgd']} of {len(sizes)} step sizes, Muon at {diverged['muon']}",
             diverged["sgd"] > diverged["muon"]),
            ("small GPT: the longest step that is not too long is larger for Muon",
             f"SGD {useful['sgd']:.3g}, Muon {useful['muon']:.3g}", bool(useful["muon"] > useful["sgd"])),
            (f"small GPT: at equal step size Muon reaches a loss of {TARGET} in fewer steps",
             f"at {fewer.sum()} of the {either.sum()} step sizes where either does; best step size: SGD "
             f"{first['sgd'].min():.0f} steps, Muon {first['muon'].min():.0f}",
             bool(either.any() and fewer[either].all()))]


def rows(numbers):
    found = []
    for kind, steps in numbers["quadratics"].items():
        steps = arrays(steps)
        found += [muon_row(kind, steps), newton_schulz_row(kind, steps), descent_row(kind, steps)]
    return found + gpt_rows(numbers)


def summary(numbers):
    steps = arrays(numbers["quadratics"]["random bases"])
    r2, largest, curvature = (log_fit(steps[name], steps["muon"])[2]
                              for name in ("by_mean", "by_largest", "by_curvature"))
    diverged = diverging(numbers)
    useful = longest_useful(numbers)
    return ("On quadratics the largest step that lowers the loss follows the mean singular value of the "
            f"gradient for Muon (R2 {r2:.3f} over random curvature; {largest:.3f} with the largest singular "
            f"value instead, {curvature:.3f} with the curvature alone), and the largest curvature alone for "
            "gradient descent. On a small GPT, whose normalisations keep the loss finite, SGD diverged at "
            f"{diverged['sgd']} and Muon at {diverged['muon']} of {len(numbers['step_sizes'])} step sizes; "
            "the longest step that was better than leaving the hidden matrices alone was "
            f"{useful['sgd']:.2g} for SGD and {useful['muon']:.2g} for Muon.")


def draw_quadratics(axes, quadratics, predicted, measured, colors):
    for (kind, steps), marker, color in zip(quadratics.items(), "os^", colors):
        axes.loglog(steps[predicted], steps[measured], marker, mfc="none", color=color, label=kind)
    axes.axline((1, 1), (2, 2), color="black", lw=1, label="the law: equal")
    axes.set(ylabel="largest stable step")


def figure(numbers):
    picture = new_figure(8)
    (left, right), (below, key) = picture.subplots(2, 2)
    draw_quadratics(left, numbers["quadratics"], "by_mean", "muon", (COLORS["muon"], "#56b4e9", "#5d3a9b"))
    left.set(title="Quadratics: Muon (exact msgn)", xlabel="predicted: 2 mean(sigma) / lambda_max")
    draw_quadratics(right, numbers["quadratics"], "by_curvature", "descent",
                    (COLORS["muon"], "#56b4e9", "#5d3a9b"))
    right.set(title="Quadratics: gradient descent", xlabel="predicted: 2 / lambda_max")
    end = {name: losses[..., -1] for name, losses in smooth_losses(numbers).items()}
    sizes = numbers["step_sizes"]
    for name, label in (("muon", "Muon"), ("sgd", "SGD")):
        style = look(name)
        below.semilogx(sizes, end[name].mean(0), label=label, **style)
        below.fill_between(sizes, end[name].min(0), end[name].max(0), color=style["color"], alpha=0.2)
    below.axhline(end["fixed"].mean(), color="gray", ls="--", lw=1, label="hidden matrices do not move")
    steps = np.array(numbers["losses"]["muon"]).shape[-1]
    below.set(title="Small GPT", xlabel="step size: RMS of the first update",
              ylabel=f"training loss after {steps} steps")
    key.axis("off")
    key.add_artist(key.legend(*left.get_legend_handles_labels(), loc="upper left", fontsize=9,
                              title="Quadratics, by curvature"))
    key.legend(*below.get_legend_handles_labels(), loc="lower left", fontsize=9, handlelength=3,
               title=f"Small GPT, mean of {counted(len(numbers['losses']['muon']), 'seed')}\n"
                     "(band: lowest to highest)")
    return picture
