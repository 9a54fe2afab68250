"""DPMuon: Muon on clipped gradients with Gaussian noise, after differentially private Muon
(DP-Muon, arXiv:2605.12994).

    H = G / max(1, ||G||_F / clip)
    G <- H + noise_multiplier clip Z,   Z standard Gaussian
    the rest is Muon with that G; q, k and v are clipped separately

The paper clips the gradient of each example before it averages them. Here the mean gradient of a batch
is clipped, because that is all a trainer has. So the unit of privacy is the whole batch: a step is a
Gaussian mechanism for the presence of its batch, with multiplier noise_multiplier in each matrix. For L
matrices together (a fused q, k, v counts as 3) the multiplier is noise_multiplier / sqrt(L). Give that
number to an accountant, with one release for each step that uses the batch. With one example in a batch,
the unit is the example and the rule is the paper's.

There is no privacy
- for one example, as the paper accounts for it: one of B examples can change H as much as the whole
  batch can. The same epsilon takes B times the paper's noise, and the fixed order of the data gives no
  amplification by sampling;
- for the whole model: the trainer's AdamW updates the embedding and head without noise, and losses are
  logged;
- at the default multiplier, which is for comparing optimizers under noise: epsilon is astronomical;
- against someone who knows `seed`: Z is a function of seed, matrix and step, so that all processes and
  resumed runs agree.

Momentum and Newton-Schulz come after the noise and cost no privacy. lr means what it means in Muon.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.dp_muon:DPMuon \\
        --optimizer_args '{"clip": 1}'
"""
import math

import numpy as np
import torch

from optimizers import check
from train_gpt2 import Muon, as_blocks


class DPMuon(Muon):
    def __init__(self, params, lr=3.6e-4, noise_multiplier=0.01, clip=0.1, seed=0, **settings):
        if not 0 <= noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier = {noise_multiplier}: must be 0 or more, and finite")
        if not clip > 0 or (noise_multiplier and clip == math.inf):
            raise ValueError(f"clip = {clip}: must be above 0, and finite unless noise_multiplier is 0")
        check(lr=lr, seed=seed, **settings)
        more = dict(noise_multiplier=noise_multiplier, clip=clip, seed=seed, steps=0)
        super().__init__(params, lr, more=more, **settings)
        self.number = {p: i for i, p in enumerate(self.matrices)}

    def step(self):
        self.group = {}
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                self.group[p] = group
        super().step()

    def precondition(self, p, G):
        group = self.group[p]
        G = as_blocks(G)
        norms = G.norm(dim=(-2, -1), keepdim=True)
        H = G / (norms / group["clip"]).clamp(min=1)
        if group["noise_multiplier"]:
            H = H + group["noise_multiplier"] * group["clip"] * self.noise(p, G, group)
        return H.view_as(p)

    def noise(self, p, G, group):
        """Z, of the shape of G. The same in every process, and different in every step."""
        entropy = (group["seed"], self.number[p], group["steps"])
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator(p.device).manual_seed(seed)
        return torch.randn(G.shape, generator=generator, dtype=G.dtype, device=G.device)
