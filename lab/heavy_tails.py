"""Does Muon's gradient norm fall under heavy-tailed noise as fast as predicted?

Noise with E |noise|^alpha finite only up to a tail index alpha in (1, 2] (infinite variance below 2). The
paper bounds the best gradient norm after T steps of Muon with Nesterov momentum by order

    T^-(alpha - 1) / (3 alpha - 2)  (1/4 at alpha = 2),  with
    1 - beta ~ T^-alpha / (3 alpha - 2),  eta ~ T^-(2 alpha - 1) / (3 alpha - 2),

with an exact polar factor and with an inexact one. As an upper bound of an order it says nothing about the
slope over a stretch of T: neither a faster nor a slower fall contradicts it. What a measurement can exceed
is a bound with its constant. That of the paper was not readable; for the exact factor on the f below, the
usual descent estimate gives, with e_t = U_t - grad f(W_t) and the weights w of the gradients in U,

    mean_t E ||grad f||_F <= f(W_0) / (eta T) + eta n / 2 + 2 sqrt(n) mean_t E ||e_t||_F,
    mean_t E ||e_t||_F <= eta sqrt(n) beta^2 / (1 - beta) + beta^2 ||W_0||_F / ((1 - beta) T)
                          + (n^2 E |x|^alpha sum_s w_s^alpha)^(1 / alpha),

since f falls by at least eta (||grad f||_* - 2 sqrt(n) ||e||_F) - eta^2 n / 2 in a step of length sqrt(n)
eta, and since for independent symmetric x_s E |sum_s w_s x_s|^alpha <= sum_s |w_s|^alpha E |x_s|^alpha. It
is C T^-(alpha - 1) / (3 alpha - 2) as T grows.

Chosen here: f(W) = 1/2 ||W||_F^2, W (8, 8) starts at 2 I; elements of the noise from Student's t with alpha
+ 0.1 degrees of freedom; both constants 1 (1 - beta = T^-..., eta = T^-...); T from 100 to 10,000; M <-
beta M + (1 - beta) G, U = beta M + (1 - beta) G, W <- W - eta polar(U), the direction of the trainer's
Muon. Measured is the mean over the T iterates of ||grad f||_F, which such proofs bound and which is at
least the best; exponents by least squares over 24 repetitions and the last decade of T, as the bound is one
for large T (T eta, the farthest that a singular value can move, is 1.8 at T = 100 and alpha = 1.2: less
than the way to 0). Inexact: the trainer's five Newton-Schulz steps.
"""
import math

import numpy as np
import torch

from lab import all_of, exponent, interval, judge, legend_below, look, new_figure
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz

SOURCE = ('"Muon with Nesterov Momentum: Heavy-Tailed Noise and (Randomized) Inexact Polar Decomposition", '
          "[arXiv:2605.06884](https://arxiv.org/abs/2605.06884)")
EXACT = "exact polar factor"
INEXACT = "five Newton-Schulz steps"
POLAR = {EXACT: msgn, INEXACT: newton_schulz}
DF = 0.1  # degrees of freedom above the tail index
LAST = 3  # values of T that a slope is fitted to: a decade


def predicted(alpha):
    """Exponent of T."""
    return -(alpha - 1) / (3 * alpha - 2)


def moment(alpha, df):
    """E |x|^alpha of Student's t."""
    log = alpha / 2 * math.log(df) + math.lgamma((alpha + 1) / 2) + math.lgamma((df - alpha) / 2)
    return math.exp(log - math.lgamma(0.5) - math.lgamma(df / 2))


def bound(alpha, T, n=8):
    """The right-hand side of the estimate above."""
    drop = T ** (-alpha / (3 * alpha - 2))
    eta = T ** (-(2 * alpha - 1) / (3 * alpha - 2))
    beta = 1 - drop
    start = 2 * n ** 0.5
    # w_0 and the sum of w_s = drop beta^(s + 1)
    weights = (drop * (1 + beta)) ** alpha + (drop * beta ** 2) ** alpha / (1 - beta ** alpha)
    noise = (n * n * moment(alpha, alpha + DF) * weights) ** (1 / alpha)
    error = eta * n ** 0.5 * beta ** 2 / drop + beta ** 2 * start / (drop * T) + noise
    return start ** 2 / 2 / (eta * T) + eta * n / 2 + 2 * n ** 0.5 * error


def mean_norms(polar, alphas, T, repetitions, rng, n=8):
    """Mean of ||grad f||_F over the T iterates, (alphas, repetitions)."""
    a = np.array(alphas)[:, None, None, None]
    drop = torch.from_numpy(T ** -(a / (3 * a - 2)))
    eta = torch.from_numpy(T ** -((2 * a - 1) / (3 * a - 2)))
    W = 2 * torch.eye(n, dtype=torch.float64).repeat(len(alphas), repetitions, 1, 1)
    M = torch.zeros_like(W)
    total = 0
    for t in range(T):
        total = total + torch.linalg.matrix_norm(W)
        G = W + torch.from_numpy(rng.standard_t(np.broadcast_to(a + DF, W.shape)))
        M = M + drop * (G - M)
        W = W - eta * polar(M + drop * (G - M))
    return (total / T).numpy()


