"""Measure training steps: this trainer against a plain loop, and Newton-Muon against Muon.

    python scripts/bench.py                     the CPU configuration, a few minutes
    python scripts/bench.py configs/speedrun_muon.toml --sides muon,newton_muon --profile     on a GPU
    torchrun --nproc_per_node 8 scripts/bench.py configs/speedrun_muon.toml --sides muon,newton_muon

All sides train the same model on the same random tokens in one process and take turns: each round gives
every side --steps steps, in an order that is reversed from round to round. A side is an optimizer as the
trainer names it (adamw, muon, newton_muon, module:Class), with the micro-batch that a run would choose; or
`plain`, the loop that one would write first: torch.optim.AdamW, not compiled, 16384 tokens at a time.
OPTIMIZER@MODEL is a side with a model of its own: muon,muon@models.faster:GPT.
Fields of the configuration can be overridden: --batch_size 128.

The table is shown and --json is written after each warm-up and each round, so that Ctrl-C at any moment
leaves what was measured. Its columns:

    warm-up s     seconds until a side is ready: it builds the model, compiles it and takes its first steps
    first ms      one step right after the warm-up; all there is before the first round
    step ms       mean step of a round; the median over the rounds, as for all columns that follow
    refresh ms    the step in which Newton-Muon refreshes its statistics, timed once a round
    mean ms       the mean step, with one refresh in refresh_interval steps
    tokens/s, MFU of the mean step; model FLOPs of a token, forward and backward, are 6 N + 12 L C T
                  (N parameters, without an embedding that is not the head, too; L layers, width C, context T)
    GPU GiB       peak memory of this side alone

Below it stand ratios of mean steps of the same round: their median and, from 6 rounds on, its 95 % interval
by order statistics. For an optimizer that does more work in every k-th step, make --steps a multiple of k.

--profile shows at the end where a step goes, by groups of kernels (torch.profiler). On a GPU a kernel
counts by its time on the device, and idle is the time without any; on a CPU an operation counts by its self
time. The sums Z Z^T of a refresh are part of the model's graph and count as matrix products. The profiler
slows the launching of kernels, so its idle time is an upper bound.
"""
import argparse
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler reports that it starts and stops

import train_gpt2  # before torch: it says how CPU threads wait
from train_gpt2 import (UserError, accumulate, autocast, build_optimizers, choose_micro_batch,
                        load_config, make_model, rank, start_processes, synchronized_time, training_dtype,
                        with_grams, wrapped, write_atomically)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend
from torch.profiler import record_function

from harness import kernels

# dense bf16 matrix products, FLOP/s, from NVIDIA's data sheets; the first that is part of the device's name
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


class PlainBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.attn_scale = 1 / math.sqrt(2 * config.n_layer)
        self.c_attn = nn.Linear(C, 3 * C, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.c_fc = nn.Linear(C, 4 * C, bias=False)
        self.mlp_proj = nn.Linear(4 * C, C, bias=False)

    def forward(self, x, rotate):
        B, T, C = x.size()
        q, k, v = self.c_attn(F.rms_norm(x, (C,), eps=1e-6)).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.attn_scale * self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(F.rms_norm(x, (C,), eps=1e-6))))


