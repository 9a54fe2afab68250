"""Does SignSGD need fewer steps than SGD under sparse noise, by a factor that grows like the dimension?

Measured is T, the first step at which the mean over t < T of E ||grad f(x_t)||_1 is at most epsilon. The
paper: SGD's T over SignSGD's is of order d where the noise sits on few coordinates, of order 1 where it is
spread evenly; Muon likewise, on singular values. Its lower-bound instance was not readable. This one is built
so that the orders can be derived:

    f(x) = x_0^2 / 2 + h(x_1) + ... + h(x_d),  h'(x) = (2 epsilon / d) clip(x / 2, -1, 1)

with x_0 = 0, x_i = 4 at first. The slopes add up to 2 epsilon. Noise N(0, sigma^2) on coordinate 0 allows SGD
a rate of order (epsilon / sigma)^2, with which the slopes take of order d steps; SignSGD a rate of order
epsilon^2 / sigma, with which they take the same number in every dimension: the ratio is of order d. Without
x_0 and with dense noise N(0, sigma^2 / d) on every coordinate instead, both take of order d steps.

Chosen here: epsilon = 1, sigma = 5, no momentum, constant rates; the expectation is a mean over 32 samples.
Each rate is that of 2^-12, 2^-11.5, ... 1 with the fewest steps on samples of its own; T is then measured
on new ones. All this is done 8 times, each with its own choices, and an interval is one over these 8.
Coordinates that move alike are simulated as one. Muon: the same instance on matrices of side d + 1, with
x_i = u_i^T W v_i in random orthonormal bases, noise on u_0 v_0^T; there the rate is 1/4 in every dimension.
Then ||x||^2 / 2 under sparse noise, with f = 16 at the start: an ordinary function instead of a lower-bound
instance.
"""
import numpy as np
import torch

from lab import exponent, interval, judge, look, new_figure
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz

SOURCE = ('Tao, Yu, Zhang, "When and Why SignSGD Outperforms SGD", '
          "[arXiv:2605.06615](https://arxiv.org/abs/2605.06615)")
SIGMA, START, COPIES = 5.0, 4.0, 32
RATES = 2.0 ** np.arange(-12, 0.1, 0.5)
UPDATES = {"SGD": lambda g: g, "SignSGD": np.sign}
CASES = ("sparse", "dense", "quadratic")
DIRECTIONS = {"Muon": msgn, "Muon, five Newton-Schulz steps": newton_schulz}


def slope(x, d):
    return 2 / d * np.clip(x / 2, -1, 1)


def steps(case, update, d, rates, rng, limit=10 ** 6):
    """T in one of the cases sparse, dense and quadratic; rates and T (settings, repetitions).

    Ends after `limit` steps, or when every repetition has a T at one setting; T is infinite where it is not
    reached by then.
    """
    rates = rates[..., None]
    shape = (*rates.shape[:2], COPIES)
    radius = (32 / d) ** 0.5
    noisy_start = {"sparse": 0, "dense": START, "quadratic": radius}[case]
    free_start = {"sparse": START, "dense": 0, "quadratic": radius}[case]
    noisy = np.full(shape, float(noisy_start))  # x_0, or any coordinate under dense noise
    free = np.full_like(rates, float(free_start))  # an x_i without noise
    total = np.zeros(shape[:2])
    done = np.full(shape[:2], np.inf)
    sd = SIGMA / d ** 0.5 if case == "dense" else SIGMA
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(1, limit + 1):
            if t % 500 == 1:
                noise = rng.standard_normal((500, *shape[1:])) * sd
            if case == "dense":
                g = slope(noisy, d)
                total += d * np.abs(g).mean(-1)
            else:
                g = noisy
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
    W = START * U[..., 1:] @ V[..., 1:].mT
    total = 0
    done = np.full(repetitions, np.inf)
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
    """(T of each repetition, whether a rate is at an end of the grid).

    Each repetition chooses its rate, and measures on new noise.
    """
    best = steps(case, update, d, RATES[:, None].repeat(repetitions, 1), rng).argmin(0)
    at_end = bool(np.isin(best, (0, len(RATES) - 1)).any())
    return steps(case, update, d, RATES[None, best], rng)[0], at_end


def measure_case(case, name, dimensions, rng, repetitions):
    """(T (dimensions, repetitions) of SGD or SignSGD, whether a best rate is at an end of the grid)."""
    found = [tuned_steps(case, UPDATES[name], d, rng, repetitions) for d in dimensions]
    return [count.tolist() for count, _ in found], any(at_end for _, at_end in found)


def measure(size="full", seed=0):
    """Of each case T of SGD, "slow", and of the other, "fast": (dimensions, repetitions)."""
    dimensions, matrix_dimensions, repetitions = (10, 30, 100, 300, 1000), (4, 8, 16, 32, 64), 8
    if size == "small":
        dimensions, matrix_dimensions = (10, 40), (4, 16)
    rng = np.random.default_rng(seed)
    cases = {}
    for case in CASES:
        slow, slow_end = measure_case(case, "SGD", dimensions, rng, repetitions)
        fast, fast_end = measure_case(case, "SignSGD", dimensions, rng, repetitions)
        cases[case] = dict(dimensions=dimensions, slow=slow, fast=fast, at_end=slow_end or fast_end)
    for case, direction in DIRECTIONS.items():
        slow, at_end = measure_case("sparse", "SGD", matrix_dimensions, rng, repetitions)
        fast = [muon_steps(direction, d, rng, repetitions).tolist() for d in matrix_dimensions]
        cases[case] = dict(dimensions=matrix_dimensions, slow=slow, fast=fast, at_end=at_end)
    return dict(cases=cases)


