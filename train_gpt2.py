"""Train a GPT-2 on token shards with AdamW, Muon, Newton-Muon, or an optimizer of yours, and log what it took.

    python train_gpt2.py configs/cpu_muon.toml                          one process, CPU or GPU
    python train_gpt2.py configs/cpu_muon.toml --num_iterations 300     any field of the file can be overridden
    torchrun --nproc_per_node 8 train_gpt2.py configs/speedrun_newton_muon.toml
    python train_gpt2.py --help                                         every field: type, default, meaning

A run writes LOG_DIR/RUN_NAME/: log.txt (this code, the machine, one line an evaluation), metrics.jsonl (the same as
JSON, and the training losses), run.json (configuration, versions, hashes), train_gpt2.py and checkpoints/. The time it
reports is training time: validation, checkpoints and the warm-up that builds the compiled graphs do not count.

The model and the default hyperparameters are those of record 4 of the Modded-NanoGPT speedrun (2024-10-10: 3.28 on
FineWeb after 6134 steps with Muon, as published). Newton-Muon is arXiv:2604.01472.
Sections: configuration, token shards, model, optimizers, distributed helpers, checkpoints, logging, main().
"""
import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import glob
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import platform
import queue
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

try:  # comes with torch's CUDA build
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


class UserError(Exception):
    """Something the user can put right: a sentence. Every process of the job raises it, and process 0 prints it, unless it is `local`."""

    def __init__(self, message, local=False):
        super().__init__(message)
        self.local = local


OPTIMIZERS = ("adamw", "muon", "newton_muon", "sgd", "signum")


@dataclass
class Config:
    """One run. Precedence: these defaults < TOML file < command line. A field's comment is its --help text."""

    # data
    input_bin: str = "data/fineweb10B/fineweb_train_*.bin"  # training shards: glob pattern, read in name order
    input_val_bin: str = "data/fineweb10B/fineweb_val_*.bin"  # validation shards: glob pattern
    batch_size: int = 512  # sequences in one optimizer step, over all processes
    device_batch_size: int = 0  # sequences in one forward pass of one process; 0: the largest power of two that fits
    sequence_length: int = 1024  # tokens in a sequence
    allow_repeat: bool = False  # start over when the shards are used up, instead of refusing to start
    data_seed: int = 0  # order of the training sequences: 0 is that of the files, any other a fixed permutation of all of them
    # schedule
    num_iterations: int = 6200  # optimizer steps
    warmup_iters: int = 0  # steps over which the learning rates rise linearly
    warmdown_iters: int = 1800  # steps at the end over which the learning rates fall linearly to 0
    val_loss_every: int = 125  # steps between evaluations; 0: only the last
    val_tokens: int = 10485760  # validation tokens, the first of the shards
    target_val_loss: float = 3.28  # the log says when an evaluation first reaches this loss
    stop_at_target: bool = False  # end the run there
    # model
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width
    vocab_size: int = 50257  # tokens that can be predicted (the table is padded to a multiple of 128 rows)
    # optimizer of the hidden matrices; the tied embedding / head always has AdamW
    optimizer: str = "muon"  # adamw, muon, newton_muon, sgd, signum, or module:Class of any torch.optim.Optimizer
    learning_rate: float = 0.0036  # of the tied table
    hidden_learning_rate: float = 0.00036  # of the hidden matrices; for Muon: root-mean-square size of an element's update
    weight_decay: float = 0.0  # of the hidden matrices; decoupled, but for sgd
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    momentum: float = 0.95  # muon, newton_muon, sgd, signum
    nesterov: bool = True  # muon, newton_muon, sgd, signum
    ns_steps: int = 5  # Newton-Schulz iterations of muon and newton_muon
    refresh_interval: int = 32  # newton_muon: steps between refreshes of the preconditioner
    ewma: float = 0.95  # newton_muon: weight of the past in the second moment of the inputs
    ridge: float = 0.2  # newton_muon: ridge, relative to the mean eigenvalue of the second moment
    power: float = 1.0  # newton_muon: the preconditioner is (second moment + ridge) ** -power; 0 would make it muon
    optimizer_args: str = "{}"  # module:Class: further keyword arguments, as a JSON object
    # machine
    seed: int = 0  # of the initial weights
    device: str = "auto"  # cuda, cpu, or auto: cuda where there is one
    dtype: str = "auto"  # of matrix products: bfloat16, float32, or auto: bfloat16 on cuda (weights stay float32)
    compile: bool = False  # use torch.compile
    collective_timeout: int = 600  # seconds that a process waits for the others before the job is ended
    # output
    log_dir: str = "logs"  # folder of the runs
    run_name: str = ""  # folder of this run in log_dir; empty: time and optimizer
    log_every: int = 10  # steps between training losses in the log (and checks that the loss is a number)
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    resume: str = ""  # a checkpoint, a run's folder, or auto: the newest checkpoint of run_name, if it has one
    wandb_project: str = ""  # also log to this Weights & Biases project


def field_help():
    """{field: comment} of Config, read from this file."""
    return dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def read_toml(path):
    """Fields of the TOML file at `path`. Raises UserError for an unknown key or a value of the wrong type."""
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}; configs/ has some to start from") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    for key, value in values.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0)[0]
            raise UserError(f"{path}: unknown key '{key}'; the nearest valid one is '{near}' (--help lists all)")
        if kinds[key] is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is not kinds[key]:
            raise UserError(f"{path}: {key} = {value!r} is a {type(value).__name__}, not a {kinds[key].__name__}")
    return values


def load_config(argv):
    """Config from the command line `argv`: CONFIG.toml [--field value ...]. Usage errors exit with 2."""
    parser = argparse.ArgumentParser(prog="train_gpt2.py", description=__doc__, allow_abbrev=False,
                                     usage="[torchrun ...] train_gpt2.py CONFIG.toml [--field value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.toml", help="configuration file, for example configs/cpu_muon.toml")
    comments = field_help()
    for field in dataclasses.fields(Config):
        text = f"{comments[field.name]} (default: {json.dumps(field.default)})"
        parser.add_argument(f"--{field.name}", type=boolean if field.type is bool else field.type, metavar=field.type.__name__,
                            default=argparse.SUPPRESS, help=text)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, [f"--{key}" for key in comments], n=1, cutoff=0)[0]
        parser.error(f"unknown argument '{name}'; the nearest valid one is '{near}' (--help lists all)")
    given = vars(args)
    config = Config(**{**read_toml(given.pop("config")), **given})
    check_config(config)
    return config


