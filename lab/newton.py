"""Where does Newton-Muon's preconditioner help: for which condition of a layer's inputs, noise of its
gradient, shape and curvature?

A layer's quadratic f(W) = tr(H (W - W*) K (W - W*)^T) / 2 with K = Z Z^T / N has the gradient G = H (W -
W*) K. One step goes along msgn(G P), with P = K^-1 (the paper's preconditioner) or P = (K + 0.2 mean
eigenvalue)^-1 (the trainer's ridge), and is compared with one along msgn(G).

Where H = I and W is square or tall, O^T O = I, so that tr(O^T H O K) is the same for all O. Then msgn(G),
which maximises <G, O>, is the best single step without noise, and the preconditioner cannot help.

Choices. The decrease is log(f before / f after), since the plain difference says nothing after 50 steps;
a ratio above 1 means that the preconditioner helps. W - W* starts Gaussian, the same for both. K is known
exactly, with log-spaced eigenvalues; bases do not matter then. Noise is that of a likelihood's gradients,
H^1/2 E K^1/2 with E Gaussian; its share |noise|^2 / |G|^2 at the start is on the axis, and its size
stays. H is the identity, or log-spaced with condition 100. The rate is the best of a grid for the mean of
the repetitions; over 50 steps it falls linearly to 0. No momentum; exact msgn.

The layers are those of the CPU track after 60 steps with Muon, three seeds: condition of K (of a matrix
with several blocks the geometric mean), noise from two half batches; then the same with the averaging of
Nesterov momentum 0.95 at fixed weights. Each layer's own ratio is that of the largest falls of another
batch's loss along both directions (mean of 3 gradients; the trainer's ridge, exact msgn, no momentum).
Those are plain falls, so that they are compared with the ratio of plain falls on the map, f before - f
after.

One verdict hangs on the seed: what the track's runs say holds with seed 0 (a mean ratio of 1.04 ± 0.03)
and is open with seed 1 (1.03 ± 0.05).
"""
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.colors import TwoSlopeNorm
from scipy import stats

from lab import all_of, counted, interval, judge, new_figure
from lab.layers import ARMS, RIDGE, arm_difference, measure_layers, track_gain
from lab.training import SMALL, parallel
from optimizers.polar_muon import msgn

SOURCE = "Du, Su, The Newton-Muon Optimizer, arXiv:2604.01472"
WIDE = "wide (mlp_proj)"
SQUARE = "square (q, k, v, attn_proj)"
TALL = "tall (c_fc)"
SHAPES = {WIDE: (8, 32), SQUARE: (16, 16), TALL: (32, 8)}
SHAPE_OF = {"mlp_proj": WIDE, "c_fc": TALL, "c_attn": SQUARE, "attn_proj": SQUARE}  # of a layer's matrix
RIDGES = {"K^-1": 0.0, "trainer's ridge": RIDGE}
CURVATURES = {"H = I": 1.0, "cond(H) = 100": 100.0}  # condition number of H
OFF_THE_MAP = {"cond(H) = 10,000, which is not on the map": 1e4}
# what the map says of final losses: prediction, an arm of the study ARMS, and one that it does not end above
ARM_PREDICTIONS = (
    ("on mlp_proj alone it is at least as good as on all matrices", "mlp_proj_alone", "newton_muon"),
    ("on all but mlp_proj it is no better than Muon", "muon", "all_but_mlp_proj"),
    ("so it is better on mlp_proj alone than on all but mlp_proj", "mlp_proj_alone", "all_but_mlp_proj"),
)
MOMENTA = ("0.95", "0.9")  # of the runs of the CPU track; the map's is the first

# For 1 step and for many. The best one lies inside the grid, except with exact inverses at a condition of 1e4
# or more.
RATES = {1: 0.2 * 1.3 ** torch.arange(17), 50: 0.25 * 1.7 ** torch.arange(6)}

# of the square of the noise by G + 0.95 M, against the square of its mean
AVERAGING = (1.95 ** 2 + 0.95 ** 4 / (1 - 0.95 ** 2)) * 0.05 ** 2


class Grid(NamedTuple):
    """The size of the map."""
    conditions: torch.Tensor
    noises: torch.Tensor
    repeats: dict  # {number of steps: repetitions}


