"""How exact is the orthogonalisation, what does it cost, and does an inexact one cost Muon anything, or make
Newton-Muon better?

Newton-Schulz replaces msgn(X) by X <- a X + b (X X^T) X + c (X X^T)^2 X, which acts on each singular value:
s <- a s + b s^3 + c s^5. The speedrun's (a, b, c) = (3.4445, -4.775, 2.0315) multiply a small s by 3.4445 a
step, 485 in five, and never converge to 1; Polar Express has other coefficients in each step. Error: |O - U
V^T|_F / sqrt(r) on 64 x 64 matrices with log-spaced singular values.

Choices. Training is shorter and smaller than the CPU configuration so that it fits into two minutes: 2
layers of width 32, 100 steps of 16 x 64 tokens, AdamW 0.02 for the table, Newton-Muon's refreshes every 32
steps; hidden rate: the best of three for each orthogonalisation with seed + 100, then six other seeds. A
singular value below 0.7 after orthogonalisation counts as not flattened.

One verdict hangs on the seed: Muon minus Newton-Muon is -0.0060 ± 0.0060 with seed 0, and -0.0047 ± 0.0050,
so open, with 1.
"""
import time
from functools import partial
from unittest.mock import patch

import numpy as np
import torch

import train_gpt2
from lab import counted, interval, judge, legend_below, look, new_figure
from lab.training import SMALL, cpu_config, new_model, open_shards, parallel, training_steps
from optimizers.polar_muon import msgn, polar_express
from train_gpt2 import evaluate, newton_schulz

SOURCE = ("Jordan et al., Muon (2024); Amsel et al., The Polar Express, arXiv:2505.16932; "
          "Du, Su, arXiv:2604.01472")
SPEEDRUN = (3.4445, -4.7750, 2.0315)
RATES = (0.005, 0.01, 0.02)
FIVE = "Muon, 5 steps"
EXACT = "Muon, exact SVD"
NEWTON_FIVE = "Newton-Muon, 5 steps"
NEWTON_EXACT = "Newton-Muon, exact SVD"
METHODS = {f"Muon, {counted(k, 'step')}": ("muon", partial(newton_schulz, steps=k)) for k in (1, 3, 5, 10)}
METHODS |= {"Muon, Polar Express 8": ("muon", partial(polar_express, steps=8)),
            EXACT: ("muon", msgn),
            NEWTON_FIVE: ("newton_muon", partial(newton_schulz, steps=5)),
            NEWTON_EXACT: ("newton_muon", msgn)}
SCHEMES = {"speedrun": newton_schulz, "Polar Express": polar_express}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = 10  # each scheme is measured after 1 to 10


def with_condition(condition, n, repeats, generator):
    """(matrices (repeats, n, n) in random bases, their polar factors, their singular values (n,))."""
    U, V = (torch.linalg.qr(torch.randn(repeats, n, n, generator=generator, dtype=torch.float64))[0]
            for _ in range(2))
    s = condition ** -torch.linspace(0, 1, n, dtype=torch.float64)
    return (U * s @ V.mT).float(), (U @ V.mT).float(), s


def scalar_iteration(s):
    """Five steps on the singular values of X / |X|_F."""
    a, b, c = SPEEDRUN
    s = s / s.norm()
    for _ in range(5):
        s = a * s + b * s ** 3 + c * s ** 5
    return s


