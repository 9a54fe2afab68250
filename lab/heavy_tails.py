"""Does Muon's gradient norm fall under heavy-tailed noise as fast as predicted?

Noise with E |noise|^alpha finite only up to a tail index alpha in (1, 2] (infinite variance below 2). The paper bounds the best
gradient norm after T steps of Muon with Nesterov momentum by order

    T^-(alpha - 1) / (3 alpha - 2)  (1/4 at alpha = 2),  with  1 - beta ~ T^-alpha / (3 alpha - 2),  eta ~ T^-(2 alpha - 1) / (3 alpha - 2),

with an exact polar factor and with an inexact one. It is an upper bound: a faster fall is no contradiction, a slower one is.

Chosen here: f(W) = 1/2 ||W||_F^2, W (8, 8) starts at 2 I; elements of the noise from Student's t with alpha + 0.1 degrees of freedom;
both constants 1 (1 - beta = T^-..., eta = T^-...); T from 100 to 10,000; M <- beta M + (1 - beta) G, U = beta M + (1 - beta) G,
W <- W - eta polar(U), the direction of the trainer's Muon. Measured is the mean over the T iterates of ||grad f||_F, which such
proofs bound and which is at least the best; exponents by least squares over 24 repetitions and the last decade of T, as the bound is one
for large T (T eta, the farthest that a singular value can move, is 1.8 at T = 100 and alpha = 1.2: less than the way to 0).
Inexact: the trainer's five Newton-Schulz steps.
"""
import numpy as np
import torch
from matplotlib.figure import Figure

from lab import Result, exponent, judge
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz

SOURCE = ('"Muon with Nesterov Momentum: Heavy-Tailed Noise and (Randomized) Inexact Polar Decomposition", '
          "[arXiv:2605.06884](https://arxiv.org/abs/2605.06884)")
POLAR = {"exact polar factor": msgn, "five Newton-Schulz steps": newton_schulz}


def predicted(alpha):
    return -(alpha - 1) / (3 * alpha - 2)


def mean_norms(polar, alphas, T, repetitions, rng, n=8):
    """Mean of ||grad f||_F over the T iterates, (alphas, repetitions)."""
    a = np.array(alphas)[:, None, None, None]
    drop, eta = (torch.from_numpy(T ** -power) for power in (a / (3 * a - 2), (2 * a - 1) / (3 * a - 2)))
    W = 2 * torch.eye(n, dtype=torch.float64).repeat(len(alphas), repetitions, 1, 1)
    M, total = torch.zeros_like(W), 0
    for t in range(T):
        total = total + torch.linalg.matrix_norm(W)
        G = W + torch.from_numpy(rng.standard_t(np.broadcast_to(a + 0.1, W.shape)))
        M = M + drop * (G - M)
        W = W - eta * polar(M + drop * (G - M))
    return (total / T).numpy()


def run(size="full", seed=0):
    alphas, times, repetitions = (1.2, 1.4, 1.6, 1.8, 2.0), (100, 316, 1000, 3162, 10000), 24
    if size == "small":
        alphas, times, repetitions = (1.2, 2.0), (50, 200, 800), 4
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows, fits = [], {}
    for name, polar in POLAR.items():
        rng = np.random.default_rng(seed)  # the same noise for both
        norms = np.stack([mean_norms(polar, alphas, T, repetitions, rng) for T in times])  # (T, alphas, repetitions)
        for i, alpha in enumerate(alphas):
            slope, width = exponent(np.repeat(np.array(times)[:, None], repetitions, 1), norms[:, i])
            fits[name, alpha] = late = exponent(np.repeat(np.array(times[-3:])[:, None], repetitions, 1), norms[-3:, i])
            rows.append((f"{name}, tail index {alpha}: falls as T^{predicted(alpha):.3f} or faster",
                         f"T^{late[0]:.3f} ± {late[1]:.3f} (all T: {slope:.3f} ± {width:.3f})", judge(*late, high=predicted(alpha))))
            if polar is msgn:
                middle = np.median(norms[:, i], 1)
                quartiles = np.abs(np.quantile(norms[:, i], (0.25, 0.75), axis=1) - middle)
                left.errorbar(times, middle, quartiles, marker="o", color=f"C{i}", capsize=3, label=f"tail index {alpha}")
                left.plot(times, middle[0] * (np.array(times) / times[0]) ** predicted(alpha), ":", color=f"C{i}")
        slopes, widths = zip(*(fits[name, alpha] for alpha in alphas))
        right.errorbar(alphas, [-slope for slope in slopes], widths, marker="o", capsize=3, label=name)
    grid = np.linspace(min(alphas), max(alphas), 50)
    right.plot(grid, -predicted(grid), color="gray", linestyle=":", label="predicted at least: (alpha - 1) / (3 alpha - 2)")
    left.set(xscale="log", yscale="log", xlabel="steps T (rates and momentum as prescribed for each T)",
             ylabel="mean of ||grad f||_F over the run",
             title="exact polar factor: median, quartiles\n(dotted: the predicted slope through the first point)")
    right.set(xlabel="tail index alpha of the noise", ylabel="fitted exponent, sign changed (bars: 95 % interval)", ylim=(0, None),
              title=f"slope from T = {times[-3]} on")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    low, high = alphas[0], alphas[-1]
    exact, rough = POLAR
    counts = [sum(holds is verdict for *_, holds in rows) for verdict in (True, False)]
    summary = (f"With rates and momentum as prescribed the mean gradient norm falls as T^{fits[exact, low][0]:.3f} at tail index {low} "
               f"(bound: {predicted(low):.3f}) and as T^{fits[exact, high][0]:.3f} at {high} (bound: {predicted(high):.3f}) from "
               f"T = {times[-3]} to {times[-1]}; with five Newton-Schulz steps the exponents are {fits[rough, low][0]:.3f} and "
               f"{fits[rough, high][0]:.3f}. Within its interval the fall is as fast as the bound in {counts[0]} of {len(rows)} rows, "
               f"slower in {counts[1]}, and too uncertain to tell in the others.")
    return Result(rows, figure, summary, SOURCE)
