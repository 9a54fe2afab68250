"""Do the singular values move as independent scalar sequences under Muon?

With U and s as in `factorisation`, or the eigenvectors of L in `in_context`, the paper finds that simplified Muon moves each
spectral coordinate as if it were alone:

    factorisation   X_t = U diag(a_t) O          a_i <- a_i - eta_t sign((a_i^2 - s_i) a_i)
    in context      Gamma_t = U diag(a_t) U^T    a_i <- a_i - eta_t sign(e_i a_i - l_i),  l and e the eigenvalues of L and E

The second is exact from Gamma = 0, the first from a start U diag(a_0) O with any orthogonal O. From a small start, ||X_0||_F = alpha, the
first step is along U O, O = msgn(diag(s) U^T X_0), so that the rest is of order alpha. Measured and predicted sequences take the
same steps eta_t = eta_0 decay^t; the deviation is ||X_t - U diag(a_t) O||_F / max |a_t|.

Chosen here: condition number 100; eta_0 = 0.5 and decay 0.75 (factorisation), 4 and 0.9 (in context), 40 iterations, 5 repetitions;
normal starts with alpha = 1e-2 to 1e-8, where the prediction starts from a_0 = 0+. Also with the trainer's five Newton-Schulz steps in
place of msgn, and in float32, to see what rounding does: it may grow, as the paper does not say that the sequences attract.
"""
import torch
from matplotlib.figure import Figure

from lab import Result, exponent, factorisation, in_context, judge
from lab.factorisation import SOURCE
from optimizers.polar_muon import msgn
from train_gpt2 import newton_schulz


def follow(gradient, X, a, U, V, scalar, steps, direction=msgn):
    """Muon from X and the scalar sequences from a, under the same steps, as matrices and in the coordinates U, V.

    Returns the measured coordinates and the predicted ones, (t, repetitions, r), and the deviations, (t, repetitions).
    """
    measured, predicted, apart = [], [], []
    for step in steps:
        X, a = X - step * direction(gradient(X)), a - step * scalar(a).sign()
        measured.append((U.mT @ X @ V).diagonal(dim1=-2, dim2=-1))
        predicted.append(a)
        apart.append(torch.linalg.matrix_norm(X - (U * a.unsqueeze(-2)) @ V.mT) / a.abs().amax(-1))
    return torch.stack(measured), torch.stack(predicted), torch.stack(apart).double()


