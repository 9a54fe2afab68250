"""Which batch size needs the fewest samples, how does it move with momentum and weight decay, and does decay
bound the weights?

A bound on the gradient X / T + Y / b + Z (T steps of batch size b) makes steps to a target fall with b, and
samples b T lowest at a critical b* = 2 Y / e. Y is proportional to (2 beta + 1)(1 - beta) + lambda: lower
for more momentum, higher with weight decay lambda. With decay and lr lambda <= 1 the weights stay bounded:
|W|_2 <= s / lambda, with s the spectral norm of an update at lr = 1.

Choices. A GPT of 1 layer of width 32, sequences of 16 bytes, constant rates; the target is a validation
loss of 2.6. The hidden rate is tuned for each batch size and variant by doubling or halving, with seed +
100; the table's AdamW has five times that rate. Six other seeds run at the tuned rate. Only the hidden
matrices have the weight decay, 2 (lr lambda = 0.02). s = 1.21 sqrt(max(m, n)) for the trainer's update, as
five Newton-Schulz steps end below 1.21.

Also fitted: T = S (1 + b_c / b), whose b_c says at which batch size samples begin to be wasted. The bound,
without Z, makes T proportional to b / (b - b* / 2) = 1 + (b* / 2) / b + ..., so that b_c stands for b* / 2
where b is large, and moves as b* does. But b T = S (b + b_c) of the fit falls down to b = 0: only the
measured samples can say whether they are fewest inside the range.
"""
from functools import partial

import numpy as np
import torch

from harness.pictures import COLORS
from lab import counted, interval, judge, new_figure
from lab.training import cpu_config, new_model, open_shards, parallel, training_steps
from train_gpt2 import as_blocks

SOURCE = ("Sato, Naganuma, Iiduka, Convergence Bound and Critical Batch Size of Muon Optimizer, "
          "arXiv:2507.01598")
TARGET = 2.6  # nats of validation loss; at the start 5.6
DECAY = 2.0
BOUND = 1.21 / DECAY  # of the spectral norm over sqrt(max(m, n))
NORM_RATE = 0.02  # hidden rate of the runs whose norms are measured
PLAIN = "Nesterov 0.95"
DECAYED = "Nesterov 0.95, decay"
VARIANTS = {PLAIN: (0.95, True, 0.0), "momentum 0.95": (0.95, False, 0.0), DECAYED: (0.95, True, DECAY),
            "momentum 0.95, decay": (0.95, False, DECAY), "Nesterov 0.5": (0.5, True, 0.0)}


def config_of(variant, batch, rate, seed, steps):
    momentum, nesterov, decay = VARIANTS[variant]
    return cpu_config(n_layer=1, n_head=2, n_embd=32, sequence_length=16, batch_size=batch, seed=seed,
                      data_seed=seed + 1, num_iterations=steps, warmdown_iters=0, hidden_learning_rate=rate,
                      learning_rate=5 * rate, momentum=momentum, nesterov=nesterov, weight_decay=decay)


def steps_to_target(variant, batch, rate, seed, most):
    """Steps until 256 validation sequences have the target loss, or `most`.

    They are evaluated at intervals of 5 % of the steps so far.
    """
    config = config_of(variant, batch, rate, seed, most)
    model, optimizers = new_model(config)
    test = open_shards(config, "input_val_bin").batch(range(256))
    due = 1
    for step, _ in enumerate(training_steps(config, model, optimizers, open_shards(config))):
        if step == due:
            with torch.no_grad():
                loss = float(model(*test)[0])
            if loss < TARGET:
                return step
            due = max(step + 1, int(1.05 * step))
    return most


def tuned(variant, batch, seed, rate, most):
    """(steps, rate): the rate doubles or halves from `rate` as long as that needs fewer steps."""
    best = steps_to_target(variant, batch, rate, seed, most)
    for factor in (2.0, 0.5):
        moved = False
        while True:
            steps = steps_to_target(variant, batch, factor * rate, seed, best)
            if steps >= best:
                break
            best = steps
            rate = factor * rate
            moved = True
        if moved:
            break
    return best, rate


def tuned_rates(variant, batches, seed, most):
    """The tuned rate of each batch size, tuned from that of the one before."""
    rate = 0.005
    found = []
    for batch in batches:
        _, rate = tuned(variant, batch, seed, rate, most)
        found.append(rate)
    return found


def steps_of(task):
    return steps_to_target(*task)


