"""Where does Newton-Muon's preconditioner help: for which condition of a layer's inputs, noise of its gradient, shape and curvature?

One verdict hangs on the seed: what the track's runs say holds with seed 0 (a mean ratio of 1.04 ± 0.03) and is open with 1 (1.03 ± 0.05).
"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from scipy import stats

from lab import Result, judge, mean_interval
from lab.layers import RIDGE, measure_layers, track_gain
from lab.training import SMALL, parallel
from optimizers.polar_muon import msgn


# for 1 step and for many: the best one lies inside the grid, except with exact inverses at a condition of 1e4 or more
RATES = {1: 0.2 * 1.3 ** torch.arange(17), 50: 0.25 * 1.7 ** torch.arange(6)}


def spectrum(condition, n):
    """(..., n) eigenvalues, log-spaced with these condition numbers, mean 1."""
    k = torch.as_tensor(condition)[..., None] ** -torch.linspace(0, 1, n)
    return k / k.mean(-1, keepdim=True)


def decreases(conditions, noises, h, n, ridge, steps, rates, repeats, seed):
    """log(f before / f after) of `steps` steps at the best of `rates`: (cells, repeats). ridge: None is Muon, else Newton-Muon's."""
    m, generator = len(h), torch.Generator().manual_seed(seed)
    k = spectrum(conditions, n)[:, None, None, None, :]  # (cells, repeats, rates, m, n)
    H, rates = h[:, None], rates[:, None, None]
    # W - W*, the same for all rules and rates
    D = torch.randn(1, repeats, 1, m, n, generator=generator).expand(len(k), -1, rates.shape[0], -1, -1)
    loss = lambda D: (H * D.square() * k).sum((-2, -1)) / 2
    signal = (H * D * k).square().sum((-2, -1), keepdim=True).mean(1, keepdim=True)  # |G|^2
    scale = (noises[:, None, None, None, None] * signal / (h.sum() * k.sum(-1, keepdim=True))).sqrt()
    before = loss(D)
    for t in range(steps):
        noise = torch.randn(1, repeats, 1, m, n, generator=generator)
        G = H * D * k + scale * H.sqrt() * noise * k.sqrt()
        D = D - rates * (1 - t / steps) * msgn(G if ridge is None else G / (k + ridge))
    after = loss(D)
    best = after.mean(1).argmin(-1)[:, None, None].expand(-1, repeats, 1)
    return (before[..., 0] / after.gather(-1, best)[..., 0]).log()


def both(*verdicts):
    """True if all are true, False if one is false, else None."""
    return False if False in verdicts else None if None in verdicts else True


def layers_task(task):
    train, batches, fields, seed = task
    return measure_layers(seed, train, batches, **fields)


