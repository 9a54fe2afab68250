"""Does the condition number slow Muon down on a linear transformer that learns linear regression in context?

A layer of linear attention reads N examples (x_i, w . x_i) and answers x_q^T Gamma (1/N) sum_i x_i (w . x_i); x ~ N(0, L), w ~ N(0, I),
a new w in each prompt. Over all prompts its squared error is, with E = (1 + 1/N) L^2 + (tr L / N) L,

    f(Gamma) = 1/2 tr(L Gamma E Gamma^T - 2 L Gamma L + L),   gradient L (Gamma E - L),   minimum at Gamma = L E^-1.

The paper proves that simplified Muon (no momentum, exact msgn, geometrically decaying steps) converges linearly in a number of
iterations that does not depend on the condition number of L.

Chosen here: the merged key and query matrix Gamma is trained, the value weight is 1; population gradients; L (10, 10) with
eigenvalues from 1 to 1 / condition, evenly spaced in the logarithm, in a random basis (condition 3 and more: at 1 all are equal,
which is another problem); N = 100; Gamma starts with normal elements of standard deviation 1e-3; done when f - min f <= 1e-6 of its
value at Gamma = 0. The grid of steps is that of `factorisation`.
"""
import torch

from lab import Result
from lab.descent import SOURCE, growth, sweep


def spectra(condition, repetitions, generator, d=10, N=100):
    """The basis U (repetitions, d, d) that L and E share, and their eigenvalues (d,)."""
    values = torch.logspace(0, -torch.tensor(float(condition)).log10().item(), d, dtype=torch.float64)
    U = torch.linalg.qr(torch.randn(repetitions, d, d, generator=generator, dtype=torch.float64))[0]
    return U, values, (1 + 1 / N) * values ** 2 + values.sum() / N * values


def problem(condition, repetitions, generator):
    """(gradient, error, start) for lab.descent of repetitions that differ in the basis of L and the start."""
    U, l, e = spectra(condition, repetitions, generator)
    L, E, best = ((U * values) @ U.mT for values in (l, e, l / e))
    start = 1e-3 * torch.randn(U.shape, generator=generator, dtype=torch.float64)

    def gradient(X):
        return L @ (X @ E - L)

    def error(X):  # (f(X) - min f) / (f(0) - min f)
        return ((L @ (X - best)) * ((X - best) @ E)).sum((-2, -1)) / (l ** 3 / e).sum()

    return gradient, error, start


def run(size="full", seed=0):
    conditions, repetitions, limits = ((3, 10, 30, 100, 300, 1000), 5, (4_000, 1_500)) if size == "full" else ((3, 10), 2, (400, 100))
    rows, figure, medians = sweep(problem, conditions, repetitions, 1e-6, limits, seed, "excess loss / excess loss at Gamma = 0")
    problems = [problem(condition, repetitions, torch.Generator().manual_seed(seed)) for condition in conditions]
    # once more from 0, where the spectral coordinates are independent (lab/decoupling.py)
    problems = [(gradient, error, 0 * start) for gradient, error, start in problems]
    aligned, _, measured, holds = growth("Muon", problems, conditions, 1e-6, limits[1])
    rows.insert(1, ("the same from Gamma = 0", measured, holds))
    shown = {key: f"{count:.0f}" if count < torch.inf else f"more than {limits['Muon' in key[0]]}" for key, count in medians.items()}
    first, last = conditions[0], conditions[-1]
    summary = (f"Exact Muon needs {shown['Muon', first]} iterations at condition number {first} and {shown['Muon', last]} at {last} "
               f"({aligned[0].median():.0f} and {aligned[-1].median():.0f} from Gamma = 0); "
               f"gradient descent {shown['gradient descent', first]} and {shown['gradient descent', last]}, Adam {shown['Adam', first]} "
               f"and {shown['Adam', last]}. At the start the gradient's condition number is the square of the features', which the "
               f"trainer's five Newton-Schulz steps do not flatten: with them Muon needs {shown['Muon, Newton-Schulz', first]} and "
               f"{shown['Muon, Newton-Schulz', last]}.")
    return Result(rows, figure, summary, SOURCE)
