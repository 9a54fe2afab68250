"""The models of other trainers, to be estimated beside the trainer's own, not to be trained.

    python scripts/estimate_step.py --peers

Written from what is published about them, and from memory of it: a docstring says where that may be wrong.
What matters here is which matrix products there are and what lies between them, so initial values are torch's
default. Everything is 768 wide, with sequences of 1024 GPT-2 tokens, whatever their own defaults are. All
compute the plain cross-entropy from all logits in fp32, kept for the backward pass.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotary_tables(T, D):
    """(cosines, sines), each (T, 1, D / 2), in fp32."""
    angles = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, D, 2) / D)).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x (B, T, n_head, D): each element of the first half turns with one of the second."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1)


def attention(q, k, v):
    """Causal, of (B, T, n_head, D); returns (B, T, n_head D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)


def blocks(config, shapes):
    """A dictionary of layers without bias for each block. shapes: {name: (outputs, inputs)}, in widths."""
    C = config.n_embd
    layers = [{name: nn.Linear(n * C, m * C, bias=False) for name, (m, n) in shapes.items()}
              for _ in range(config.n_layer)]
    return nn.ModuleList(map(nn.ModuleDict, layers))


FUSED = {"qkv": (3, 1), "proj": (1, 1), "fc": (4, 1), "out": (1, 4)}
SEPARATE = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "proj": (1, 1), "fc": (4, 1), "out": (1, 4)}


class Record4(nn.Module):
    """Record 4 of the Modded-NanoGPT speedrun (2024-10-10), which is also the model of the Newton-Muon paper.

    A table of 50257 rows, tied; the branch of attention scaled by 1 / sqrt(2 n_layer); heads of 64; exact
    gelu; norms in fp32 without gains; fp32 residual stream. Unsure: whether its rotary tables were fp32, as
    here. An odd number of rows makes products slower, or makes the compiler pad them; neither is estimated.
    """

    def __init__(self, config):
        super().__init__()
        self.D = 64
        self.scale = 1 / math.sqrt(2 * config.n_layer)
        self.wte = nn.Embedding(50257, config.n_embd)
        self.h = blocks(config, FUSED)
        self.cos, self.sin = rotary_tables(config.sequence_length, self.D)

    def forward(self, idx, targets, collect=()):
        x = self.wte(idx)
        for h in self.h:
            q, k, v = (y.unflatten(-1, (-1, self.D)) for y in h["qkv"](norm(x)).chunk(3, -1))
            y = attention(rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin), v)
            x = x + self.scale * h["proj"](y)
            x = x + h["out"](F.gelu(h["fc"](norm(x))))
        return cross_entropy(F.linear(norm(x), self.wte.weight), targets), []


class Record7(nn.Module):
    """Record 7 of the speedrun (October 2024): the architecture of record 5 with a newer torch.

    A table of 50304 rows, still tied; q, k and v from three matrices; q and k normalised, then rotated, with
    tables in bf16; squared ReLU; branches unscaled; fp32 residual stream. Unsure: whether heads of 128 came
    with record 5, as assumed here, or a little later; attention has the rates of heads of 64 either way.
    """

    def __init__(self, config):
        super().__init__()
        self.D = 128
        self.wte = nn.Embedding(50304, config.n_embd)
        self.h = blocks(config, SEPARATE)
        self.cos, self.sin = (table.bfloat16() for table in rotary_tables(config.sequence_length, self.D))

    def forward(self, idx, targets, collect=()):
        x = self.wte(idx)
        for h in self.h:
            z = norm(x)
            q, k, v = (h[name](z).unflatten(-1, (-1, self.D)) for name in "qkv")
            q, k = (rotate(norm(y), self.cos, self.sin) for y in (q, k))
            x = x + h["proj"](attention(q, k, v))
            x = x + h["out"](F.relu(h["fc"](norm(x))).square())
        return cross_entropy(F.linear(norm(x), self.wte.weight), targets), []


class Nanochat(nn.Module):
    """nanochat's first release (October 2025), at 12 layers.

    Embedding, in bf16, and head are two matrices; a norm follows the embedding, so the residual stream is
    bf16; q and k are rotated with tables in bf16, then normalised; heads of 128; squared ReLU; logits become
    15 tanh(l / 15). Its own tokenizer has 65536 tokens: the 50304 rows here compare it at equal work. Later
    versions, with value embeddings and sliding windows, differ. Unsure: whether tanh was in bf16, as here.
    """

    def __init__(self, config):
        super().__init__()
        self.D = 128
        self.wte = nn.Embedding(50304, config.n_embd, dtype=torch.bfloat16)
        self.h = blocks(config, SEPARATE)
        self.head = nn.Linear(config.n_embd, 50304, bias=False)
        self.cos, self.sin = (table.bfloat16() for table in rotary_tables(config.sequence_length, self.D))

    def forward(self, idx, targets, collect=()):
        x = norm(self.wte(idx))
        for h in self.h:
            z = norm(x)
            q, k, v = (h[name](z).unflatten(-1, (-1, self.D)) for name in "qkv")
            q, k = (norm(rotate(y, self.cos, self.sin)) for y in (q, k))
            x = x + h["proj"](attention(q, k, v))
            x = x + h["out"](F.relu(h["fc"](norm(x))).square())
        return cross_entropy(15 * torch.tanh(self.head(norm(x)) / 15), targets), []


class NanoGPT(nn.Module):
    """nanoGPT's GPT-2 124M, as its config/train_gpt2.py trains it: without biases and dropout.

    Learned positions; LayerNorm with gains, in fp32 under autocast; heads of 64; exact gelu; a table of 50304
    rows, tied; fp32 residual stream.
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.D = 64
        self.wte = nn.Embedding(50304, C)
        self.wpe = nn.Embedding(config.sequence_length, C)
        self.h = blocks(config, FUSED)
        self.norms = nn.ModuleList(nn.LayerNorm(C, bias=False) for _ in range(2 * config.n_layer + 1))

    def forward(self, idx, targets, collect=()):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for i, h in enumerate(self.h):
            z = self.norms[2 * i](x)
            q, k, v = (y.unflatten(-1, (-1, self.D)) for y in h["qkv"](z).chunk(3, -1))
            x = x + h["proj"](attention(q, k, v))
            x = x + h["out"](F.gelu(h["fc"](self.norms[2 * i + 1](x))))
        return cross_entropy(F.linear(self.norms[-1](x), self.wte.weight), targets), []
