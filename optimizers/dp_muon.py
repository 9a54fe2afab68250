"""DPMuon: Muon on clipped gradients with Gaussian noise, after differentially private Muon (DP-Muon, arXiv:2605.12994).

    H = G / max(1, ||G||_F / clip)
    G <- H + noise_multiplier clip Z,   Z Gaussian, of variance 1
    the rest is Muon with that G; q, k and v are clipped apart

The paper clips the gradient of every example before it averages them. The trainer has only the mean gradient of a batch, and that is
what is clipped here: the unit of privacy is the whole batch. What that gives: each step is a Gaussian mechanism for the presence of its
batch, in each matrix with noise_multiplier; all L matrices together (3 for a fused q, k, v) have the effective multiplier
noise_multiplier / sqrt(L), which is the number to give to an accountant, one release for each step that uses the batch. With one
example in a batch the unit is the example, and the rule the paper's. What it does not give:
- example-level privacy as the paper accounts for it: one of B examples can change H by as much as the whole batch, not by 1 / B of it, so
  the same epsilon takes B times the paper's noise; and none of its amplification by sampling, as the order of the data is fixed;
- privacy of the model: the trainer's AdamW updates the table, which is also the head, without noise, and the losses are logged;
- anything at the default multiplier, which is for comparing optimizers under noise: epsilon is astronomical;
- anything against someone who knows `seed`: Z comes from it, the matrix and the step number, so that all processes and resumed runs agree.

Momentum and newton_schulz come after the noise and cost no privacy. Left out: the paper's correction of the bias that noise has on
newton_schulz (DP-MuonBC), and its own coefficients. lr means what it means in Muon.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.dp_muon:DPMuon --optimizer_args '{"clip": 1}'
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
        super().__init__(params, lr, more=dict(noise_multiplier=noise_multiplier, clip=clip, seed=seed, steps=0), **settings)
        self.number = {p: i for i, p in enumerate(self.matrices)}

    def step(self):
        for group in self.param_groups:
            group["steps"] += 1
        self.group = {p: group for group in self.param_groups for p in group["params"]}
        super().step()

    def precondition(self, p, G):
        group, G = self.group[p], as_blocks(G)
        H = G / (G.norm(dim=(-2, -1), keepdim=True) / group["clip"]).clamp(min=1)
        if group["noise_multiplier"]:
            entropy = np.random.SeedSequence((group["seed"], self.number[p], group["steps"])).generate_state(1, np.uint64)
            generator = torch.Generator(p.device).manual_seed(int(entropy[0] >> 1))
            Z = torch.randn(G.shape, generator=generator, dtype=G.dtype, device=G.device)
            H = H + group["noise_multiplier"] * group["clip"] * Z
        return H.view_as(p)