def measure(size="full", seed=0):
    """norms: {polar factor: (times, alphas, repetitions)}."""
    alphas, times, repetitions = (1.2, 1.4, 1.6, 1.8, 2.0), (100, 316, 1000, 3162, 10000), 24
    if size == "small":
        alphas, times, repetitions = (1.2, 2.0), (50, 200, 800), 4
    norms = {}
    for name, polar in POLAR.items():
        rng = np.random.default_rng(seed)  # the same noise for both
        norms[name] = [mean_norms(polar, alphas, T, repetitions, rng).tolist() for T in times]
    return dict(alphas=alphas, times=times, norms=norms)


def norms_at(numbers, name, i):
    """Norms (times, repetitions) with the tail index alphas[i]."""
    return np.array(numbers["norms"][name])[:, i]


def fitted(numbers, name, i, last=LAST):
    """(exponent of T, half-width of its 95 % interval) over the last values of T."""
    norms = norms_at(numbers, name, i)[-last:]
    times = np.broadcast_to(np.array(numbers["times"])[-last:, None], norms.shape)
    return exponent(times.copy(), norms)


def limits(numbers, alpha):
    return np.array([bound(alpha, T) for T in numbers["times"]])


def row(numbers, name, i):
    alpha = numbers["alphas"][i]
    scale = np.array(numbers["times"]) ** -predicted(alpha)
    intervals = [interval(norms) for norms in norms_at(numbers, name, i)]
    constants = np.array([mean for mean, _ in intervals]) * scale
    prediction = f"{name}, tail index {alpha}: at most C T^{predicted(alpha):.3f}"
    verdict = None
    if name == EXACT:
        limit = limits(numbers, alpha)
        prediction += f", C = {max(limit * scale):.0f} by the descent estimate"
        verdict = all_of([judge(*found, high=high) for found, high in zip(intervals, limit)])
    else:
        prediction += ", C not known"
    slope, width = fitted(numbers, name, i, len(numbers["times"]))
    late, late_width = fitted(numbers, name, i)
    return (prediction, f"C = {min(constants):.1f} to {max(constants):.1f}; T^{late:.3f} ± {late_width:.3f} "
            f"(all T: {slope:.3f} ± {width:.3f})", verdict)


def rows(numbers):
    return [row(numbers, name, i) for name in POLAR for i in range(len(numbers["alphas"]))]


def summary(numbers):
    alphas = numbers["alphas"]
    times = numbers["times"]
    end = len(alphas) - 1
    slopes = {(name, i): fitted(numbers, name, i)[0] for name in POLAR for i in (0, end)}
    slack = [min(limits(numbers, alpha) / norms_at(numbers, EXACT, i).mean(1))
             for i, alpha in enumerate(alphas)]
    return ("With rates and momentum as prescribed the mean gradient norm falls as "
            f"T^{slopes[EXACT, 0]:.3f} at tail index {alphas[0]} (bound: {predicted(alphas[0]):.3f}) and as "
            f"T^{slopes[EXACT, end]:.3f} at {alphas[-1]} (bound: {predicted(alphas[-1]):.3f}) from T = "
            f"{times[-LAST]} to {times[-1]}; with five Newton-Schulz steps the exponents are "
            f"{slopes[INEXACT, 0]:.3f} and {slopes[INEXACT, end]:.3f}. A slope over one decade cannot "
            "contradict an upper bound whose constant is not known; the constant of a descent estimate is "
            f"{min(slack):.0f} to {max(slack):.0f} times what was measured, and so a weak test.")


def draw_norms(axes, numbers):
    """Lighter is a heavier tail."""
    times = np.array(numbers["times"])
    alphas = numbers["alphas"]
    for i, alpha in enumerate(alphas):
        color = str(0.7 * (1 - i / (len(alphas) - 1)))
        norms = norms_at(numbers, EXACT, i)
        middle = np.median(norms, 1)
        quartiles = np.abs(np.quantile(norms, (0.25, 0.75), axis=1) - middle)
        axes.errorbar(times, middle, quartiles, marker="os^vD"[i], markersize=5, color=color, capsize=3,
                      label=f"tail index {alpha}")
        axes.plot(times, middle[0] * (times / times[0]) ** predicted(alpha), ":", color=color)
    axes.set(xscale="log", yscale="log", xlabel="steps T", ylabel="mean of ||grad f||$_F$ over the run",
             title="Exact (dotted: slope of the bound)")


def draw_slopes(axes, numbers):
    alphas = numbers["alphas"]
    for name, changes in ((EXACT, {}), (INEXACT, dict(linestyle="--", markerfacecolor="white"))):
        slopes, widths = zip(*(fitted(numbers, name, i) for i in range(len(alphas))))
        axes.errorbar(alphas, [-slope for slope in slopes], widths, capsize=3, label=name,
                      **look("muon", **changes))
    grid = np.linspace(min(alphas), max(alphas), 50)
    axes.plot(grid, -predicted(grid), color="black", linestyle=":",
              label="bound: (alpha - 1) / (3 alpha - 2)")
    axes.set(xlabel="tail index alpha of the noise", ylabel="fitted exponent, sign changed (bars: 95 %)",
             ylim=(0, None), title=f"Slope from T = {numbers['times'][-LAST]} on")


def figure(numbers):
    picture = new_figure(5)
    left, right = picture.subplots(1, 2)
    draw_norms(left, numbers)
    draw_slopes(right, numbers)
    legend_below(left, columns=2)
    legend_below(right)
    return picture