def measure_accuracy(conditions, repeats, generator):
    """Of each scheme, type and number of steps: errors and smallest singular values at these conditions.

    errors, smallest   {scheme: {type: (steps, conditions)}}
    predicted          smallest singular value by the scalar iteration, at each condition
    deviation          largest difference between the measured singular values and the scalar iteration
    """
    errors = {name: {dtype: [[] for _ in range(STEPS)] for dtype in TYPES} for name in SCHEMES}
    smallest = {name: {dtype: [[] for _ in range(STEPS)] for dtype in TYPES} for name in SCHEMES}
    predicted = []
    deviation = 0.0
    for condition in conditions:
        X, Q, s = with_condition(condition, 64, repeats, generator)
        for name, function in SCHEMES.items():
            for dtype, torch_dtype in TYPES.items():
                for i in range(STEPS):
                    O = function(X.to(torch_dtype), i + 1).float()
                    error = ((O - Q).square().sum((-2, -1)) / 64).sqrt()
                    errors[name][dtype][i].append(float(error.mean()))
                    smallest[name][dtype][i].append(float(torch.linalg.svdvals(O).min()))
        s = scalar_iteration(s)
        predicted.append(float(s.min()))
        measured = torch.linalg.svdvals(newton_schulz(X, 5))
        deviation = max(deviation, float((measured - s.sort(descending=True).values).abs().max()))
    return dict(errors=errors, smallest=smallest, predicted=predicted, deviation=deviation)


def milliseconds(function, X):
    """Median of nine calls."""
    times = []
    for _ in range(9):
        start = time.perf_counter()
        function(X)
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))


def train(method, rate, seed, steps, val_tokens):
    """(final validation loss, share of the singular values below 0.7 in the last orthogonalised momenta)."""
    optimizer, orthogonalise = METHODS[method]
    fields = SMALL | dict(seed=seed, data_seed=seed + 1, num_iterations=steps, optimizer=optimizer,
                          hidden_learning_rate=rate, val_tokens=val_tokens)
    config = cpu_config(**fields)
    model, optimizers = new_model(config)
    last = {}

    def recorded(U, _):
        last[U.shape] = orthogonalise(U)
        return last[U.shape]

    with patch.object(train_gpt2, "newton_schulz", recorded):
        list(training_steps(config, model, optimizers, open_shards(config)))
    validation = open_shards(config, "input_val_bin")
    loss = evaluate(model, validation, config, torch.device("cpu"), torch.float32, 64)
    values = torch.cat([torch.linalg.svdvals(O).flatten() for O in last.values()])
    return loss, float((values < 0.7).float().mean())


def train_task(task):
    return train(*task)


def results(methods, seed, seeds, length, rates=RATES):
    """{method: (final losses, shares not flattened)} of `seeds` seeds.

    The rate is the one that is best with seed + 100.
    """
    tasks = [(method, rate, seed + 100, *length) for method in methods for rate in rates]
    tried = parallel(train_task, tasks)
    losses = np.array(tried)[:, 0].reshape(len(methods), len(rates))
    best = [rates[i] for i in losses.argmin(1)]
    tasks = [(method, rate, seed + i, *length) for method, rate in zip(methods, best) for i in range(seeds)]
    found = parallel(train_task, tasks)
    return dict(zip(methods, np.array(found).reshape(len(methods), seeds, 2).transpose(0, 2, 1)))


def measure(size="full", seed=0):
    full = size == "full"
    generator = torch.Generator().manual_seed(seed)
    conditions = 10.0 ** np.arange(0, 6.5, 1.0 if full else 3.0)
    accuracy = measure_accuracy(conditions, 5 if full else 2, generator)
    X = torch.randn(256, 256, generator=generator)
    cost = {name: milliseconds(function, X) for name, function in (SCHEMES | {"SVD": msgn}).items()}
    if full:
        trained = results(list(METHODS), seed, 6, (100, 16384))
    else:
        trained = results([FIVE, EXACT, NEWTON_FIVE, NEWTON_EXACT], seed, 1, (8, 1024), RATES[1:2])
    return dict(conditions=conditions.tolist(), **accuracy, milliseconds=cost,
                losses={name: found[0].tolist() for name, found in trained.items()},
                not_flattened={name: found[1].tolist() for name, found in trained.items()})


def errors_of(numbers, scheme, steps, dtype="fp32"):
    """At each condition."""
    return np.array(numbers["errors"][scheme][dtype][steps - 1])


