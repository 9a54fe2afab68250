"""Does the condition number slow Muon down on low-rank matrix factorisation?

f(X) = 1/4 ||X X^T - M||_F^2, X (n, r), M = U diag(s) U^T of rank r with s from 1 to 1 / condition, evenly
spaced in the logarithm; gradient (X X^T - M) X. The paper proves that simplified Muon,
X <- X - eta_t msgn(gradient) without momentum and with geometrically decaying eta_t, converges linearly in a
number of iterations that does not depend on the condition number, and that gradient descent's and Adam's do.

Chosen here: n = 40, r = 5; X starts with normal elements of standard deviation 1e-3; done when
||X X^T - M||_F <= 1e-5 ||M||_F (the smallest singular value is then right within 1.1 % at condition 1000).
Every method has the same grid: eta_0 = 2^-8, 2^-7, ... 2^10 times decay 1, 0.999, 0.99, 0.95, 0.9, ... 0.3;
the best setting is that whose slowest of 5 repetitions is done first. Where none inside the grid is as good
(constant steps count as inside) the row says so and stays open. Muon also with the trainer's five
Newton-Schulz steps in place of msgn.
"""
import torch

from lab import descent

SOURCE = descent.SOURCE
FULL = dict(conditions=(1, 10, 100, 1000), repetitions=5, limits=(20_000, 2_000))
SMALL = dict(conditions=(1, 30), repetitions=2, limits=(400, 400))


def factors(condition, repetitions, generator, n=40, r=5):
    """U (repetitions, n, r) and s (r,) of M."""
    s = torch.logspace(0, -torch.tensor(float(condition)).log10().item(), r, dtype=torch.float64)
    normal = torch.randn(repetitions, n, r, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(normal)[0], s


def problem(condition, repetitions, generator):
    """(gradient, error, start) for lab.descent of repetitions that differ in U and the start."""
    U, s = factors(condition, repetitions, generator)
    start = 1e-3 * torch.randn(U.shape, generator=generator, dtype=torch.float64)

    def gradient(X):
        return X @ (X.mT @ X) - (U * s) @ (U.mT @ X)

    def error(X):  # ||X X^T - M||_F / ||M||_F, from the r x r products
        P = X.mT @ X
        Q = U.mT @ X
        square = (P * P).sum((-2, -1)) - 2 * (Q * Q * s[:, None]).sum((-2, -1)) + (s * s).sum()
        return square.clamp(min=0).sqrt() / s.norm()

    return gradient, error, start


def measure(size="full", seed=0):
    return descent.measure_sweep(problem, target=1e-5, seed=seed, **(FULL if size == "full" else SMALL))


def rows(numbers):
    return descent.sweep_rows(numbers)


def summary(numbers):
    conditions = numbers["conditions"]
    ends = {}
    for method, found in numbers["methods"].items():
        medians = descent.median_counts(found)
        ends[method] = f"{medians[0]:.0f} and then {medians[-1]:.0f}"
    return (f"From condition number {conditions[0]} to {conditions[-1]}, exact Muon needs {ends['Muon']} "
            f"iterations, gradient descent {ends['gradient descent']}, Adam {ends['Adam']}. With the "
            "trainer's five Newton-Schulz steps in place of the exact factor Muon needs "
            f"{ends['Muon, Newton-Schulz']}.")


def figure(numbers):
    return descent.sweep_figure(numbers, "||X X^T - M|| / ||M|| (Frobenius)")
