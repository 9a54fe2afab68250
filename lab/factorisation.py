"""Does the condition number slow Muon down on low-rank matrix factorisation?

f(X) = 1/4 ||X X^T - M||_F^2, X (n, r), M = U diag(s) U^T of rank r with s from 1 to 1 / condition, evenly spaced in the logarithm;
gradient (X X^T - M) X. The paper proves that simplified Muon, X <- X - eta_t msgn(gradient) without momentum and with
geometrically decaying eta_t, converges linearly in a number of iterations that does not depend on the condition number, and that
gradient descent's and Adam's do.

Chosen here: n = 40, r = 5; X starts with normal elements of standard deviation 1e-3; done when ||X X^T - M||_F <= 1e-5 ||M||_F (the
smallest singular value is then right within 1.1 % at condition 1000). Every method has the same grid: eta_0 = 2^-8, 2^-7, ... 2^10
times decay 1, 0.999, 0.99, 0.95, 0.9, ... 0.3; the best setting is that whose slowest of 5 repetitions is done first. Where none inside
the grid is as good (constant steps count as inside) the row says so and stays open. Muon also with the trainer's five Newton-Schulz
steps in place of msgn.
"""
import torch

from lab import Result
from lab.descent import SOURCE, sweep


def factors(condition, repetitions, generator, n=40, r=5):
    """U (repetitions, n, r) and s (r,) of M."""
    s = torch.logspace(0, -torch.tensor(float(condition)).log10().item(), r, dtype=torch.float64)
    return torch.linalg.qr(torch.randn(repetitions, n, r, generator=generator, dtype=torch.float64))[0], s


def problem(condition, repetitions, generator):
    """(gradient, error, start) for lab.descent of repetitions that differ in U and the start."""
    U, s = factors(condition, repetitions, generator)
    start = 1e-3 * torch.randn(U.shape, generator=generator, dtype=torch.float64)

    def gradient(X):
        return X @ (X.mT @ X) - (U * s) @ (U.mT @ X)

    def error(X):  # ||X X^T - M||_F / ||M||_F, from the r x r products
        P, Q = X.mT @ X, U.mT @ X
        return ((P * P).sum((-2, -1)) - 2 * (Q * Q * s[:, None]).sum((-2, -1)) + (s * s).sum()).clamp(min=0).sqrt() / s.norm()

    return gradient, error, start


def run(size="full", seed=0):
    conditions, repetitions, limits = ((1, 10, 100, 1000), 5, (20_000, 2_000)) if size == "full" else ((1, 30), 2, (400, 400))
    rows, figure, medians = sweep(problem, conditions, repetitions, 1e-5, limits, seed, "||X X^T - M|| / ||M|| (Frobenius)")
    ends = {method: " and then ".join(f"{medians[method, condition]:.0f}" for condition in (conditions[0], conditions[-1]))
            for method, _ in medians}
    summary = (f"From condition number {conditions[0]} to {conditions[-1]}, exact Muon needs {ends['Muon']} iterations, "
               f"gradient descent {ends['gradient descent']}, Adam {ends['Adam']}. "
               f"With the trainer's five Newton-Schulz steps in place of the exact factor Muon needs {ends['Muon, Newton-Schulz']}.")
    return Result(rows, figure, summary, SOURCE)
