"""Descent on matrix problems with every method on one grid of steps, for the experiments factorisation, in_context and decoupling."""
import torch
from matplotlib.figure import Figure

from lab import exponent, judge
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz

DIRECTIONS = {"Muon": msgn, "Muon, Newton-Schulz": newton_schulz, "gradient descent": lambda G: G, "Adam": None}
RATES = 2.0 ** torch.arange(-8, 7, dtype=torch.float64)
DECAYS = torch.tensor([1, 0.999, 0.99, 0.9, 0.75, 0.6], dtype=torch.float64)


def descend(method, gradient, error, start, rate, decay, target, limit):
    """Errors (iterations + 1, settings, repetitions) of X <- X - rate decay^t direction(gradient(X)), t = 0, 1, ...

    method is one of DIRECTIONS; Adam has betas (0.9, 0.999). start (repetitions, m, n); rate, decay (settings,). Ends after
    `limit` iterations, or as soon as every repetition of one setting has met the target.
    """
    X = start.expand(len(rate), *start.shape)
    m = v = 0
    errors = [error(X)]
    met = errors[0] <= target
    for t in range(limit):
        if met.all(-1).any():
            break
        G = gradient(X)
        if method == "Adam":
            m, v = 0.9 * m + 0.1 * G, 0.999 * v + 0.001 * G * G
            step = m / (1 - 0.9 ** (t + 1)) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-12)
        else:
            step = DIRECTIONS[method](G)
        X = X - (rate * decay ** t)[:, None, None, None] * step
        errors.append(error(X))
        met |= errors[-1] <= target
    return torch.stack(errors)


def fewest_iterations(method, problem, target, limit):
    """(iterations to the target at the best of RATES x DECAYS (repetitions,), errors there (iterations + 1, repetitions)).

    problem: (gradient, error, start) of descend. Iterations are infinite if no setting meets the target in every repetition.
    """
    rate, decay = (grid.flatten() for grid in torch.meshgrid(RATES, DECAYS, indexing="ij"))
    errors = descend(method, *problem, rate, decay, target, limit)
    met = errors <= target
    iterations = torch.where(met.any(0), met.int().argmax(0).double(), torch.inf)  # (settings, repetitions)
    best = iterations.amax(-1).argmin()
    return iterations[best], errors[:, best]


def sweep(problem, conditions, repetitions, target, limits, seed, quantity):
    """Iterations of each method against the condition number: (rows, figure, {(method, condition): median over the repetitions}).

    problem(condition, repetitions, generator) makes what fewest_iterations takes; limits: iterations allowed to (gradient descent
    and Adam, Muon); quantity: name of the error in the figure.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows, medians = [], {}
    for i, method in enumerate(DIRECTIONS):
        limit, counts = limits["Muon" in method], []
        for condition in conditions:
            found, errors = fewest_iterations(method, problem(condition, repetitions, torch.Generator().manual_seed(seed)), target, limit)
            counts.append(found)
            medians[method, condition] = found.median().item()
        counts = torch.stack(counts)  # (conditions, repetitions); infinite where the target was not met
        slope, width = exponent(torch.tensor(conditions)[:, None].expand_as(counts), counts.clamp(max=limit))
        missed = counts.isinf().any(1)
        prediction, holds = {
            "Muon": ("Muon: iterations do not grow with the condition number (exponent up to 0.1)",
                     not missed.any() and judge(slope, width, high=0.1)),
            "Muon, Newton-Schulz": ("Muon with five Newton-Schulz steps: not in the paper", None)}.get(
            method, (f"{method}: iterations grow with it (exponent over 0.1)", judge(slope, width, low=0.1)))
        listed = ", ".join(f"over {limit}" if medians[method, c] > limit else f"{medians[method, c]:.0f}" for c in conditions)
        rows.append((prediction, f"{listed} iterations; exponent {'over ' if missed.any() else ''}{slope:.2f} ± {width:.2f}", holds))
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
