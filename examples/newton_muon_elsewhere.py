"""Newton-Muon in a training loop of one's own: a small network learns scikit-learn's handwritten digits.

    pip install scikit-learn
    python examples/newton_muon_elsewhere.py

Each optimizer of the hidden matrices takes the best of five learning rates on seed 0. The loss is that on 500
images that were held out, over five other seeds. In half a minute on one core of a CPU:

    AdamW      lr 0.04   loss 0.092 (standard deviation 0.017)
    Muon       lr 0.004  loss 0.065 (standard deviation 0.009)
    NewtonMuon lr 0.004  loss 0.057 (standard deviation 0.005)

This shows how to use it. A network this small says little about which one is better for yours.
"""
import contextlib
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from optimizers.input_moments import InputMoments
from train_gpt2 import Muon, NewtonMuon

STEPS = 100
RATES = {torch.optim.AdamW: 0.02, Muon: 0.004, NewtonMuon: 0.004}  # the middle one of five

data, digits = load_digits(return_X_y=True)
order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
images = torch.tensor(data, dtype=torch.float32)[order] / 16
labels = torch.tensor(digits)[order]


def held_out_loss(kind, lr, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                          nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    matrices = [model[i].weight for i in (0, 2, 4)]
    others = [model[6].weight, *(layer.bias for layer in model[::2])]  # the head and the biases
    hidden = kind(matrices, lr=lr, **({"refresh_interval": 10} if kind is NewtonMuon else {}))
    adamw = torch.optim.AdamW(others, lr=0.003)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1, 0, STEPS) for o in (hidden, adamw)]
    moments = InputMoments(model, hidden) if kind is NewtonMuon else None
    for step in range(STEPS):
        batch = torch.randint(500, len(images), (128,))
        with moments.collecting(step) if moments else contextlib.nullcontext():
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
        for part in (hidden, adamw, *schedules):
            part.step()
        model.zero_grad()
    return F.cross_entropy(model(images[:500]), labels[:500]).item()


for kind, middle in RATES.items():
    lr = min((middle * 2 ** i for i in (-2, -1, 0, 1, 2)), key=lambda lr: held_out_loss(kind, lr, seed=0))
    losses = torch.tensor([held_out_loss(kind, lr, seed) for seed in (1, 2, 3, 4, 5)])
    print(f"{kind.__name__:10} lr {lr:<6g} loss {losses.mean():.3f} (standard deviation {losses.std():.3f})")