def norms(variant, rate, steps, seed):
    """(2, steps): the largest |W|_2 / sqrt(max(m, n)) of a hidden block, and the norm of the gradient."""
    config = config_of(variant, 32, rate, seed, steps)
    model, optimizers = new_model(config)
    matrices = list(model.hidden_matrices().values())
    found = []
    for _ in training_steps(config, model, optimizers, open_shards(config)):
        blocks = [as_blocks(p.detach()) for p in matrices]
        largest = max(float(torch.linalg.matrix_norm(W, 2).max() / max(W.shape[1:]) ** 0.5) for W in blocks)
        gradient = torch.cat([p.grad.flatten() for p in matrices])
        found.append((largest, float(gradient.norm())))
    return np.array(found).T


def measure(size="full", seed=0):
    full = size == "full"
    batches, most, seeds, length = ((8, 32, 128, 512), 600, 6, 400) if full else ((8, 32), 12, 1, 10)
    names = list(VARIANTS) if full else [PLAIN]
    rates = parallel(partial(tuned_rates, batches=batches, seed=seed + 100, most=most), names)
    tasks = []
    for name, mine in zip(names, rates):
        for batch, rate in zip(batches, mine):
            tasks += [(name, batch, rate, seed + i, most) for i in range(seeds)]
    found = np.array(parallel(steps_of, tasks)).reshape(len(names), len(batches), seeds)
    traces = {}
    for name in (PLAIN, DECAYED):
        weights, gradients = norms(name, NORM_RATE, length, seed)
        traces[name] = dict(weights=weights.tolist(), gradients=gradients.tolist())
    return dict(batches=list(batches), rates=dict(zip(names, rates)), steps=dict(zip(names, found.tolist())),
                traces=traces)


def steps_and_samples(numbers):
    """{variant: steps to the target (batches, seeds)}, and the same for samples."""
    batches = np.array(numbers["batches"])[:, None]
    steps = {name: np.array(values) for name, values in numbers["steps"].items()}
    return steps, {name: values * batches for name, values in steps.items()}


def best_batches(numbers):
    """{variant: batch size with the fewest samples}."""
    _, samples = steps_and_samples(numbers)
    return {name: numbers["batches"][values.mean(1).argmin()] for name, values in samples.items()}


def critical_batches(numbers):
    """{variant: b_c of each seed}."""
    steps, _ = steps_and_samples(numbers)
    inverse = 1 / np.array(numbers["batches"])
    found = {}
    for name, values in steps.items():
        slope, floor = np.polyfit(inverse, values, 1, w=1 / values.mean(1))
        found[name] = slope / floor
    return found


def critical_rows(numbers):
    """How b_c moves with momentum and decay, seed by seed."""
    critical = critical_batches(numbers)
    claims = [("more momentum lowers the critical batch size (b_c)", PLAIN, "Nesterov 0.5"),
              ("weight decay raises it, with Nesterov momentum", PLAIN, DECAYED),
              ("weight decay raises it, with plain momentum", "momentum 0.95", "momentum 0.95, decay")]
    found = []
    for claim, low, high in claims:
        mean, width = interval(critical[high] - critical[low])
        found.append((claim, f"{high} {critical[high].mean():.0f}, {low} {critical[low].mean():.0f}; "
                      f"difference {mean:+.0f} ± {width:.0f}", judge(mean, width, low=0)))
    return found