def run(size="full", seed=0):
    repetitions, alphas = (5, (1e-2, 1e-4, 1e-6, 1e-8)) if size == "full" else (5, (1e-2, 1e-5, 1e-8))
    t = torch.arange(40, dtype=torch.float64)
    generator = torch.Generator()

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def scalar(a):
        return (a * a - s) * a

    runs = {}
    gradient, *_ = factorisation.problem(100, repetitions, generator.manual_seed(seed))
    U, s = factorisation.factors(100, repetitions, generator.manual_seed(seed))  # those of the gradient
    V, a = torch.linalg.qr(normal(repetitions, len(s), len(s)))[0], 0.1 * normal(repetitions, len(s)).abs()
    runs["factorisation, aligned start"] = follow(gradient, (U * a.unsqueeze(-2)) @ V.mT, a, U, V, scalar, 0.5 * 0.75 ** t)
    for alpha in alphas:
        X = normal(*U.shape)
        X = alpha * X / torch.linalg.matrix_norm(X, keepdim=True)
        arguments = gradient, X, torch.full_like(a, 1e-30), U, msgn(s[:, None] * (U.mT @ X)).mT, scalar, 0.5 * 0.75 ** t
        runs[f"factorisation, start of size {alpha:g}"] = follow(*arguments)
    runs["the same with Newton-Schulz"] = follow(*arguments, newton_schulz)
    for dtype, name in ((torch.float64, "in context"), (torch.float32, "in context, float32")):
        W, l, e = (x.to(dtype) for x in in_context.spectra(100, repetitions, generator.manual_seed(seed)))
        L, E = (W * l) @ W.mT, (W * e) @ W.mT
        runs[name] = follow(lambda X: L @ (X @ E - L), torch.zeros_like(W), torch.zeros_like(W[:, 0]), W, W, lambda a: l * (e * a - l),
                            (4 * 0.9 ** t).to(dtype))

    apart = {name: deviations for name, (_, _, deviations) in runs.items()}
    aligned, context, single = (apart[name] for name in ("factorisation, aligned start", "in context", "in context, float32"))
    first, last = (torch.stack([apart[f"factorisation, start of size {alpha:g}"][:end].amax(0) for alpha in alphas]) for end in (10, 40))
    fits = {end: exponent(torch.tensor(alphas)[:, None].expand_as(d), d) for end, d in ((10, first), (40, last))}
    first, last = (d / torch.tensor(alphas)[:, None] for d in (first, last))
    growth = ((context[-1] / context[4]) ** (1 / 35)).median()
    rough = apart["the same with Newton-Schulz"]
    rows = [
        ("factorisation, aligned start: exact (deviation up to 1e-9 in 40 iterations)", f"{aligned.max():.0e}", bool(aligned.max() < 1e-9)),
        ("in context, start at 0: exact (up to 1e-9 in 10 iterations)", f"{context[:10].max():.0e}", bool(context[:10].max() < 1e-9)),
        ("in context: still exact (up to 1e-9) after 40 iterations",
         f"{context.max():.0e}: rounding grows {growth:.2f}-fold an iteration (float32: {single.max():.0e})",
         bool(context.max() < 1e-9)),
        ("factorisation, small start: of order alpha (exponent 1 within 0.1) in 10 iterations",
         f"exponent {fits[10][0]:.2f} ± {fits[10][1]:.2f}; {first.min():.1f} to {first.max():.1f} alpha", judge(*fits[10], 0.9, 1.1)),
        ("factorisation, small start: still of order alpha after 40 iterations",
         f"exponent {fits[40][0]:.2f} ± {fits[40][1]:.2f}; {last.min():.1f} to {last.max():.0f} alpha", judge(*fits[40], 0.9, 1.1)),
        (f"Newton-Schulz, start of size {alphas[-1]:g}: not in the paper", f"{rough[:10].max():.1f} in 10 iterations", None)]

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, name in zip(axes, (f"factorisation, start of size {alphas[0]:g}", "in context")):
        measured, predicted, _ = runs[name]
        for i in range(measured.size(-1)):
            ax.plot(t + 1, measured[:, 0, i], "o", color=f"C{i}", markersize=4, label="measured, one colour each" if i == 0 else None)
            ax.plot(t + 1, predicted[:, 0, i], color="black", linewidth=0.8, label="predicted" if i == 0 else None)
        ax.set(xlabel="iteration", ylabel="spectral coordinate $a_i$", title=name)
        ax.legend(fontsize=8)
    for name, deviations in apart.items():
        axes[2].semilogy(t + 1, deviations.median(-1).values.clamp(min=1e-17), label=name, linestyle="-" if "context" in name else "--")
    axes[2].set(xlabel="iteration", ylabel="deviation (median)", ylim=(1e-16, 1e6),
                title="predicted: at rounding, or at the size of the start")
    axes[2].legend(fontsize=7, ncols=2)
    summary = (f"In the first 10 iterations the coordinates follow their scalar sequences: within {context[:10].max():.0e} of the largest "
               f"in context, {aligned[:10].max():.0e} in a factorisation with an aligned start, and up to {first.max():.1f} alpha from a "
               f"random start of size alpha, which the first step aligns. But the sequences do not attract: in context rounding grows "
               f"{growth:.2f}-fold an iteration, to {context.max():.0e} after 40, and with five Newton-Schulz steps, "
               f"whose factor is only roughly orthogonal, the prediction is off by {rough[:10].median():.1f} within 10.")
    return Result(rows, figure, summary, SOURCE)
