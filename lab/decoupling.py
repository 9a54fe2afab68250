"""Do the singular values move as independent scalar sequences under Muon?

With U and s as in `factorisation`, or the eigenvectors of L in `in_context`, the paper finds that simplified
Muon moves each spectral coordinate as if it were alone:

    factorisation   X_t = U diag(a_t) O          a_i <- a_i - eta_t sign((a_i^2 - s_i) a_i)
    in context      Gamma_t = U diag(a_t) U^T    a_i <- a_i - eta_t sign(e_i a_i - l_i)

with l and e the eigenvalues of L and E. The second is exact from Gamma = 0, the first from a start
U diag(a_0) O with any orthogonal O. From a small start, ||X_0||_F = alpha, the first step is along U O,
O = msgn(diag(s) U^T X_0), so that the rest is of order alpha. Measured and predicted sequences take the same
steps eta_t = eta_0 decay^t; the deviation is ||X_t - U diag(a_t) O||_F / max |a_t|.

Chosen here: condition number 100; eta_0 = 0.5 and decay 0.75 (factorisation), 4 and 0.9 (in context), 40
iterations, 5 repetitions; normal starts with alpha = 1e-2 to 1e-8, where the prediction starts from a_0 =
0+. Also with the trainer's five Newton-Schulz steps in place of msgn, and in float32, to see what rounding
does: it may grow, as the paper does not say that the sequences attract.
"""
import numpy as np
import torch

from lab import descent, exponent, factorisation, in_context, judge, legend_below, new_figure
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz

SOURCE = descent.SOURCE
CONDITION = 100
REPETITIONS = 5
ALIGNED = "factorisation, aligned start"
ROUGH = "the same with Newton-Schulz"
CONTEXT = "in context"
SINGLE = "in context, float32"


def small_start(alpha):
    return f"factorisation, start of size {alpha:g}"


def follow(gradient, X, a, U, V, scalar, steps, direction=msgn):
    """Muon from X and the scalar sequences from a, under the same steps; U and V give the coordinates.

    Returns the measured coordinates and the predicted ones, (t, repetitions, r), and the deviations,
    (t, repetitions).
    """
    measured = []
    predicted = []
    apart = []
    for step in steps:
        X = X - step * direction(gradient(X))
        a = a - step * scalar(a).sign()
        measured.append((U.mT @ X @ V).diagonal(dim1=-2, dim2=-1))
        predicted.append(a)
        apart.append(torch.linalg.matrix_norm(X - (U * a.unsqueeze(-2)) @ V.mT) / a.abs().amax(-1))
    return torch.stack(measured), torch.stack(predicted), torch.stack(apart).double()


def factorisation_runs(alphas, t, generator, seed):
    """{name: follow(...)} from an aligned start and from small ones."""
    gradient, *_ = factorisation.problem(CONDITION, REPETITIONS, generator.manual_seed(seed))
    U, s = factorisation.factors(CONDITION, REPETITIONS, generator.manual_seed(seed))  # those of the gradient
    steps = 0.5 * 0.75 ** t

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def scalar(a):
        return (a * a - s) * a

    V = torch.linalg.qr(normal(REPETITIONS, len(s), len(s)))[0]
    a = 0.1 * normal(REPETITIONS, len(s)).abs()
    runs = {ALIGNED: follow(gradient, (U * a.unsqueeze(-2)) @ V.mT, a, U, V, scalar, steps)}
    for alpha in alphas:
        X = normal(*U.shape)
        X = alpha * X / torch.linalg.matrix_norm(X, keepdim=True)
        V = msgn(s[:, None] * (U.mT @ X)).mT
        start = gradient, X, torch.full_like(a, 1e-30), U, V, scalar, steps
        runs[small_start(alpha)] = follow(*start)
    runs[ROUGH] = follow(*start, newton_schulz)  # from the smallest start
    return runs


def in_context_run(t, generator, dtype):
    U, l, e = (x.to(dtype) for x in in_context.spectra(CONDITION, REPETITIONS, generator))
    L = (U * l) @ U.mT
    E = (U * e) @ U.mT

    def gradient(X):
        return L @ (X @ E - L)

    def scalar(a):
        return l * (e * a - l)

    steps = (4 * 0.9 ** t).to(dtype)
    return follow(gradient, torch.zeros_like(U), torch.zeros_like(U[:, 0]), U, U, scalar, steps)


def measure(size="full", seed=0):
    """Deviations {run: (t, repetitions)}, and of two runs the coordinates (t, r) in one repetition."""
    alphas = (1e-2, 1e-4, 1e-6, 1e-8) if size == "full" else (1e-2, 1e-5, 1e-8)
    t = torch.arange(40, dtype=torch.float64)
    generator = torch.Generator()
    runs = factorisation_runs(alphas, t, generator, seed)
    for dtype, name in ((torch.float64, CONTEXT), (torch.float32, SINGLE)):
        runs[name] = in_context_run(t, generator.manual_seed(seed), dtype)
    coordinates = {}
    for name in (small_start(alphas[0]), CONTEXT):
        measured, predicted, _ = runs[name]
        coordinates[name] = dict(measured=measured[:, 0].tolist(), predicted=predicted[:, 0].tolist())
    deviations = {name: apart.tolist() for name, (_, _, apart) in runs.items()}
    return dict(alphas=alphas, deviations=deviations, coordinates=coordinates)