def norm_rows(numbers):
    """Does decay bound the weights?"""
    decayed = numbers["traces"][DECAYED]
    free = numbers["traces"][PLAIN]
    top = max(decayed["weights"])
    end = free["weights"][-1]
    length = len(free["weights"])
    growth = {}
    for name, trace in numbers["traces"].items():
        gradients = np.array(trace["gradients"])
        growth[name] = gradients[-length // 4:].mean() / gradients[:length // 4].mean()
    return [("with decay the spectral norm of the weights stays below s / lambda",
             f"at most {top:.3f}, bound {BOUND:.3f} (over sqrt(max(m, n)))", top <= BOUND),
            (f"without decay it grows on beyond that within {length} steps", f"{end:.3f} at the end",
             end > BOUND),
            ("gradients stay bounded with decay (mean norm of the last quarter over the first, below 2)",
             f"{growth[DECAYED]:.2f}; without decay {growth[PLAIN]:.2f}", bool(growth[DECAYED] < 2))]


def rows(numbers):
    steps, _ = steps_and_samples(numbers)
    batches = numbers["batches"]
    best = best_batches(numbers)
    means = {name: values.mean(1) for name, values in steps.items()}
    texts = [f"{name} {' '.join(f'{x:.0f}' for x in mean)}" for name, mean in means.items()]
    falling = all((np.diff(mean) < 0).all() for mean in means.values())
    inside = all(batches[0] < batch < batches[-1] for batch in best.values())
    found = [("steps to the target fall as the batch grows, whichever variant", "; ".join(texts), falling),
             (f"the batch size with the fewest samples lies inside the range of {batches[0]} to "
              f"{batches[-1]}",
              ", ".join(f"{name}: {batch}" for name, batch in best.items()), inside)]
    if len(steps) == len(VARIANTS):
        found += critical_rows(numbers)
        ratio = means[PLAIN] / means["momentum 0.95"]
        found.append(("Nesterov momentum needs fewer steps than plain at each batch size",
                      "ratio of steps " + " ".join(f"{r:.2f}" for r in ratio), bool((ratio < 1).all())))
    return found + norm_rows(numbers)


def summary(numbers):
    batches = numbers["batches"]
    best = " and ".join(str(batch) for batch in sorted(set(best_batches(numbers).values())))
    critical = [values.mean() for values in critical_batches(numbers).values()]
    decayed = numbers["traces"][DECAYED]["weights"]
    free = numbers["traces"][PLAIN]["weights"]
    return (f"The fewest samples to the target are needed at {best} sequences (over all variants), and "
            f"samples begin to be wasted (b_c) at {min(critical):.0f} to {max(critical):.0f}; an optimum at "
            f"an end of the range of {batches[0]} to {batches[-1]} says only that it is not inside. Weight "
            f"decay held the spectral norm below {max(decayed):.3f} (bound {BOUND:.3f}); without it, it was "
            f"{free[-1]:.2f} after {len(free)} steps, and rising.")


# all are Muon: one colour for decay, another for less momentum, and plain momentum is dashed
LOOKS = {PLAIN: dict(color=COLORS["muon"], linestyle="-", marker="o"),
         "momentum 0.95": dict(color=COLORS["muon"], linestyle="--", marker="o", mfc="white"),
         DECAYED: dict(color="#009e73", linestyle="-", marker="^"),
         "momentum 0.95, decay": dict(color="#009e73", linestyle="--", marker="^", mfc="white"),
         "Nesterov 0.5": dict(color="#cc79a7", linestyle="-.", marker="s")}


def draw_batches(axes, batches, values, quantity):
    for i, (name, found) in enumerate(values.items()):
        mean = found.mean(1)
        bars = [mean - found.min(1), found.max(1) - mean]
        shifted = np.array(batches) * 1.05 ** i  # so that bars do not cover each other
        axes.errorbar(shifted, mean, bars, capsize=2, markersize=5, label=name, **LOOKS[name])
    axes.set(title=f"{quantity.capitalize()} to the target", xlabel="batch size, sequences", ylabel=quantity,
             yscale="log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])


def figure(numbers):
    steps, samples = steps_and_samples(numbers)
    batches = numbers["batches"]
    picture = new_figure(7.5)
    (left, right), (below, key) = picture.subplots(2, 2)
    draw_batches(left, batches, steps, "steps")
    draw_batches(right, batches, samples, "sequences")
    first = steps[PLAIN].mean(1)[0]
    left.plot(batches, first * batches[0] / np.array(batches), "k:", lw=1,
              label="as many sequences at every batch size")
    for name in (PLAIN, DECAYED):
        below.plot(numbers["traces"][name]["weights"], **LOOKS[name] | dict(marker=""))
    below.axhline(BOUND, color="black", ls=":", lw=1)
    below.text(len(numbers["traces"][PLAIN]["weights"]), BOUND, "bound with decay", ha="right", va="bottom",
               fontsize=9)
    below.set(title=f"Weights, batch 32, rate {NORM_RATE}", xlabel="step",
              ylabel="largest |W|$_2$ / sqrt(max(m, n))")
    key.axis("off")
    handles, labels = left.get_legend_handles_labels()
    seeds = counted(steps[PLAIN].shape[1], "seed")
    key.legend(handles, labels, loc="center", fontsize=9, handlelength=3.5,
               title=f"Muon, mean of {seeds}\n(bars: lowest to highest)")
    return picture
