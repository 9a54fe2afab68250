"""Scion: steps towards the corner of a spectral ball that the momentum points away from (Pethick et al., arXiv:2502.07529).

    M <- momentum M + G
    O = newton_schulz(M)
    W <- (1 - eta) W - eta radius sqrt(m / n) O,   eta = lr sqrt(min(m, n)) / radius

so that W enters the ball ||W||_2 <= radius sqrt(m / n), whose corners are radius sqrt(m / n) O, and stays there while eta is
at most 1; newton_schulz exceeds 1 by up to 0.2, and the ball is that much larger. With constrained = false there is no (1 - eta), and
`radius` has no effect. The paper has an average of the gradients, whose direction is that of M, and its alpha is 1 - momentum. It has eta
itself as the rate; here lr is the root-mean-square of an element's update in square and tall matrices, as in Muon, and lr m / n in wide
ones: sqrt(m / n), instead of Muon's sqrt(max(m, n)), is Scion's. The table and the head have the trainer's AdamW instead of Scion's rule,
and its initial weights on the ball to the model.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.scion:Scion --optimizer_args '{"radius": 10}'
"""
import math

import torch

from optimizers import check
from train_gpt2 import Muon, as_blocks, newton_schulz


class Scion(Muon):
    def __init__(self, params, lr=3.6e-4, momentum=0.9, radius=50.0, constrained=True, ns_steps=5):
        check(lr=lr, ns_steps=ns_steps, constrained=constrained)
        if not 0 < radius < math.inf:
            raise ValueError(f"radius = {radius}: must be above 0, and finite")
        super().__init__(params, lr, momentum, nesterov=False, ns_steps=ns_steps, more=dict(radius=radius, constrained=constrained))

    def orthogonalize(self, matrices, U, group):
        m, n = U.shape[-2:]
        D = math.sqrt(m / n) * newton_schulz(U, group["ns_steps"])
        if group["constrained"]:
            D = D + torch.cat([as_blocks(p) for p in matrices]) / group["radius"]
        return math.sqrt(min(m, n)) * D
