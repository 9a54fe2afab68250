"""Does SignSGD need fewer steps than SGD under sparse noise, by a factor that grows like the dimension?

Measured is T, the first step at which the mean over t < T of E ||grad f(x_t)||_1 is at most epsilon. The paper: SGD's T over SignSGD's
is of order d where the noise sits on few coordinates, of order 1 where it is spread evenly; Muon likewise, on singular values. Its
lower-bound instance was not readable. This one is built so that the orders can be derived:

    f(x) = x_0^2 / 2 + h(x_1) + ... + h(x_d),  h'(x) = (2 epsilon / d) clip(x / 2, -1, 1);  x_0 = 0, x_i = 4 at first.

The slopes add up to 2 epsilon. Noise N(0, sigma^2) on coordinate 0 allows SGD a rate of order (epsilon / sigma)^2, with which the slopes
take of order d steps; SignSGD a rate of order epsilon^2 / sigma, with which they take the same number in every dimension: the
ratio is of order d. Without x_0 and with dense noise N(0, sigma^2 / d) on every coordinate instead, both take of order d steps.

Chosen here: epsilon = 1, sigma = 5, no momentum, constant rates; the expectation is a mean over 32 samples. Each rate is that of 2^-12,
2^-11.5, ... 1 with the fewest steps on samples of its own; T is then measured on new ones. All this is done 8 times, each with its own
choices, and an interval is one over these 8. Coordinates that move alike are simulated as one. Muon: the same instance on matrices of
side d + 1, with x_i = u_i^T W v_i in random orthonormal bases, noise on u_0 v_0^T; there the rate is 1/4 in every dimension. Then
||x||^2 / 2 under sparse noise, with f = 16 at the start: an ordinary function instead of a lower-bound instance.
"""
import math

import numpy as np
import torch
from matplotlib.figure import Figure

from lab import Result, exponent, judge, mean_interval
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz

SOURCE = ('Tao, Yu, Zhang, "When and Why SignSGD Outperforms SGD", [arXiv:2605.06615](https://arxiv.org/abs/2605.06615)')
SIGMA, START, COPIES = 5.0, 4.0, 32
RATES = 2.0 ** np.arange(-12, 0.1, 0.5)
UPDATES = {"SGD": lambda g: g, "SignSGD": np.sign}


def slope(x, d):
    return 2 / d * np.clip(x / 2, -1, 1)