def check_config(config):
    """Raises UserError for a value that is out of range, whatever the data and the machine."""

    def require(condition, *names, must):
        if not condition:
            raise UserError(", ".join(f"{name} = {getattr(config, name)!r}" for name in names) + f": must be {must}")

    for name in ("batch_size", "sequence_length", "num_iterations", "val_tokens", "n_layer", "n_head", "n_embd", "ns_steps",
                 "vocab_size", "refresh_interval", "collective_timeout", "log_every"):
        require(getattr(config, name) >= 1, name, must="at least 1")
    for name in ("device_batch_size", "warmup_iters", "warmdown_iters", "val_loss_every", "save_every", "learning_rate",
                 "hidden_learning_rate", "weight_decay", "seed", "data_seed"):
        require(0 <= getattr(config, name) < math.inf, name, must="0 or more, and finite")
    for name in ("beta1", "beta2", "momentum", "ewma"):
        require(0 <= getattr(config, name) < 1, name, must="at least 0 and below 1")
    require(0 < config.ridge < math.inf, "ridge", must="positive and finite")
    require(0 < config.power <= 1, "power", must="above 0 and at most 1")
    require(config.warmup_iters + config.warmdown_iters <= config.num_iterations, "warmup_iters", "warmdown_iters",
            "num_iterations", must="such that warm-up and warm-down fit into the run")
    require(config.n_embd % (2 * config.n_head) == 0, "n_embd", "n_head",
            must="such that n_embd / n_head is an even number (rotary embeddings turn pairs)")
    require(config.val_tokens % config.sequence_length == 0, "val_tokens", "sequence_length",
            must="such that sequence_length divides val_tokens")
    require(config.vocab_size <= 65536, "vocab_size", must="at most 65536 (shards hold 16-bit tokens)")
    require(config.device in ("auto", "cpu", "cuda"), "device", must="auto, cpu or cuda")
    require(config.dtype in ("auto", "float32", "bfloat16"), "dtype", must="auto, float32 or bfloat16")
    require(config.optimizer in OPTIMIZERS or re.fullmatch(r"[\w.]+:\w+", config.optimizer), "optimizer",
            must=f"{', '.join(OPTIMIZERS)} or module:Class")
    require(not (config.optimizer == "sgd" and config.nesterov and config.momentum == 0), "nesterov", "momentum",
            must="such that Nesterov's rule has a momentum above 0")
    require(os.path.basename(config.run_name) == config.run_name and config.run_name not in (".", ".."), "run_name",
            must="a folder name without a path; the folder above it is log_dir")
    require(config.weight_decay == 0 or ":" not in config.optimizer, "weight_decay", "optimizer",
            must="0 for a module:Class; optimizer_args has its arguments")
    require(config.seed < 2 ** 63, "seed", must="below 2^63")
    require(config.data_seed < 2 ** 32, "data_seed", must="below 2^32")
    require(config.resume != "auto" or config.run_name, "resume", "run_name", must="given together: auto needs a run_name")
    try:
        require(isinstance(json.loads(config.optimizer_args), dict), "optimizer_args", must="a JSON object")
    except json.JSONDecodeError as error:
        raise UserError(f"optimizer_args = {config.optimizer_args!r} is not JSON: {error}") from None


def divisors_near(n, wanted):
    """The divisors of n, the one nearest to `wanted` first."""
    return sorted((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))


def sequences_per_process(config, world):
    """Sequences of one process in a step, after checking that the batch can be split over `world` processes and micro-batches."""
    if config.batch_size % world:
        near = sorted(divisors_near(config.batch_size, world)[:2])
        raise UserError(f"batch_size = {config.batch_size} cannot be split over {world} processes; "
                        f"the nearest numbers of processes that can are {' and '.join(map(str, near))}")
    per_process = config.batch_size // world
    if config.device_batch_size and per_process % config.device_batch_size:
        near = divisors_near(per_process, config.device_batch_size)[0]
        raise UserError(f"device_batch_size = {config.device_batch_size} does not divide the {per_process} sequences that each "
                        f"of {world} processes has in a step (batch_size = {config.batch_size}); the nearest that does is {near}")
    return per_process


def learning_rate_scale(config, step):
    """Factor on both learning rates in step `step` (from 0): linear rise, constant, linear fall to 0."""
    if step < config.warmup_iters:
        return (step + 1) / config.warmup_iters
    left = config.num_iterations - step
    return min(1.0, left / config.warmdown_iters) if config.warmdown_iters else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Token shards: 256 little-endian int32 (20240520, version 1, number of tokens, rest 0), then uint16 tokens

HEADER_BYTES = 1024
MAGIC, VERSION = 20240520, 1
FIX = "make it again with the script in data/ that made it"


def open_shard(path):
    """Memory-mapped tokens of the shard at `path`: (n,) uint16. Raises UserError if it is missing or damaged."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for ever
            raise OSError("it is no file")
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4")
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); {FIX}") from None
    if len(header) < 256 or header[0] != MAGIC:
        raise UserError(f"{path}: not a token shard (it should start with {MAGIC}); {FIX}")
    if header[1] != VERSION:
        raise UserError(f"{path}: shard version {header[1]}, this code reads version {VERSION}; {FIX}")
    n = int(header[2])
    if n < 0 or size != HEADER_BYTES + 2 * n:
        raise UserError(f"{path}: damaged: {size:,} bytes, but its header says {n:,} tokens, "
                        f"which is {HEADER_BYTES + 2 * n:,} bytes; {FIX}")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(n,)) if n else np.zeros(0, "<u2")


class Shards:
    """All shards that match a glob pattern, cut into sequences.

    Sequence i is sequence_length tokens and the one after them; sequences follow each other in a shard, shards follow
    each other by name, and no sequence spans two shards. Step t of a run trains on sequences t * batch_size to
    (t + 1) * batch_size - 1, however many processes share them: the position in the data is the step. A data_seed
    above 0 numbers the sequences of all shards in another order.
    All headers and lengths are checked at once; a shard is mapped only while a batch is read, so that memory stays flat.
    """

    def __init__(self, pattern, sequence_length, vocab_size, allow_repeat=False, data_seed=0):
        self.paths = sorted(glob.glob(pattern))
        if not self.paths:
            raise UserError(f"no file matches '{pattern}' from {os.getcwd()}; data/fineweb.py, data/shakespeare.py and data/tokenize_text.py make shards")
        self.lengths = [len(open_shard(path)) for path in self.paths]  # in tokens
        self.pattern, self.T, self.vocab_size, self.allow_repeat = pattern, sequence_length, vocab_size, allow_repeat
        self.ends = np.cumsum([max(0, n - 1) // sequence_length for n in self.lengths])  # in sequences
        # numpy never changes what a RandomState yields for a seed
        self.order = np.random.RandomState(data_seed).permutation(self.ends[-1]) if data_seed else None

    def require(self, sequences, what):
        """Raises UserError unless there are `sequences` sequences for `what`."""
        have = int(self.ends[-1])
        if have >= sequences or (self.allow_repeat and have > 0):
            return
        largest = max(self.lengths)
        missing = f"{math.ceil((sequences - have) * self.T / largest)} more shards like the largest one" if largest else "more shards"
        raise UserError(f"'{self.pattern}' holds {have * self.T:,} tokens in sequences of {self.T}, {what} needs "
                        f"{sequences * self.T:,}: add {missing}, or set a lower number"
                        + ("" if what == "validation" else " of steps, or allow_repeat = true"))

    def describe(self):
        """For run.json: name and tokens of each shard, and SHA-256 of its header and size, and of its first MiB (other data of the same size)."""
        shards = []
        for path, n in zip(self.paths, self.lengths):
            with open(path, "rb") as file:
                start, size = file.read(2 ** 20), os.path.getsize(path)
            shards.append(dict(name=os.path.basename(path), tokens=n, sha256_of_first_mebibyte=hashlib.sha256(start).hexdigest(),
                               sha256_of_header_and_size=hashlib.sha256(start[:HEADER_BYTES] + str(size).encode()).hexdigest()))
        return shards

    def batch(self, sequences):
        """Inputs and targets, each (len(sequences), T) int64, of the sequences with these numbers.

        Raises UserError for a token outside the vocabulary, and for a shard that has changed since it was checked.
        """
        rows, opened = np.empty((len(sequences), self.T + 1), dtype=np.int64), None
        for row, i in zip(rows, sequences):
            i %= int(self.ends[-1])
            i = i if self.order is None else int(self.order[i])
            shard = int(np.searchsorted(self.ends, i, side="right"))
            start = (i - (int(self.ends[shard - 1]) if shard else 0)) * self.T
            if shard != opened:
                tokens, opened = open_shard(self.paths[shard]), shard
                if len(tokens) != self.lengths[shard]:
                    raise UserError(f"{self.paths[shard]}: had {self.lengths[shard]:,} tokens when the run started and has "
                                    f"{len(tokens):,} now; leave the shards of a run alone")
            row[:] = tokens[start:start + self.T + 1]
            if row.max() >= self.vocab_size:
                raise UserError(f"{self.paths[shard]}: token {row.max()} after position {start} is outside vocab_size = "
                                f"{self.vocab_size}; use the vocabulary of the tokenizer that made the shard")
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def prefetched(shards, batches, device):
    """Yields shards.batch(sequences) for each of `batches` in turn; a thread reads the next one while the caller uses this one.

    Where `device` is a GPU, the tensors lie in pinned memory, from which they can be copied while it computes.
    """
    def read(sequences):
        try:
            batch = shards.batch(sequences)
        except UserError as error:
            raise UserError(str(error), local=True) from None  # other processes read other sequences
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread starts with GPU 0 as its own, whatever the GPU of its process
            batch = [t.pin_memory() for t in batch]
        return batch

    with ThreadPoolExecutor(1) as thread:
        waiting = []
        for sequences in batches:
            waiting.append(thread.submit(read, sequences))
            if len(waiting) == 2:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


# ---------------------------------------------------------------------------------------------------------------------
# Model: pre-norm GPT-2 with RMSNorm, rotary embeddings, no biases, no learned norm gains, tied embedding and head


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotate(x, cos, sin):
    """Rotary embedding of x (B, T, n_head, D), half-split layout: element i turns with element i + D / 2. Tables (T, 1, D)."""
    z = x.float()
    return (z * cos + z.unflatten(-1, (2, -1)).flip(-2).flatten(-2) * sin).type_as(x)


def on_gpu(x):
    return x.is_cuda


def matmul_dtype(x):
    """The type to which autocast turns x before a matrix product."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


