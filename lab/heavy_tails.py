"""Does Muon's gradient norm fall under heavy-tailed noise as fast as predicted?

Noise with E |noise|^alpha finite only up to a tail index alpha in (1, 2] (infinite variance below 2). The paper bounds the best
gradient norm after T steps of Muon with Nesterov momentum by order

    T^-(alpha - 1) / (3 alpha - 2)  (1/4 at alpha = 2),  with  1 - beta ~ T^-alpha / (3 alpha - 2),  eta ~ T^-(2 alpha - 1) / (3 alpha - 2),

with an exact polar factor and with an inexact one. As an upper bound of an order it says nothing about the slope over a stretch of T:
neither a faster nor a slower fall contradicts it. What a measurement can exceed is a bound with its constant. That of the paper was not
readable; for the exact factor on the f below, the usual descent estimate gives, with e_t = U_t - grad f(W_t) and the weights w of the
gradients in U,

    mean_t E ||grad f||_F <= f(W_0) / (eta T) + eta n / 2 + 2 sqrt(n) mean_t E ||e_t||_F,
    mean_t E ||e_t||_F <= eta sqrt(n) beta^2 / (1 - beta) + beta^2 ||W_0||_F / ((1 - beta) T)
                          + (n^2 E |x|^alpha sum_s w_s^alpha)^(1 / alpha),

since f falls by at least eta (||grad f||_* - 2 sqrt(n) ||e||_F) - eta^2 n / 2 in a step of length sqrt(n) eta, and since for independent
symmetric x_s E |sum_s w_s x_s|^alpha <= sum_s |w_s|^alpha E |x_s|^alpha. It is C T^-(alpha - 1) / (3 alpha - 2) as T grows.

Chosen here: f(W) = 1/2 ||W||_F^2, W (8, 8) starts at 2 I; elements of the noise from Student's t with alpha + 0.1 degrees of freedom;
both constants 1 (1 - beta = T^-..., eta = T^-...); T from 100 to 10,000; M <- beta M + (1 - beta) G, U = beta M + (1 - beta) G,
W <- W - eta polar(U), the direction of the trainer's Muon. Measured is the mean over the T iterates of ||grad f||_F, which such
proofs bound and which is at least the best; exponents by least squares over 24 repetitions and the last decade of T, as the bound is one
for large T (T eta, the farthest that a singular value can move, is 1.8 at T = 100 and alpha = 1.2: less than the way to 0).
Inexact: the trainer's five Newton-Schulz steps.
"""
import math

import numpy as np
import torch
from matplotlib.figure import Figure

from lab import Result, exponent, judge, mean_interval
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz

SOURCE = ('"Muon with Nesterov Momentum: Heavy-Tailed Noise and (Randomized) Inexact Polar Decomposition", '
          "[arXiv:2605.06884](https://arxiv.org/abs/2605.06884)")
POLAR = {"exact polar factor": msgn, "five Newton-Schulz steps": newton_schulz}
DF = 0.1  # degrees of freedom above the tail index


def predicted(alpha):
    return -(alpha - 1) / (3 * alpha - 2)


def moment(alpha, df):
    """E |x|^alpha of Student's t."""
    return math.exp(alpha / 2 * math.log(df) + math.lgamma((alpha + 1) / 2) + math.lgamma((df - alpha) / 2)
                    - math.lgamma(0.5) - math.lgamma(df / 2))


def bound(alpha, T, n=8):
    """The right-hand side of the estimate above."""
    drop, eta = T ** (-alpha / (3 * alpha - 2)), T ** (-(2 * alpha - 1) / (3 * alpha - 2))
    beta, start = 1 - drop, 2 * n ** 0.5
    weights = (drop * (1 + beta)) ** alpha + (drop * beta ** 2) ** alpha / (1 - beta ** alpha)  # w_0 and the sum of w_s = drop beta^(s + 1)
    noise = (n * n * moment(alpha, alpha + DF) * weights) ** (1 / alpha)
    error = eta * n ** 0.5 * beta ** 2 / drop + beta ** 2 * start / (drop * T) + noise
    return start ** 2 / 2 / (eta * T) + eta * n / 2 + 2 * n ** 0.5 * error


