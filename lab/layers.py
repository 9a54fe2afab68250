"""The hidden matrices of the CPU track, for lab/newton.py, and what the runs of the track say."""
import json

import numpy as np
import torch

from harness.estimates import mean_interval
from harness.zoo.table import Table
from lab import interval
from lab.training import ROOT, cpu_config, new_model, open_shards, training_steps
from optimizers.polar_muon import msgn
from train_gpt2 import UserError, accumulate, as_blocks

RIDGE = 0.2  # the trainer's
ARMS = "2026-11-30_where_the_gain_comes_from"  # a study of records/cpu: which matrices are preconditioned
RATES = (0.0, *(0.01 * 2.0 ** torch.arange(10)))  # at which the fall along a direction is measured


def gradients(model, batch):
    """{name: (gradient, K of its inputs (blocks, n, n))} of the hidden matrices on the batch."""
    model.zero_grad(set_to_none=True)
    _, grams = accumulate(model, [batch], list(model.hidden_matrices()), torch.float32)
    tokens = batch[0].numel()
    matrices = model.hidden_matrices()
    return {name: (p.grad.clone(), K / tokens) for (name, p), K in zip(matrices.items(), grams)}


@torch.no_grad()
def largest_fall(model, batch, p, direction):
    """Largest fall of the loss on the batch when p moves along -direction. p is left as it was."""
    W = p.detach().clone()
    losses = []
    for rate in RATES:
        p.copy_(W - rate * direction)
        losses.append(float(model(*batch)[0]))
    p.copy_(W)
    return losses[0] - min(losses)


def preconditioned(G, K):
    """G (K + ridge)^-1 for the gradient's blocks; the ridge is the trainer's."""
    mean = K.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    inverse = torch.linalg.inv(K + RIDGE * mean * torch.eye(K.size(-1)))
    return torch.einsum("mbi,bij->mbj", G.view(len(G), len(K), -1), inverse).reshape_as(G)


def geometric_mean_condition(K):
    """Of the condition numbers of the blocks of K."""
    e = torch.linalg.eigvalsh(K)
    smallest = e[:, 0].clamp(min=1e-7 * e[:, -1])
    return (e[:, -1] / smallest).log().mean().exp()


def measure_layers(seed, train, batches, **fields):
    """[(name, condition, noise, ratio)] of the CPU track's hidden matrices, after `train` steps with Muon.

    condition  number of K, the second moment of the matrix' inputs
    noise      |noise|^2 / |gradient|^2 of a batch
    ratio      fall of the loss in one step along the preconditioned direction over that along the plain one

    All are means over this number of batches. `fields` replace those of the configuration.
    """
    config = cpu_config(**fields, num_iterations=train, warmdown_iters=0, seed=seed, data_seed=seed + 1)
    shards = open_shards(config)
    model, optimizers = new_model(config)
    list(training_steps(config, model, optimizers, shards))
    matrices = model.hidden_matrices()
    B = config.batch_size
    half = B // 2
    after = (train + batches) * B  # sequences that no gradient here has seen
    test = shards.batch(range(after, after + half))
    found = {name: [] for name in matrices}
    for i in range(batches):
        start = (train + i) * B
        first = gradients(model, shards.batch(range(start, start + half)))
        second = gradients(model, shards.batch(range(start + half, start + 2 * half)))
        for name, p in matrices.items():
            G1, K1 = first[name]
            G2, K2 = second[name]
            G = (G1 + G2) / 2
            K = (K1 + K2) / 2
            noise = (G1 - G2).square().sum() / 4  # E |G_batch - G|^2
            signal = (G1 * G2).sum()  # |G|^2 without bias
            falls = []
            for U in (preconditioned(G, K), G):
                falls.append(largest_fall(model, test, p, msgn(as_blocks(U)).view_as(p)))
            found[name].append((geometric_mean_condition(K), noise, signal, *falls))
    layers = []
    for name, values in found.items():
        condition, noise, signal, with_it, without = np.array(values, dtype=float).mean(0)
        layers.append((name, condition, noise / max(signal, 1e-12), with_it / without))
    return layers


def final_losses(runs, optimizer, steps):
    """{seed: final loss} of the optimizer's runs of that length."""
    mine = [run for run in runs if run["config"]["optimizer"] == optimizer
            and run["config"]["num_iterations"] == steps]
    return {run["config"]["seed"]: run["final_val_loss"] for run in mine}


def track_gain(momentum):
    """(Estimate of Muon's final loss minus Newton-Muon's, paired by seed, name of the comparison's folder).

    It is the newest comparison with this momentum in records/cpu/. Raises UserError if there is none.
    """
    for folder in sorted((ROOT / "records/cpu").glob("2*"), reverse=True):
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/run.json")]
        runs = [run for run in runs if run["config"]["momentum"] == momentum]
        lengths = [run["config"]["num_iterations"] for run in runs if run["config"]["optimizer"] == "muon"]
        steps = max(lengths, default=None)
        muon = final_losses(runs, "muon", steps)
        newton = final_losses(runs, "newton_muon", steps)
        gains = [muon[seed] - newton[seed] for seed in sorted(muon.keys() & newton.keys())]
        if len(gains) > 1:
            return mean_interval(gains), folder.name
    raise UserError("records/cpu has no two seeds of both muon and newton_muon with momentum "
                    f"{momentum}; restore it from git")


def arm_difference(first, second):
    """(mean, half-width) of the final loss of the arm `first` of ARMS minus that of `second`, by pairs.

    The interval is the study's: those of all its pairs of arms hold together with 95 % (Bonferroni).
    Raises UserError if its runs are missing.
    """
    path = ROOT / "records/cpu" / ARMS / "runs.csv"
    table = Table(path)
    arms = {point.optimizer for point in table.losses}
    finals = [table.results(name, 600) for name in (first, second)]
    seeds = sorted(finals[0].keys() & finals[1].keys())
    if len(seeds) < 2:
        raise UserError(f"{path} has no two seeds of both {first} and {second}; restore it from git")
    gaps = [finals[0][seed] - finals[1][seed] for seed in seeds]
    pairs = len(arms) * (len(arms) - 1) / 2
    return interval(gaps, level=1 - 0.05 / pairs)