@torch.no_grad()
def gram(z, n):
    """Z Z^T of the layer inputs z (..., b * n), summed over the tokens in fp32, for each of the b slices: (b, n, n)."""
    z = z.detach().to(matmul_dtype(z)).reshape(-1, z.size(-1) // n, n).transpose(0, 1)
    with torch.autocast(z.device.type, enabled=False):
        if on_gpu(z) and z.dtype != torch.float32:
            return torch.bmm(z.mT, z, out_dtype=torch.float32)
        return z.float().mT @ z.float()


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, grams):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)
        if grams is not None:
            grams += [gram(x, C), gram(y, C)]
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x, grams):
        h = F.gelu(self.c_fc(x))
        if grams is not None:
            grams += [gram(x, x.size(-1)), gram(h, x.size(-1))]
        return self.c_proj(h)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.attn_scale = 1 / math.sqrt(2 * config.n_layer)

    def forward(self, x, cos, sin, grams):
        x = x.add(self.attn(norm(x), cos, sin, grams), alpha=self.attn_scale)
        return x + self.mlp(norm(x), grams)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.vocab_size = config.vocab_size
        rows = math.ceil(config.vocab_size / 128) * 128  # aligned; the added rows can be neither looked up nor predicted
        self.wte = nn.Embedding(rows, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        self.wte.weight = self.lm_head.weight
        D = config.n_embd // config.n_head
        angles = torch.outer(torch.arange(config.sequence_length), 10000.0 ** (-torch.arange(0, D, 2) / D)).unsqueeze(1)
        self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), -1), persistent=False)  # (T, 1, D)
        self.register_buffer("sin", torch.cat((angles.sin(), -angles.sin()), -1), persistent=False)

    def forward(self, idx, targets, collect=False):
        """Mean cross-entropy of `targets` (B, T), of which -1 does not count, after the tokens `idx` (B, T).

        Returns (loss, grams): with `collect`, grams holds Z Z^T of the inputs of each of hidden_matrices(), else nothing.
        """
        x, grams = self.features(idx, collect)
        if triton and on_gpu(x):
            return head_loss(x.flatten(0, 1).to(matmul_dtype(x)), self.lm_head.weight, targets.flatten(), self.vocab_size)[0], grams
        return F.cross_entropy(self.lm_head(x)[..., :self.vocab_size].float().flatten(0, 1), targets.flatten(), ignore_index=-1), grams

    def logits(self, idx):
        """Logits (B, T, vocab_size) fp32 for tokens `idx` (B, T)."""
        return self.lm_head(self.features(idx)[0])[..., :self.vocab_size].float()

    def features(self, idx, collect=False):
        """Input (B, T, C) of the head for tokens `idx` (B, T), and the grams of forward()."""
        grams = [] if collect else None
        x = self.wte(idx)
        cos, sin = self.cos[:idx.size(1)], self.sin[:idx.size(1)]
        for block in self.h:
            x = block(x, cos, sin, grams)
        return norm(x), grams

    def hidden_matrices(self):
        """{name: weight} of the matrices in the blocks, in the order of the grams."""
        return {name: p for name, p in self.named_parameters() if name.startswith("h.")}

    def num_parameters(self):
        """Parameters, without the rows that pad the table."""
        padding = (self.lm_head.weight.size(0) - self.vocab_size) * self.lm_head.weight.size(1)
        return sum(p.numel() for p in self.parameters()) - padding


# The loss on a GPU: head and cross-entropy by chunks of tokens, with the gradients of both at once, so that the logits never exist whole

CHUNK = 16384  # tokens

if triton:
    @triton.jit
    def cross_entropy_kernel(logits, targets, losses, scale, vocab_size, stride, BLOCK: tl.constexpr):
        """One program a row of `logits`, of which columns from vocab_size on are padding: losses <- logsumexp(row) - row[target],
        and row <- scale (softmax(row) - onehot(target)), 0 in the padding; both 0 for a target of -1."""
        log2e: tl.constexpr = 1.4426950408889634  # exp2 and log2 are what the hardware has
        row = tl.program_id(0)
        logits += row.to(tl.int64) * stride
        target = tl.load(targets + row).to(tl.int32)
        counts = target >= 0
        at_target = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
        scale = tl.where(counts, tl.load(scale), 0.0)
        columns = tl.arange(0, BLOCK)
        top, total = -float("inf"), tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):  # running maximum, and the sums of exponentials relative to it
            x = tl.load(logits + start + columns, mask=columns < stride - start, other=0.0).to(tl.float32) * log2e
            x = tl.where(columns < vocab_size - start, x, -float("inf"))  # a mask of the load would forbid wide loads
            higher = tl.maximum(top, tl.max(x))
            total = total * tl.exp2(top - higher) + tl.exp2(x - higher)
            top = higher
        lse = top + tl.log2(tl.sum(total))
        tl.store(losses + row, tl.where(counts, lse / log2e - at_target, 0.0))
        for start in range(0, stride, BLOCK):
            x = tl.load(logits + start + columns, mask=columns < stride - start, other=0.0).to(tl.float32) * log2e
            p = tl.where(columns < vocab_size - start, tl.exp2(x - lse), 0.0)
            gradient = scale * tl.where(columns == target - start, p - 1.0, p)
            tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), mask=columns < stride - start)


