"""Which batch size needs the fewest samples, how does it move with momentum and weight decay, and does decay bound the weights?"""
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure

from lab import Result, judge, mean_interval
from lab.training import cpu_config, new_model, open_shards, parallel, training_steps
from train_gpt2 import as_blocks

TARGET = 2.6  # nats of validation loss; at the start 5.6
DECAY = 2.0
VARIANTS = {"Nesterov 0.95": (0.95, True, 0.0), "momentum 0.95": (0.95, False, 0.0), "Nesterov 0.95, decay": (0.95, True, DECAY),
            "momentum 0.95, decay": (0.95, False, DECAY), "Nesterov 0.5": (0.5, True, 0.0)}


def config_of(variant, batch, rate, seed, steps):
    momentum, nesterov, decay = VARIANTS[variant]
    return cpu_config(n_layer=1, n_head=2, n_embd=32, sequence_length=16, batch_size=batch, seed=seed, data_seed=seed + 1,
                      num_iterations=steps, warmdown_iters=0, hidden_learning_rate=rate, learning_rate=5 * rate, momentum=momentum,
                      nesterov=nesterov, weight_decay=decay)


def steps_to_target(variant, batch, rate, seed, most):
    """Steps until 256 validation sequences have the target loss, or `most`; evaluated at intervals of 5 % of the steps so far."""
    config = config_of(variant, batch, rate, seed, most)
    model, optimizers = new_model(config)
    test, due = open_shards(config, "input_val_bin").batch(range(256)), 1
    for step, _ in enumerate(training_steps(config, model, optimizers, open_shards(config))):
        if step == due:
            with torch.no_grad():
                if float(model(*test)[0]) < TARGET:
                    return step
            due = max(step + 1, int(1.05 * step))
    return most


def tuned(variant, batch, seed, rate, most):
    """(steps, rate): the rate doubles or halves from `rate` as long as that needs fewer steps."""
    best = steps_to_target(variant, batch, rate, seed, most)
    for factor in (2.0, 0.5):
        moved = False
        while (steps := steps_to_target(variant, batch, factor * rate, seed, best)) < best:
            best, rate, moved = steps, factor * rate, True
        if moved:
            break
    return best, rate


def tuned_rates(variant, batches, seed, most):
    """The tuned rate of each batch size, tuned from that of the one before."""
    rate, found = 0.005, []
    for batch in batches:
        rate = tuned(variant, batch, seed, rate, most)[1]
        found.append(rate)
    return found


def steps_of(task):
    return steps_to_target(*task)


def norms(variant, rate, steps, seed):
    """(largest |W|_2 / sqrt(max(m, n)) of a hidden block, norm of the gradient) in each step."""
    config = config_of(variant, 32, rate, seed, steps)
    model, optimizers = new_model(config)
    found = []
    matrices = list(model.hidden_matrices().values())
    for _ in training_steps(config, model, optimizers, open_shards(config)):
        blocks = [as_blocks(p.detach()) for p in matrices]
        found.append((max(float(torch.linalg.matrix_norm(W, 2).max() / max(W.shape[1:]) ** 0.5) for W in blocks),
                      float(torch.cat([p.grad.flatten() for p in matrices]).norm())))
    return np.array(found).T


