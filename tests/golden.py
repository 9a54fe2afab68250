"""Replay files of golden vectors through this repository's optimizers.

    python tests/golden.py FILE.npz ...

A file holds, for the matrices qkv (3d x d), o (d x d), c_fc (4d x d) and c_proj (d x 4d): w0_NAME (first weights), G_NAME (steps, m,
n: gradients), Z_NAME (steps, micro-batches, tokens, n: layer inputs), wT_NAME (weights after T steps), `lr`, and `meta`: seed, d,
steps, refresh interval, tokens, micro-batches. A file whose name starts with newton_muon is for Newton-Muon, any other for Muon;
both with momentum 0.95, Nesterov, 5 Newton-Schulz steps; ewma 0.95, ridge 0.2. Prints the worst |w - wT| / |wT - w(T-1)| of each
matrix over all steps, and exits with 1 if it is above 1e-4.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from train_gpt2 import Muon, NewtonMuon, gram

TOLERANCE = 1e-4
NAMES = ("qkv", "o", "c_fc", "c_proj")


def replay(path, dtype=torch.float32):
    """{matrix: worst error relative to the size of the step} of a file."""
    file = np.load(path)
    _, d, steps, refresh_interval, _, _ = file["meta"].tolist()
    kind = NewtonMuon if Path(path).name.startswith("newton_muon") else Muon
    weights = {name: torch.nn.Parameter(torch.tensor(file[f"w0_{name}"]).to(dtype)) for name in NAMES}
    optimizer = kind(weights.values(), lr=float(file["lr"]), momentum=0.95, nesterov=True, ns_steps=5)
    worst = dict.fromkeys(NAMES, 0.0)
    for step in range(steps):
        for name, w in weights.items():
            w.grad = torch.tensor(file[f"G_{name}"][step]).to(dtype)
        if kind is NewtonMuon and (step + 1) % refresh_interval == 0:
            inputs = {name: torch.tensor(file[f"Z_{name}"][step]) for name in NAMES}
            grams = [sum(gram(z, d) for z in inputs[name]) for name in NAMES]
            optimizer.refresh(grams, inputs["o"].shape[0] * inputs["o"].shape[1])
        optimizer.step()
        for name, w in weights.items():
            expected, before = (torch.tensor(file[f"w{t}_{name}"]).double() for t in (step + 1, step))
            error = ((w.detach().double() - expected).norm() / (expected - before).norm()).item()
            worst[name] = max(worst[name], error)
    return worst


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    failed = False
    for path in sys.argv[1:]:
        errors = replay(path)
        failed |= max(errors.values()) > TOLERANCE
        print(f"{path}: worst error {max(errors.values()):.1e} of a step ("
              + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()) + ")")
    sys.exit(failed)
