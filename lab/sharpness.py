"""Does Muon move along flatter directions than Adam?

A step u changes the loss by <g, u> + |u|^2 NDS / 2 with the normalised directional sharpness
NDS = u^T H u / |u|^2. Prediction: Muon's is lower than Adam's (and, the theorem, than that of gradient
descent), at a similar first-order fall and length.

f(W) = tr(W^T H W) / 2 with eigenvalues h: msgn(H W) of a square matrix has NDS = mean(h) exactly; gradient
descent has sum h^3 |w|^2 / sum h^2 |w|^2, above it. A sign has mean(h) too if the eigenvectors are the axes,
so they are random in one of the cases.

Choices. h log-spaced from 100 to 0.1, W Gaussian 32 x 32; runs of 100 steps with the trainer's Muon and
torch's Adam, rates falling linearly, each the best of a grid. Small GPT: 2 layers of width 32, 150 steps of
16 x 64 tokens, u the update of all hidden matrices, H of the loss of its batch by double backward; medians at
equal loss. The longer a rule's steps, the lower their NDS. So the rules are compared at equal length, with
the pair of rates whose median |u| is most similar, and then each at its best rate; both are chosen with
seed + 100.
"""
import math
from itertools import product

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.pictures import COLORS
from lab import counted, interval, judge, legend_below, look, new_figure
from lab.training import SMALL, cpu_config, new_model, open_shards, parallel, training_steps
from optimizers.polar_muon import msgn
from train_gpt2 import Muon

SOURCE = ("Muon outperforms Adam by reducing curvature penalty via lower normalized directional sharpness, "
          "arXiv:2606.04662")
SIGN = "sign (Adam's first step)"
OPTIMIZERS = {"Adam": "adamw", "Muon": "muon"}
RATES = {"Adam": (0.005, 0.01, 0.02), "Muon": (0.0025, 0.005, 0.01)}  # of the small GPT's hidden matrices
QUADRATIC_RATES = (0.03, 0.06, 0.1, 0.2, 0.3, 0.6, 1.2, 2.4)
ALONG_AXES = "eigenvectors along the axes"
RANDOM = "random eigenvectors"
EQUAL_LENGTH = "at equal length"
BEST_RATES = "at the best rates"


def directional_sharpness(u, Hu):
    return float((u * Hu).sum() / u.square().sum())


def curvature(h, rotated, generator):
    """Matrix with the eigenvalues h and eigenvectors that are random, or the axes."""
    Q = torch.eye(len(h))
    if rotated:
        Q = torch.linalg.qr(torch.randn(len(h), len(h), generator=generator))[0]
    return Q * h @ Q.T


def first_directions(H, W):
    """Directional sharpness of the direction of each rule at W, for f(W) = tr(W^T H W) / 2."""
    G = H @ W
    directions = {"gradient descent": G, SIGN: G.sign(), "msgn": msgn(G)}
    return {rule: directional_sharpness(u, H @ u) for rule, u in directions.items()}