def run(size="full", seed=0):
    """A bound on the gradient X / T + Y / b + Z (T steps of batch size b) makes steps to a target fall with b, and samples b T lowest at a
    critical b* = 2 Y / e, Y proportional to (2 beta + 1)(1 - beta) + lambda: lower for more momentum, higher with weight decay lambda.
    With decay and lr lambda <= 1 the weights stay bounded: |W|_2 <= s / lambda, s the spectral norm of an update at lr = 1.

    Choices. A GPT of 1 layer of width 32, sequences of 16 bytes, constant rates; the target is a validation loss of 2.6. The hidden rate is
    tuned for each batch size and variant by doubling or halving, with seed + 100; the table's AdamW has five times that rate. Six other
    seeds run at the tuned rate. Only the hidden matrices have the weight decay, 2 (lr lambda = 0.02). s = 1.21 sqrt(max(m, n)) for the
    trainer's update, as five Newton-Schulz steps end below 1.21.

    Also fitted: T = S (1 + b_c / b), whose b_c says at which batch size samples begin to be wasted. The bound, without Z, makes T
    proportional to b / (b - b* / 2) = 1 + (b* / 2) / b + ..., so that b_c stands for b* / 2 where b is large, and moves as b* does. But
    b T = S (b + b_c) of the fit falls down to b = 0: only the measured samples can say whether they are fewest inside the range.
    """
    full = size == "full"
    batches, most, seeds = ((8, 32, 128, 512), 600, 6) if full else ((8, 32), 12, 1)
    names = list(VARIANTS) if full else ["Nesterov 0.95"]
    rates = parallel(partial(tuned_rates, batches=batches, seed=seed + 100, most=most), names)
    tasks = [(name, batch, rate, seed + i, most) for name, mine in zip(names, rates) for batch, rate in zip(batches, mine)
             for i in range(seeds)]
    found = np.array(parallel(steps_of, tasks)).reshape(len(names), len(batches), seeds)
    steps = dict(zip(names, found))
    samples = {name: steps[name] * np.array(batches)[:, None] for name in names}
    best = {name: batches[samples[name].mean(1).argmin()] for name in names}
    critical = {}  # b_c of each seed
    for name in names:
        slope, floor = np.polyfit(1 / np.array(batches), steps[name], 1, w=1 / steps[name].mean(1))
        critical[name] = slope / floor

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes, rows = figure.subplots(1, 3), []
    for axis, values, label in ((axes[0], steps, "steps to the target"), (axes[1], samples, "sequences to the target")):
        for i, name in enumerate(names):
            mean = values[name].mean(1)
            bars = [mean - values[name].min(1), values[name].max(1) - mean]
            axis.errorbar(np.array(batches) * 1.03 ** i, mean, bars, marker="o", capsize=3, label=name)
        axis.set(title=f"{label.capitalize()}, {seeds} seeds (bars: lowest to highest)", xlabel="batch size, sequences", ylabel=label,
                 yscale="log")
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=8)
    axes[0].plot(batches, steps[names[0]].mean(1)[0] * batches[0] / np.array(batches), "k:", lw=1)
    axes[0].annotate("samples constant", (batches[1], steps[names[0]].mean(1)[0] * batches[0] / batches[1]), fontsize=8, ha="right",
                     va="top")

    rows.append(("steps to the target fall as the batch grows, whichever variant", "; ".join(
        f"{name} {' '.join(f'{x:.0f}' for x in steps[name].mean(1))}" for name in names),
        bool(all((np.diff(steps[n].mean(1)) < 0).all() for n in names))))
    rows.append((f"the batch size with the fewest samples lies inside the range of {batches[0]} to {batches[-1]}", ", ".join(
        f"{name}: {best[name]}" for name in names), bool(all(batches[0] < best[name] < batches[-1] for name in names))))
    for claim, low, high in (("more momentum lowers the critical batch size (b_c)", "Nesterov 0.95", "Nesterov 0.5"),
                             ("weight decay raises it, with Nesterov momentum", "Nesterov 0.95", "Nesterov 0.95, decay"),
                             ("weight decay raises it, with plain momentum", "momentum 0.95", "momentum 0.95, decay")) if full else ():
        d, width = mean_interval(critical[high] - critical[low])  # seed by seed
        rows.append((claim, f"{high} {critical[high].mean():.0f}, {low} {critical[low].mean():.0f}; difference {d:+.0f} ± {width:.0f}",
                     judge(d, width, low=0)))
    if full:
        ratio = steps["Nesterov 0.95"].mean(1) / steps["momentum 0.95"].mean(1)
        rows.append(("Nesterov momentum needs fewer steps than plain at each batch size",
                     "ratio of steps " + " ".join(f"{r:.2f}" for r in ratio), bool((ratio < 1).all())))
    length, rate, bound = (400 if full else 10), 0.02, 1.21 / DECAY
    traces = {name: norms(name, rate, length, seed) for name in ("Nesterov 0.95", "Nesterov 0.95, decay")}
    for name, (weights, _) in traces.items():
        axes[2].plot(weights, label=name)
    axes[2].axhline(bound, color="black", ls="--", lw=1, label="bound with decay")
    axes[2].set(title=f"Weights with and without decay, batch 32, rate {rate}", xlabel="step", ylabel="largest |W|_2 / sqrt(max(m, n))")
    axes[2].legend(fontsize=8)
    end = {name: (weights[-1], weights.max(), gradients[-length // 4:].mean(), gradients[:length // 4].mean())
           for name, (weights, gradients) in traces.items()}
    (last, top, late, early), (free, _, free_late, free_early) = end["Nesterov 0.95, decay"], end["Nesterov 0.95"]
    rows.append(("with decay the spectral norm of the weights stays below s / lambda",
                 f"at most {top:.3f}, bound {bound:.3f} (over sqrt(max(m, n)))", bool(top <= bound)))
    rows.append((f"without decay it grows on beyond that within {length} steps", f"{free:.3f} at the end", bool(free > bound)))
    rows.append(("gradients stay bounded with decay (mean norm of the last quarter over the first, below 2)",
                 f"{late / early:.2f}; without decay {free_late / free_early:.2f}", bool(late / early < 2)))
    summary = (f"The fewest samples to the target are needed at {' and '.join(map(str, sorted(set(best.values()))))} sequences (over all "
               f"variants), and samples begin to be wasted (b_c) at {min(c.mean() for c in critical.values()):.0f} to "
               f"{max(c.mean() for c in critical.values()):.0f}; an optimum at an end of the range of {batches[0]} to {batches[-1]} says "
               f"only that it is not inside. Weight decay held the spectral norm below {top:.3f} (bound {bound:.3f}); without it, it was "
               f"{free:.2f} after {length} steps, and rising.")
    return Result(rows, figure, summary,
                  "Sato, Naganuma, Iiduka, Convergence Bound and Critical Batch Size of Muon Optimizer, arXiv:2507.01598")