def deviation(numbers, name, iterations=40):
    """(iterations, repetitions)."""
    return np.array(numbers["deviations"][name])[:iterations]


def rounding_growth(numbers):
    """By what factor the deviation grows in an iteration."""
    context = deviation(numbers, CONTEXT)
    return float(torch.tensor((context[-1] / context[4]) ** (1 / 35)).median())


def largest_from_small_starts(numbers, iterations):
    """Largest deviation within so many iterations, (starts, repetitions)."""
    starts = [small_start(alpha) for alpha in numbers["alphas"]]
    return np.array([deviation(numbers, name, iterations).max(0) for name in starts])


def small_start_row(numbers, iterations, words):
    largest = largest_from_small_starts(numbers, iterations)
    alphas = np.array(numbers["alphas"])[:, None]
    slope, width = exponent(np.repeat(alphas, largest.shape[1], 1), largest)
    relative = largest / alphas
    digits = 1 if iterations == 10 else 0
    return (f"factorisation, small start: {words} {iterations} iterations",
            f"exponent {slope:.2f} ± {width:.2f}; {relative.min():.1f} to {relative.max():.{digits}f} alpha",
            judge(slope, width, 0.9, 1.1))


def rows(numbers):
    aligned = deviation(numbers, ALIGNED).max()
    early = deviation(numbers, CONTEXT, 10).max()
    context = deviation(numbers, CONTEXT).max()
    single = deviation(numbers, SINGLE).max()
    rough = deviation(numbers, ROUGH, 10).max()
    return [
        ("factorisation, aligned start: exact (deviation up to 1e-9 in 40 iterations)", f"{aligned:.0e}",
         bool(aligned < 1e-9)),
        ("in context, start at 0: exact (up to 1e-9 in 10 iterations)", f"{early:.0e}", bool(early < 1e-9)),
        ("in context: still exact (up to 1e-9) after 40 iterations",
         f"{context:.0e}: rounding grows {rounding_growth(numbers):.2f}-fold an iteration (float32: "
         f"{single:.0e})",
         bool(context < 1e-9)),
        small_start_row(numbers, 10, "of order alpha (exponent 1 within 0.1) in"),
        small_start_row(numbers, 40, "still of order alpha after"),
        (f"Newton-Schulz, start of size {numbers['alphas'][-1]:g}: not in the paper",
         f"{rough:.1f} in 10 iterations", None)]


def summary(numbers):
    relative = largest_from_small_starts(numbers, 10) / np.array(numbers["alphas"])[:, None]
    rough = torch.tensor(deviation(numbers, ROUGH, 10)).median()
    return ("In the first 10 iterations the coordinates follow their scalar sequences: within "
            f"{deviation(numbers, CONTEXT, 10).max():.0e} of the largest in context, "
            f"{deviation(numbers, ALIGNED, 10).max():.0e} in a factorisation with an aligned start, and up "
            f"to {relative.max():.1f} alpha from a random start of size alpha, which the first step aligns. "
            "But the sequences do not attract: in context rounding grows "
            f"{rounding_growth(numbers):.2f}-fold an iteration, to {deviation(numbers, CONTEXT).max():.0e} "
            "after 40, and with five Newton-Schulz steps, whose factor is only roughly orthogonal, the "
            f"prediction is off by {rough:.1f} within 10.")


def draw_coordinates(axes, name, coordinates):
    """Measured as dots, predicted as lines."""
    measured = np.array(coordinates["measured"])
    t = np.arange(1, len(measured) + 1)
    for i, (dots, line) in enumerate(zip(measured.T, np.array(coordinates["predicted"]).T)):
        axes.plot(t, line, color="black", linewidth=0.8)
        axes.plot(t, dots, "o", color=f"C{i}", markersize=3.5)
    axes.set(xlabel="iteration", ylabel="spectral coordinate $a_i$", title=name.capitalize())


def draw_deviations(axes, numbers):
    for i, name in enumerate(numbers["deviations"]):
        middle = np.median(deviation(numbers, name), axis=1).clip(1e-17)
        line = "-" if "context" in name else "--"
        axes.semilogy(range(1, 41), middle, line, color=f"C{i}", marker="osv^D<>P"[i],
                      markevery=(3 * i % 8, 8), markersize=5, label=name)
    axes.set(xlabel="iteration", ylabel="deviation (median)",
             title="Deviation (predicted: at rounding, or at the size of the start)")
    legend_below(axes, columns=2)


def figure(numbers):
    picture = new_figure(8.5)
    panels = picture.subplot_mosaic([["left", "right"], ["below", "below"]])
    for side, (name, coordinates) in zip(("left", "right"), numbers["coordinates"].items()):
        draw_coordinates(panels[side], name, coordinates)
    draw_deviations(panels["below"], numbers)
    picture.suptitle("Dots: measured. Lines: predicted.", fontsize=10)
    return picture
