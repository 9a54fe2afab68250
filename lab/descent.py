"""Descent on matrix problems with every method on one grid of steps, for the experiments factorisation, in_context and decoupling."""
import torch
from matplotlib.figure import Figure

from lab import exponent, judge
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz

SOURCE = ('Ma, Huang, Chi, Chen, "Preconditioning Benefits of Spectral Orthogonalization in Muon", '
          "[arXiv:2601.13474](https://arxiv.org/abs/2601.13474)")
DIRECTIONS = {"Muon": msgn, "Muon, Newton-Schulz": newton_schulz, "gradient descent": lambda G: G, "Adam": None}
RATES = 2.0 ** torch.arange(-8, 11, dtype=torch.float64)
DECAYS = torch.tensor([1, 0.999, 0.99, *(0.05 * i for i in range(19, 5, -1))], dtype=torch.float64)  # ... 0.95, 0.9, ... 0.3


def descend(method, gradient, error, start, rate, decay, target, limit):
    """Errors (iterations + 1, settings, repetitions) of X <- X - rate decay^t direction(gradient(X)), t = 0, 1, ...

    method is one of DIRECTIONS; Adam has betas (0.9, 0.999). start (repetitions, m, n); rate, decay (settings,). Ends after
    `limit` iterations, or as soon as every repetition of one setting has met the target. A setting that has diverged, or whose steps
    have shrunk below 1e-20, keeps its last errors.
    """
    X = start.expand(len(rate), *start.shape)
    m = v = torch.zeros_like(X)
    errors, live = [error(X)], torch.arange(len(rate))
    met = errors[0] <= target
    for t in range(limit):
        if met.all(-1).any():
            break
        moves = (rate[live] * decay[live] ** t > 1e-20) & errors[-1][live].isfinite().all(-1)
        if not moves.all():
            X, m, v, live = X[moves], m[moves], v[moves], live[moves]
        G = gradient(X)
        if method == "Adam":
            m, v = 0.9 * m + 0.1 * G, 0.999 * v + 0.001 * G * G
            step = m / (1 - 0.9 ** (t + 1)) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-12)
        else:
            step = DIRECTIONS[method](G)
        X = X - (rate[live] * decay[live] ** t)[:, None, None, None] * step
        errors.append(errors[-1].index_copy(0, live, error(X)))
        met |= errors[-1] <= target
    return torch.stack(errors)


def fewest_iterations(method, problem, target, limit):
    """(iterations to the target at the best of RATES x DECAYS (repetitions,), errors there (iterations + 1, repetitions), at an end).

    problem: (gradient, error, start) of descend. Iterations are infinite if no setting meets the target in every repetition. The best
    is the setting whose slowest repetition is done first; it is at an end if none inside the grid is as good. Constant steps, decay 1,
    are no end: what the paper allows ends there too.
    """
    rate, decay = (grid.flatten() for grid in torch.meshgrid(RATES, DECAYS, indexing="ij"))
    errors = descend(method, *problem, rate, decay, target, limit)
    met = errors <= target
    iterations = torch.where(met.any(0), met.int().argmax(0).double(), torch.inf)  # (settings, repetitions)
    slowest, inside = iterations.amax(-1), (rate > RATES[0]) & (rate < RATES[-1]) & (decay > DECAYS[-1])
    best = slowest.argmin()
    return iterations[best], errors[:, best], bool(slowest[inside].min() > slowest[best])


def growth(method, problems, conditions, target, limit):
    """(counts (conditions, repetitions), errors at the last condition, the exponent and what it rests on as text, whether it is up to 0.1).

    Where the target is not met the count is infinite, and the exponent, with `limit` in its place, a lower bound. Open if a best setting
    is at an end of the grid.
    """
    counts, errors, ends = zip(*(fewest_iterations(method, problem, target, limit) for problem in problems))
    counts = torch.stack(counts)
    slope, width = exponent(torch.tensor(conditions)[:, None].expand_as(counts), counts.clamp(max=limit))
    missed = bool(counts.isinf().any())
    listed = ", ".join(f"over {limit}" if count > limit else f"{count:.0f}" for count in counts.median(1).values)
    text = f"{listed} iterations; exponent {'over ' * missed}{slope:.2f} ± {width:.2f}"
    if any(ends):
        text += "; best at an end of the grid at condition " + ", ".join(str(c) for c, end in zip(conditions, ends) if end)
    within = judge(slope, width, high=0.1)
    return counts, errors[-1], text, None if any(ends) or missed and within else within


def sweep(problem, conditions, repetitions, target, limits, seed, quantity):
    """Iterations of each method against the condition number: (rows, figure, {(method, condition): median over the repetitions}).

    problem(condition, repetitions, generator) makes what fewest_iterations takes; limits: iterations allowed to (gradient descent
    and Adam, Muon); quantity: name of the error in the figure.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows, medians = [], {}
    for i, method in enumerate(DIRECTIONS):
        problems = [problem(condition, repetitions, torch.Generator().manual_seed(seed)) for condition in conditions]
        counts, errors, measured, within = growth(method, problems, conditions, target, limits["Muon" in method])
        medians |= {(method, condition): count.median().item() for condition, count in zip(conditions, counts)}
        prediction, holds = {
            "Muon": ("Muon: iterations do not grow with the condition number (exponent up to 0.1)", within),
            "Muon, Newton-Schulz": ("Muon with five Newton-Schulz steps: not in the paper", None)}.get(
            method, (f"{method}: iterations grow with it (exponent over 0.1)", None if within is None else not within))
        rows.append((prediction, measured, holds))
        limit, missed = limits["Muon" in method], counts.isinf().any(1)
        low, middle, high = counts.clamp(max=limit).quantile(torch.tensor([0.0, 0.5, 1.0], dtype=counts.dtype), dim=1)
        left.errorbar(conditions, middle, torch.stack([middle - low, high - middle]), color=f"C{i}", marker="o", capsize=3, label=method)
        left.plot([c for c, late in zip(conditions, missed) if late], middle[missed], "^", color=f"C{i}", markersize=11)
        middle = errors.median(-1).values
        right.loglog(range(1, len(middle) + 1), middle, color=f"C{i}", label=method)
    left.axhline(medians["Muon", conditions[0]], color="gray", linestyle=":", label="prediction for Muon: constant")
    left.set(xscale="log", yscale="log", xlabel="condition number", ylabel="iterations to the target (median; bars: all repetitions)",
             title="best setting of the same grid for each\n(triangles: not met within the iterations allowed)")
    right.axhline(target, color="gray", linestyle=":", label="target")
    right.set(xlabel="iteration + 1", ylabel=quantity, title=f"condition number {conditions[-1]}")
    right.set_ylim(bottom=target / 5)
    left.legend(fontsize=8)
    return rows, figure, medians