def steps(case, update, d, rates, rng, limit=10 ** 6):
    """T in one of the cases sparse, dense and quadratic; rates and T (settings, repetitions).

    Ends after `limit` steps, or when every repetition has a T at one setting; T is infinite where it is not reached by then.
    """
    rates = rates[..., None]
    shape = (*rates.shape[:2], COPIES)
    noisy, free = np.zeros(shape), np.zeros_like(rates)  # x_0, or any coordinate under dense noise; x_i without noise
    free += {"sparse": START, "dense": 0, "quadratic": (32 / d) ** 0.5}[case]
    noisy += {"sparse": 0, "dense": START, "quadratic": (32 / d) ** 0.5}[case]
    total, done = np.zeros(shape[:2]), np.full(shape[:2], np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(1, limit + 1):
            if t % 500 == 1:
                noise = rng.standard_normal((500, *shape[1:])) * (SIGMA / d ** 0.5 if case == "dense" else SIGMA)
            g = slope(noisy, d) if case == "dense" else noisy
            if case == "dense":
                total += d * np.abs(g).mean(-1)
            else:
                still = slope(free, d) if case == "sparse" else free
                total += np.abs(g).mean(-1) + d * np.abs(still[..., 0])
                free = free - rates * update(still)
            noisy = noisy - rates * update(g + noise[(t - 1) % 500])
            if t % 5 == 0 or t < 100:
                done = np.where(np.isinf(done) & (total <= t), t, done)
                if np.isfinite(done).any(0).all():
                    break
    return done


def muon_steps(direction, d, rng, repetitions, rate=0.25, limit=2000):
    """T of each repetition of Muon on the sparse instance with matrices of side d + 1."""
    bases = rng.standard_normal((2, repetitions * COPIES, d + 1, d + 1))
    U, V = torch.linalg.qr(torch.from_numpy(bases))[0]
    W, total, done = START * U[..., 1:] @ V[..., 1:].mT, 0, np.full(repetitions, np.inf)
    for t in range(1, limit + 1):
        x = (U.mT @ W @ V).diagonal(dim1=-2, dim2=-1).numpy()
        g = np.concatenate([x[:, :1], slope(x[:, 1:], d)], -1)
        total = total + np.abs(g).sum(-1).reshape(repetitions, COPIES).mean(-1)
        done = np.where(np.isinf(done) & (total <= t), t, done)
        if np.isfinite(done).all():
            break
        g[:, 0] += SIGMA * rng.standard_normal(len(g))
        W = W - rate * direction((U * torch.from_numpy(g).unsqueeze(-2)) @ V.mT)
    return done


def tuned_steps(case, update, d, rng, repetitions):
    """(T of each repetition, whether a rate is at an end of the grid): each chooses its rate, and measures on new noise."""
    best = steps(case, update, d, RATES[:, None].repeat(repetitions, 1), rng).argmin(0)
    return steps(case, update, d, RATES[None, best], rng)[0], bool(np.isin(best, (0, len(RATES) - 1)).any())


def run(size="full", seed=0):
    dimensions, matrix_dimensions, repetitions = (10, 30, 100, 300, 1000), (4, 8, 16, 32, 64), 8
    if size == "small":
        dimensions, matrix_dimensions, repetitions = (10, 40), (4, 16), 8
    rng = np.random.default_rng(seed)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    fits, texts, medians, at_end = {}, {}, {}, []

    def measure(case, name, dimensions):
        """T (dimensions, repetitions)."""
        found, ends = zip(*(tuned_steps(case, UPDATES[name], d, rng, repetitions) for d in dimensions))
        at_end.append(any(ends))
        return np.stack(found)

    def show(case, dimensions, slow, fast, name, color):
        """Fits the exponent of slow / fast over the dimension in each repetition, and draws the ratios."""
        ratio = slow / fast
        fits[case] = mean_interval(np.array([exponent(dimensions, column)[0] for column in ratio.T]))
        middle = medians[case] = np.median(ratio, 1)
        right.errorbar(dimensions, middle, np.abs(np.stack([ratio.min(1), ratio.max(1)]) - middle), marker="o", capsize=3, color=color,
                       label=f"{name}: exponent {fits[case][0]:.2f}")
        listed = ", ".join(f"{x:.3g}" for x in middle)
        texts[case] = f"exponent {fits[case][0]:.2f} ± {fits[case][1]:.2f}; SGD takes {listed} times the steps"
        if any(at_end):
            texts[case] += "; a best rate is at an end of the grid"
            fits[case] = fits[case][0], math.inf  # open
        at_end.clear()

    for i, case in enumerate(("sparse", "dense", "quadratic")):
        counts = {name: measure(case, name, dimensions) for name in UPDATES}
        show(case, dimensions, counts["SGD"], counts["SignSGD"], case if case == "quadratic" else f"{case} noise", f"C{i}")
        for (name, count), line in zip(counts.items(), ("-", "--")):
            left.plot(dimensions, np.median(count, 1), line, marker="o", color=f"C{i}", label=f"{name}, {case}")
    for i, (case, direction) in enumerate((("Muon", msgn), ("Muon, five Newton-Schulz steps", newton_schulz))):
        slow = measure("sparse", "SGD", matrix_dimensions)
        fast = np.stack([muon_steps(direction, d, rng, repetitions) for d in matrix_dimensions])
        show(case, matrix_dimensions, slow, fast, case, f"C{i + 3}")
        left.plot(matrix_dimensions, np.median(fast, 1), ":", marker="s", color=f"C{i + 3}", label=case)
    ends = np.array([dimensions[0], dimensions[-1]])
    for power in (1, 0):
        line = medians["sparse" if power else "dense"][0] * (ends / ends[0]) ** power
        right.plot(ends, line, color="gray", linestyle=":", label="predicted: exponents 1 and 0" if power else None)
    left.set(xscale="log", yscale="log", xlabel="dimension d", ylabel="steps T (median)", title="steps until the mean gradient norm is 1")
    right.set(xscale="log", yscale="log", xlabel="dimension d", ylabel="T of SGD / T of SignSGD or Muon",
              title="ratio of steps (bars: all repetitions)", ylim=(0.1, 1e5))
    left.legend(fontsize=7, handlelength=4)
    right.legend(fontsize=7, loc="upper left")
    rows = [(prediction, texts[case], None if power is None else judge(*fits[case], power - 0.1, power + 0.1))
            for case, power, prediction in (
        ("sparse", 1, "sparse noise: SGD over SignSGD grows like d (exponent 1 within 0.1)"),
        ("dense", 0, "dense noise: it does not (exponent 0 within 0.1)"),
        ("Muon", 1, "sparse noise in singular values: SGD over Muon grows like d (exponent 1 within 0.1)"),
        ("Muon, five Newton-Schulz steps", None, "the same with five Newton-Schulz steps: not in the paper"),
        ("quadratic", None, "||x||^2 / 2, sparse noise: not in the paper"))]
    first, last = ({case: middle[end] for case, middle in medians.items()} for end in (0, -1))
    summary = (f"On an instance built for it SGD takes {first['sparse']:.0f} times as many steps as SignSGD in {dimensions[0]} dimensions "
               f"and {last['sparse']:.0f} times as many in {dimensions[-1]} (exponent {fits['sparse'][0]:.2f} ± {fits['sparse'][1]:.2f}), "
               f"under dense noise {first['dense']:.2f} and {last['dense']:.2f} times; over Muon the exponent is {fits['Muon'][0]:.2f}. "
               f"That is the worst case: on an ordinary quadratic under sparse noise the ratio falls from {first['quadratic']:.2f} to "
               f"{last['quadratic']:.2f}, so that tuned SGD wins in high dimensions.")
    return Result(rows, figure, summary, SOURCE)