GRIDS = {"full": Grid(10.0 ** torch.arange(7), 10.0 ** torch.arange(-2, 1.1, 0.5), {1: 8, 50: 3}),
         "small": Grid(torch.tensor([1.0, 1e3]), torch.tensor([0.01, 10.0]), {1: 4, 5: 2})}


def spectrum(condition, n):
    """(..., n) eigenvalues, log-spaced with these condition numbers, mean 1."""
    k = torch.as_tensor(condition)[..., None] ** -torch.linspace(0, 1, n)
    return k / k.mean(-1, keepdim=True)


def decreases(conditions, noises, h, n, ridge, steps, rates, repeats, seed):
    """log(f before / f after) of `steps` steps at the best of `rates`: (cells, repeats).

    conditions, noises: (cells,). h: the m eigenvalues of H. ridge: that of Newton-Muon, None for Muon.
    """
    m = len(h)
    generator = torch.Generator().manual_seed(seed)
    k = spectrum(conditions, n)[:, None, None, None, :]  # (cells, repeats, rates, m, n)
    H = h[:, None]
    rates = rates[:, None, None]

    def loss(D):
        return (H * D.square() * k).sum((-2, -1)) / 2

    # D = W - W*, the same for all rules and rates
    D = torch.randn(1, repeats, 1, m, n, generator=generator).expand(len(k), -1, rates.shape[0], -1, -1)
    signal = (H * D * k).square().sum((-2, -1), keepdim=True).mean(1, keepdim=True)  # |G|^2
    share = noises[:, None, None, None, None]
    scale = (share * signal / (h.sum() * k.sum(-1, keepdim=True))).sqrt()
    before = loss(D)
    for t in range(steps):
        noise = torch.randn(1, repeats, 1, m, n, generator=generator)
        G = H * D * k + scale * H.sqrt() * noise * k.sqrt()
        if ridge is not None:
            G = G / (k + ridge)
        D = D - rates * (1 - t / steps) * msgn(G)
    after = loss(D)
    best = after.mean(1).argmin(-1)[:, None, None].expand(-1, repeats, 1)
    return (before[..., 0] / after.gather(-1, best)[..., 0]).log()


def ratio(shape, ridge, steps, condition_of_H, conditions, noises, repeats, seed, plain=False):
    """(ratio of the mean decreases with and without the preconditioner, half-width of its 95 % interval).

    Both have the shape of `conditions` and `noises`. The interval is by jackknife over the repetitions.
    plain: decreases of f itself, not of its logarithm.
    """
    m, n = SHAPES[shape]
    h = spectrum(condition_of_H, m)
    rates = RATES[1] if steps == 1 else RATES[50]

    def with_ridge(ridge):
        return decreases(conditions.flatten(), noises.flatten(), h, n, ridge, steps, rates, repeats, seed)

    with ThreadPoolExecutor(2) as pool:  # an svd of many small matrices keeps one core busy
        found = list(pool.map(with_ridge, (ridge, None)))
    if plain:
        found = [1 - (-x).exp() for x in found]
    preconditioned, without = found
    left_out = [x.sum(1, keepdim=True) - x for x in found]  # sums without one repetition
    error = (left_out[0] / left_out[1]).std(1, correction=0) * (repeats - 1) ** 0.5
    width = error * stats.t.ppf(0.975, repeats - 1)
    mean = preconditioned.mean(1) / without.mean(1)
    return mean.view(conditions.shape).numpy(), width.view(conditions.shape).numpy()


def row_name(shape, rule):
    return f"{shape}, {rule}"


def column_name(steps, curvature):
    return f"{counted(steps, 'step')}, {curvature}"


def measure_maps(grid, seed):
    """{row: {column: ratios (conditions, noises)}} of the figure's panels."""
    conditions, noises = torch.meshgrid(grid.conditions, grid.noises, indexing="ij")
    maps = {}
    for shape in SHAPES:
        for rule, ridge in RIDGES.items():
            row = maps[row_name(shape, rule)] = {}
            for steps, repeats in grid.repeats.items():
                for curvature, condition_of_H in CURVATURES.items():
                    found, _ = ratio(shape, ridge, steps, condition_of_H, conditions, noises, repeats, seed)
                    row[column_name(steps, curvature)] = found.tolist()
    return maps


