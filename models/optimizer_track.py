"""The model of the Modded-NanoGPT speedrun's benchmark for optimizers (its track 3, 2026).

    python train_gpt2.py configs/cpu_track3_muon.toml

It differs from the trainer's own model (record 4 of the speedrun) in this:
- Embedding and head are two matrices. Every layer has a bias, and every norm has learned gains.
- A norm follows the embedding.
- Queries, keys and values come from three matrices. Queries and keys are normalised in each head, so their
  product needs a scale of its own, 0.12. Half of the rotary pairs do not turn.
- The MLP squares a ReLU. Nothing scales the branches, whose last matrices start at 0.
- Logits l become 15 l / sqrt(l^2 + 225).

Names of parameters are those of the benchmark's code, which `groups` in a configuration refers to. Residuals
are fp32 here, as in the trainer's model; there they are bf16, and so is the embedding.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import train_gpt2
from train_gpt2 import gram, head_loss, matmul_dtype, rotate

SOFT_CAP = 15.0
ATTENTION_SCALE = 0.12
ROTARY_BASE = 1024


class Norm(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.gains = nn.Parameter(torch.ones(C))

    def forward(self, x):
        return F.rms_norm(x, self.gains.shape, self.gains)


def linear(inputs, outputs, zero=False):
    """A layer whose bias is 0 and whose matrix is 0, too, or normal with a variance of 0.33 / inputs."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.0 if zero else math.sqrt(0.33 / inputs))
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    def __init__(self, config, name):
        super().__init__()
        C = config.n_embd
        self.name = name
        self.n_head = config.n_head
        self.norm1 = Norm(C)
        self.attn = nn.ModuleDict({name: linear(C, C) for name in "qkv"} | {"proj": linear(C, C, zero=True)})
        self.norm2 = Norm(C)
        self.mlp = nn.ModuleDict({"fc": linear(C, 4 * C), "proj": linear(4 * C, C, zero=True)})

    def forward(self, x, cos, sin, grams):
        """x (B, T, C) after this block. Sets the values of `grams`, {name of a weight: its gram}."""
        B, T, C = x.size()
        z = self.norm1(x)
        q, k, v = (self.attn[name](z).view(B, T, self.n_head, -1) for name in "qkv")  # (B, T, n_head, D)
        q, k = (rotate(F.rms_norm(y.float(), y.shape[3:]), cos, sin).type_as(v) for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=ATTENTION_SCALE)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x + self.attn.proj(y)
        u = self.norm2(x)
        h = F.relu(self.mlp.fc(u))
        h = h * h
        inputs = {"attn.q": z, "attn.k": z, "attn.v": z, "attn.proj": y, "mlp.fc": u, "mlp.proj": h}
        for layer, inputs in inputs.items():
            name = f"{self.name}.{layer}.weight"
            if name in grams:
                grams[name] = gram(inputs, C)
        return x + self.mlp.proj(h)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.fused_loss = bool(train_gpt2.triton)
        self.embed = nn.Embedding(config.vocab_size, C)  # normal with a variance of 1
        self.norm1 = Norm(C)
        self.blocks = nn.ModuleList(Block(config, f"blocks.{i}") for i in range(config.n_layer))
        self.norm2 = Norm(C)
        self.proj = linear(C, config.vocab_size, zero=True)
        pairs = C // config.n_head // 2
        turning = (1 / ROTARY_BASE) ** torch.linspace(0, 1, pairs // 2)
        frequencies = torch.cat((turning, torch.zeros(pairs - len(turning))))
        frequencies = torch.cat((frequencies, -frequencies))  # of an element and its partner
        angles = torch.outer(torch.arange(config.sequence_length), frequencies).unsqueeze(1)  # (T, 1, D)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def features(self, idx, collect=()):
        """Input (B, T, C) of the head for tokens `idx` (B, T), and the grams of forward()."""
        T = idx.size(1)
        grams = dict.fromkeys(collect)
        x = self.norm1(self.embed(idx))
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T], grams)
        return self.norm2(x), list(grams.values())

    def head(self, x):
        """Logits (..., vocab_size) fp32 of features x (..., C)."""
        logits = self.proj(x).float()
        return logits * torch.rsqrt(1 + (logits / SOFT_CAP) ** 2)

    def logits(self, idx):
        """Logits (B, T, vocab_size) fp32 for tokens `idx` (B, T)."""
        x, _ = self.features(idx)
        return self.head(x)

    def forward(self, idx, targets, collect=()):
        """(mean cross-entropy of `targets` (B, T), ignoring -1, given the tokens `idx` (B, T); grams: Z Z^T
        of the inputs of each of the hidden matrices whose names are in `collect`)."""
        x, grams = self.features(idx, collect)
        targets = targets.flatten()
        if self.fused_loss and train_gpt2.on_gpu(x):
            x = x.flatten(0, 1).to(matmul_dtype(x))
            # the bias is the weight of an input of 1; 7 more of 0, as GPUs multiply fastest by multiples of 8
            x = F.pad(F.pad(x, (0, 1), value=1.0), (0, 7))
            weight = F.pad(torch.cat((self.proj.weight, self.proj.bias.unsqueeze(1)), 1), (0, 7))
            loss = head_loss(x, weight, targets, len(weight), SOFT_CAP)[0]
        else:
            loss = F.cross_entropy(self.head(x).flatten(0, 1), targets, ignore_index=-1)
        return loss, grams

    def hidden_matrices(self):
        """{name: weight} of the matrices in the blocks."""
        return {name: p for name, p in self.named_parameters() if name.startswith("blocks.") and p.ndim == 2}

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())