def flat_up_to(numbers):
    """The largest condition at which the speedrun's five steps leave no singular value below 0.68."""
    smallest = np.array(numbers["smallest"]["speedrun"]["fp32"][4])
    return np.array(numbers["conditions"])[smallest >= 0.68].max()


def more_accurate(numbers):
    """At which conditions Polar Express is, in five steps."""
    return errors_of(numbers, "Polar Express", 5) < errors_of(numbers, "speedrun", 5)


def difference(numbers, a, b):
    """(mean, half-width of its 95 % interval) of the loss of a minus that of b, seed by seed."""
    return interval(np.array(numbers["losses"][a]) - np.array(numbers["losses"][b]))


def signed(found):
    return "{:+.4f} ± {:.4f}".format(*found)


def accuracy_rows(numbers):
    conditions = np.array(numbers["conditions"])
    flat = flat_up_to(numbers)
    better = more_accurate(numbers)
    moderate = conditions <= 1e4
    worst = {name: errors_of(numbers, name, 5)[moderate].max() for name in SCHEMES}
    five, ten, express = (errors_of(numbers, *which)[:2].max()
                          for which in (("speedrun", 5), ("speedrun", 10), ("Polar Express", 10)))
    last = numbers["smallest"]["speedrun"]["fp32"][4][-1]
    found = [("five steps act on each singular value as s <- a s + b s^3 + c s^5 does",
              f"largest deviation {numbers['deviation']:.0e}", numbers["deviation"] < 1e-3),
             ("five steps flatten singular values down to |X|_F 0.7 / 485 (condition 280 for 64 log-spaced "
              "ones)",
              f"smallest at least 0.68 up to condition {flat:.0e}; then {last:.1e} at {conditions[-1]:.0e}",
              bool(flat == 100)),
             ("Polar Express is more accurate than the speedrun's coefficients, five steps each",
              f"at {better.sum()} of {len(better)} conditions; worst error up to 1e4: "
              f"{worst['Polar Express']:.2f} against {worst['speedrun']:.2f}", bool(better.all())),
             ("more steps of the speedrun's coefficients do not make well-conditioned matrices exact "
              "(condition 10 and less)",
              f"error {five:.2f} after 5, {ten:.2f} after 10; Polar Express {express:.0e}", bool(ten > 0.05))]
    for steps in (5, 10):
        changes = [abs(errors_of(numbers, name, steps, "bf16") - errors_of(numbers, name, steps)).max()
                   for name in SCHEMES]
        found.append((f"bf16 costs no accuracy in {steps} steps (error changes by less than 0.05)",
                      f"by up to {max(changes):.2f}", bool(max(changes) < 0.05)))
    return found


def loss_rows(numbers):
    exact_gain = difference(numbers, FIVE, EXACT)
    newton_gain = difference(numbers, FIVE, NEWTON_FIVE)
    exact_newton_gain = difference(numbers, EXACT, NEWTON_EXACT)
    losses = {name: np.array(values) for name, values in numbers["losses"].items()}
    shrunk = interval((losses[FIVE] - losses[NEWTON_FIVE]) - (losses[EXACT] - losses[NEWTON_EXACT]))
    share, newton_share = (np.mean(numbers["not_flattened"][name]) for name in (FIVE, NEWTON_FIVE))
    gains = judge(*newton_gain, low=0)
    return [("an exact msgn gives Muon a lower loss than five steps",
             f"five steps minus exact: {signed(exact_gain)}", judge(*exact_gain, low=0)),
            ("Newton-Muon ends lower than Muon here, five steps each",
             f"Muon minus Newton-Muon: {signed(newton_gain)}", gains),
            ("its gain is that of a spectrum which five steps can flatten: with an exact msgn it shrinks",
             f"gain {signed(newton_gain)} with five steps, {signed(exact_newton_gain)} exact; not flattened: "
             f"{share:.0%} of Muon's singular values, {newton_share:.0%} of Newton-Muon's",
             judge(*shrunk, low=0) if gains else None)]