@torch.library.custom_op("train_gpt2::head_loss", mutates_args=())
def head_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of `targets` (N,), of which -1 does not count, under the logits x weight^T, x (N, C) and weight (rows, C).

    Returns (loss, d loss / d x, d loss / d weight), the last in fp32; logits from vocab_size on cannot be predicted.
    """
    scale = 1 / (targets >= 0).sum()
    losses, dx = torch.empty(len(x), device=x.device), torch.empty_like(x)
    dweight = torch.zeros(weight.shape, device=x.device)
    weight = weight.to(x.dtype)
    for x_, dx_, targets_, losses_ in zip(*(t.split(CHUNK) for t in (x, dx, targets, losses))):
        logits = x_ @ weight.mT
        cross_entropy_kernel[(len(logits),)](logits, targets_, losses_, scale, vocab_size, logits.stride(0), BLOCK=4096, num_warps=8)
        torch.mm(logits, weight, out=dx_)  # the kernel left their gradient there
        if x.dtype == torch.float32:
            dweight.addmm_(logits.mT, x_)
        else:
            torch.addmm(dweight, logits.mT, x_, out_dtype=torch.float32, out=dweight)
    return losses.sum() * scale, dx, dweight


@head_loss.register_fake
def _(x, weight, targets, vocab_size):
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)


def keep_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def scale_gradients(ctx, gradient, *_):
    return *(gradient * t for t in ctx.saved_tensors), None, None


head_loss.register_autograd(scale_gradients, setup_context=keep_gradients)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers


def newton_schulz(U, steps=5):
    """Approximately the nearest orthogonal matrix, U V^T of the singular value decomposition, of each matrix in U (..., m, n).

    X = U / (||U||_F + 1e-7), then `steps` times A = X X^T, X <- a X + (b A + c A A) X. The coefficients trade accuracy
    for speed: singular values end between about 0.7 and 1.2 (K. Jordan et al., Muon, 2024). bf16 on CUDA.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = (U.bfloat16() if U.is_cuda else U).reshape(-1, *U.shape[-2:])
    if U.size(-2) > U.size(-1):
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    if U.size(-2) > U.size(-1):
        X = X.mT
    return X.reshape(U.shape)


def as_blocks(W):
    """View of a matrix W (m, n) as what is orthogonalised: (3, n, n) for a fused q, k, v, else (1, shorter, longer side)."""
    m, n = W.shape
    if m == 3 * n:
        return W.view(3, n, n)
    return (W if m <= n else W.mT).unsqueeze(0)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (K. Jordan et al., Muon, 2024).

    For each matrix W (m, n) with gradient G:

        M <- momentum M + G
        U =  G + momentum M  (Nesterov), or M
        W <- (1 - lr weight_decay) W - lr sqrt(max(m, n)) newton_schulz(U)

    so that lr is about the root-mean-square size of an element's update. A matrix with m = 3 n is taken for a fused
    q, k, v, whose three n x n blocks are orthogonalised apart with sqrt(n). Raises ValueError for a setting out of range,
    or a parameter that is no matrix.

    With several processes each matrix has one owner, which alone keeps its state and orthogonalises its momentum; the
    updates of all owners come back in one all-gather, bf16 on CUDA, else in the weights' type. An owner's matrices of one
    shape go through Newton-Schulz as one batch. Gradients must be the same on all processes, as DDP leaves them.
    """

    def __init__(self, params, lr=3.6e-4, momentum=0.95, nesterov=True, ns_steps=5, weight_decay=0.0, **more):
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1:
            raise ValueError(f"lr = {lr}, weight_decay = {weight_decay}, momentum = {momentum}: must be 0 or more, momentum below 1")
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps,
                                      weight_decay=weight_decay, **more))
        matrices = [p for group in self.param_groups for p in group["params"]]
        for p in matrices:
            if p.ndim != 2:
                raise ValueError(f"a parameter of shape {tuple(p.shape)}: {type(self).__name__} updates matrices only")
        self.slot, used = {}, [0] * world_size()  # matrix -> (owner, where its update starts in the owner's part of the all-gather)
        for p, owner in zip(matrices, assign_owners([self.flops(p) for p in matrices], world_size())):
            self.slot[p] = owner, used[owner]
            used[owner] += p.numel()
        dtype = torch.bfloat16 if matrices[0].is_cuda else matrices[0].dtype
        self.updates = torch.zeros(max(used), dtype=dtype, device=matrices[0].device)  # of this process's matrices

    def flops(self, p):
        """FLOPs of the owner's work on matrix p in a step: X X^T, A A and their product with X in each Newton-Schulz iteration."""
        b, r, R = as_blocks(p).shape
        return self.defaults["ns_steps"] * b * (4 * r * r * R + 2 * r ** 3)

    def precondition(self, p, G):
        return G

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            batches = defaultdict(list)  # shape -> [(blocks of U, where the blocks of the update go)]
            for p in group["params"]:
                owner, start = self.slot[p]
                if owner != rank() or p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                G = self.precondition(p, p.grad)
                M = self.state[p]["momentum_buffer"].mul_(group["momentum"]).add_(G)
                U = as_blocks(G.add(M, alpha=group["momentum"]) if group["nesterov"] else M)
                batches[U.shape[1:]].append((U, as_blocks(self.updates[start:start + p.numel()].view_as(p))))
            for batch in batches.values():
                O = newton_schulz(torch.cat([U for U, _ in batch]), group["ns_steps"])
                for (U, update), o in zip(batch, O.split([len(U) for U, _ in batch])):
                    update.copy_(o)
        updates = all_gather(self.updates)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    owner, start = self.slot[p]
                    scale = math.sqrt(max(as_blocks(p).shape[1:]))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(updates[owner, start:start + p.numel()].view_as(p), alpha=-group["lr"] * scale)

    def state_dict(self):
        """On process 0 with the state of all matrices, whoever owns them (all processes must call it); elsewhere with this process's."""
        state = super().state_dict()
        mine = {i: {key: value.cpu() for key, value in entry.items()} for i, entry in state["state"].items()}
        for part in gather_objects(mine):
            state["state"].update(part)
        return state

    def load_state_dict(self, state_dict):
        owners = [self.slot[p][0] for group in self.param_groups for p in group["params"]]
        owned = {i: state for i, state in state_dict["state"].items() if owners[i] == rank()}
        super().load_state_dict({**state_dict, "state": owned})


class NewtonMuon(Muon):
    """Muon on gradients preconditioned by the second moment of each layer's inputs (arXiv:2604.01472).

    Each matrix W (m, n) of a layer with inputs Z (n, N tokens) keeps K (n, n), at first 1e-3 I. A refresh does

        K <- ewma K + (1 - ewma) Z Z^T / N
        P =  (K + (ridge tr(K) / n + 1e-8) I)^-power

    and from the first refresh on, each step replaces G by G P before Muon's momentum; the paper's power, 1, is the inverse, by
    Cholesky, any other is taken of the eigenvalues. A matrix wider than tall has n / m diagonal blocks instead of one K, one for
    each slice of its inputs; fused q, k, v share theirs. If a factorisation fails, that block keeps its previous P, and
    `failures` counts it. Raises ValueError as Muon does.

    The speedrun on 8 GPUs, per step (524,288 tokens, n = 768, refreshes every 32 steps), counted, not measured:

                                   FLOPs, all GPUs    received by each GPU         kept by each owner
        model                      448 T              865 MB, gradients fp32 (DDP)
        Newton-Schulz              1.63 T             149 MB, updates bf16         42 MB, momentum
        Z Z^T, one step in 32      1.62 T             3.1 MB, triangles fp32       25 MB, K
        G P                        0.13 T                                          25 MB, P
        factorisation, 1 in 32     0.001 T

    So Newton-Muon adds 0.4 % to the FLOPs of a Muon step (Z Z^T runs in TF32, at half the rate of bf16), and 0.3 % to its bytes.
    """

    def __init__(self, params, lr=4e-4, momentum=0.95, nesterov=True, ns_steps=5, weight_decay=0.0,
                 refresh_interval=32, ewma=0.95, ridge=0.2, power=1.0):
        if not 0 <= ewma < 1 or ridge <= 0 or not 0 < power <= 1:
            raise ValueError(f"ewma = {ewma}, ridge = {ridge}, power = {power}: ewma must be at least 0 and below 1, ridge positive, "
                             "power above 0 and at most 1")
        super().__init__(params, lr, momentum, nesterov, ns_steps, weight_decay,
                         refresh_interval=refresh_interval, ewma=ewma, ridge=ridge, power=power)
        self.failures = torch.zeros((), dtype=torch.int64, device=self.updates.device)

    @staticmethod
    def gram_shape(p):
        """(b, n, n) of K and P of matrix p."""
        n = min(p.shape)
        if p.size(1) % n:
            raise ValueError(f"a matrix of shape {tuple(p.shape)}: must be as tall as wide, taller, or a whole number of times wider")
        return p.size(1) // n, n, n

    def flops(self, p):
        """Muon's, G P, and the share of a refresh (Cholesky and inverse: n^3 a block) that falls to one step."""
        b, n, _ = self.gram_shape(p)
        return super().flops(p) + 2 * p.numel() * n + b * n ** 3 // self.defaults["refresh_interval"]

    @torch.no_grad()
    def refresh(self, grams, tokens):
        """Updates K and P. grams: of each matrix in turn, the sum of z z^T over this process's inputs, shaped gram_shape(p);
        overwritten. tokens: N, over all processes."""
        matrices = [(p, group) for group in self.param_groups for p in group["params"]]
        reduce_to_owners(grams, [self.slot[p][0] for p, _ in matrices])
        for (p, group), gram in zip(matrices, grams, strict=True):
            if self.slot[p][0] != rank():
                continue
            state, eye = self.state[p], torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device)
            if "K" not in state:
                state["K"] = 1e-3 * eye.repeat(gram.size(0), 1, 1)
                state["P"] = eye.repeat(gram.size(0), 1, 1)
            K = state["K"].mul_(group["ewma"]).add_(gram, alpha=(1 - group["ewma"]) / tokens)
            ridge = group["ridge"] * K.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-8
            A = K + ridge[:, None, None] * eye
            if group["power"] == 1:
                L, info = torch.linalg.cholesky_ex(A)
                good = ((info == 0) & L.isfinite().all(-1).all(-1))[:, None, None]
                P = torch.cholesky_inverse(torch.where(good, L, eye))
            else:
                good = A.isfinite().all(-1).all(-1)[:, None, None]
                values, V = A.new_full(A.shape[:-1], math.nan), A
                with contextlib.suppress(torch.linalg.LinAlgError):  # no convergence
                    values, V = torch.linalg.eigh(torch.where(good, A, eye))
                P = V * values[:, None, :].pow(-group["power"]) @ V.mT  # a negative eigenvalue, too, has none
                good = good & P.isfinite().all(-1).all(-1)[:, None, None]
            state["P"] = torch.where(good, P, state["P"])
            self.failures += (~good).sum()

    def precondition(self, p, G):
        P = self.state[p].get("P")
        if P is None:  # no refresh yet
            return G
        return torch.einsum("mbi,bij->mbj", G.view(G.size(0), P.size(0), -1), P).reshape_as(G)


