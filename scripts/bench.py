"""Measure training steps: this trainer against a plain loop, and Newton-Muon against Muon.

    python scripts/bench.py                                                                   the CPU configuration, a few minutes
    python scripts/bench.py configs/speedrun_muon.toml --sides muon,newton_muon --profile     the 124 M model, on a GPU
    torchrun --nproc_per_node 8 scripts/bench.py configs/speedrun_muon.toml --sides muon,newton_muon

All sides train the same model on the same random tokens in one process and take turns: each round gives every side --steps steps, in an
order that is reversed from round to round. A side is an optimizer as the trainer names it (adamw, muon, newton_muon, module:Class), with
the micro-batch that a run would choose; or `plain`, the loop one would write first: torch.optim.AdamW, not compiled, 16384 tokens at
a time. Fields of the configuration can be overridden: --batch_size 128. Ctrl-C ends the rounds early.

The table shows the mean step of a round, as the median over the rounds; for Newton-Muon the step that refreshes its statistics (timed once
a round) and the mean step, with one refresh in refresh_interval; tokens per second and model FLOPs utilisation (MFU) of the mean step; the
peak memory of the side alone on the GPU; and the ratio of mean steps of the same round: median, and from 6 rounds on its 95 % interval by
order statistics. For an optimizer that does more work in every k-th step, make --steps a multiple of k.
Model FLOPs of a token, forward and backward: 6 N + 12 L C T (N parameters, L layers, width C, context T).

--profile first shows where a step goes, by groups of kernels (torch.profiler). On a GPU a kernel counts by its time on the device, and
idle is the time without any; on a CPU an operation counts by its self time. The sums Z Z^T of a refresh are part of the model's graph
and count as matrix products. The profiler slows the launching of kernels, so its idle time is an upper bound.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import signal
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler reports that it starts and stops

import train_gpt2  # before torch: it says how CPU threads wait
from train_gpt2 import (GPT, PEAK_FLOPS, accumulate, build_optimizers, choose_micro_batch, fast_dtype, load_config, start_processes,
                        synchronized_time, wrapped)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function

from harness import kernels


class PlainGPT(nn.Module):
    """The trainer's model, written plainly."""

    def __init__(self, config):
        super().__init__()
        C, d = config.n_embd, config.n_embd // config.n_head
        self.n_head, self.attn_scale = config.n_head, 1 / math.sqrt(2 * config.n_layer)
        linear = functools.partial(nn.Linear, bias=False)
        block = lambda: nn.ModuleDict(dict(c_attn=linear(C, 3 * C), c_proj=linear(C, C), c_fc=linear(C, 4 * C), mlp_proj=linear(4 * C, C)))
        self.h = nn.ModuleList(block() for _ in range(config.n_layer))
        self.wte = nn.Embedding(config.vocab_size, C)
        self.lm_head = linear(C, config.vocab_size)
        self.wte.weight = self.lm_head.weight
        angles = torch.outer(torch.arange(config.sequence_length), 10000.0 ** (-torch.arange(0, d, 2) / d))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos + b * self.sin, b * self.cos - a * self.sin], dim=-1).type_as(x)

    def forward(self, idx, targets):
        x = self.wte(idx)
        B, T, C = x.size()
        for block in self.h:
            qkv = block.c_attn(F.rms_norm(x, (C,), eps=1e-6)).split(C, dim=2)
            q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in qkv)
            y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
            x = x + self.attn_scale * block.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
            x = x + block.mlp_proj(F.gelu(block.c_fc(F.rms_norm(x, (C,), eps=1e-6))))
        logits = self.lm_head(F.rms_norm(x, (C,), eps=1e-6)).float()
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def plain_side(config, device, dtype):
    """(step(batches, refresh), steps between refreshes or 0) of the plain loop."""
    model, _ = wrapped(PlainGPT(config).to(device), dataclasses.replace(config, compile=False), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=0.0)

    def step(batches, refresh):
        for idx, targets in batches:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(idx, targets)
            (loss / len(batches)).backward()
        with record_function("bench:optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return step, 0


def trainer_side(config, device, dtype):
    """(step(batches, refresh), steps between refreshes or 0) of train_gpt2.py with the configuration's optimizer."""
    raw = GPT(config).to(device)
    model, _ = wrapped(raw, config, device)
    optimizers = build_optimizers(raw, config)

    def step(batches, refresh):
        _, grams = accumulate(model, batches, refresh, dtype)
        if refresh:
            with record_function("bench:statistics"):
                optimizers[1].refresh(grams, config.batch_size * config.sequence_length)
        with record_function("bench:optimizer"):
            for optimizer in optimizers:
                optimizer.step()
            raw.zero_grad(set_to_none=True)
    return step, optimizers[1].defaults.get("refresh_interval", 0) if hasattr(optimizers[1], "refresh") else 0


def interval(values):
    """95 % interval of the median: the k-th smallest and k-th largest value, k from the binomial distribution; None below 6 values."""
    n = len(values)
    k = max((k for k in range(1, n) if 2 * sum(math.comb(n, i) for i in range(k)) <= 0.05 * 2 ** n), default=0)
    return dict(low=sorted(values)[k - 1] if k else None, high=sorted(values)[n - k] if k else None)


def build(name, config, device, dtype, idx):
    """One side, warmed up: both kinds of steps have run, and graphs, memory pools and the optimizer's state are there."""
    side = SimpleNamespace(times=[], refreshes=[], peak=0, profile={})
    side.micro_batch = (max(1, min(len(idx), 16384 // config.sequence_length)) if name == "plain" else
                        choose_micro_batch(config, device, len(idx), dtype))
    side.batches = [(part, part.roll(-1, 1)) for part in idx.split(side.micro_batch)]
    before = allocated(device)
    torch.manual_seed(0)
    side.step, side.refresh_interval = (plain_side if name == "plain" else trainer_side)(config, device, dtype)
    for refresh in (False, False, True, True)[:4 if side.refresh_interval else 2]:
        side.step(side.batches[:2], refresh)
    side.memory = allocated(device) - before
    return side


def allocated(device):
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def timed(side, device, refresh):
    """Milliseconds of one step; side.peak is raised to what this side alone would have allocated in it on a GPU."""
    others = allocated(device) - side.memory
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = synchronized_time(device)
    side.step(side.batches, refresh)
    ms = round(1000 * (synchronized_time(device) - start), 3)
    if device.type == "cuda":
        side.peak = max(side.peak, torch.cuda.max_memory_allocated() - others)
    return ms


def report(args, config, sides, device, dtype):
    """Everything measured, as --json has it."""
    rounds = min(len(side.times) for side in sides.values())  # complete ones
    tokens, world, model = config.batch_size * config.sequence_length, train_gpt2.world_size(), GPT(config)
    parameters, flops = model.num_parameters(), model.flops_per_token()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    peak = next((value for key, value in PEAK_FLOPS.items() if gpu and key in gpu), None)
    cpu = f"{train_gpt2.describe_machine(device)['cpu']} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    machine = gpu or cpu
    means, measured, ratios = {}, {}, {}  # means: the mean step in each round of each side
    for name, side in sides.items():
        times, refreshes = side.times[:rounds], side.refreshes[:rounds]
        means[name] = ordinary = [statistics.mean(steps) for steps in times]
        if refreshes:
            means[name] = [ms + (refresh - ms) / side.refresh_interval for ms, refresh in zip(ordinary, refreshes)]
        mean = statistics.median(means[name])
        speed = 1000 * tokens / mean
        measured[name] = dict(micro_batch=side.micro_batch, step_ms=statistics.median(ordinary), mean_step_ms=mean, tokens_per_second=speed,
                              refresh_step_ms=statistics.median(refreshes) if refreshes else None,
                              mfu=speed * flops / peak / world if peak else None, peak_memory_gib=side.peak / 2 ** 30 if gpu else None,
                              rounds_ms=times, refreshes_ms=refreshes, profile=side.profile)
    first = next(iter(sides))
    for name, base in dict.fromkeys([(name, first) for name in list(sides)[1:]] + [("newton_muon", "muon")]):
        if name in sides and base in sides:
            values = [mine / theirs for mine, theirs in zip(means[name], means[base])]
            ratios[f"{name}/{base}"] = dict(rounds=values, mean_step=statistics.median(values), **interval(values))
    facts = {key: getattr(config, key) for key in ("compile", "batch_size", "sequence_length", "refresh_interval")}
    return dict(command=sys.argv[1:], config=args.config, machine=machine, processes=world,
                torch=torch.__version__, dtype=str(dtype), **facts, code_sha256=train_gpt2.code_sha256(), parameters=parameters,
                flops_per_token=flops, peak_flops=peak, rounds=rounds, steps=args.steps, sides=measured, ratios=ratios)


def show(result):
    """The table of a report()."""
    print("{config}: {parameters:,} parameters, {batch_size} x {sequence_length} tokens a step, {rounds} rounds of {steps} steps\n"
          "{processes} x {machine}, {dtype}, compile = {compile}, torch {torch}\n"
          "model FLOPs of a token: 6 N + 12 L C T = {flops_per_token:,}; known peak of the device: {peak_flops}".format(**result))
    width = max(map(len, result["sides"]))
    print(f"{'':{width}} micro-batch    step ms refresh ms    mean ms   tokens/s    MFU  GPU GiB")
    for name, side in result["sides"].items():
        refresh, mfu, memory = ("-" if side[key] is None else form.format(side[key]) for key, form in
                                (("refresh_step_ms", "{:.2f}"), ("mfu", "{:.1%}"), ("peak_memory_gib", "{:.2f}")))
        print(f"{name:{width}} {side['micro_batch']:11} {side['step_ms']:10.2f} {refresh:>10} {side['mean_step_ms']:10.2f} "
              f"{side['tokens_per_second']:10,.0f} {mfu:>6} {memory:>8}")
    for pair, ratio in result["ratios"].items():
        bounds = "95 %: {low:.4f} to {high:.4f}" if ratio["low"] else "6 or more rounds give an interval"
        print(f"{pair}: mean step {ratio['mean_step']:.4f} ({bounds.format(**ratio)})")


@command(interrupted="interrupted")
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("config", nargs="?", default="configs/cpu_newton_muon.toml", help="(default: configs/cpu_newton_muon.toml)")
    parser.add_argument("--sides", default="plain,adamw,muon,newton_muon", help="(default: plain,adamw,muon,newton_muon)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: 9)")
    parser.add_argument("--steps", type=int, default=5, help="ordinary steps of each side in a round (default: 5)")
    parser.add_argument("--profile", action="store_true", help="show where a step goes, by groups of kernels")
    parser.add_argument("--json", metavar="FILE", help="also write everything measured to this file")
    fields = [field.name for field in dataclasses.fields(train_gpt2.Config) if field.name != "optimizer"]
    for name in fields:
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1 or args.steps < 1:
        sys.exit(f"error: --rounds {args.rounds} --steps {args.steps}: must be at least 1")
    if args.json and (not Path(args.json).resolve().parent.is_dir() or Path(args.json).is_dir()):
        sys.exit(f"error: --json {args.json}: must be a file, in a folder that is there")

    names = list(dict.fromkeys(args.sides.split(",")))
    given = [text for name in fields if name in args for text in (f"--{name}", getattr(args, name))]
    configs = {name: load_config([args.config, *given, "--optimizer", "adamw" if name == "plain" else name,
                                  *(() if ":" in name else ("--optimizer_args", "{}"))]) for name in names}
    config = configs[names[0]]
    per_process = train_gpt2.sequences_per_process(config, int(os.environ.get("WORLD_SIZE") or 1))
    device = start_processes(config)
    dtype = fast_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    torch.set_float32_matmul_precision("high")
    generator = torch.Generator().manual_seed(train_gpt2.rank())
    idx = torch.randint(config.vocab_size, (per_process, config.sequence_length), generator=generator).to(device)
    sides = {name: build(name, configs[name], device, dtype, idx) for name in names}
    first_process = train_gpt2.rank() == 0
    if args.profile:
        for side in sides.values():
            for kind, refresh in [("step", False), ("refresh", True)][:1 + (side.refresh_interval > 0)]:
                side.profile[kind] = kernels.profiled(lambda: side.step(side.batches, refresh), device)
        if first_process:
            kernels.show({f"{name} {kind}": totals["groups"] for name, side in sides.items() for kind, totals in side.profile.items()})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    with contextlib.suppress(KeyboardInterrupt):
        for i in range(args.rounds):
            for name in names[::1 if i % 2 else -1]:
                times = [timed(sides[name], device, False) for _ in range(args.steps)]
                sides[name].refreshes += [timed(sides[name], device, True)] if sides[name].refresh_interval else []
                sides[name].times.append(times)
    if not all(side.times for side in sides.values()):
        sys.exit("error: interrupted before the first round was complete")
    if first_process:
        result = report(args, config, sides, device, dtype)
        show(result)
        if args.json:
            innermost = r"[\[{][^\[\]{}]*[\]}]"  # lists and dictionaries: each on one line
            Path(args.json).write_text(re.sub(innermost, lambda m: " ".join(m[0].split()), json.dumps(result, indent=1)) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {str(error).splitlines()[0]} Name fewer --sides, which share the GPU here, or a smaller --device_batch_size.")