def rows(numbers):
    cost = numbers["milliseconds"]
    cost_row = ("five steps are cheaper than an SVD (256 x 256, this CPU)",
                ", ".join(f"{name} {ms:.1f} ms" for name, ms in cost.items()), cost["speedrun"] < cost["SVD"])
    return [*accuracy_rows(numbers), cost_row, *loss_rows(numbers)]


def summary(numbers):
    better = more_accurate(numbers)
    one = np.mean(numbers["losses"].get("Muon, 1 step", numbers["losses"][FIVE]))
    return ("The speedrun's five steps flatten singular values up to a condition of about "
            f"{flat_up_to(numbers):.0f}, as the scalar iteration says, and Polar Express is closer to the "
            f"polar factor at {better.sum()} of {len(better)} conditions. In the loss of a small GPT five "
            f"steps minus exact is {signed(difference(numbers, FIVE, EXACT))}, one step minus five "
            f"{one - np.mean(numbers['losses'][FIVE]):+.3f}; Muon minus Newton-Muon is "
            f"{signed(difference(numbers, FIVE, NEWTON_FIVE))} with five steps and "
            f"{signed(difference(numbers, EXACT, NEWTON_EXACT))} with an exact msgn, where flatter singular "
            "values, were they the reason, would bring the second nearer to 0.")


# Muon's own colour for the trainer's steps, darker with more of them; another for Polar Express
CURVES = {("speedrun", 1): ("#9ecae1", "o"), ("speedrun", 3): ("#6baed6", "s"),
          ("speedrun", 5): ("#0072b2", "o"), ("speedrun", 10): ("#08306b", "D"),
          ("Polar Express", 5): ("#e69f00", "^"), ("Polar Express", 8): ("#a63603", "v")}


def draw_errors(axes, numbers):
    for (name, steps), (color, marker) in CURVES.items():
        for dtype, line in (("fp32", "-"), ("bf16", ":")):
            label = f"{name}, {counted(steps, 'step')}" if dtype == "fp32" else None
            error = errors_of(numbers, name, steps, dtype).clip(1e-4)
            axes.loglog(numbers["conditions"], error, line, marker=marker if dtype == "fp32" else "",
                        color=color, markersize=4, label=label)
    axes.set(title="Error (dotted: bf16; least drawn: 1e-4)", xlabel="condition number",
             ylabel=r"$|O - U V^T|_F$ / sqrt(r)")


def draw_smallest(axes, numbers):
    conditions = numbers["conditions"]
    axes.loglog(conditions, numbers["predicted"], "k-", lw=1, label="speedrun: the scalar iteration")
    for name in SCHEMES:
        color, marker = CURVES[name, 5]
        axes.loglog(conditions, numbers["smallest"][name]["fp32"][4], marker, mfc="none", color=color,
                    label=f"{name}: measured")
    axes.axhline(0.7, color="gray", ls="--", lw=1, label="0.7")
    axes.set(title="Smallest singular value, 5 steps", xlabel="condition number")


def draw_losses(axes, numbers):
    losses = numbers["losses"]
    for i, (name, values) in enumerate(losses.items()):
        optimizer, _ = METHODS[name]
        axes.plot(values, [i] * len(values), **look(optimizer, linestyle="", mfc="none"))
        axes.plot(np.mean(values), i, "|", color="black", ms=18)
    axes.set_yticks(range(len(losses)), list(losses))
    axes.invert_yaxis()
    seeds = counted(len(losses[FIVE]), "seed")
    axes.set(title=f"Small GPT, {seeds} (bar: mean)", xlabel="final validation loss",
             ylabel="orthogonalisation")


def figure(numbers):
    picture = new_figure(8)
    panels = picture.subplot_mosaic([["error", "smallest"], ["loss", "loss"]], height_ratios=(1.5, 1))
    draw_errors(panels["error"], numbers)
    draw_smallest(panels["smallest"], numbers)
    draw_losses(panels["loss"], numbers)
    legend_below(panels["error"], columns=2)
    legend_below(panels["smallest"])
    return picture