class Signum(torch.optim.Optimizer):
    """Sign of the momentum (Bernstein et al., 2018): M <- momentum M + (1 - momentum) G, W <- (1 - lr weight_decay) W - lr sign(U),
    with U = momentum M + (1 - momentum) G (Nesterov), or M."""

    def __init__(self, params, lr=1e-3, momentum=0.95, nesterov=True, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            mu = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                M = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - mu)
                U = p.grad.lerp(M, mu) if group["nesterov"] else M
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(U.sign(), alpha=-group["lr"])


def build_optimizers(model, config):
    """(optimizer of the tied table, optimizer of the hidden matrices). Raises UserError if the second cannot be made."""
    adamw = dict(betas=(config.beta1, config.beta2), fused=True)
    table = torch.optim.AdamW([model.lm_head.weight], lr=config.learning_rate, weight_decay=0.0, **adamw)
    hidden = list(model.hidden_matrices().values())
    rate = dict(lr=config.hidden_learning_rate, weight_decay=config.weight_decay)
    momentum = dict(momentum=config.momentum, nesterov=config.nesterov)
    if config.optimizer == "adamw":
        return table, torch.optim.AdamW(hidden, **rate, **adamw)
    if config.optimizer == "muon":
        return table, Muon(hidden, **rate, **momentum, ns_steps=config.ns_steps)
    if config.optimizer == "newton_muon":
        return table, NewtonMuon(hidden, **rate, **momentum, ns_steps=config.ns_steps, refresh_interval=config.refresh_interval,
                                 ewma=config.ewma, ridge=config.ridge, power=config.power)
    if config.optimizer == "sgd":
        return table, torch.optim.SGD(hidden, **rate, **momentum)
    if config.optimizer == "signum":
        return table, Signum(hidden, **rate, **momentum)
    module, name = config.optimizer.split(":")
    try:
        kind = getattr(importlib.import_module(module), name)
        closure = inspect.signature(kind.step).parameters.get("closure")
        if closure and closure.default is closure.empty:
            raise TypeError("its step() needs a closure, which the training loop does not have")
        return table, kind(hidden, lr=config.hidden_learning_rate, **json.loads(config.optimizer_args))
    except Exception as error:  # whatever somebody else's code raises
        raise UserError(f"optimizer = '{config.optimizer}' with optimizer_args = '{config.optimizer_args}' cannot be made: "
                        f"{type(error).__name__}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Distributed helpers: all of them also work in a single process without a process group


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes(config):
    """Joins the process group when torchrun started this process. Returns the device of this process."""
    world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    if config.device == "cuda" and not gpus:
        raise UserError(f"device = 'cuda', but torch {torch.__version__} finds no GPU here; "
                        "use --device cpu, or install a CUDA build of torch")
    device = torch.device("cuda", local_rank) if config.device != "cpu" and gpus else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= gpus:
            raise UserError(f"process {local_rank} of this node has no GPU: there are {gpus}; start at most {gpus} processes a node",
                            local=True)
        torch.cuda.set_device(device)
    elif sys.platform == "linux":
        # glibc gives the memory of large tensors back to the kernel and faults it in again in the same step; keep it: 10 to 20 % of a step
        with contextlib.suppress(OSError, AttributeError):  # another libc
            for parameter, value in ((-1, 2 ** 30), (-2, 2 ** 26), (-3, 2 ** 25)):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(parameter, value)
    if world > 1:
        global job_store  # what_failed() uses it when collectives fail
        try:
            job_store, process, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=config.collective_timeout)))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"WORLD_SIZE is {world}, but the processes cannot find each other: {error}; start them by torchrun",
                            local=True) from None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own store outlives a restart, with the old addresses
            job_store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", job_store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=job_store, rank=process,
                                world_size=world, timeout=timedelta(seconds=config.collective_timeout))
    return device


def what_failed(error):
    """A sentence about the RuntimeError of a collective: every process that can still tell says so, and the others are named."""
    missing = []
    for other in range(world_size()):
        try:
            job_store.set(f"failed/{rank()}", "")
            job_store.wait([f"failed/{other}"], timedelta(seconds=5))
        except RuntimeError:
            missing.append(str(other))
    reason = f"process {', '.join(missing)} does not answer any more" if missing else "the processes lost each other"
    return f"{reason} ({str(error).splitlines()[0].split('. ')[0]}); what was saved stays, go on with --resume"


def deferred_signals():
    """From now on SIGINT and SIGTERM do nothing but to stand in the list that this returns."""
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    return signals


def assign_owners(costs, world):
    """Owner (0 .. world - 1) of each matrix: the most costly first, each to the process with the least work so far."""
    load, owners = [0] * world, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(world), key=lambda r: load[r])
        load[owners[i]] += costs[i]
    return owners


def all_gather(mine):
    """(world, *mine.shape): the `mine` of all processes, in order of rank."""
    if world_size() == 1:
        return mine.unsqueeze(0)
    everyone = torch.empty((world_size(), *mine.shape), dtype=mine.dtype, device=mine.device)
    dist.all_gather(list(everyone), mine)
    return everyone