def mean_norms(polar, alphas, T, repetitions, rng, n=8):
    """Mean of ||grad f||_F over the T iterates, (alphas, repetitions)."""
    a = np.array(alphas)[:, None, None, None]
    drop, eta = (torch.from_numpy(T ** -power) for power in (a / (3 * a - 2), (2 * a - 1) / (3 * a - 2)))
    W = 2 * torch.eye(n, dtype=torch.float64).repeat(len(alphas), repetitions, 1, 1)
    M, total = torch.zeros_like(W), 0
    for t in range(T):
        total = total + torch.linalg.matrix_norm(W)
        G = W + torch.from_numpy(rng.standard_t(np.broadcast_to(a + DF, W.shape)))
        M = M + drop * (G - M)
        W = W - eta * polar(M + drop * (G - M))
    return (total / T).numpy()


def run(size="full", seed=0):
    alphas, times, repetitions = (1.2, 1.4, 1.6, 1.8, 2.0), (100, 316, 1000, 3162, 10000), 24
    if size == "small":
        alphas, times, repetitions = (1.2, 2.0), (50, 200, 800), 4
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows, fits, slack = [], {}, []
    for name, polar in POLAR.items():
        rng = np.random.default_rng(seed)  # the same noise for both
        norms = np.stack([mean_norms(polar, alphas, T, repetitions, rng) for T in times])  # (T, alphas, repetitions)
        for i, alpha in enumerate(alphas):
            slope, width = exponent(np.repeat(np.array(times)[:, None], repetitions, 1), norms[:, i])
            fits[name, alpha] = late = exponent(np.repeat(np.array(times[-3:])[:, None], repetitions, 1), norms[-3:, i])
            scale = np.array(times) ** -predicted(alpha)
            mean, half = np.array([mean_interval(row) for row in norms[:, i]]).T
            limit = np.array([bound(alpha, T) for T in times])
            prediction = (f"{name}, tail index {alpha}: at most C T^{predicted(alpha):.3f}"
                          + (f", C = {max(limit * scale):.0f} by the descent estimate" if polar is msgn else ", C not known"))
            below = {judge(m, h, high=b) for m, h, b in zip(mean, half, limit)}
            holds = None if polar is not msgn else False if False in below else None if None in below else True
            rows.append((prediction, f"C = {min(mean * scale):.1f} to {max(mean * scale):.1f}; T^{late[0]:.3f} ± {late[1]:.3f} "
                         f"(all T: {slope:.3f} ± {width:.3f})", holds))
            if polar is msgn:
                slack.append(min(limit / mean))
                middle = np.median(norms[:, i], 1)
                quartiles = np.abs(np.quantile(norms[:, i], (0.25, 0.75), axis=1) - middle)
                left.errorbar(times, middle, quartiles, marker="o", color=f"C{i}", capsize=3, label=f"tail index {alpha}")
                left.plot(times, middle[0] * (np.array(times) / times[0]) ** predicted(alpha), ":", color=f"C{i}")
        slopes, widths = zip(*(fits[name, alpha] for alpha in alphas))
        right.errorbar(alphas, [-slope for slope in slopes], widths, marker="o", capsize=3, label=name)
    grid = np.linspace(min(alphas), max(alphas), 50)
    right.plot(grid, -predicted(grid), color="gray", linestyle=":", label="of the bound: (alpha - 1) / (3 alpha - 2)")
    left.set(xscale="log", yscale="log", xlabel="steps T (rates and momentum as prescribed for each T)",
             ylabel="mean of ||grad f||_F over the run",
             title="exact polar factor: median, quartiles\n(dotted: the slope of the bound through the first point)")
    right.set(xlabel="tail index alpha of the noise", ylabel="fitted exponent, sign changed (bars: 95 % interval)", ylim=(0, None),
              title=f"slope from T = {times[-3]} on")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    low, high = alphas[0], alphas[-1]
    exact, rough = POLAR
    summary = (f"With rates and momentum as prescribed the mean gradient norm falls as T^{fits[exact, low][0]:.3f} at tail index {low} "
               f"(bound: {predicted(low):.3f}) and as T^{fits[exact, high][0]:.3f} at {high} (bound: {predicted(high):.3f}) from "
               f"T = {times[-3]} to {times[-1]}; with five Newton-Schulz steps the exponents are {fits[rough, low][0]:.3f} and "
               f"{fits[rough, high][0]:.3f}. A slope over one decade cannot contradict an upper bound whose constant is not known; the "
               f"constant of a descent estimate is {min(slack):.0f} to {max(slack):.0f} times what was measured, and so a weak test.")
    return Result(rows, figure, summary, SOURCE)
