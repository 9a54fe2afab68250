"""Measure training steps: this trainer against a plain loop, and Newton-Muon against Muon.

    python scripts/bench.py                                                          the CPU configuration
    python scripts/bench.py configs/speedrun_muon.toml --sides muon,newton_muon      the 124 M model, on a GPU

All sides train the same model on the same random tokens in one process, taking turns: in each round every side does --steps steps, in an
order that is reversed from round to round. `plain` is a loop as one would write it first: the same model, fp32 or bf16 autocast as the
configuration says, torch.optim.AdamW, no compilation. Printed for each side: the median of its steps; tokens per second; for a GPU
the model FLOPs utilisation; and the median over the rounds of its time relative to the first side's of the same round. Newton-Muon's steps that
refresh the preconditioner are timed apart (one a round), and `mean` weighs them in, one in refresh_interval.

Model FLOPs of a token, forward and backward: 6 N + 12 L C T (N parameters, L layers, width C, context T).
"""
import argparse
import dataclasses
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn

import train_gpt2
from train_gpt2 import GPT, accumulate, build_optimizers, read_toml, synchronized_time

# dense bf16 matrix products, FLOP/s, from NVIDIA's data sheets
PEAK = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


class PlainAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_embd = config.n_head, config.n_embd
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

    @staticmethod
    def rotate(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x)


class PlainBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = PlainAttention(config)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        self.attn_scale = 1 / math.sqrt(2 * config.n_layer)

    def forward(self, x, cos, sin):
        x = x + self.attn_scale * self.attn(F.rms_norm(x, (x.size(-1),), eps=1e-6), cos, sin)
        return x + self.c_proj(F.gelu(self.c_fc(F.rms_norm(x, (x.size(-1),), eps=1e-6))))


class PlainGPT(nn.Module):
    """The trainer's model, written plainly."""

    def __init__(self, config):
        super().__init__()
        self.h = nn.ModuleList([PlainBlock(config) for _ in range(config.n_layer)])
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        d = config.n_embd // config.n_head
        angles = torch.outer(torch.arange(config.sequence_length), 10000.0 ** (-torch.arange(0, d, 2) / d))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, idx, targets):
        x = self.wte(idx)
        for block in self.h:
            x = block(x, self.cos, self.sin)
        logits = self.lm_head(F.rms_norm(x, (x.size(-1),), eps=1e-6)).float()
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def plain_side(config, device, dtype):
    """step(batches, refresh) of the plain loop."""
    model = PlainGPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=0.0)

    def step(batches, refresh):
        for idx, targets in batches:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(idx, targets)
            (loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def trainer_side(config, device, dtype):
    """step(batches, refresh) of train_gpt2.py with the configuration's optimizer."""
    raw = GPT(config).to(device)
    model = torch.compile(raw, dynamic=False) if config.compile else raw
    optimizers = build_optimizers(raw, config)

    def step(batches, refresh):
        _, grams = accumulate(model, batches, refresh, dtype)
        if refresh:
            optimizers[1].refresh(grams, sum(idx.numel() for idx, _ in batches))
        for optimizer in optimizers:
            optimizer.step()
        raw.zero_grad(set_to_none=True)
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/cpu_newton_muon.toml", help="model and batch (default: configs/cpu_newton_muon.toml)")
    parser.add_argument("--sides", default="plain,adamw,muon,newton_muon", help="(default: plain,adamw,muon,newton_muon)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: 9)")
    parser.add_argument("--steps", type=int, default=5, help="ordinary steps of each side in a round (default: 5)")
    parser.add_argument("--refresh_interval", type=int, help="steps between refreshes (default: the configuration's)")
    parser.add_argument("--device_batch_size", type=int, help="sequences at a time (default: the configuration's, else 16384 tokens)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()

    if args.rounds < 1 or args.steps < 1:
        sys.exit(f"error: --rounds {args.rounds} --steps {args.steps}: must be at least 1")
    config = train_gpt2.Config(**read_toml(args.config))
    device = train_gpt2.start_processes(dataclasses.replace(config, device=args.device if args.device != "auto" else config.device))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")
    size = args.device_batch_size or config.device_batch_size or max(1, min(config.batch_size, 16384 // config.sequence_length))
    if config.batch_size % size:
        sys.exit(f"error: device_batch_size = {size} does not divide batch_size = {config.batch_size}")
    interval = args.refresh_interval or config.refresh_interval
    sides = {}
    for name in args.sides.split(","):
        if name != "plain" and name not in train_gpt2.OPTIMIZERS:
            sys.exit(f"error: unknown side '{name}'; there are plain, {', '.join(train_gpt2.OPTIMIZERS)}")
        torch.manual_seed(0)
        sides[name] = (plain_side if name == "plain" else trainer_side)(dataclasses.replace(config, optimizer=name), device, dtype)
    tokens = config.batch_size * config.sequence_length
    shape = (config.batch_size // size, size, config.sequence_length)
    batches = [(idx, idx.roll(-1, 1)) for idx in torch.randint(config.vocab_size, shape).to(device)]

    def timed(name, refresh):
        start = synchronized_time(device)
        sides[name](batches, refresh)
        return synchronized_time(device) - start

    times, refreshes = {name: [] for name in sides}, []
    for name in sides:  # compilation and warm-up
        for refresh in (False, True) if name == "newton_muon" else (False,):
            timed(name, refresh)
            timed(name, refresh)
    for i in range(args.rounds):
        for name in list(sides)[::1 if i % 2 else -1]:
            times[name].append([timed(name, False) for _ in range(args.steps)])
            if name == "newton_muon":
                refreshes.append(timed(name, True))

    N = GPT(config).num_parameters()
    flops = 6 * N + 12 * config.n_layer * config.n_embd * config.sequence_length
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    peak = next((value for key, value in PEAK.items() if gpu and key in gpu), None)
    print(f"{args.config}: {N:,} parameters, {tokens:,} tokens a step, {size} of {config.batch_size} sequences at a time, "
          f"{gpu or f'CPU with {torch.get_num_threads()} threads'}, {dtype}, compile = {config.compile}, torch {torch.__version__}")
    print(f"model FLOPs of a token: 6 N + 12 L C T = {flops:,}")
    first = next(iter(sides))
    medians = {name: [statistics.median(steps) for steps in rounds] for name, rounds in times.items()}
    for name in sides:
        median = statistics.median(step for steps in times[name] for step in steps)
        ratios = sorted(mine / theirs for mine, theirs in zip(medians[name], medians[first]))
        text = f"{name:12} median step {1000 * median:9.2f} ms  {tokens / median:12,.0f} tokens/s  "
        text += f"{statistics.median(ratios):.3f} x {first} ({ratios[0]:.3f} to {ratios[-1]:.3f} over {args.rounds} rounds)"
        if peak:
            text += f"  MFU {flops * tokens / median / peak:.1%} of {peak / 1e12:.0f} TFLOP/s"
        print(text)
        if name == "newton_muon":
            refresh = statistics.median(refreshes)
            mean = median + (refresh - median) / interval
            print(f"{'':12} a step that refreshes {1000 * refresh:.2f} ms; mean with one in {interval}: {1000 * mean:.2f} ms")
    if "muon" in sides and "newton_muon" in sides:
        ratio = statistics.median(mine / theirs for mine, theirs in zip(medians["newton_muon"], medians["muon"]))
        muon = statistics.median(step for steps in times["muon"] for step in steps)
        print(f"newton_muon / muon: median step {ratio:.3f}, mean step {mean / muon:.3f}")


if __name__ == "__main__":
    try:
        main()
    except train_gpt2.UserError as error:
        sys.exit(f"error: {error}")
