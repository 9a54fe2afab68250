"""Descent on matrix problems, every method on one grid of steps, for factorisation and in_context."""
import numpy as np
import torch

from lab import exponent, judge, look, new_figure, thinned
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz

SOURCE = ('Ma, Huang, Chi, Chen, "Preconditioning Benefits of Spectral Orthogonalization in Muon", '
          "[arXiv:2601.13474](https://arxiv.org/abs/2601.13474)")
DIRECTIONS = {"Muon": msgn, "Muon, Newton-Schulz": newton_schulz, "gradient descent": lambda G: G,
              "Adam": None}
LOOKS = {"Muon": look("muon"), "Muon, Newton-Schulz": look("muon", linestyle="--", markerfacecolor="white"),
         "gradient descent": look("sgd"), "Adam": look("adamw")}
RATES = 2.0 ** torch.arange(-8, 11, dtype=torch.float64)
DECAYS = torch.tensor([1, 0.999, 0.99, *(0.05 * i for i in range(19, 5, -1))],  # ... 0.95, 0.9, ... 0.3
                      dtype=torch.float64)


def descend(method, gradient, error, start, rate, decay, target, limit):
    """Errors (iterations + 1, settings, repetitions) of X <- X - rate decay^t direction(gradient(X)).

    method is one of DIRECTIONS; Adam has betas (0.9, 0.999). start (repetitions, m, n); rate, decay
    (settings,); t = 0, 1, ... Ends after `limit` iterations, or as soon as every repetition of one setting
    has met the target. A setting that has diverged, or whose steps have shrunk below 1e-20, keeps its last
    errors.
    """
    X = start.expand(len(rate), *start.shape)
    m = torch.zeros_like(X)
    v = torch.zeros_like(X)
    live = torch.arange(len(rate))
    errors = [error(X)]
    met = errors[0] <= target
    for t in range(limit):
        if met.all(-1).any():
            break
        moves = (rate[live] * decay[live] ** t > 1e-20) & errors[-1][live].isfinite().all(-1)
        if not moves.all():
            X, m, v, live = (values[moves] for values in (X, m, v, live))
        G = gradient(X)
        if method == "Adam":
            m = 0.9 * m + 0.1 * G
            v = 0.999 * v + 0.001 * G * G
            step = m / (1 - 0.9 ** (t + 1)) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-12)
        else:
            step = DIRECTIONS[method](G)
        X = X - (rate[live] * decay[live] ** t)[:, None, None, None] * step
        errors.append(errors[-1].index_copy(0, live, error(X)))
        met |= errors[-1] <= target
    return torch.stack(errors)


def fewest_iterations(method, problem, target, limit):
    """(iterations to the target (repetitions,), errors (iterations + 1, repetitions), whether at an end).

    All are those of the best of the settings RATES x DECAYS; problem: (gradient, error, start) of descend.
    Iterations are infinite if no setting meets the target in every repetition. The best is the setting whose
    slowest repetition is done first; it is at an end if none inside the grid is as good. Constant steps,
    decay 1, are no end: what the paper allows ends there too.
    """
    rate, decay = (grid.flatten() for grid in torch.meshgrid(RATES, DECAYS, indexing="ij"))
    errors = descend(method, *problem, rate, decay, target, limit)
    met = errors <= target
    iterations = torch.where(met.any(0), met.int().argmax(0).double(), torch.inf)  # (settings, repetitions)
    slowest = iterations.amax(-1)
    inside = (rate > RATES[0]) & (rate < RATES[-1]) & (decay > DECAYS[-1])
    best = slowest.argmin()
    return iterations[best], errors[:, best], bool(slowest[inside].min() > slowest[best])


def measure_growth(method, problems, target, limit):
    """Iterations to the target on these problems.

    counts   (problems, repetitions), infinite where the target is not met
    at_end   for each problem whether its best setting is at an end of the grid
    curve    [iterations + 1, median errors there] on the last problem
    """
    counts = []
    at_end = []
    for problem in problems:
        iterations, errors, end = fewest_iterations(method, problem, target, limit)
        counts.append(iterations.tolist())
        at_end.append(end)
    return dict(limit=limit, counts=counts, at_end=at_end, curve=thinned(errors.median(-1).values))