def measure_cells(grid, seed):
    """Single cells of the map with K^-1 and H = I, as [ratio, half-width].

    quiet   {shape: cell}, one step at condition 1e4 without noise
    noisy   {steps: {shape: two cells}}, at condition 100 and noise shares of 0.01 and 10
    """
    def cell(shape, steps, condition, noise):
        point = torch.tensor([condition]), torch.tensor([noise])
        mean, width = ratio(shape, 0.0, steps, 1.0, *point, grid.repeats[steps], seed)
        return [float(mean[0]), float(width[0])]

    quiet = {shape: cell(shape, 1, 1e4, 0.0) for shape in SHAPES}
    noisy = {str(steps): {} for steps in grid.repeats}
    for steps in grid.repeats:
        for shape in SHAPES:
            noisy[str(steps)][shape] = [cell(shape, steps, 1e2, noise) for noise in (0.01, 10.0)]
    return quiet, noisy


def layers_task(task):
    train, batches, fields, seed = task
    return measure_layers(seed, train, batches, **fields)


def measure_track_layers(size, seed):
    """{name, condition, noise, ratio: a list for each seed, with an entry for each matrix}."""
    tasks = [(1, 1, SMALL, seed)]
    if size == "full":
        tasks = [(60, 3, {}, seed + i) for i in range(3)]
    by_seed = parallel(layers_task, tasks)
    fields = dict(name=0, condition=1, noise=2, ratio=3)
    return {field: [[layer[i] for layer in layers] for layers in by_seed] for field, i in fields.items()}


def map_at_layers(layers, grid, condition_of_H, steps, seed):
    """(ratios, half-widths) of the map at the layers, (seeds, matrices) each.

    In one step those of plain falls, and over many steps with momentum's averaging.
    """
    found = []
    for i, names in enumerate(layers["name"]):
        for j, name in enumerate(names):
            noise = layers["noise"][i][j]
            if steps > 1:
                noise *= AVERAGING
            point = torch.tensor([layers["condition"][i][j]]), torch.tensor([noise])
            found.append(ratio(shape_of(name), RIDGE, steps, condition_of_H, *point, grid.repeats[steps],
                               seed, plain=steps == 1))
    return np.array(found).reshape(len(layers["name"]), -1, 2).transpose(2, 0, 1)


def shape_of(name):
    """Shape of the matrix h.0.mlp_proj.weight."""
    return SHAPE_OF[name.split(".")[-2]]


def measure(size="full", seed=0):
    track = {}
    for momentum in MOMENTA:  # first: if a record is missing, that is known before the work
        found, folder = track_gain(float(momentum))
        track[momentum] = dict(mean=found.mean, low=found.low, high=found.high, folder=folder)
    arms = [arm_difference(first, second) for _, first, second in ARM_PREDICTIONS]
    grid = GRIDS[size]
    many = max(grid.repeats)
    layers = measure_track_layers(size, seed)
    quiet, noisy = measure_cells(grid, seed)
    falls = {}
    for curvature, condition_of_H in (CURVATURES | OFF_THE_MAP).items():
        falls[curvature] = map_at_layers(layers, grid, condition_of_H, 1, seed)[0].tolist()
    averaged = {}  # [ratio, half-width], as if the layers' errors were all alike: they share their noise
    for curvature, condition_of_H in CURVATURES.items():
        averaged[curvature] = map_at_layers(layers, grid, condition_of_H, many, seed).mean((1, 2)).tolist()
    return dict(steps=list(grid.repeats), log10_condition=grid.conditions.log10().tolist(),
                log10_noise=grid.noises.log10().tolist(), maps=measure_maps(grid, seed), quiet=quiet,
                noisy=noisy, layers=layers, falls_on_the_map=falls, averaged_on_the_map=averaged, track=track,
                arms=arms)


def plus_minus(cell):
    return "{:.2f} ± {:.2f}".format(*cell)