def ratios(found):
    """T of SGD over that of the other: (dimensions, repetitions)."""
    return np.array(found["slow"]) / np.array(found["fast"])


def fitted(found):
    """(exponent of the ratio over the dimension, half-width): fitted in each repetition."""
    return interval([exponent(found["dimensions"], column)[0] for column in ratios(found).T])


def row(prediction, found, power):
    """power: the predicted exponent, or None."""
    mean, width = fitted(found)
    listed = ", ".join(f"{x:.3g}" for x in np.median(ratios(found), 1))
    measured = f"exponent {mean:.2f} ± {width:.2f}; SGD takes {listed} times the steps"
    if found["at_end"]:
        measured += "; a best rate is at an end of the grid"
    if power is None or found["at_end"]:
        return prediction, measured, None
    return prediction, measured, judge(mean, width, power - 0.1, power + 0.1)


def rows(numbers):
    predictions = [
        ("sparse", 1, "sparse noise: SGD over SignSGD grows like d (exponent 1 within 0.1)"),
        ("dense", 0, "dense noise: it does not (exponent 0 within 0.1)"),
        ("Muon", 1, "sparse noise in singular values: SGD over Muon grows like d (exponent 1 within 0.1)"),
        ("Muon, five Newton-Schulz steps", None,
         "the same with five Newton-Schulz steps: not in the paper"),
        ("quadratic", None, "||x||^2 / 2, sparse noise: not in the paper")]
    return [row(prediction, numbers["cases"][case], power) for case, power, prediction in predictions]


def summary(numbers):
    cases = numbers["cases"]
    dimensions = cases["sparse"]["dimensions"]
    medians = {case: np.median(ratios(found), 1) for case, found in cases.items()}
    first = {case: values[0] for case, values in medians.items()}
    last = {case: values[-1] for case, values in medians.items()}
    mean, width = fitted(cases["sparse"])
    return (f"On an instance built for it SGD takes {first['sparse']:.0f} times as many steps as SignSGD in "
            f"{dimensions[0]} dimensions and {last['sparse']:.0f} times as many in {dimensions[-1]} "
            f"(exponent {mean:.2f} ± {width:.2f}), under dense noise {first['dense']:.2f} and "
            f"{last['dense']:.2f} times; over Muon the exponent is {fitted(cases['Muon'])[0]:.2f}. That is "
            "the worst case: on an ordinary quadratic under sparse noise the ratio falls from "
            f"{first['quadratic']:.2f} to {last['quadratic']:.2f}, so that tuned SGD wins in high "
            "dimensions.")


LINES = {"sparse": "-", "dense": "--", "quadratic": ":"}
LOOKS = {case: look("signsgd", linestyle=line) for case, line in LINES.items()}
LOOKS |= {"Muon": look("muon"),
          "Muon, five Newton-Schulz steps": look("muon", linestyle="--", markerfacecolor="white")}


def name_of(case):
    if case in DIRECTIONS:
        return f"{case}, sparse noise".replace("Muon, five Newton-Schulz steps", "Muon with Newton-Schulz")
    return {"sparse": "SignSGD, sparse noise", "dense": "SignSGD, dense noise",
            "quadratic": "SignSGD, quadratic"}[case]


def figure(numbers):
    picture = new_figure(5.2)
    left, right = picture.subplots(1, 2)
    for case, found in numbers["cases"].items():
        dimensions = found["dimensions"]
        left.plot(dimensions, np.median(found["fast"], 1), label=name_of(case), **LOOKS[case])
        if case in CASES:
            left.plot(dimensions, np.median(found["slow"], 1), label=name_of(case).replace("SignSGD", "SGD"),
                      **look("sgd", linestyle=LINES[case]))
        ratio = ratios(found)
        middle = np.median(ratio, 1)
        bars = [middle - ratio.min(1), ratio.max(1) - middle]
        right.errorbar(dimensions, middle, bars, capsize=3, **LOOKS[case])
    ends = np.array(numbers["cases"]["sparse"]["dimensions"])[[0, -1]]
    for case, power in (("sparse", 1), ("dense", 0)):
        first = np.median(ratios(numbers["cases"][case]), 1)[0]
        label = "predicted for SignSGD: exponents 1 and 0" if power else None
        right.plot(ends, first * (ends / ends[0]) ** power, color="gray", linewidth=4, alpha=0.4, label=label)
    left.set(xscale="log", yscale="log", xlabel="dimension d", ylabel="T (median)",
             title="Steps T until the mean gradient norm is 1")
    right.set(xscale="log", yscale="log", xlabel="dimension d", ylabel="T of SGD / T of SignSGD or Muon",
              title="Ratio of steps (bars: all repetitions)")
    picture.legend(loc="outside lower center", ncols=2, fontsize=9, handlelength=4)
    return picture
