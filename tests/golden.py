"""Replays golden vectors through the optimizers of this repository:

    python tests/golden.py FILE.npz ...

A file has four matrices: qkv (3d x d), o (d x d), c_fc (4d x d) and c_proj (d x 4d). For each of them:

    w0_NAME     initial weights
    wT_NAME     weights after T steps, T = 1, 2, ...
    G_NAME      gradients       (steps, m, n)
    Z_NAME      layer inputs    (steps, micro-batches, tokens, n)

and for all of them: `lr` and `meta`: seed, d, steps, refresh interval, tokens, micro-batches. A file whose
name starts with newton_muon is for Newton-Muon, any other for Muon. Both have momentum 0.95, Nesterov and
5 Newton-Schulz steps; Newton-Muon has ewma 0.95 and ridge 0.2.

Prints the largest |w - wT| / |wT - w(T-1)| of each matrix over all steps. Exits with 1 if it is above 1e-4.
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
    """{matrix: largest error relative to the size of the step} of a file."""
    file = np.load(path)
    _, d, steps, refresh_interval, _, _ = file["meta"].tolist()
    kind = NewtonMuon if Path(path).name.startswith("newton_muon") else Muon
    weights = {}
    for name in NAMES:
        weights[name] = torch.nn.Parameter(torch.tensor(file[f"w0_{name}"]).to(dtype))
    optimizer = kind(weights.values(), lr=float(file["lr"]), momentum=0.95, nesterov=True, ns_steps=5)
    largest = dict.fromkeys(NAMES, 0.0)
    for step in range(steps):
        for name, w in weights.items():
            w.grad = torch.tensor(file[f"G_{name}"][step]).to(dtype)
        if kind is NewtonMuon and (step + 1) % refresh_interval == 0:
            optimizer.refresh(*statistics(file, step, d))
        optimizer.step()
        for name, w in weights.items():
            before = torch.tensor(file[f"w{step}_{name}"]).double()
            expected = torch.tensor(file[f"w{step + 1}_{name}"]).double()
            error = (w.detach().double() - expected).norm() / (expected - before).norm()
            largest[name] = max(largest[name], error.item())
    return largest


def statistics(file, step, d):
    """(gram of the inputs of each matrix, number of tokens) in a step."""
    grams = []
    for name in NAMES:
        inputs = torch.tensor(file[f"Z_{name}"][step])  # (micro-batches, tokens, n)
        grams.append(sum(gram(z, d) for z in inputs))
    micro_batches, tokens, _ = inputs.shape
    return grams, micro_batches * tokens


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    failed = False
    for path in sys.argv[1:]:
        errors = replay(path)
        largest = max(errors.values())
        failed = failed or largest > TOLERANCE
        each = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        print(f"{path}: largest error {largest:.1e} of a step ({each})")
    sys.exit(failed)


if __name__ == "__main__":
    main()