def cell_rows(numbers):
    """On single cells: where K^-1 can help."""
    quiet = numbers["quiet"]
    found = [("1 step, H = I, no noise, square or tall: msgn(G) is the best single step, K^-1 cannot help "
              "(condition 1e4)",
              f"ratio {plus_minus(quiet[SQUARE])} square, {plus_minus(quiet[TALL])} tall",
              max(quiet[SQUARE][0], quiet[TALL][0]) < 1.001)]
    for steps, shapes in numbers["noisy"].items():
        for shape, (low_noise, high_noise) in shapes.items():
            where = f"{column_name(int(steps), 'H = I')}, {shape}, condition 100:"
            measured = f"ratio {plus_minus(low_noise)}, and {plus_minus(high_noise)}"
            if steps == "1" and shape != WIDE:
                found.append((f"{where} noise shares of 0.01 and 10: no prediction "
                              "(without noise K^-1 cannot help, see above)", measured, None))
            else:
                found.append((f"{where} K^-1 helps at a noise share of 0.01, and hurts at 10", measured,
                              all_of([judge(*low_noise, low=1), judge(*high_noise, high=1)])))
    return found


def curvature_row(numbers):
    many = max(numbers["steps"])
    mean = {}  # of the maps, without their first line: at condition 1 the preconditioner does nothing
    for curvature in CURVATURES:
        for rule in RIDGES:
            column = column_name(many, curvature)
            maps = [np.array(numbers["maps"][row_name(shape, rule)][column]) for shape in SHAPES]
            mean[curvature, rule] = np.mean([ratios[1:] for ratios in maps])
    inverse, ridge = RIDGES
    texts = [f"{curvature} {mean[curvature, inverse]:.2f} (K^-1), {mean[curvature, ridge]:.2f} (ridge)"
             for curvature in CURVATURES]
    isotropic, anisotropic = CURVATURES
    lower = all(mean[anisotropic, rule] < mean[isotropic, rule] - 0.05 for rule in RIDGES)
    return (f"{many} steps: an anisotropic H makes the preconditioner hurt more (by 0.05 and more)",
            "mean ratio of the maps: " + ", ".join(texts), lower)


def measured_ratio(numbers):
    """Mean ratio of the layers, with its interval over the seeds, as text."""
    return plus_minus(interval(np.mean(numbers["layers"]["ratio"], axis=1)))


def layer_rows(numbers):
    """Does the map know which layers gain?"""
    measured = np.array(numbers["layers"]["ratio"])
    matrices = measured.shape[1]
    found = []
    for curvature, falls in numbers["falls_on_the_map"].items():
        falls = np.array(falls)
        right = ((falls > 1) == (measured > 1)).mean(1)
        ranks = [stats.spearmanr(ours, theirs).statistic for ours, theirs in zip(falls, measured)]
        correlation = interval(ranks)
        counts = ", ".join(f"{share * matrices:.0f}" for share in right)
        found.append((f"the map ({curvature}) says for each layer of the CPU track whether one "
                      "preconditioned step of one batch is better (for three in four)",
                      f"right for {counts} of {matrices} (by seed); rank correlation "
                      f"{plus_minus(correlation)}; mean ratio {falls.mean():.2f} on the map, "
                      f"{measured_ratio(numbers)} measured",
                      all_of([judge(*interval(right), low=0.75), judge(*correlation, low=0)])))
    return found


def gain_text(gain):
    return "{mean:+.4f} ({low:+.4f} to {high:+.4f}, {folder})".format(**gain)


def track_row(numbers):
    """Does the map say what the final losses of the CPU track say?"""
    averaged = numbers["averaged_on_the_map"]
    map_says = {judge(*cell, low=1) for cell in averaged.values()}
    gain = numbers["track"][MOMENTA[0]]
    uncertain = None in map_says or len(map_says) > 1 or gain["low"] <= 0 <= gain["high"]
    verdict = None if uncertain else map_says == {gain["mean"] > 0}
    ratios = " and ".join(f"{plus_minus(cell)} ({curvature})" for curvature, cell in averaged.items())
    gains = [f"{gain_text(gain)} with momentum {momentum}" for momentum, gain in numbers["track"].items()]
    return ("what the track's runs say: the map at the layers with momentum's averaging, "
            f"{max(numbers['steps'])} steps, has a mean ratio of {ratios}",
            f"final loss of Muon minus Newton-Muon, by pairs: {', '.join(gains)}", verdict)


def arm_rows(numbers):
    """Do the runs with the preconditioner on some of the matrices end as the map says?"""
    found = []
    for (prediction, first, second), (mean, width) in zip(ARM_PREDICTIONS, numbers["arms"]):
        found.append((f"the preconditioner on some of the track's matrices: {prediction}",
                      f"final loss of {first} minus {second}'s: {mean:+.4f} ({mean - width:+.4f} to "
                      f"{mean + width:+.4f}, {ARMS})", judge(mean, width, high=0)))
    return found