def run(size="full", seed=0):
    """A layer's quadratic f(W) = tr(H (W - W*) K (W - W*)^T) / 2 with K = Z Z^T / N has the gradient G = H (W - W*) K. One step goes along
    msgn(G P), P = K^-1 (the paper's preconditioner) or P = (K + 0.2 mean eigenvalue)^-1 (the trainer's ridge), against msgn(G).

    Where H = I and W is square or tall, O^T O = I, so that tr(O^T H O K) is the same for all O: msgn(G), which maximises <G, O>, then is
    the best single step without noise, and the preconditioner cannot help.

    Choices. decrease = log(f before / f after), since the plain difference says nothing after 50 steps; a ratio above 1 means that the
    preconditioner helps. W - W* starts Gaussian, the same for both; K is known exactly, with log-spaced eigenvalues; bases do not matter
    then. Noise is that of a likelihood's gradients, H^1/2 E K^1/2 with E Gaussian, its share |noise|^2 / |G|^2 at the start on the axis;
    its size stays. H is the identity, or log-spaced with condition 100. The rate is the best of a grid for the mean of the repetitions;
    over 50 steps it falls linearly to 0. No momentum; exact msgn. Shapes: 8 x 32 (as mlp_proj), 16 x 16 (q, k, v, attn_proj), 32 x 8
    (c_fc). The layers are those of the CPU track after 60 steps with Muon, three seeds: condition of K (of a matrix with several blocks
    the geometric mean), noise from two half batches; the same with the averaging of Nesterov momentum 0.95 at fixed weights. Each layer's
    own ratio is that of the largest falls of another batch's loss along both directions (mean of 3 gradients; the trainer's ridge, exact
    msgn, no momentum). Those are plain falls, so that they are compared with the ratio of plain falls on the map: f before - f after.
    """
    track = {momentum: track_gain(momentum) for momentum in (0.95, 0.9)}  # first: if a record is missing, that is known before the work
    full = size == "full"
    axis_of = ((10.0 ** torch.arange(7), 10.0 ** torch.arange(-2, 1.1, 0.5)) if full
               else (torch.tensor([1.0, 1e3]), torch.tensor([0.01, 10.0])))
    conditions, noises = torch.meshgrid(*axis_of, indexing="ij")
    log_conditions, log_noises = conditions.log10().numpy(), noises.log10().numpy()
    shapes = {"wide (mlp_proj)": (8, 32), "square (q, k, v, attn_proj)": (16, 16), "tall (c_fc)": (32, 8)}
    grids = {1: (RATES[1], 8 if full else 4), 50 if full else 5: (RATES[50], 3 if full else 2)}
    curvatures = {"H = I": 1.0, "cond(H) = 100": 100.0}

    def ratio(shape, curvature, steps, ridge, conditions, noises, plain=False):
        """(ratio of the mean decreases, half-width of its 95 % interval by jackknife) for each pair of a condition and a noise.

        plain: of f itself, not of its logarithm.
        """
        (m, n), (rates, repeats) = shapes[shape], grids[steps]
        h = spectrum(curvatures[curvature], m)
        with ThreadPoolExecutor(2) as pool:  # svd of many small matrices keeps one core busy
            with_it, without = pool.map(lambda r: decreases(conditions.flatten(), noises.flatten(), h, n, r, steps, rates, repeats, seed),
                                        (ridge, None))
        if plain:
            with_it, without = (1 - (-x).exp() for x in (with_it, without))
        left_out = [(x.sum(1, keepdim=True) - x) for x in (with_it, without)]
        spread = (left_out[0] / left_out[1]).std(1, correction=0) * (repeats - 1) ** 0.5 * stats.t.ppf(0.975, repeats - 1)
        return (with_it.mean(1) / without.mean(1)).view(conditions.shape).numpy(), spread.view(conditions.shape).numpy()

    layers = parallel(layers_task, [(60, 3, {}, seed + i) for i in range(3)] if full else [(1, 1, SMALL, seed)])
    wide, square, tall = shapes
    kind_of = {"mlp_proj": wide, "c_fc": tall, "c_attn": square, "attn_proj": square}
    kinds = [kind_of[name.split(".")[-2]] for name, *_ in sum(layers, [])]
    layer_condition, layer_noise, layer_ratio = np.array([layer[1:] for layer in sum(layers, [])]).T
    averaging = (1.95 ** 2 + 0.95 ** 4 / (1 - 0.95 ** 2)) * 0.05 ** 2  # of the noise's square by G + 0.95 M, against the square of its mean
    figure = Figure(figsize=(13, 17), layout="constrained")
    axes, rows, maps = figure.subplots(6, 4, sharex=True, sharey=True), [], {}
    for i, (shape, (name, ridge)) in enumerate((s, r) for s in shapes for r in (("K^-1", 0.0), ("trainer's ridge", RIDGE))):
        for j, (steps, curvature) in enumerate((s, c) for s in grids for c in curvatures):
            r, _ = maps[shape, ridge, steps, curvature] = ratio(shape, curvature, steps, ridge, conditions, noises)
            axis = axes[i, j]
            image = axis.pcolormesh(log_conditions, log_noises, r, cmap="RdBu", shading="nearest",
                                    norm=TwoSlopeNorm(1, 0.4, 1.6))
            if full:
                axis.contour(log_conditions[1:], log_noises[1:], r[1:], [1.0], colors="black", linewidths=1)
            for (x, y), value in np.ndenumerate(r) if full else ():
                if x in (2, 4, 6) and y % 2 == 0:
                    color = "black" if 0.6 < value < 1.4 else "white"
                    axis.text(x, (y - 4) / 2, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
            mine = np.array([kind == shape for kind in kinds])
            for noise, marker in ((layer_noise, "o"), (layer_noise * averaging, "^")):
                axis.plot(np.log10(layer_condition[mine]).clip(0, 6), np.log10(noise[mine]).clip(-2, 1), marker, mfc="gold", mec="black",
                          ms=5)
            axis.set_title(f"{steps} step{'s' * (steps > 1)}, {curvature}", fontsize=9)
            if not j:
                axis.set_ylabel(f"{shape}\n{name}\nlog10 noise share", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("log10 condition of Z Z^T", fontsize=9)
    figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, extend="both",
                    label="decrease of log loss with the preconditioner / without (above 1: it helps)")
    figure.suptitle("Blue: the preconditioner helps. Black line: no difference.\n"
                    f"Circles: layers of the CPU track, one batch, {len(layers)} seeds; triangles: with momentum's averaging")

    long = max(grids)

    def at(condition, noise, shape, ridge, steps, curvature):
        """Text, value and half-width of the map's cell."""
        r, spread = ratio(shape, curvature, steps, ridge, torch.tensor([condition]), torch.tensor([noise]))
        return f"{r[0]:.2f} ± {spread[0]:.2f}", r[0], spread[0]

    quiet = {shape: at(1e4, 0.0, shape, 0.0, 1, "H = I") for shape in shapes}
    rows.append(("1 step, H = I, no noise, square or tall: msgn(G) is the best single step, K^-1 cannot help (condition 1e4)",
                 f"ratio {quiet[square][0]} square, {quiet[tall][0]} tall", bool(max(quiet[square][1], quiet[tall][1]) < 1.001)))
    for steps in grids:
        for shape in shapes:
            best, noisy = (at(1e2, noise, shape, 0.0, steps, "H = I") for noise in (0.01, 10.0))
            where, found = f"{steps} step{'s' * (steps > 1)}, H = I, {shape}, condition 100:", f"ratio {best[0]}, and {noisy[0]}"
            if steps == 1 and shape != wide:
                rows.append((f"{where} noise shares of 0.01 and 10: no prediction (without noise K^-1 cannot help, see above)", found,
                             None))
            else:
                rows.append((f"{where} K^-1 helps at a noise share of 0.01, and hurts at 10", found,
                             both(judge(*best[1:], low=1), judge(*noisy[1:], high=1))))
    mean = {(c, ridge): np.mean([maps[shape, ridge, long, c][0][1:].mean() for shape in shapes])
            for c in curvatures for ridge in (0.0, RIDGE)}
    rows.append((f"{long} steps: an anisotropic H makes the preconditioner hurt more (by 0.05 and more)",
                 "mean ratio of the maps: " + ", ".join(
                     f"{c} {mean[c, 0.0]:.2f} (K^-1), {mean[c, RIDGE]:.2f} (ridge)" for c in curvatures),
                 bool(all(mean["cond(H) = 100", ridge] < mean["H = I", ridge] - 0.05 for ridge in (0.0, RIDGE)))))

    def at_layers(c, steps):
        """The map's (ratios, half-widths) at the layers: of plain falls in one step, with momentum's averaging over many."""
        noise = layer_noise * (averaging if steps > 1 else 1)
        return np.array([np.ravel(ratio(kind, c, steps, RIDGE, torch.tensor([x]), torch.tensor([y]), plain=steps == 1))
                         for kind, x, y in zip(kinds, layer_condition, noise)]).T

    averaged = np.array([at_layers(c, long).mean(1) for c in curvatures])  # as if the layers' errors were all alike: they share their noise
    curvatures["cond(H) = 10,000, which is not on the map"] = 1e4
    predicted = {c: at_layers(c, 1)[0] for c in curvatures}
    seeds, each = len(layers), len(layers[0])
    by_seed = mean_interval(layer_ratio.reshape(seeds, each).mean(1))
    measured = f"{by_seed[0]:.2f} ± {by_seed[1]:.2f}"
    for c, ours in predicted.items():
        right = ((ours > 1) == (layer_ratio > 1)).reshape(seeds, each).mean(1)
        rank = np.array([stats.spearmanr(*pair).statistic for pair in zip(ours.reshape(seeds, each), layer_ratio.reshape(seeds, each))])
        share, correlation = mean_interval(right), mean_interval(rank)
        rows.append((f"the map ({c}) says for each layer of the CPU track whether one preconditioned step of one batch is better (for "
                     "three in four)", f"right for {', '.join(f'{x * each:.0f}' for x in right)} of {each} (by seed); rank correlation "
                     f"{correlation[0]:.2f} ± {correlation[1]:.2f}; mean ratio {ours.mean():.2f} on the map, {measured} measured",
                     both(judge(*share, low=0.75), judge(*correlation, low=0))))
    says = {judge(*ours, low=1) for ours in averaged}
    gain = track[0.95][0]  # the map's momentum
    gains = {momentum: f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}, {folder})"
             for momentum, (found, folder) in track.items()}
    rows.append((f"what the track's runs say: the map at the layers with momentum's averaging, {long} steps, has a mean ratio of "
                 + " and ".join(f"{x:.2f} ± {width:.2f} ({c})" for (x, width), c in zip(averaged, curvatures)),
                 "final loss of Muon minus Newton-Muon, by pairs: " + ", ".join(f"{gains[m]} with momentum {m}" for m in gains),
                 None if None in says or len(says) > 1 or gain.low <= 0 <= gain.high else says == {gain.mean > 0}))
    quiet_wide, noisy_wide = (at(1e2, noise, wide, 0.0, 1, "H = I")[1] for noise in (0.01, 10.0))
    summary = ("The inverse of Z Z^T helps a matrix that is wider than tall if the gradient has little noise (one step, condition 100, "
               f"H = I: ratio {quiet_wide:.2f} at a noise share of 0.01, {noisy_wide:.2f} at 10); for a square or tall one, which msgn "
               f"whitens on its own, it is {quiet[square][1]:.2f} and {quiet[tall][1]:.2f} in one step without noise at condition 1e4, and "
               "the ridge softens both gain and harm. Along one step of one batch the CPU track's layers have a mean ratio of "
               f"{measured} where the map says {predicted['H = I'].mean():.2f} (H = I) or {predicted['cond(H) = 100'].mean():.2f} "
               f"(anisotropic), and Muon's final loss on the track minus Newton-Muon's is {gains[0.95]}.")
    return Result(rows, figure, summary, "Du, Su, The Newton-Muon Optimizer, arXiv:2604.01472")
