"""Scion: steps towards the corner of a spectral ball that is opposite to the momentum
(Pethick et al., arXiv:2502.07529).

    M <- momentum M + G
    O =  newton_schulz(M)
    eta = lr sqrt(min(m, n)) / radius
    W <- (1 - eta) W - eta radius sqrt(m / n) O

So W enters the ball ||W||_2 <= radius sqrt(m / n), whose corners are radius sqrt(m / n) O, and stays
there while eta is at most 1. (Newton-Schulz exceeds 1 by up to 0.2, and the ball is that much larger.)
With constrained = false there is no factor (1 - eta), and `radius` has no effect.

The paper averages the gradients, which has the same direction as M; its alpha is 1 - momentum. The
paper's rate is eta itself. Here lr is the root mean square of an element's update in square and tall
matrices, as in Muon, and lr m / n is in wide ones: sqrt(m / n), where Muon has sqrt(max(m, n)), is
Scion's. The paper uses its own rule for the embedding and head, and starts with weights on the ball; here
the trainer's AdamW and the model's initial weights stay.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.scion:Scion \\
        --optimizer_args '{"radius": 10}'
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
        super().__init__(params, lr, momentum, nesterov=False, ns_steps=ns_steps,
                         more=dict(radius=radius, constrained=constrained))

    def orthogonalize(self, matrices, U, group):
        m, n = U.shape[-2:]
        D = math.sqrt(m / n) * newton_schulz(U, group["ns_steps"])
        if group["constrained"]:
            W = torch.cat([as_blocks(p) for p in matrices])
            D = D + W / group["radius"]
        return math.sqrt(min(m, n)) * D