def rows(numbers):
    return [*cell_rows(numbers), curvature_row(numbers), *layer_rows(numbers), track_row(numbers),
            *arm_rows(numbers)]


def summary(numbers):
    quiet = numbers["quiet"]
    low_noise, high_noise = numbers["noisy"]["1"][WIDE]
    isotropic, anisotropic = (np.mean(numbers["falls_on_the_map"][curvature]) for curvature in CURVATURES)
    return ("The inverse of Z Z^T helps a matrix that is wider than tall if the gradient has little noise "
            f"(one step, condition 100, H = I: ratio {low_noise[0]:.2f} at a noise share of 0.01, "
            f"{high_noise[0]:.2f} at 10). For a square or a tall one, which msgn whitens on its own, it is "
            f"{quiet[SQUARE][0]:.2f} and {quiet[TALL][0]:.2f} in one step without noise at condition 1e4. "
            "The ridge softens both gain and harm. Along one step of one batch the CPU track's layers have "
            f"a mean ratio of {measured_ratio(numbers)} where the map says {isotropic:.2f} (H = I) or "
            f"{anisotropic:.2f} (anisotropic). Muon's final loss on the track minus Newton-Muon's is "
            f"{gain_text(numbers['track'][MOMENTA[0]])}. With the preconditioner on mlp_proj alone it ends "
            f"{-numbers['arms'][-1][0]:.4f} lower than with it on all but mlp_proj, each tuned ({ARMS}).")


def draw_layers(axes, layers, shape):
    """The layers of that shape: circles with the noise of one batch, triangles with momentum's averaging."""
    names, conditions, noises = (np.ravel(layers[field]) for field in ("name", "condition", "noise"))
    mine = np.array([shape_of(name) == shape for name in names])
    x = np.log10(conditions[mine]).clip(0, 6)
    y = np.log10(noises[mine])
    axes.plot(x, y.clip(-2, 1), "o", mfc="white", mec="black", markersize=4)
    axes.plot(x, (y + np.log10(AVERAGING)).clip(-2, 1), "^", mfc="black", mec="white", markersize=5)


def draw_map(axes, numbers, ratios):
    conditions = np.array(numbers["log10_condition"])
    noises = np.array(numbers["log10_noise"])
    image = axes.pcolormesh(conditions, noises, ratios.T, cmap="cividis", shading="nearest",
                            norm=TwoSlopeNorm(1, 0.4, 1.6))
    if len(conditions) > 2:  # at condition 1 the preconditioner does nothing
        axes.contour(conditions[1:], noises, ratios[1:].T, [1.0], colors="black", linewidths=1.5)
    return image


def figure(numbers):
    picture = new_figure(11)
    axes = picture.subplots(len(SHAPES) * len(RIDGES), 4, sharex=True, sharey=True)
    panels = [(shape, rule) for shape in SHAPES for rule in RIDGES]
    for line, (shape, rule) in zip(axes, panels):
        for panel, ratios in zip(line, numbers["maps"][row_name(shape, rule)].values()):
            image = draw_map(panel, numbers, np.array(ratios))
            draw_layers(panel, numbers["layers"], shape)
        line[0].set_ylabel(shape.replace("v, ", "v,\n") + "\n" + rule, fontsize=9)
    columns = next(iter(numbers["maps"].values()))
    for panel, column in zip(axes[0], columns):
        panel.set_title(column, fontsize=10)
    for panel in axes[-1]:
        panel.set_xlabel("log10 condition", fontsize=9)
    picture.supylabel("log10 of the noise's share in the gradient", fontsize=10)
    bar = picture.colorbar(image, ax=axes, location="bottom", shrink=0.8, aspect=40, extend="both")
    bar.set_label("decrease of log loss with the preconditioner / without it (above 1: it helps)")
    seeds = counted(len(numbers["layers"]["name"]), "seed")
    picture.suptitle("Bright: the preconditioner helps. Black line: no difference. "
                     "Condition: that of Z Z^T.\n"
                     f"Circles: layers of the CPU track, one batch, {seeds}. "
                     "Triangles: with momentum's averaging.", fontsize=10)
    return picture