class PlainGPT(nn.Module):
    """The trainer's model, written plainly."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        D = C // config.n_head
        self.h = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.wte = nn.Embedding(config.vocab_size, C)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        frequencies = 10000.0 ** (-torch.arange(0, D, 2) / D)
        angles = torch.outer(torch.arange(config.sequence_length), frequencies)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos + b * self.sin, b * self.cos - a * self.sin], dim=-1).type_as(x)

    def forward(self, idx, targets):
        x = self.wte(idx)
        for block in self.h:
            x = block(x, self.rotate)
        logits = self.lm_head(F.rms_norm(x, (x.size(-1),), eps=1e-6)).float()
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


@dataclasses.dataclass
class Side:
    """An optimizer with its model, and what was measured of it so far."""

    micro_batch: int  # sequences in a forward pass
    batches: list  # [(idx, targets), ...]: a step's micro-batches
    step: callable  # step(batches, refresh)
    refresh_interval: int  # steps between refreshes, or 0
    memory: int  # bytes that it keeps on the GPU between steps
    warm_up_s: float
    first_step_ms: float = math.nan
    rounds_ms: list = dataclasses.field(default_factory=list)  # [[ms, ...] of a round's steps, ...]
    refreshes_ms: list = dataclasses.field(default_factory=list)  # one for each round
    peak: int = 0  # bytes
    profile: dict = dataclasses.field(default_factory=dict)  # {"step" or "refresh": kernels.profiled()}


def plain_step(config, device, dtype):
    """(step(batches, refresh), 0) of the plain loop."""
    plain = PlainGPT(config).to(device)
    model, _ = wrapped(plain, dataclasses.replace(config, compile=False), device)
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=betas, weight_decay=0.0)

    def step(batches, refresh):
        for idx, targets in batches:
            with autocast(device, dtype):
                loss = model(idx, targets)
            (loss / len(batches)).backward()
        with record_function("bench:optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return step, 0


def trainer_step(raw, config, device, dtype):
    """(step(batches, refresh), steps between refreshes or 0) of the trainer for the model `raw`."""
    model, _ = wrapped(raw, config, device)
    optimizers = build_optimizers(raw, config)
    hidden = optimizers[1]
    names = with_grams(raw, hidden)

    def step(batches, refresh):
        _, grams = accumulate(model, batches, names if refresh else (), dtype)
        if refresh:
            with record_function("bench:statistics"):
                hidden.refresh(grams, config.batch_size * config.sequence_length)
        with record_function("bench:optimizer"):
            for optimizer in optimizers:
                optimizer.step()
            raw.zero_grad(set_to_none=True)
    return step, hidden.defaults["refresh_interval"] if names else 0


def allocated(device):
    """Bytes in tensors on the GPU, 0 on a CPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def build(name, config, device, dtype, idx):
    """A side after both kinds of steps: with its graphs, memory pools and the optimizer's state."""
    start = synchronized_time(device)
    before = allocated(device)
    torch.manual_seed(0)
    if name == "plain":
        micro_batch = max(1, min(len(idx), 16384 // config.sequence_length))
        step, refresh_interval = plain_step(config, device, dtype)
    else:
        model = make_model(config).to(device)
        step, refresh_interval = trainer_step(model, config, device, dtype)
        micro_batch = choose_micro_batch(model, config, device, len(idx), dtype)
    batches = [(part, part.roll(-1, 1)) for part in idx.split(micro_batch)]
    kinds = [False, False]
    if refresh_interval:
        kinds += [True, True]
    for refresh in kinds:
        step(batches[:2], refresh)
    memory = allocated(device) - before
    seconds = synchronized_time(device) - start
    return Side(micro_batch, batches, step, refresh_interval, memory, round(seconds, 1))


def timed(side, device, refresh=False):
    """Milliseconds of one step. Raises side.peak to what this side alone allocates in it on a GPU."""
    others = allocated(device) - side.memory
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = synchronized_time(device)
    side.step(side.batches, refresh)
    ms = round(1000 * (synchronized_time(device) - start), 3)
    if device.type == "cuda":
        side.peak = max(side.peak, torch.cuda.max_memory_allocated() - others)
    return ms


def take_turns(sides, steps, device, backwards):
    """One round."""
    names = list(sides)
    if backwards:
        names.reverse()
    for name in names:
        side = sides[name]
        times = [timed(side, device) for _ in range(steps)]
        if side.refresh_interval:
            side.refreshes_ms.append(timed(side, device, refresh=True))
        side.rounds_ms.append(times)


def attention_kernel(config, device, dtype):
    """The name of the attention that torch takes for this model."""
    shape = (1, config.n_head, config.sequence_length, config.n_embd // config.n_head)
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name.lower()


def describe(args, config, device, dtype):
    """What is measured, and on what: the part of the result that does not change from round to round."""
    model = make_model(config)
    parameters = model.num_parameters()
    multiplied = {layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)}
    looked_up = 0  # parameters that nothing is multiplied by: an embedding that is not the head, too
    for layer in model.modules():
        if isinstance(layer, nn.Embedding) and layer.weight not in multiplied:
            looked_up += layer.weight.numel()
    attention_flops = 12 * config.n_layer * config.n_embd * config.sequence_length
    machine = train_gpt2.describe_machine(device)
    peak = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{machine['cpu']} ({capability}), {torch.get_num_threads()} threads"
    return dict(command=sys.argv[1:], config=args.config, machine=name, processes=train_gpt2.world_size(),
                torch=torch.__version__, dtype=str(dtype), compile=config.compile,
                batch_size=config.batch_size, sequence_length=config.sequence_length,
                refresh_interval=config.refresh_interval, code_sha256=train_gpt2.code_sha256(),
                parameters=parameters, flops_per_token=6 * (parameters - looked_up) + attention_flops,
                peak_flops=peak, attention=attention_kernel(config, device, dtype), steps=args.steps)


def interval(values):
    """95 % interval of the median: {low, high}, Nones below 6 values.

    The k-th smallest and the k-th largest value, with k from the binomial distribution: the largest for which
    2 P(fewer than k of n values lie below the median) <= 0.05.
    """
    n = len(values)
    k = 0
    below = 0.0  # P(at most k values below the median), times 2^n
    while 2 * (below + math.comb(n, k)) <= 0.05 * 2 ** n:
        below += math.comb(n, k)
        k += 1
    if k == 0:
        return dict(low=None, high=None)
    return dict(low=sorted(values)[k - 1], high=sorted(values)[n - k])


def mean_steps(side, rounds):
    """The mean step of each of the first rounds, in ms, with one refresh in refresh_interval steps."""
    means = [statistics.mean(steps) for steps in side.rounds_ms[:rounds]]
    if side.refresh_interval:
        pairs = zip(means, side.refreshes_ms)
        means = [ms + (refresh - ms) / side.refresh_interval for ms, refresh in pairs]
    return means


def median(values):
    return statistics.median(values) if values else None


def summary(side, rounds, facts):
    """What the table and --json say of a side, after so many complete rounds."""
    refreshes = side.refreshes_ms[:rounds]
    mean = median(mean_steps(side, rounds))
    tokens_per_second = mfu = peak_memory_gib = None
    if mean:
        tokens_per_second = 1000 * facts["batch_size"] * facts["sequence_length"] / mean
        if facts["peak_flops"]:
            peak_flops = facts["peak_flops"] * facts["processes"]
            mfu = tokens_per_second * facts["flops_per_token"] / peak_flops
    if side.peak:
        peak_memory_gib = side.peak / 2 ** 30
    return dict(micro_batch=side.micro_batch, warm_up_s=side.warm_up_s, first_step_ms=side.first_step_ms,
                step_ms=median([statistics.mean(steps) for steps in side.rounds_ms[:rounds]]),
                refresh_step_ms=median(refreshes), mean_step_ms=mean, tokens_per_second=tokens_per_second,
                mfu=mfu, peak_memory_gib=peak_memory_gib, rounds_ms=side.rounds_ms[:rounds],
                refreshes_ms=refreshes, profile=side.profile)


def report(sides, facts):
    """Everything measured so far, as --json has it."""
    rounds = min(len(side.rounds_ms) for side in sides.values())  # complete ones
    names = list(sides)
    pairs = [(name, names[0]) for name in names[1:]]
    if {"muon", "newton_muon"} <= sides.keys() and ("newton_muon", "muon") not in pairs:
        pairs.append(("newton_muon", "muon"))
    ratios = {}
    for name, base in pairs:
        means = zip(mean_steps(sides[name], rounds), mean_steps(sides[base], rounds))
        values = [mine / theirs for mine, theirs in means]
        if values:
            ratios[f"{name}/{base}"] = dict(rounds=values, mean_step=median(values), **interval(values))
    measured = {name: summary(side, rounds, facts) for name, side in sides.items()}
    return dict(**facts, rounds=rounds, sides=measured, ratios=ratios)


COLUMNS = {  # heading: (width, key of a side, format)
    "micro-batch": (11, "micro_batch", "d"),
    "warm-up s": (9, "warm_up_s", ".1f"),
    "first ms": (9, "first_step_ms", ".2f"),
    "step ms": (9, "step_ms", ".2f"),
    "refresh ms": (10, "refresh_step_ms", ".2f"),
    "mean ms": (9, "mean_step_ms", ".2f"),
    "tokens/s": (10, "tokens_per_second", ",.0f"),
    "MFU": (6, "mfu", ".1%"),
    "GPU GiB": (7, "peak_memory_gib", ".2f"),
}


def show_facts(facts):
    print("{config}: {parameters:,} parameters, {batch_size} x {sequence_length} tokens a step\n"
          "{processes} x {machine}, {dtype}, {attention}, compile = {compile}, torch {torch}\n"
          "model FLOPs of a token: 6 N + 12 L C T = {flops_per_token:,}; "
          "known peak of the device: {peak_flops}"
          .format(**facts))


def show(result):
    """The table of a report()."""
    print(f"after {result['rounds']} rounds of {result['steps']} steps")
    first = max(map(len, result["sides"]))
    print(" " * first, *(f"{heading:>{width}}" for heading, (width, _, _) in COLUMNS.items()))
    for name, side in result["sides"].items():
        cells = []
        for width, key, form in COLUMNS.values():
            text = "-" if side[key] is None else format(side[key], form)
            cells.append(f"{text:>{width}}")
        print(f"{name:{first}}", *cells)
    for pair, ratio in result["ratios"].items():
        bounds = "6 or more rounds give an interval"
        if ratio["low"]:
            bounds = f"95 %: {ratio['low']:.4f} to {ratio['high']:.4f}"
        print(f"{pair}: mean step {ratio['mean_step']:.4f} ({bounds})")


def write_json(path, result):
    """Writes the result with each innermost list or object on one line."""
    innermost = r"[\[{][^\[\]{}]*[\]}]"
    text = re.sub(innermost, lambda match: " ".join(match[0].split()), json.dumps(result, indent=1))
    write_atomically(Path(path).resolve(), (text + "\n").encode())


def publish(sides, facts, args, table=True):
    """Process 0 writes --json and shows the table."""
    if rank() != 0:
        return
    result = report(sides, facts)
    if args.json:
        write_json(args.json, result)
    if table:
        show(result)


def measure(sides, configs, facts, args, device, dtype, idx):
    """Warms up every side, measures --rounds rounds and then profiles; adds to `sides` as it goes."""
    for name, config in configs.items():
        side = build(name, config, device, dtype, idx)
        side.first_step_ms = timed(side, device)
        sides[name] = side
        publish(sides, facts, args)
    for i in range(args.rounds):
        take_turns(sides, args.steps, device, backwards=i % 2 == 0)
        publish(sides, facts, args)
    if args.profile:
        profile(sides, facts, args, device)


def profile(sides, facts, args, device):
    """Profiles a step, and a refresh, of every side."""
    columns = {}
    try:
        for name, side in sides.items():
            kinds = {"step": False}
            if side.refresh_interval:
                kinds["refresh"] = True
            for kind, refresh in kinds.items():
                step = functools.partial(side.step, side.batches, refresh)
                side.profile[kind] = kernels.profiled(step, device)
                columns[f"{name} {kind}"] = side.profile[kind]["groups"]
                publish(sides, facts, args, table=False)
    finally:  # also what there is at Ctrl-C
        if columns and rank() == 0:
            kernels.show(columns)


def parse_arguments():
    """(arguments, {side: its configuration})."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/cpu_newton_muon.toml",
                        help="(default: configs/cpu_newton_muon.toml)")
    parser.add_argument("--sides", default="plain,adamw,muon,newton_muon",
                        help="(default: plain,adamw,muon,newton_muon)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: 9)")
    parser.add_argument("--steps", type=int, default=5,
                        help="ordinary steps of each side in a round (default: 5)")
    parser.add_argument("--profile", action="store_true",
                        help="show where a step goes, by groups of kernels")
    parser.add_argument("--json", metavar="FILE", help="also write everything measured to this file")
    fields = [field.name for field in dataclasses.fields(train_gpt2.Config) if field.name != "optimizer"]
    for name in fields:
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1 or args.steps < 1:
        raise UserError(f"--rounds {args.rounds} --steps {args.steps}: must be at least 1")
    if args.json and (not Path(args.json).resolve().parent.is_dir() or Path(args.json).is_dir()):
        raise UserError(f"--json {args.json}: must be a file, in a folder that is there")

    given = []
    for name in fields:
        if name in args:
            given += [f"--{name}", getattr(args, name)]
    configs = {}
    for side in args.sides.split(","):
        optimizer, _, model = side.partition("@")
        argv = [args.config, *given, "--optimizer", "adamw" if side == "plain" else optimizer]
        if ":" not in optimizer:
            argv += ["--optimizer_args", "{}"]
        if model:
            argv += ["--model", model]
        configs[side] = load_config(argv)
        if side == "plain" and configs[side].model != "gpt":
            raise UserError(f"--sides {args.sides}: plain is the trainer's own model, not "
                            f"model = '{configs[side].model}'; leave it out")
    return args, configs


@command(interrupted="interrupted before the first round was complete")
def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    args, configs = parse_arguments()
    config = next(iter(configs.values()))
    per_process = train_gpt2.sequences_per_process(config, int(os.environ.get("WORLD_SIZE") or 1))
    device = start_processes(config)
    dtype = training_dtype(config, device)
    torch.set_float32_matmul_precision("high")
    generator = torch.Generator().manual_seed(rank())
    shape = (per_process, config.sequence_length)
    idx = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    facts = describe(args, config, device, dtype)
    if rank() == 0:
        show_facts(facts)
    sides = {}
    try:
        measure(sides, configs, facts, args, device, dtype, idx)
    except KeyboardInterrupt:
        if sides:
            publish(sides, facts, args)
        if len(sides) < len(configs) or not all(side.rounds_ms for side in sides.values()):
            raise
        print("interrupted: the table has all complete rounds", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{str(error).splitlines()[0]} Name fewer --sides, which share the GPU here, "
                        "or a smaller --device_batch_size.") from None
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
