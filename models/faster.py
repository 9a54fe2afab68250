"""The trainer's model with less to do in its backward pass: experiments that wait for a GPU's verdict.

    python train_gpt2.py configs/speedrun_muon.toml --model models.faster:GPT
    python scripts/estimate_step.py --model models.faster:BF16GPT

GPT is the trainer's up to rounding. Rotary embeddings are turned back in one kernel; gelu and its derivative
come from one exponential; norms keep their output, which the next product keeps anyway, not their input.
BF16GPT also has its residual stream in bf16, which is no longer the arithmetic of the speedrun's record 4.
"""
import math

import torch
import torch.nn.functional as F

import train_gpt2
from train_gpt2 import gram, matmul_dtype


class Norm(torch.autograd.Function):
    """y = x r, in `dtype`, with r = (mean(x^2) + 1e-6)^(-1/2); dx = r (g - y mean(g y)), from that y."""

    @staticmethod
    def forward(ctx, x, dtype):
        if x.dtype == dtype:  # the compiler writes what has such a view, or else adds it up in each kernel
            x = x.as_strided(x.shape, x.stride())
        z = x.float()
        r = torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6)
        y = (z * r).to(dtype)
        ctx.save_for_backward(y, r)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx, g):
        y, r = ctx.saved_tensors
        g = g.float()
        z = y.float()
        return (r * (g - z * (g * z).mean(-1, keepdim=True))).to(ctx.dtype), None


def norm(x):
    return Norm.apply(x, matmul_dtype(x))


class Rotate(torch.autograd.Function):
    """train_gpt2.rotate(), whose backward pass turns by the opposite angle."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return train_gpt2.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, g):
        cos, sin = (table.chunk(2, -1)[0] for table in ctx.saved_tensors)
        g1, g2 = g.float().chunk(2, -1)
        return torch.cat((g1 * cos - g2 * sin, g2 * cos + g1 * sin), -1).type_as(g), None, None


def normal(x):
    """(x in fp32, the normal distribution function at x to 3e-7, exp(-x^2 / 2)).

    The tail is that exponential times a polynomial of t = 1 / (1 + p |x|): M. Abramowitz and I. Stegun,
    Handbook of Mathematical Functions, 7.1.26, for the error function.
    """
    x = x.float()
    t = 1 / (1 + 0.3275911 * math.sqrt(0.5) * x.abs())
    e = torch.exp2(x * x * (-0.5 / math.log(2)))
    coefficients = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    polynomial = torch.zeros_like(t)
    for a in coefficients:
        polynomial = (polynomial + a) * t
    tail = 0.5 * polynomial * e
    return x, torch.where(x > 0, 1 - tail, tail), e


class Gelu(torch.autograd.Function):
    """x Phi(x), with the normal distribution function Phi, whose slope is exp(-x^2 / 2) / sqrt(2 pi)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        z, phi, _ = normal(x)
        return (z * phi).type_as(x)

    @staticmethod
    def backward(ctx, g):
        x, = ctx.saved_tensors
        z, tail, e = normal(-x)  # of x, the compiler would find it in the forward pass, and keep it
        return (g.float() * (1 - tail - z * e / math.sqrt(2 * math.pi))).type_as(g)


class GPT(train_gpt2.GPT):
    """The trainer's model with the functions above."""

    def features(self, idx, collect=()):
        """Input (B, T, C) of the head for tokens `idx` (B, T), and the grams of forward()."""
        T = idx.size(1)
        grams = dict.fromkeys(collect)
        x = self.residual(self.wte(idx))
        for block in self.h:
            x = self.block(block, x, self.cos[:T], self.sin[:T], grams)
        return norm(x), list(grams.values())

    def residual(self, x):
        """The residual stream from the embeddings x."""
        return x

    def block(self, block, x, cos, sin, grams):
        """train_gpt2.Block.forward(), with the scale of the branch of attention in its matrix."""
        B, T, C = x.size()
        z = norm(x)
        q, k, v = block.c_attn(z).view(B, T, 3, block.n_head, C // block.n_head).unbind(2)
        q = Rotate.apply(q, cos, sin).transpose(1, 2)  # (B, n_head, T, D)
        k = Rotate.apply(k, cos, sin).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x + F.linear(y, block.attn_proj.weight * block.attn_scale)
        u = norm(x)
        h = Gelu.apply(block.c_fc(u))  # (B, T, 4 C)
        for layer, inputs in dict(c_attn=z, attn_proj=y, c_fc=u, mlp_proj=h).items():
            name = f"{block.name}.{layer}.weight"
            if name in grams:
                grams[name] = gram(inputs, C)
        return x + block.mlp_proj(h)


class BF16GPT(GPT):
    """GPT with the residual stream in the type of matrix products, bf16 on a GPU."""

    def residual(self, x):
        return x.to(matmul_dtype(x))