def reduce_to_owners(grams, owners):
    """Replaces each symmetric gram (b, n, n) by its sum over all processes, on the process that owns it; elsewhere nothing changes.

    One reduction for each owner carries the upper triangles of all its grams. No less can do: an owner needs n (n + 1) / 2 sums of each
    block, to which every other process adds a number of its own.
    """
    if world_size() == 1:
        return
    triangle = {n: torch.triu_indices(n, n, device=grams[0].device).unbind() for n in {gram.size(-1) for gram in grams}}
    nothing = grams[0].new_empty(0)
    packed = [torch.cat([gram[:, *triangle[gram.size(-1)]].flatten() for gram, owner in zip(grams, owners) if owner == r] or [nothing])
              for r in range(world_size())]
    for work in [dist.reduce(part, dst=r, async_op=True) for r, part in enumerate(packed) if len(part)]:
        work.wait()
    start = 0
    for gram, owner in zip(grams, owners):
        if owner == rank():
            b, n, _ = gram.shape
            rows, columns = triangle[n]
            part = packed[owner][start:start + b * len(rows)].view(b, -1)
            gram[:, rows, columns] = part
            gram[:, columns, rows] = part
            start += part.numel()


def gather_objects(value):
    """On process 0 the list of every process's `value`, elsewhere an empty list."""
    if world_size() == 1:
        return [value]
    everyone = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, everyone)
    return everyone or []


def broadcast_object(value):
    """Process 0's `value`, on every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def all_max(value):
    """The largest of all processes' `value`, an integer."""
    return int(all_gather(torch.tensor(value)).max())


def all_sum(*values):
    """Sums over all processes of these numbers, in float64."""
    return all_gather(torch.tensor(values, dtype=torch.float64)).sum(0).tolist()


@contextlib.contextmanager
def together():
    """Runs the body on every process. If it raises a UserError on any, all raise that, so that none waits for one that has ended."""
    error = None
    try:
        yield
    except UserError as caught:
        error = str(caught)
    errors = [error] * world_size()
    if world_size() > 1:
        dist.all_gather_object(errors, error)
    for process, error in enumerate(errors):
        if error:
            raise UserError(error if errors.count(error) == len(errors) else f"process {process}: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: process 0 writes and reads them, in a form that any number of processes can load

# what may differ between the run that wrote a checkpoint and the one that goes on from it
FREE_FIELDS = {"device_batch_size", "compile", "collective_timeout", "log_dir", "run_name", "log_every", "save_every", "resume",
               "wandb_project", "target_val_loss", "stop_at_target", "device"}


def code_sha256():
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def write_atomically(path, content):
    """Writes `content`, bytes, to a temporary file beside `path`, flushes it to disk and renames it: `path` is never half-written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name, too, is on the disk before anything relies on it
        os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; what was there before is untouched", local=True) from None


def save_checkpoint(log, config, model, optimizers, progress):
    """Writes checkpoints/step_XXXXXX.pt in the run's folder and keeps the one before it. All processes must call it.

    Raises UserError if a weight is not finite, or if the file cannot be written; the checkpoints before it stay.
    """
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(f"{name} holds numbers that are not finite after step {progress['step']}, so no checkpoint was written; "
                            "lower learning_rate or hidden_learning_rate and go on with --resume")
    states = [optimizer.state_dict() for optimizer in optimizers]
    if rank() == 0:
        folder = log.folder / "checkpoints"
        checkpoint = dict(config=dataclasses.asdict(config), code_sha256=code_sha256(), model=model.state_dict(), optimizers=states,
                          progress=progress, rng=torch.get_rng_state())
        content = io.BytesIO()  # torch.save would report a full disk in words of its own
        torch.save(checkpoint, content)
        write_atomically(folder / f"step_{progress['step']:06d}.pt", content.getbuffer())
        for old in sorted(folder.glob("step_*.pt"))[:-2]:
            old.unlink()


def find_checkpoint(config):
    """The loaded checkpoint that config.resume names and the folder of its run, or (None, None) where `auto` finds none."""
    path = Path(config.log_dir, config.run_name) if config.resume == "auto" else Path(config.resume)
    candidates = [path] if path.is_file() else sorted(path.glob("checkpoints/step_*.pt"), reverse=True)
    for candidate in candidates:
        try:
            checkpoint = torch.load(candidate, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever the bytes make it raise
            print(f"warning: {candidate} cannot be loaded ({type(error).__name__}), looking for an older one", file=sys.stderr)
            continue
        check_checkpoint(checkpoint, candidate, config)
        return checkpoint, candidate.resolve().parent.parent
    if config.resume == "auto" and not candidates:
        return None, None
    raise UserError(f"resume = '{config.resume}': no checkpoint there that can be loaded; "
                    "name a step_*.pt file or the folder of a run that has one")


def check_checkpoint(checkpoint, path, config):
    """Raises UserError, naming the difference, unless this code with `config` would have come to this checkpoint."""
    if not isinstance(checkpoint, dict) or "code_sha256" not in checkpoint or path.resolve().parent.name != "checkpoints":
        raise UserError(f"{path}: not a checkpoint of train_gpt2.py in the checkpoints/ of its run's folder")
    if checkpoint["code_sha256"] != code_sha256():
        raise UserError(f"{path} was written by another version of train_gpt2.py (SHA-256 {checkpoint['code_sha256'][:12]}, this one is "
                        f"{code_sha256()[:12]}); go on with the train_gpt2.py in the run's folder")
    for name, value in dataclasses.asdict(config).items():
        theirs = checkpoint["config"][name]
        if name not in FREE_FIELDS and theirs != value:
            raise UserError(f"{path} is from a run with {name} = {theirs!r}, this one has {value!r}; give it --{name} {theirs}")


# ---------------------------------------------------------------------------------------------------------------------
# Logging


def describe_machine(device):
    """Facts about the software and hardware of this process."""
    def output(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=30).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, AttributeError):  # other systems, other processors
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, cuda=torch.version.cuda,
                platform=platform.platform(), cpu=cpu, cpu_threads=torch.get_num_threads(),
                gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
                git_commit=output("git", "rev-parse", "HEAD") or None, git_changes=bool(output("git", "status", "--porcelain", "-uno")),
                nvidia_smi=output("nvidia-smi") if device.type == "cuda" else "")


WANDB_SECONDS = 60


class Log:
    """The folder of a run, its files and the terminal. On processes other than 0 every method does nothing."""

    def __init__(self, config, checkpoint, folder):
        """Opens `folder` to go on from `checkpoint`, or a new folder for a new run. Raises UserError if it cannot be written."""
        self.config, self.folder, self.files, self.live, self.for_wandb = config, folder, {}, sys.stdout.isatty(), queue.SimpleQueue()
        self.resumed = checkpoint is not None
        if rank() != 0:
            return
        if checkpoint and config.run_name not in ("", folder.name):
            raise UserError(f"resume = '{config.resume}' goes on in {folder}, so run_name = '{config.run_name}' cannot be; leave it out")
        if not checkpoint:
            self.folder = Path(config.log_dir, config.run_name or time.strftime("%Y%m%d-%H%M%S_") + config.optimizer.replace(":", "-"))
            if config.resume != "auto" and ((self.folder / "log.txt").exists() or any(self.folder.glob("checkpoints/step_*.pt"))):
                raise UserError(f"{self.folder} already holds a run; take another run_name, or go on with that run by --resume auto")
        try:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            for name in ("log.txt", "metrics.jsonl"):
                self.files[name] = open(self.folder / name, "a" if checkpoint else "w", buffering=1, encoding="utf-8")
                if checkpoint:  # what was logged after the checkpoint will be logged again
                    size = os.path.getsize(self.folder / name)
                    self.files[name].truncate(min(size, checkpoint["progress"]["log_bytes"][name]))
            for path in self.folder.glob("checkpoints/step_*.pt") if checkpoint else ():  # and what was saved after it, saved again
                if int(path.stem[5:]) > checkpoint["progress"]["step"]:
                    path.unlink()
            if Path(__file__).resolve() != (self.folder / "train_gpt2.py").resolve():
                shutil.copyfile(__file__, self.folder / "train_gpt2.py")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another --log_dir") from None

    def begin(self, facts, optimizer):
        """Starts log.txt with code and machine, writes run.json with the `facts`, and starts wandb if it is asked for.

        Of an `optimizer` given as module:Class the source file is kept too, as optimizer.py, and its SHA-256 in the facts.
        """
        source = inspect.getsourcefile(type(optimizer)) if ":" in self.config.optimizer else None
        facts["optimizer_sha256"] = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else None
        self.facts = {**facts, "start": now(), "resumed": []}
        if self.resumed:  # what the run started with stays, as in log.txt
            earlier = json.loads((self.folder / "run.json").read_text())
            self.facts = {name: earlier[name] for name in self.facts}
            self.facts["resumed"].append(dict(time=now(), **{name: facts[name] for name in ("config", "machine", "world_size")}))
        else:
            machine = dict(facts["machine"])
            nvidia_smi = machine.pop("nvidia_smi")
            machine = json.dumps(machine, indent=1) + "\n" + nvidia_smi
            for part in (Path(__file__).read_text(), machine, json.dumps(facts["config"], indent=1)):
                self.write("log.txt", part.rstrip() + "\n" + "=" * 100)
            if source:
                shutil.copyfile(source, self.folder / "optimizer.py")
        self.write_facts()
        if self.config.wandb_project:
            self.wandb = threading.Thread(target=self.log_to_wandb, daemon=True)
            self.wandb.start()

    def log_to_wandb(self):
        """Sends the queue's records to wandb, on a thread of its own: what wandb raises, or waits for, neither ends nor slows the run."""
        try:
            import wandb
            run = wandb.init(project=self.config.wandb_project, name=self.folder.name, config=self.facts["config"], dir=str(self.folder))
            for record in iter(self.for_wandb.get, None):
                run.log(record, step=record["step"])
            run.finish()
        except Exception as error:
            print(f"warning: wandb failed ({type(error).__name__}: {error}); the run goes on without it", file=sys.stderr)

    def end(self, **facts):
        """Writes `facts` of the finished run, if it did finish, and gives wandb WANDB_SECONDS to send what it has."""
        if not self.files:
            return
        if facts:
            self.facts.update(facts, end=now())
            self.write_facts()
        if self.config.wandb_project:
            self.for_wandb.put(None)
            self.wandb.join(WANDB_SECONDS)
            if self.wandb.is_alive():
                print("warning: wandb does not come to an end; the run is complete without it", file=sys.stderr)

    def write_facts(self):
        write_atomically(self.folder / "run.json", json.dumps(self.facts, indent=1).encode())

    def write(self, name, text):
        try:
            self.files[name].write(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.folder / name}: {error.strerror}; free some space and go on with --resume",
                            local=True) from None

    def print(self, text):
        """A line for the terminal and log.txt."""
        if self.files:
            print(("\r\033[K" if self.live else "") + text, flush=True)
            self.write("log.txt", text)

    def measured(self, step, train_time, **values):
        """Logs a training or validation loss, the first of `values`, after `step` steps and train_time seconds of training."""
        if not self.files:
            return
        name, loss = next(iter(values.items()))
        text = (f"step:{step}/{self.config.num_iterations} {name}:{loss:.4f} train_time:{1000 * train_time:.0f}ms "
                f"step_avg:{1000 * train_time / step if step else math.nan:.2f}ms")
        if name == "val_loss":
            self.print(text)
        else:
            self.write("log.txt", text)
            if self.live and step:
                left = train_time / step * (self.config.num_iterations - step)
                print(f"\r\033[K{text} {left:.0f} s left", end="", flush=True)
        tokens = step * self.config.batch_size * self.config.sequence_length
        record = dict(step=step, **values, train_time_ms=round(1000 * train_time, 3), tokens=tokens)
        self.write("metrics.jsonl", json.dumps(record))
        if self.config.wandb_project:
            self.for_wandb.put(record)

    def sizes(self):
        """Bytes of each file, for a checkpoint."""
        for file in self.files.values():
            file.flush()
        return {name: os.path.getsize(self.folder / name) for name in self.files}


