"""Does the condition number slow Muon down on a linear transformer that learns linear regression in context?

A layer of linear attention reads N examples (x_i, w . x_i) and answers x_q^T Gamma (1/N) sum_i x_i (w . x_i);
x ~ N(0, L), w ~ N(0, I), a new w in each prompt. Over all prompts its squared error is, with
E = (1 + 1/N) L^2 + (tr L / N) L,

    f(Gamma) = 1/2 tr(L Gamma E Gamma^T - 2 L Gamma L + L),  gradient L (Gamma E - L),  minimum at L E^-1.

The paper proves that simplified Muon (no momentum, exact msgn, geometrically decaying steps) converges
linearly in a number of iterations that does not depend on the condition number of L.

Chosen here: the merged key and query matrix Gamma is trained, the value weight is 1; population gradients;
L (10, 10) with eigenvalues from 1 to 1 / condition, evenly spaced in the logarithm, in a random basis
(condition 3 and more: at 1 all are equal, which is another problem); N = 100; Gamma starts with normal
elements of standard deviation 1e-3; done when f - min f <= 1e-6 of its value at Gamma = 0. The grid of
steps is that of `factorisation`.
"""
import torch

from lab import descent

SOURCE = descent.SOURCE
FULL = dict(conditions=(3, 10, 30, 100, 300, 1000), repetitions=5, limits=(4_000, 1_500))
SMALL = dict(conditions=(3, 10), repetitions=2, limits=(400, 100))
TARGET = 1e-6


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


def problems_from_zero(conditions, repetitions, seed):
    """The same from Gamma = 0, where the spectral coordinates are independent (lab/decoupling.py)."""
    found = []
    for condition in conditions:
        gradient, error, start = problem(condition, repetitions, torch.Generator().manual_seed(seed))
        found.append((gradient, error, 0 * start))
    return found


def measure(size="full", seed=0):
    sizes = FULL if size == "full" else SMALL
    numbers = descent.measure_sweep(problem, target=TARGET, seed=seed, **sizes)
    problems = problems_from_zero(sizes["conditions"], sizes["repetitions"], seed)
    numbers["from_zero"] = descent.measure_growth("Muon", problems, TARGET, sizes["limits"][1])
    return numbers


def rows(numbers):
    found = descent.sweep_rows(numbers)
    found.insert(1, ("the same from Gamma = 0", *descent.growth(numbers["conditions"], numbers["from_zero"])))
    return found


def summary(numbers):
    first = {}
    last = {}
    for method, found in numbers["methods"].items():
        shown = [f"{count:.0f}" if count < torch.inf else f"more than {found['limit']}"
                 for count in descent.median_counts(found)]
        first[method] = shown[0]
        last[method] = shown[-1]
    zero = descent.median_counts(numbers["from_zero"])
    conditions = numbers["conditions"]
    return (f"Exact Muon needs {first['Muon']} iterations at condition number {conditions[0]} and "
            f"{last['Muon']} at {conditions[-1]} ({zero[0]:.0f} and {zero[-1]:.0f} from Gamma = 0); "
            f"gradient descent {first['gradient descent']} and {last['gradient descent']}, Adam "
            f"{first['Adam']} and {last['Adam']}. At the start the gradient's condition number is the "
            "square of the features', which the trainer's five Newton-Schulz steps do not flatten: with "
            f"them Muon needs {first['Muon, Newton-Schulz']} and {last['Muon, Newton-Schulz']}.")


def figure(numbers):
    return descent.sweep_figure(numbers, "excess loss / excess loss at Gamma = 0")