def quadratic_run(rule, rate, H, start, steps):
    """(loss after `steps` steps with a rate that falls to 0, mean directional sharpness of the steps)."""
    W = torch.nn.Parameter(start.clone())
    if rule == "Muon":
        optimizer = Muon([W], lr=rate)
    else:
        optimizer = torch.optim.AdamW([W], lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    found = []
    for step in range(steps):
        before = W.detach().clone()
        W.grad = H @ before
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
        u = W.detach() - before
        found.append(directional_sharpness(u, H @ u))
    loss = (W * (H @ W)).detach().sum() / 2
    return float(loss), float(np.mean(found))


def measure_quadratics(where, h, repeats, steps, generator):
    """{rule: directional sharpness in each repetition} of first steps and, on average, of runs."""
    n = len(h)
    found = {"gradient descent": [], SIGN: [], "msgn": [], "Adam": [], "Muon": []}
    for _ in range(repeats):
        H = curvature(h, where == RANDOM, generator)
        W = torch.randn(n, n, generator=generator)
        for rule, value in first_directions(H, W).items():
            found[rule].append(value)
        for rule in OPTIMIZERS:
            _, mean = min(quadratic_run(rule, rate, H, W, steps) for rate in QUADRATIC_RATES)
            found[rule].append(mean)
    return found


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def sharpness_of(model, batch, matrices, u):
    """(directional sharpness of u, |u|, first-order fall -<g, u>) for the batch's loss at the weights."""
    with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
        gradient = torch.autograd.grad(model(*batch)[0], matrices, create_graph=True)
        slope = sum((g * v).sum() for g, v in zip(gradient, u))
        Hu = torch.autograd.grad(slope, matrices)
    flat_u = torch.cat([t.flatten() for t in u])
    flat_Hu = torch.cat([t.flatten() for t in Hu])
    return directional_sharpness(flat_u, flat_Hu), float(flat_u.norm()), -float(slope.detach())


def gpt_run(optimizer, rate, seed, steps, every):
    """(points, 4): loss, directional sharpness, |u| and first-order fall -<g, u> in every `every`-th step.

    u is the update of the hidden matrices; the loss is that of its own batch.
    """
    config = cpu_config(**SMALL, seed=seed, data_seed=seed + 1, num_iterations=steps + 1, warmdown_iters=0,
                        optimizer=optimizer, hidden_learning_rate=rate)
    model, optimizers = new_model(config)
    shards = open_shards(config)
    everything = list(model.parameters())
    matrices = list(model.hidden_matrices().values())
    points = []
    begun = None  # what there was before the update that is measured
    for step, loss in enumerate(training_steps(config, model, optimizers, shards)):
        if begun is not None:  # its update is known now: back to where it began
            everything_before, matrices_before, loss_before, batch = begun
            u = [p.detach() - b for p, b in zip(matrices, matrices_before)]
            after = copies(everything)
            with torch.no_grad():
                torch._foreach_copy_(everything, everything_before)
            points.append((loss_before, *sharpness_of(model, batch, matrices, u)))
            with torch.no_grad():
                torch._foreach_copy_(everything, after)
            begun = None
        if (step + 1) % every == 0:
            batch = shards.batch(range(step * config.batch_size, (step + 1) * config.batch_size))
            begun = copies(everything), copies(matrices), loss, batch
    return np.array(points)


def gpt_task(task):
    return gpt_run(*task)


def choose_rates(tried):
    """Rates for the two comparisons from {rule: {rate: points of a run}}.

    Returns ({rule: rate with the lowest final loss}, {rule: rate} with the most similar median |u|).
    """
    tuned = {}
    length = {}
    for rule, runs in tried.items():
        tuned[rule] = min(runs, key=lambda rate: runs[rate][-5:, 0].mean())
        length[rule] = {rate: np.median(points[:, 2]) for rate, points in runs.items()}

    def unlike(pair):
        adam, muon = pair
        return abs(math.log(length["Adam"][adam] / length["Muon"][muon]))

    pair = min(product(*tried.values()), key=unlike)
    return tuned, dict(zip(tried, pair))


def measure_gpt(seed, seeds, length, tried_rates):
    """The rates of both comparisons, and the points of the runs at these rates.

    rates    {comparison: {rule: rate}}
    points   {comparison: {rule: (seeds, points, 4)}}, see gpt_run
    """
    pairs = [(rule, rate) for rule in OPTIMIZERS for rate in RATES[rule][:tried_rates]]
    found = parallel(gpt_task, [(OPTIMIZERS[rule], rate, seed + 100, *length) for rule, rate in pairs])
    tried = {rule: {} for rule in OPTIMIZERS}
    for (rule, rate), points in zip(pairs, found):
        tried[rule][rate] = points
    tuned, matched = choose_rates(tried)
    pairs = [(rule, rate) for rule in OPTIMIZERS for rate in sorted({tuned[rule], matched[rule]})]
    tasks = [(OPTIMIZERS[rule], rate, seed + i, *length) for rule, rate in pairs for i in range(seeds)]
    found = parallel(gpt_task, tasks)
    curves = dict(zip(pairs, np.array(found).reshape(len(pairs), seeds, -1, 4)))
    rates = {EQUAL_LENGTH: matched, BEST_RATES: tuned}
    points = {}
    for title, chosen in rates.items():
        points[title] = {rule: curves[rule, rate].tolist() for rule, rate in chosen.items()}
    return rates, points


def measure(size="full", seed=0):
    full = size == "full"
    generator = torch.Generator().manual_seed(seed)
    h = torch.logspace(2, -1, 32 if full else 8)
    repeats, steps = (5, 100) if full else (2, 10)
    quadratics = {where: measure_quadratics(where, h, repeats, steps, generator)
                  for where in (ALONG_AXES, RANDOM)}
    if full:
        rates, points = measure_gpt(seed, 3, (150, 10), 3)
    else:
        rates, points = measure_gpt(seed, 1, (8, 1), 1)
    return dict(mean_curvature=float(h.mean()), quadratics=quadratics, rates=rates, points=points)


def compare(curves):
    """Muon against Adam at equal loss, from {rule: (seeds, points, 4)}.

    Returns (lowest and highest loss that both rules have, {quantity: (median of Adam, median of Muon, mean of
    log(Muon / Adam) over the seeds, half-width of its 95 % interval)}). Medians are over the points at those
    losses.
    """
    low = max(c[..., 0].min() for c in curves.values())
    high = min(c[..., 0].max() for c in curves.values())
    medians = {name: {} for name in ("NDS", "length", "fall", "penalty")}
    for rule, runs in curves.items():
        common = [run[(run[:, 0] >= low) & (run[:, 0] <= high)] for run in runs]
        for column, name in ((1, "NDS"), (2, "length"), (3, "fall")):
            medians[name][rule] = np.array([np.median(run[:, column]) for run in common])
        penalty = [np.median(run[:, 1] * run[:, 2] ** 2 / 2) for run in common]
        medians["penalty"][rule] = np.array(penalty)
    found = {}
    for name, median in medians.items():
        ratio = interval(np.log(median["Muon"] / median["Adam"]))
        found[name] = (median["Adam"].mean(), median["Muon"].mean(), *ratio)
    return low, high, found


def compared(numbers, title):
    return compare({rule: np.array(points) for rule, points in numbers["points"][title].items()})


def quadratic_rows(where, found, mean_curvature):
    values = {rule: np.array(v) for rule, v in found.items()}
    off, off_sign = (abs(values[rule] / mean_curvature - 1).max() for rule in ("msgn", SIGN))
    descent = values["gradient descent"]
    first = (f"quadratic, {where}: msgn's first step has NDS = mean(h) = {mean_curvature:.2f}, gradient "
             "descent's is higher",
             f"msgn {values['msgn'].mean():.2f} (off by {off:.0e}), gradient descent {descent.mean():.1f}",
             bool(off < 1e-3 and descent.min() > mean_curvature))
    measured = f"msgn {values['msgn'].mean():.2f}, sign {values[SIGN].mean():.2f}"
    if where == RANDOM:
        sign = (f"quadratic, {where}: lower than that of Adam's first step", measured,
                bool(values["msgn"].max() < 0.99 * values[SIGN].min()))
    else:
        sign = (f"quadratic, {where}: Adam's first step has NDS = mean(h) too", measured,
                bool(off_sign < 1e-3))
    means = ["{} {:.1f} ± {:.1f}".format(rule, *interval(values[rule])) for rule in OPTIMIZERS]
    run = (f"quadratic, {where}: Muon's mean NDS over a run is lower than Adam's", ", ".join(means),
           judge(*interval(values["Muon"] - values["Adam"]), high=0))
    return [first, sign, run]


def gpt_row(title, prediction, quantity, digits, **limits):
    adam, muon, mean, width = quantity
    span = "?"
    if math.isfinite(width):
        span = f"{math.exp(mean - width):.2f} to {math.exp(mean + width):.2f}"
    return (f"small GPT, {title}: {prediction}",
            f"Adam {adam:.{digits}f}, Muon {muon:.{digits}f}; ratio {math.exp(mean):.2f} (95 %: {span})",
            judge(mean, width, **limits))


def gpt_rows(numbers, title):
    low, high, found = compared(numbers, title)
    rates = numbers["rates"][title]
    similar = dict(low=-math.log(2), high=math.log(2))
    lengths = "their lengths |u| are similar (within a factor of 2)"
    if title == EQUAL_LENGTH:
        lengths += ", as chosen"
    return [gpt_row(title, f"Muon's NDS is lower than Adam's (losses {low:.2f} to {high:.2f}, rates "
                    f"{rates['Muon']:g} and {rates['Adam']:g})", found["NDS"], 3, high=0),
            gpt_row(title, lengths, found["length"], 2, **similar),
            gpt_row(title, "their first-order falls are similar (within a factor of 2)", found["fall"], 3,
                    **similar),
            gpt_row(title, "the curvature's penalty |u|^2 NDS / 2 is smaller for Muon", found["penalty"], 4,
                    high=0)]


def rows(numbers):
    found = []
    for where, values in numbers["quadratics"].items():
        found += quadratic_rows(where, values, numbers["mean_curvature"])
    for title in numbers["points"]:
        found += gpt_rows(numbers, title)
    return found


def summary(numbers):
    rotated = {rule: np.mean(values) for rule, values in numbers["quadratics"][RANDOM].items()}
    equal = compared(numbers, EQUAL_LENGTH)[2]
    best = compared(numbers, BEST_RATES)[2]
    return ("On a quadratic the first step of Muon has exactly the mean curvature "
            f"({numbers['mean_curvature']:.1f}), and Adam's sign has more only if the eigenvectors are not "
            f"the axes ({rotated[SIGN]:.0f}); over whole runs there the mean is {rotated['Muon']:.1f} for "
            f"Muon and {rotated['Adam']:.1f} for Adam. Along the training of a small GPT, at equal loss and "
            "with steps of about equal length, the directional sharpness of Adam's steps is "
            f"{math.exp(-equal['NDS'][2]):.1f} times that of Muon's; each at its best rate, it is "
            f"{math.exp(-best['NDS'][2]):.1f} times that, but Muon's steps are "
            f"{math.exp(best['length'][2]):.1f} times as long, and longer steps have less.")


BARS = {"gradient descent": ("gradient\ndescent,\n1st step", "sgd", ""),  # label, colour, hatch
        SIGN: ("Adam,\n1st step", "adamw", ""), "msgn": ("Muon,\n1st step", "muon", ""),
        "Adam": ("Adam,\nrun", "adamw", "//"), "Muon": ("Muon,\nrun", "muon", "//")}


def draw_quadratic(axes, where, found, mean_curvature):
    for i, (rule, (_, optimizer, hatch)) in enumerate(BARS.items()):
        mean, width = interval(found[rule])
        axes.bar(i, mean, yerr=width if math.isfinite(width) else 0, capsize=4, color=COLORS[optimizer],
                 ecolor="#56b4e9" if optimizer == "sgd" else "black", edgecolor="white", hatch=hatch)
    axes.axhline(mean_curvature, color="black", ls="--", lw=1)
    axes.set_xticks(range(len(BARS)), [label for label, _, _ in BARS.values()], fontsize=8)
    axes.set(title=f"Quadratic, {where}", ylabel="directional sharpness",
             xlabel="bars: 95 %; dashed: mean(h), predicted for msgn")


def draw_gpt(axes, title, rates, points):
    for rule, optimizer in OPTIMIZERS.items():
        loss, nds = np.array(points[rule])[..., :2].reshape(-1, 2).T
        axes.semilogy(loss, nds.clip(1e-3), label=f"{rule}, rate {rates[rule]:g}",
                      **look(optimizer, linestyle="", mfc="none"))
    seeds = counted(len(points["Muon"]), "seed")
    axes.set(title=f"Small GPT {title}, {seeds}", xlabel="training loss (falls to the right)",
             ylabel="directional sharpness (least drawn: 0.001)")
    axes.invert_xaxis()
    legend_below(axes, columns=2)


def figure(numbers):
    picture = new_figure(8)
    above, below = picture.subplots(2, 2)
    for axes, (where, found) in zip(above, numbers["quadratics"].items()):
        draw_quadratic(axes, where, found, numbers["mean_curvature"])
    for axes, (title, points) in zip(below, numbers["points"].items()):
        draw_gpt(axes, title, numbers["rates"][title], points)
    return picture