def now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# ---------------------------------------------------------------------------------------------------------------------
# main()


def accumulate(model, micro_batches, collect, dtype):
    """Adds the gradient of the mean loss of `micro_batches`, a list of (idx, targets), to the parameters' gradients.

    Returns the mean loss, a tensor, and with `collect` the grams of all inputs of this process. DDP averages the gradients
    over the processes during the last backward pass.
    """
    total, total_grams = 0.0, []
    for i, (idx, targets) in enumerate(micro_batches, start=1):
        last = i == len(micro_batches)
        with contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            with torch.autocast(idx.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss, grams = model(idx, targets, collect)
            (loss / len(micro_batches)).backward()
        total += loss.detach() / len(micro_batches)
        if collect:
            total_grams = [a.add_(b) for a, b in zip(total_grams, grams)] if total_grams else grams
    return total, total_grams


def evaluate(model, shards, config, device, dtype, size, signals):
    """Mean loss over exactly val_tokens tokens, in batches of `size` sequences, shared by all processes.

    None if `signals` came meanwhile.
    """
    total, mine = 0.0, range(rank(), config.val_tokens // config.sequence_length, world_size())
    # with torch.compile, use the graph of the training step: one without gradients would be a third to build
    with torch.set_grad_enabled(config.compile), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        batches = [list(mine[i:i + size]) for i in range(0, len(mine), size)]
        full = [numbers + [0] * (size - len(numbers)) for numbers in batches]  # the last batch is filled up
        for numbers, (idx, targets) in zip(batches, prefetched(shards, full, device)):
            if signals:
                break
            targets[len(numbers):] = -1  # and what fills it does not count
            loss = model(idx.to(device), targets.to(device))[0].detach()  # before the next pass: with a graph come its activations
            total += loss.double() * (len(numbers) * config.sequence_length)
    total, ended = all_sum(float(total), len(signals))
    return None if ended else total / config.val_tokens


def warm_up(model, raw, config, device, dtype, per_process):
    """Builds the graphs and the memory pools with steps on dummy data, and leaves the weights as they were.

    Returns the micro-batch: device_batch_size, or the largest power of two that divides per_process and fits.
    """
    size = config.device_batch_size
    if not size:
        tokens = 16384  # on a CPU larger micro-batches are no faster
        if device.type == "cuda":  # an upper bound: the bytes that a forward pass keeps for a token at the least
            tokens = torch.cuda.get_device_properties(device).total_memory // (6 * config.vocab_size + 40 * config.n_layer * config.n_embd)
        size = per_process & -per_process  # the largest power of two that divides it
        while size > 1 and size * config.sequence_length > tokens:
            size //= 2
    weights = {name: p.detach().cpu().clone() for name, p in raw.state_dict().items()}
    kinds = (False, True) if config.optimizer == "newton_muon" else (False,)  # with and without collecting the inputs
    while True:
        generator = torch.Generator().manual_seed(0)
        idx, targets = torch.randint(config.vocab_size, (2, size, config.sequence_length), generator=generator).to(device)
        fits, ballast = 1, None
        try:
            ballast = torch.empty(16 * raw.num_parameters(), dtype=torch.uint8, device=device)  # the optimizers' share, not yet there
            with model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext():
                for collect in kinds:
                    accumulate(model, [(idx, targets)] * 2, collect, dtype)
        except torch.OutOfMemoryError:
            fits = 0
        del ballast
        if all_sum(fits)[0] == world_size():
            break
        if config.device_batch_size or size == 1:
            raise UserError(f"a forward and backward pass of {size} sequences of {config.sequence_length} tokens does not fit into the "
                            f"memory of the GPU; set a smaller {'device_batch_size' if size > 1 else 'sequence_length or model'}")
        raw.zero_grad(set_to_none=True)
        torch.compiler.reset()
        torch.cuda.empty_cache()
        size //= 2
    optimizers = build_optimizers(raw, config)  # a second pair, thrown away after this
    for collect in (False, *kinds):  # at least twice: DDP arranges its buckets anew after the first
        _, grams = accumulate(model, [(idx, targets)], collect, dtype)
        if collect:
            optimizers[1].refresh(grams, idx.numel() * world_size())
        for optimizer in optimizers:
            optimizer.step()
    raw.zero_grad(set_to_none=True)
    raw.load_state_dict(weights)
    return size


def synchronized_time(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run(config):
    """One training run, in this process's part of it. Returns the exit code: 0, or 128 + the signal that ended it."""
    per_process = sequences_per_process(config, int(os.environ.get("WORLD_SIZE", 1)))
    device = start_processes(config)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" or config.dtype == "auto" and device.type == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU multiplies fp32: preconditioning and the second moments
    B, T, N = config.batch_size, config.sequence_length, config.num_iterations

    with together():
        train_shards = Shards(config.input_bin, T, config.vocab_size, config.allow_repeat, config.data_seed)
        train_shards.require(N * B, f"{N} steps of {B} sequences")
        val_shards = Shards(config.input_val_bin, T, config.vocab_size)
        val_shards.require(config.val_tokens // T, "validation")
        checkpoint, folder = find_checkpoint(config) if config.resume and rank() == 0 else (None, None)
    checkpoint = broadcast_object(checkpoint)

    torch.manual_seed(config.seed)
    raw = GPT(config).to(device)
    model = torch.compile(raw, dynamic=False) if config.compile else raw
    if world_size() > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    with together():
        optimizers = build_optimizers(raw, config)
    hidden = optimizers[1]
    with together():
        log = Log(config, checkpoint, folder)
    if rank() == 0:
        log.begin(dict(config=dataclasses.asdict(config), machine=describe_machine(device), world_size=world_size(), device=device.type,
                       dtype=str(dtype), code_sha256=code_sha256(), parameters=raw.num_parameters(),
                       hidden_parameters=sum(p.numel() for p in raw.hidden_matrices().values()), tokens_per_step=B * T,
                       train_shards=train_shards.describe(), val_shards=val_shards.describe()), hidden)
    size = warm_up(model, raw, config, device, dtype, per_process)

    start, train_time, best = 0, 0.0, math.inf
    if checkpoint:
        start, train_time, best = (checkpoint["progress"][key] for key in ("step", "train_time", "best_val_loss"))
        raw.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        torch.set_rng_state(checkpoint["rng"])
        log.print(f"resumed at step {start}")
    log.print(f"{config.optimizer}: {raw.num_parameters():,} parameters, {N} steps of {B * T:,} tokens, {world_size()} process(es) on "
              f"{device.type} with {size} of {per_process} sequences at a time, logs in {log.folder}")

    failures, data_wait, reached, signals = 0, 0.0, best <= config.target_val_loss, deferred_signals()
    offset = rank() * per_process
    batches = prefetched(train_shards, (range(step * B + offset, step * B + offset + per_process) for step in range(start, N)), device)
    clock = synchronized_time(device)
    for step in range(start, N + 1):
        last, stop = step == N, all_max(max(signals, default=0))  # a signal ends the run here, on all processes
        evaluates = not stop and (last or (config.val_loss_every and step % config.val_loss_every == 0))
        saves = last or stop or (config.save_every and step % config.save_every == 0)
        if evaluates or saves:
            train_time += synchronized_time(device) - clock
            # a checkpoint is of the moment before the evaluation, so that whoever goes on from it logs that once
            progress = dict(step=step, train_time=train_time, best_val_loss=best, log_bytes=log.sizes())
            if evaluates:
                val_loss = evaluate(model, val_shards, config, device, dtype, size, signals)
                if val_loss is None:
                    stop = all_max(max(signals, default=0))
                else:
                    log.measured(step, train_time, val_loss=val_loss)
                    if not math.isfinite(val_loss):
                        raise UserError(f"the validation loss is {val_loss} at step {step}; lower learning_rate or hidden_learning_rate")
                    best = min(best, val_loss)
                    if val_loss <= config.target_val_loss and not reached:
                        reached = True
                        log.print(f"target {config.target_val_loss} reached at step {step}, {train_time:.1f} s")
            ends = last or stop or (reached and config.stop_at_target)
            if step > start and (saves or ends):
                save_checkpoint(log, config, raw, optimizers, progress)
            if ends:
                break
            clock = synchronized_time(device)

        scale = learning_rate_scale(config, step)
        for optimizer, rate in zip(optimizers, (config.learning_rate, config.hidden_learning_rate)):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        collect = config.optimizer == "newton_muon" and (step + 1) % config.refresh_interval == 0
        before = time.perf_counter()
        batch = next(batches)
        data_wait += time.perf_counter() - before
        idx, targets = (t.to(device, non_blocking=True).split(size) for t in batch)
        loss, grams = accumulate(model, list(zip(idx, targets)), collect, dtype)
        if collect:
            hidden.refresh(grams, B * T)
        for optimizer in optimizers:
            optimizer.step()
        raw.zero_grad(set_to_none=True)
        if (step + 1) % config.log_every == 0 or step + 1 == N:
            everyone = all_gather(torch.tensor([float(loss), float(getattr(hidden, "failures", 0))], dtype=torch.float64))
            loss, failed = everyone[:, 0].mean().item(), everyone[:, 1].sum().item()
            log.measured(step + 1, train_time + time.perf_counter() - clock, train_loss=loss, learning_rate_scale=scale,
                         data_wait_ms=round(1000 * data_wait, 3),
                         **({"failed_factorisations": int(failed)} if config.optimizer == "newton_muon" else {}))
            if failed > failures:
                log.print(f"warning: {int(failed - failures)} factorisations failed up to step {step + 1}; "
                          "those blocks keep their last preconditioner")
                failures = failed
            data_wait = 0.0
            if not math.isfinite(loss):
                bad = [str(r) for r, value in enumerate(everyone[:, 0].tolist()) if not math.isfinite(value)]
                where = f" on process {', '.join(bad)}" if world_size() > 1 else ""
                raise UserError(f"the training loss is {loss} at step {step + 1}{where}; lower learning_rate or hidden_learning_rate")
    if stop:
        log.print(f"stopped by {signal.Signals(stop).name} after step {step}" + (f"; go on with --resume {log.folder}" if step else ""))
        log.end()
    else:
        log.end(final_val_loss=val_loss, best_val_loss=best, train_time_ms=1000 * train_time, steps=step)
    all_max(0)  # no process leaves before all have come here
    return 128 + stop if stop else 0


def main():
    message = ""
    try:
        code = run(load_config(sys.argv[1:]))
    except KeyboardInterrupt:  # before the first step; later, deferred_signals() has them
        message, code = "interrupted", 130
    except UserError as error:
        message, code = f"process {rank()}: {error}" if error.local and world_size() > 1 else str(error), 1
        if not error.local and os.environ.get("RANK", "0") != "0":  # process 0 says it; torchrun ends it as soon as another leaves
            time.sleep(5)
            message = ""
    except torch.OutOfMemoryError as error:
        message, code = f"{str(error).splitlines()[0]} Set a smaller device_batch_size.", 1
    except OSError as error:
        message, code = str(error), 1
    except RuntimeError as error:
        if world_size() == 1 or not re.search("gloo|nccl|connection|timed out", str(error), re.IGNORECASE):
            raise
        message, code = f"process {rank()}: {what_failed(error)}", 1
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if world_size() > 1:
        sys.stdout.flush()
        os._exit(code)  # at once: the end of a process group can wait for others that are gone, or abort after all was done
    sys.exit(code)


if __name__ == "__main__":
    main()