def median_counts(found):
    """For each condition; the median of an even number of repetitions is the lower one in the middle."""
    return torch.tensor(found["counts"], dtype=torch.float64).median(1).values


def growth(conditions, found):
    """(the exponent of the iterations over the condition and the iterations, as text; is it up to 0.1?).

    Where the target is not met, the exponent with the limit in place of the count is a lower bound. The
    verdict is open if a best setting is at an end of the grid.
    """
    limit = found["limit"]
    counts = torch.tensor(found["counts"], dtype=torch.float64)
    missed = bool(counts.isinf().any())
    x = torch.tensor(conditions)[:, None].expand_as(counts)
    slope, width = exponent(x, counts.clamp(max=limit))
    listed = [f"over {limit}" if count > limit else f"{count:.0f}" for count in median_counts(found)]
    over = "over " if missed else ""
    text = f"{', '.join(listed)} iterations; exponent {over}{slope:.2f} ± {width:.2f}"
    ends = [str(condition) for condition, end in zip(conditions, found["at_end"]) if end]
    if ends:
        return f"{text}; best at an end of the grid at condition {', '.join(ends)}", None
    within = judge(slope, width, high=0.1)
    if missed and within:
        within = None
    return text, within


def measure_sweep(problem, conditions, repetitions, target, limits, seed):
    """{method: measure_growth} over the condition number.

    problem(condition, repetitions, generator) makes what fewest_iterations takes; limits: iterations allowed
    to (gradient descent and Adam, Muon).
    """
    found = {}
    for method in DIRECTIONS:
        problems = [problem(condition, repetitions, torch.Generator().manual_seed(seed))
                    for condition in conditions]
        found[method] = measure_growth(method, problems, target, limits["Muon" in method])
    return dict(conditions=conditions, target=target, methods=found)


def sweep_rows(numbers):
    """A row for each method, in the order of DIRECTIONS."""
    found = []
    for method, measured in numbers["methods"].items():
        text, within = growth(numbers["conditions"], measured)
        if method == "Muon":
            found.append(("Muon: iterations do not grow with the condition number (exponent up to 0.1)",
                          text, within))
        elif method == "Muon, Newton-Schulz":
            found.append(("Muon with five Newton-Schulz steps: not in the paper", text, None))
        else:
            grows = None if within is None else not within
            found.append((f"{method}: iterations grow with it (exponent over 0.1)", text, grows))
    return found


def draw_counts(axes, method, conditions, found):
    counts = np.array(found["counts"])
    shown = counts.clip(max=found["limit"])
    middle = np.median(shown, axis=1)
    bars = [middle - shown.min(1), shown.max(1) - middle]
    axes.errorbar(conditions, middle, bars, capsize=3, label=method, **LOOKS[method])
    missed = np.isinf(counts).any(1)
    axes.plot(np.array(conditions)[missed], middle[missed], "^", color=LOOKS[method]["color"], markersize=11)


def sweep_figure(numbers, quantity):
    """quantity: name of the error."""
    conditions = numbers["conditions"]
    picture = new_figure(4.6)
    left, right = picture.subplots(1, 2)
    for method, found in numbers["methods"].items():
        draw_counts(left, method, conditions, found)
        right.loglog(*found["curve"], **LOOKS[method] | dict(marker=""))
    first = float(median_counts(numbers["methods"]["Muon"])[0])
    left.axhline(first, color="gray", linewidth=5, alpha=0.3, label="predicted for Muon: constant")
    left.set(xscale="log", yscale="log", xlabel="condition number", ylabel="iterations to the target",
             title="Median and range (large triangle: not met)")
    right.axhline(numbers["target"], color="gray", linestyle=":", label="target")
    right.set(xlabel="iteration + 1", ylabel=quantity, title=f"Condition number {conditions[-1]}")
    right.set_ylim(bottom=numbers["target"] / 5)
    picture.legend(loc="outside lower center", ncols=3, fontsize=9, handlelength=4)
    return picture
