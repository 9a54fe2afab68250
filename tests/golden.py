"""Replays golden vectors through the optimizers and the optimizer track's model of this repository:

    python tests/golden.py FILE.npz ...

A file has four matrices: qkv (3d x d), o (d x d), c_fc (4d x d) and c_proj (d x 4d). For each of them:

    w0_NAME     initial weights
    wT_NAME     weights after T steps, T = 1, 2, ...
    G_NAME      gradients       (steps, m, n)
    Z_NAME      layer inputs    (steps, micro-batches, tokens, n)

and for all of them: `lr` and `meta`: seed, d, steps, refresh interval, tokens, micro-batches. A file whose
name starts with newton_muon is for Newton-Muon, any other for Muon. Both have momentum 0.95, Nesterov and
5 Newton-Schulz steps; Newton-Muon has ewma 0.95 and ridge 0.2.

A file whose name starts with optimizer_track is of models/optimizer_track.py, with heads of 128:

    idx                          tokens and, one further, their targets     (B, T + 1)
    weight/NAME, grad/NAME       each parameter, and the gradient of the mean loss
    loss                         that loss
    after_two_muon_steps/NAME    some matrices after two steps of TrackMuon with that gradient, lr 0.025,
                                 weight_decay 0.05, momentum 0.95, 12 iterations

Prints the largest |w - wT| / |wT - w(T-1)| of each matrix over all steps. Of the model it prints the relative
errors of the loss, of the gradients and of the steps. Exits with 1 if one is above 1e-4, or that of a loss
above 1e-5.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from models.optimizer_track import GPT
from optimizers.track_muon import TrackMuon
from train_gpt2 import Config, Muon, NewtonMuon, gram

TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
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


def part(file, kind):
    """{NAME: tensor} of the arrays kind/NAME in a file."""
    prefix = f"{kind}/"
    return {key.removeprefix(prefix): torch.tensor(file[key]) for key in file if key.startswith(prefix)}


def relative(value, expected, size):
    """|value - expected| / |size|"""
    return float((value.detach().double() - expected.double()).norm() / size.double().norm())


def replay_track(path):
    """{"loss", "gradient of NAME", "two steps of NAME": relative error} of a file."""
    file = np.load(path)
    weights = part(file, "weight")
    rows = torch.tensor(file["idx"]).long()
    vocab_size, width = weights["embed.weight"].shape
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    model = GPT(Config(n_layer=len(layers), n_head=width // 128, n_embd=width, vocab_size=vocab_size,
                       sequence_length=rows.size(1) - 1))
    model.load_state_dict(weights)
    loss, _ = model(rows[:, :-1], rows[:, 1:])
    loss.backward()
    errors = {"loss": abs(loss.item() / float(file["loss"]) - 1)}
    for name, expected in part(file, "grad").items():
        errors[f"gradient of {name}"] = relative(model.get_parameter(name).grad, expected, expected)
    for name, expected in part(file, "after_two_muon_steps").items():
        w = torch.nn.Parameter(weights[name].clone())
        w.grad = torch.tensor(file[f"grad/{name}"])
        muon = TrackMuon([w], lr=0.025, weight_decay=0.05, momentum=0.95)
        muon.step()
        before = w.detach().clone()
        muon.step()
        errors[f"two steps of {name}"] = relative(w, expected, expected - before)
    return errors


def errors_of(path):
    """What replaying the file at `path` finds."""
    replays = replay_track if Path(path).name.startswith("optimizer_track") else replay
    return replays(path)


def within_tolerance(errors):
    """Whether all are; an error that is not a number is not."""
    return all(error <= (LOSS_TOLERANCE if what == "loss" else TOLERANCE) for what, error in errors.items())


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    failed = False
    for path in sys.argv[1:]:
        errors = errors_of(path)
        failed = failed or not within_tolerance(errors)
        each = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
        print(f"{path}: largest error {max(errors.values()):.1e} ({each})")
    sys.exit(failed)


if __name__ == "__main__":
    main()
