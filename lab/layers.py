"""The hidden matrices of the CPU track, measured for lab/newton.py: where they lie on its map, and what the track's runs say."""
import json

import numpy as np
import torch

from harness.estimates import mean_interval
from lab.training import ROOT, cpu_config, new_model, open_shards, training_steps
from optimizers.polar_muon import msgn
from train_gpt2 import UserError, accumulate, as_blocks

RIDGE = 0.2  # the trainer's


def measure_layers(seed, train, batches, **fields):
    """Of each hidden matrix of the CPU track after `train` steps with Muon: (name, condition of K, noise of the gradient, fall of the loss
    in one step along the preconditioned direction over that along the plain one), means over this number of batches.

    `fields` replace those of the configuration, for a smaller model.
    """
    config = cpu_config(**fields, num_iterations=train, warmdown_iters=0, seed=seed, data_seed=seed + 1)
    shards = open_shards(config)
    model, optimizers = new_model(config)
    list(training_steps(config, model, optimizers, shards))
    matrices, B = model.hidden_matrices(), config.batch_size

    def gradients(first, n):
        model.zero_grad(set_to_none=True)
        _, grams = accumulate(model, [shards.batch(range(first, first + n))], True, torch.float32)
        return {name: (p.grad.clone(), K / (n * config.sequence_length)) for (name, p), K in zip(matrices.items(), grams)}

    test = shards.batch(range((train + batches) * B, (train + batches) * B + B // 2))  # sequences that no gradient here has seen

    @torch.no_grad()
    def fall(p, O):
        """Largest fall of the loss on the test batch along -O."""
        W, losses = p.detach().clone(), []
        for rate in (0.0, *0.01 * 2.0 ** torch.arange(10)):
            p.copy_(W - rate * O)
            losses.append(float(model(*test)[0]))
        p.copy_(W)
        return losses[0] - min(losses)

    found = {name: [] for name in matrices}
    for i in range(batches):
        first, second = gradients((train + i) * B, B // 2), gradients((train + i) * B + B // 2, B // 2)
        for name, p in matrices.items():
            (G1, K1), (G2, K2) = first[name], second[name]
            G, K, e = (G1 + G2) / 2, (K1 + K2) / 2, torch.linalg.eigvalsh((K1 + K2) / 2)
            A = K + RIDGE * K.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(K.size(-1))
            GP = torch.einsum("mbi,bij->mbj", G.view(len(G), len(K), -1), torch.linalg.inv(A)).reshape_as(G)
            found[name].append(((e[:, -1] / e[:, 0].clamp(min=1e-7 * e[:, -1])).log().mean().exp(),
                                (G1 - G2).square().sum() / 4, (G1 * G2).sum(),  # E |G_batch - G|^2, and |G|^2 without bias
                                *(fall(p, msgn(as_blocks(U)).view_as(p)) for U in (GP, G))))
    found = {name: np.array(values, dtype=float).mean(0) for name, values in found.items()}
    return [(name, condition, noise / max(signal, 1e-12), with_it / without)
            for name, (condition, noise, signal, with_it, without) in found.items()]


def track_gain(momentum):
    """(Estimate of Muon's final loss minus Newton-Muon's, paired by seed, folder) in the newest comparison with this momentum in
    records/cpu/. Raises UserError if there is none.
    """
    for folder in sorted((ROOT / "records/cpu").glob("2*"), reverse=True):
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/run.json")]
        runs = [run for run in runs if run["config"]["momentum"] == momentum]
        steps = max((run["config"]["num_iterations"] for run in runs if run["config"]["optimizer"] == "muon"), default=None)
        muon, newton = ({run["config"]["seed"]: run["final_val_loss"] for run in runs
                         if (run["config"]["optimizer"], run["config"]["num_iterations"]) == (name, steps)}
                        for name in ("muon", "newton_muon"))
        gains = [muon[seed] - newton[seed] for seed in sorted(muon.keys() & newton.keys())]
        if len(gains) > 1:
            return mean_interval(gains), folder.name
    raise UserError(f"records/cpu has no two seeds of both muon and newton_muon with momentum {momentum}; restore it from git")
