"""Trains GPT-2 124M to a loss of 3.28 on FineWeb, or a small model on a laptop in a minute.

    python train_gpt2.py configs/cpu_muon.toml --num_iterations 300               one process, CPU or GPU
    torchrun --nproc_per_node 8 train_gpt2.py configs/speedrun_newton_muon.toml   eight GPUs

The hidden matrices are trained by AdamW, Muon, Newton-Muon (arXiv:2604.01472), SGD or an optimizer of
your own. Model and defaults are those of record 4 of the Modded-NanoGPT speedrun (2024-10-10), which took
22 minutes on 8 H100s, and takes 2 hours on one. A run writes into LOG_DIR/RUN_NAME/

    log.txt          this code, the machine, the losses
    metrics.jsonl    the losses as JSON
    run.json         configuration, versions, hashes, results
    train_gpt2.py    this file
    checkpoints/

Times are training time: validation, checkpoints and the warm-up that compiles the model do not count.
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import fcntl
import fnmatch
import glob
import hashlib
import inspect
import io
import json
import math
import os
import pkgutil
import platform
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import chain, pairwise
from pathlib import Path

# before torch starts its CPU threads: how long they spin before they yield the core
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

try:  # comes with torch's CUDA build
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# ---- Configuration -------------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can fix: one sentence, which main() prints before it exits with 1."""


@dataclasses.dataclass
class Config:
    """One run: these defaults < TOML file < command line.

    A field's comment is its --help text. It may go on in a comment on the next line.
    """

    # data
    input_bin: str = "data/fineweb10B/fineweb_train_*.bin"  # training shards: glob, read in order of name
    input_val_bin: str = "data/fineweb10B/fineweb_val_*.bin"  # validation shards: glob
    batch_size: int = 512  # sequences in one optimizer step, over all processes
    device_batch_size: int = 0  # sequences in a forward pass; 0: what fits the GPU (on a CPU 16384 tokens)
    sequence_length: int = 1024  # tokens in a sequence
    allow_repeat: bool = False  # start over when the shards are used up, instead of refusing to start
    data_seed: int = 0  # order of the training sequences; 0: as in the files, else all shuffled by this seed

    # schedule
    num_iterations: int = 6200  # optimizer steps
    warmup_iters: int = 0  # steps over which the learning rates rise linearly
    warmdown_iters: int = 1800  # steps at the end over which the learning rates fall linearly to 0
    val_loss_every: int = 125  # steps between evaluations; 0: only at the end
    val_tokens: int = 10485760  # tokens of an evaluation: the first ones of the validation shards
    target_val_loss: float = 3.28  # the log says when an evaluation first reaches this loss
    stop_at_target: bool = False  # end the run when an evaluation reaches target_val_loss

    # model
    model: str = "gpt"  # gpt, or module:Class of one with the methods of GPT in this file
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width
    vocab_size: int = 50257  # tokens that can be predicted (the table has a multiple of 128 rows)

    # optimizer of the hidden matrices; the tied embedding and head always has AdamW
    optimizer: str = "muon"  # adamw, muon, newton_muon, sgd, or module:Class of any torch.optim.Optimizer
    learning_rate: float = 0.0036  # AdamW learning rate of the tied embedding and head
    hidden_learning_rate: float = 0.00036  # that of the hidden matrices; for Muon about the RMS of an update
    weight_decay: float = 0.0  # weight decay of the hidden matrices; decoupled, except for sgd
    beta1: float = 0.9  # AdamW's decay of the mean of the gradients
    beta2: float = 0.95  # AdamW's decay of the mean of the squared gradients
    momentum: float = 0.95  # momentum of muon, newton_muon and sgd
    nesterov: bool = True  # Nesterov momentum for muon, newton_muon and sgd
    ns_steps: int = 5  # Newton-Schulz iterations of muon and newton_muon
    refresh_interval: int = 32  # newton_muon: steps between refreshes of the preconditioner
    ewma: float = 0.95  # newton_muon: weight of the past in the second moment of the inputs
    ridge: float = 0.2  # newton_muon: ridge, relative to the mean eigenvalue of the second moment
    optimizer_args: str = "{}"  # further arguments of the optimizer, as a JSON object
    groups: str = "{}"  # settings by parameter name, as a JSON object: {"h.*.c_fc.weight": {"lr": 0.001}}

    # machine
    seed: int = 0  # seed of the initial weights
    device: str = "auto"  # cuda, cpu, or auto: cuda if there is a GPU
    dtype: str = "auto"  # of matrix products: float32, bfloat16, or auto: bfloat16 if the GPU has it
    compile: bool = False  # use torch.compile
    collective_timeout: int = 600  # seconds that a process waits for the others before it ends the job

    # output
    log_dir: str = "logs"  # folder of the runs
    run_name: str = ""  # folder of this run in log_dir; empty: named after the time and the optimizer
    log_every: int = 10  # steps between training losses in the log; one that is not finite ends the run
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    resume: str = ""  # checkpoint or folder of a run; auto: the newest checkpoint of run_name, if it has one
    wandb_project: str = ""  # also log to this Weights & Biases project


# settings of the configuration and of Muon: {names: (lowest value, what they must be below)}
RANGES = {
    "batch_size sequence_length num_iterations val_tokens n_layer n_head n_embd ns_steps refresh_interval "
    "collective_timeout log_every": (1, 2 ** 32),
    "device_batch_size warmup_iters warmdown_iters val_loss_every save_every seed data_seed": (0, 2 ** 32),
    "vocab_size": (1, 2 ** 16 + 1),  # shards hold 16-bit tokens
    "learning_rate hidden_learning_rate lr weight_decay": (0, 1e38),
    "beta1 beta2 momentum ewma": (0, 1),
    "ridge": (1e-38, 1e38),
    "target_val_loss": (-1e6, 1e6),
}


def out_of_range(settings):
    """A sentence on the first of `settings`, {name: value}, that is outside its range, or None."""
    for names, (low, end) in RANGES.items():
        for name in names.split():
            if name in settings and not low <= settings[name] < end:
                return f"{name} = {settings[name]!r}: must be at least {low:,} and below {end:,}"


def check_config(c):
    """UserError for a value that is out of range, whatever the data and the machine."""
    def require(valid, names, must):
        if not valid:
            values = [f"{name} = {getattr(c, name)!r}" for name in names.split()]
            raise UserError(f"{', '.join(values)}: must be {must}")

    if wrong := out_of_range(vars(c)):
        raise UserError(wrong)
    require(c.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda")
    require(c.dtype in ("auto", "float32", "bfloat16"), "dtype", "auto, float32 or bfloat16")
    require(c.warmup_iters + c.warmdown_iters <= c.num_iterations,
            "warmup_iters warmdown_iters num_iterations", "such that both fit into the run")
    require(c.n_embd % (2 * c.n_head) == 0, "n_embd n_head",
            "such that n_embd / n_head is even (rotary embeddings turn pairs)")
    require(c.val_tokens % c.sequence_length == 0, "val_tokens sequence_length",
            "such that sequence_length divides val_tokens")
    require(Path(c.run_name).name == c.run_name != "..", "run_name",
            "a folder name; log_dir is the path above it")
    require(c.resume != "auto" or c.run_name, "resume run_name", "given together: auto needs a run_name")

    own = re.fullmatch(r"[\w.]+:\w+", c.optimizer)
    require(own or c.optimizer in OPTIMIZERS, "optimizer", f"{', '.join(OPTIMIZERS)} or module:Class")
    require(not own or c.weight_decay == 0, "weight_decay optimizer",
            "0 for a module:Class, whose own goes into optimizer_args")


def nearest(name, names):
    return difflib.get_close_matches(name, names, n=1, cutoff=0)[0]


def read_toml(path):
    """Fields in the TOML file at `path`. UserError for an unknown key or a value of the wrong type."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}; "
                        "configs/ has some to start from")
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError
        raise UserError(f"{path} is not valid TOML: {error}")
    types = Config.__annotations__
    for key, value in values.items():
        if key not in types:
            raise UserError(f"{path}: unknown key '{key}'; the nearest valid one is '{nearest(key, types)}'")
        wanted = types[key]
        if wanted is float and type(value) is int and abs(value) < 2 ** 63:
            values[key] = float(value)
        elif type(value) is not wanted:
            raise UserError(f"{path}: {key} = {value!r} is a {type(value).__name__}, not a {wanted.__name__}")
        if "\0" in str(value):
            raise UserError(f"{path}: {key} = {value!r} has a NUL byte; remove it")
    return values


def boolean(text):
    return ("false", "true").index(text.lower()) == 1


def load_config(argv):
    """Config from the command line `argv`: CONFIG.toml [--field value ...]. Usage errors exit with 2."""
    parser = argparse.ArgumentParser(usage="[torchrun ...] train_gpt2.py CONFIG.toml [--field value ...]",
                                     description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="CONFIG.toml, for example configs/cpu_muon.toml")
    comments = re.findall(r"(\w+): \w+ = .*?  # (.*(?:\n    # .*)*)\n", Path(__file__).read_text())
    helps = {name: text.replace("\n    #", "") for name, text in comments}
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", type=boolean if field.type is bool else field.type,
                            metavar=field.type.__name__, default=argparse.SUPPRESS,
                            help=f"{helps.get(field.name)} (default: {json.dumps(field.default)})")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = nearest(unknown[0], [f"--{name}" for name in Config.__annotations__])
        parser.error(f"unknown argument '{unknown[0]}'; the nearest valid one is '{near}' (--help lists all)")
    given = vars(args)
    config = Config(**read_toml(given.pop("config")) | given)
    check_config(config)
    return config


def sequences_per_process(config, world):
    """Sequences of one process in a step. UserError unless they can be shared evenly."""
    if config.batch_size % world:
        raise UserError(f"batch_size = {config.batch_size} cannot be split over {world} processes; "
                        "set a multiple of their number, or start fewer")
    per_process = config.batch_size // world
    if per_process % (config.device_batch_size or 1):
        raise UserError(f"device_batch_size = {config.device_batch_size}: must divide the {per_process} "
                        f"sequences that each of {world} processes has in a step")
    return per_process


def learning_rate_scale(config, step):
    """Factor on all learning rates in step `step`, from 0: linear rise, constant, linear fall to 0."""
    rise = (step + 1) / max(1, config.warmup_iters)
    fall = (config.num_iterations - step) / max(1, config.warmdown_iters)
    return min(1.0, rise, fall)


# ---- Token shards: 256 little-endian int32 (magic, version, tokens, 0 ...), then uint16 tokens ----

HEADER_BYTES = 1024
MAGIC = 20240520
VERSION = 1


def open_shard(path):
    """Memory-mapped tokens of the shard at `path`: (n,) uint16. UserError if it is missing or damaged."""
    def refuse(what):
        raise UserError(f"{path}: {what}; make it again with the script in data/ that made it")

    try:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait forever
            raise OSError("it is not a regular file")
        header = np.fromfile(path, "<i4", 3).tolist()
        size = os.path.getsize(path)
    except (OSError, ValueError) as error:
        refuse(f"cannot be read ({getattr(error, 'strerror', None) or error})")
    if size < HEADER_BYTES or header[0] != MAGIC:
        refuse(f"not a token shard (it should start with {MAGIC})")
    _, version, n = header
    if version != VERSION:
        refuse(f"shard version {version}, this code reads version {VERSION}")
    expected = HEADER_BYTES + 2 * n
    if size != expected:
        refuse(f"damaged: {size:,} bytes, but its header says {n:,} tokens, which is {expected:,} bytes")
    return np.memmap(path, "<u2", "r")[HEADER_BYTES // 2:]


class Shards:
    """All shards that match a glob pattern, cut into sequences.

    Sequence i is sequence_length tokens and the one after them; sequences follow each other in a shard,
    shards in order of name, and no sequence spans two shards. Step t of a run trains on sequences
    t * batch_size to (t + 1) * batch_size - 1, however many processes share them. A data_seed above 0
    numbers the sequences in another order. A shard is mapped only while a batch is read.
    """

    def __init__(self, pattern, sequence_length, vocab_size, allow_repeat=False, data_seed=0):
        self.pattern = pattern
        self.T = sequence_length
        self.vocab_size = vocab_size
        self.allow_repeat = allow_repeat
        # a folder's name may have brackets
        self.paths = sorted(glob.glob(pattern) or glob.glob(pattern.replace("[", "[[]")))
        if not self.paths:
            raise UserError(f"no file matches '{pattern}' from {os.getcwd()}; "
                            "data/fineweb.py, data/shakespeare.py and data/tokenize_text.py make shards")
        self.lengths = [len(open_shard(path)) for path in self.paths]  # in tokens
        self.starts = np.cumsum([0] + [max(0, n - 1) // self.T for n in self.lengths])  # in sequences
        self.count = int(self.starts[-1])
        self.order = range(self.count)
        if data_seed:  # numpy never changes what RandomState gives
            self.order = np.random.RandomState(data_seed).permutation(self.count)

    def require(self, sequences, what, less):
        """UserError unless there are `sequences` sequences for `what`, which can also be set to `less`."""
        if self.count >= sequences or (self.allow_repeat and self.count):
            return
        missing = "longer shards"
        if largest := max(np.diff(self.starts)):
            missing = f"{math.ceil((sequences - self.count) / largest)} more shards like the largest one"
        raise UserError(f"'{self.pattern}' holds {self.count * self.T:,} tokens in sequences of {self.T}, "
                        f"{what} needs {sequences * self.T:,}: add {missing}, or set {less}")

    def describe(self):
        """For run.json: of each shard name, tokens and SHA-256 of the first MiB."""
        return [dict(name=os.path.basename(path), tokens=n,
                     sha256_of_first_mebibyte=sha256(np.fromfile(path, "u1", 2 ** 20)))
                for path, n in zip(self.paths, self.lengths)]

    def batch(self, sequences):
        """Inputs and targets of these sequences, each (len(sequences), T) int64.

        UserError for a shard that has changed, or a token out of range.
        """
        rows = np.empty((len(sequences), self.T + 1), dtype=np.int64)
        opened = None
        for row, i in zip(rows, sequences):
            i = self.order[i % self.count]
            shard = np.searchsorted(self.starts, i, side="right") - 1
            start = (i - self.starts[shard]) * self.T
            path = self.paths[shard]
            if shard != opened:
                tokens = open_shard(path)
                opened = shard
                if len(tokens) != self.lengths[shard]:
                    raise UserError(f"{path}: had {self.lengths[shard]:,} tokens at first, "
                                    f"now {len(tokens):,}; restore it")
            row[:] = tokens[start:start + self.T + 1]
            if row.max() >= self.vocab_size:
                raise UserError(f"{path}: token {row.max()} after position {start} is outside vocab_size = "
                                f"{self.vocab_size}; use that of the tokenizer that made it")
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def prefetched(shards, batches, device):
    """Yields shards.batch(sequences) for each of `batches`, read one ahead; in pinned memory for a GPU."""
    def read(sequences):
        batch = shards.batch(sequences)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread is on GPU 0, whatever the GPU of its process
            batch = [t.pin_memory() for t in batch]
        return batch

    with ThreadPoolExecutor(1) as thread:
        futures = (thread.submit(read, sequences) for sequences in batches)
        for current, _ in pairwise(chain(futures, [None])):  # the next is read meanwhile
            yield current.result()


# ---- Model: GPT-2 with RMSNorm and rotary embeddings, without biases and learned norm gains ------

def rotate(x, cos, sin):
    """Rotary embedding of x (B, T, n_head, D): element i turns with element i + D / 2. Tables (T, 1, D)."""
    z = x.float()
    swapped = z.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (z * cos + swapped * sin).type_as(x)


def on_gpu(x):
    return x.is_cuda  # a function, so that tests can send CPU tensors that way


def matmul_dtype(x):
    """The type to which autocast turns x before a matrix product."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6).to(matmul_dtype(x))


@torch.no_grad()
def gram(z, n):
    """Z Z^T of the layer inputs z (..., b * n), summed over tokens in fp32, of each slice: (b, n, n)."""
    z = z.detach().to(matmul_dtype(z)).reshape(-1, z.size(-1) // n, n).transpose(0, 1)  # (b, tokens, n)
    if on_gpu(z) and z.dtype != torch.float32:
        return torch.bmm(z.mT, z, out_dtype=torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        return z.float().mT @ z.float()


class Block(nn.Module):
    def __init__(self, config, name):
        super().__init__()
        C = config.n_embd
        self.name = name
        self.n_head = config.n_head
        self.attn_scale = 1 / math.sqrt(2 * config.n_layer)
        self.c_attn = nn.Linear(C, 3 * C, bias=False)
        self.attn_proj = nn.Linear(C, C, bias=False)
        self.c_fc = nn.Linear(C, 4 * C, bias=False)
        self.mlp_proj = nn.Linear(4 * C, C, bias=False)

    def forward(self, x, cos, sin, grams):
        """x (B, T, C) after this block. Sets the values of `grams`, {name of a weight: its gram}."""
        B, T, C = x.size()
        z = norm(x)
        q, k, v = self.c_attn(z).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # (B, T, n_head, D)
        q = rotate(q, cos, sin).transpose(1, 2)
        k = rotate(k, cos, sin).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)  # (B, n_head, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x.add(self.attn_proj(y), alpha=self.attn_scale)
        u = norm(x)
        h = F.gelu(self.c_fc(u))  # (B, T, 4 C)
        for layer, inputs in dict(c_attn=z, attn_proj=y, c_fc=u, mlp_proj=h).items():
            name = f"{self.name}.{layer}.weight"
            if name in grams:
                grams[name] = gram(inputs, C)
        return x + self.mlp_proj(h)


class GPT(nn.Module):
    """The trainer's model. Another, model = module:Class, is made from the Config, too, and has forward(),
    logits(), hidden_matrices(), num_parameters() and fused_loss, set to False where kernels do not compile.
    AdamW trains all but the hidden matrices. A subclass with its own features() will do."""

    def __init__(self, config):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.fused_loss = bool(triton)  # on a GPU
        rows = math.ceil(config.vocab_size / 128) * 128  # those added are neither looked up nor predicted
        self.wte = nn.Embedding(rows, config.n_embd)
        self.h = nn.ModuleList(Block(config, f"h.{i}") for i in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        self.wte.weight = self.lm_head.weight
        D = config.n_embd // config.n_head
        frequencies = 10000.0 ** (-torch.arange(0, D, 2) / D)
        frequencies = torch.cat((frequencies, -frequencies))  # of an element and its partner
        angles = torch.outer(torch.arange(config.sequence_length), frequencies).unsqueeze(1)  # (T, 1, D)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def features(self, idx, collect=()):
        """Input (B, T, C) of the head for tokens `idx` (B, T), and the grams of forward()."""
        T = idx.size(1)
        grams = dict.fromkeys(collect)
        x = self.wte(idx)
        for block in self.h:
            x = block(x, self.cos[:T], self.sin[:T], grams)
        return norm(x), list(grams.values())

    def logits(self, idx):
        """Logits (B, T, vocab_size) fp32 for tokens `idx` (B, T)."""
        x, _ = self.features(idx)
        return self.lm_head(x)[..., :self.vocab_size].float()

    def forward(self, idx, targets, collect=()):
        """(mean cross-entropy of `targets` (B, T), ignoring -1, given the tokens `idx` (B, T); grams: Z Z^T
        of the inputs of each of the hidden matrices whose names are in `collect`)."""
        x, grams = self.features(idx, collect)
        targets = targets.flatten()
        if self.fused_loss and on_gpu(x):
            x = x.flatten(0, 1).to(matmul_dtype(x))
            loss = head_loss(x, self.lm_head.weight, targets, self.vocab_size)[0]
        else:
            logits = self.lm_head(x)[..., :self.vocab_size].float()
            loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1)
        return loss, grams

    def hidden_matrices(self):
        """{name: weight} of the matrices in the blocks."""
        return {name: p for name, p in self.named_parameters() if name.startswith("h.")}

    def num_parameters(self):
        """Parameters, without the rows that pad the table."""
        return sum(p.numel() for p in self.parameters()) - self.lm_head.weight[self.vocab_size:].numel()


def make_model(config):
    """The model that the configuration names. UserError if it cannot be made."""
    if config.model == "gpt":
        return GPT(config)
    try:
        return pkgutil.resolve_name(config.model)(config)
    except Exception as error:  # whatever somebody else's code raises
        raise UserError(f"model = '{config.model}' cannot be made ({type(error).__name__}: {error}); "
                        "it must be gpt or module:Class")


# ---- Loss on a GPU: head and cross-entropy by chunks of tokens, with their gradients -------------

CHUNK = 16384  # tokens; the logits of all tokens are never in memory together

if triton:
    @triton.jit
    def load_logits(logits, columns, mask, vocab_size, cap):
        """y = x / sqrt(1 + (x / cap)^2) of x = logits[columns], or x without a cap; y / ln 2, since exp2 and
        log2 are what the hardware has, -inf in the padding, where a mask would split wide loads; dy / dx."""
        x = tl.load(logits + columns, mask=mask, other=0.0).to(tl.float32)
        r = tl.rsqrt(1 + x * x / (cap * cap)) if cap > 0 else 1.0
        y = x * r
        return y, tl.where(columns < vocab_size, y * 1.4426950408889634, -float("inf")), r * r * r

    @triton.jit
    def cross_entropy_kernel(logits, targets, losses, scale, vocab_size: tl.constexpr, stride: tl.constexpr,
                             cap: tl.constexpr, BLOCK: tl.constexpr):
        """One program per row x of `logits`, whose columns from vocab_size on are padding, with y as above:

            losses <- logsumexp(y) - y[target], 0 for a target of -1
            row    <- scale (softmax(y) - onehot(target)) dy / dx, 0 for a target of -1 and in the padding
        """
        row = tl.program_id(0)
        logits += row.to(tl.int64) * stride
        target = tl.load(targets + row).to(tl.int32)
        counts = target >= 0
        at_target = load_logits(logits, target, counts, vocab_size, cap)[0]
        scale = tl.where(counts, tl.load(scale), 0.0)

        # 1. the running maximum, and the sums of exponentials relative to it
        top = -float("inf")
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = load_logits(logits, columns, columns < stride, vocab_size, cap)[1]
            higher = tl.maximum(top, tl.max(x))
            total = total * tl.exp2(top - higher) + tl.exp2(x - higher)
            top = higher
        lse = top + tl.log2(tl.sum(total))
        tl.store(losses + row, tl.where(counts, lse / 1.4426950408889634 - at_target, 0.0))

        # 2. the gradient, in place of the logits
        for start in range(0, stride, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            _, x, slope = load_logits(logits, columns, columns < stride, vocab_size, cap)
            p = tl.exp2(x - lse)
            gradient = scale * tl.where(columns == target, p - 1.0, p) * slope
            tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < stride)


@torch.library.custom_op("train_gpt2::head_loss", mutates_args=())
def head_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, cap: float = 0.0,
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, d loss / d x, d loss / d weight in fp32): the mean cross-entropy of `targets` (N,), ignoring -1,
    under the first vocab_size logits of x weight^T, x (N, C) and weight (rows, C). cap: 0, or a soft cap."""
    table = weight.to(x.dtype)
    scale = 1 / (targets >= 0).sum()
    losses = torch.empty(len(x), device=x.device)
    dx = torch.empty_like(x)
    dweight = torch.zeros(weight.shape, device=x.device)
    fp32_sums = {} if x.dtype == torch.float32 else dict(out_dtype=torch.float32)
    for x_, dx_, targets_, losses_ in zip(*(t.split(CHUNK) for t in (x, dx, targets, losses))):
        logits = x_ @ table.mT
        cross_entropy_kernel[(len(logits),)](logits, targets_, losses_, scale, vocab_size, logits.stride(0),
                                             cap, BLOCK=4096, num_warps=8)
        # the kernel has left their gradient in the logits
        torch.mm(logits, table, out=dx_)
        torch.addmm(dweight, logits.mT, x_, out=dweight, **fp32_sums)
    return losses.sum() * scale, dx, dweight


@head_loss.register_fake
def head_loss_shapes(x, weight, *_):
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight)


def save_gradients(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros for the gradients of dx and dweight
    ctx.save_for_backward(*output[1:])


def scale_gradients(ctx, gradient, *_):
    return *(gradient * saved for saved in ctx.saved_tensors), None, None, None


head_loss.register_autograd(scale_gradients, setup_context=save_gradients)


# ---- Optimizers ----------------------------------------------------------------------------------

def fast_dtype(device, otherwise=torch.float32):
    """bfloat16 on GPUs that multiply it."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return otherwise


def newton_schulz(U, steps=5):
    """Nearly the orthogonal factor of each matrix in U (..., m, n): W V^T of its SVD W S V^T.

        X = U / (||U||_F + 1e-7)
        steps times: A = X X^T,  X <- a X + (b A + c A A) X

    The coefficients trade accuracy for speed: singular values end between about 0.7 and 1.2
    (K. Jordan et al., Muon, 2024). bf16 on GPUs that have it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = U.to(fast_dtype(U.device, U.dtype)).reshape(-1, *U.shape[-2:])
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    if tall:
        X = X.mT
    return X.reshape(U.shape)


def as_blocks(W):
    """View of W (m, n) as the blocks to orthogonalise: (3, n, n) for a fused q, k, v, else (1, m, n)."""
    m, n = W.shape
    return W.view(3, n, n) if m == 3 * n else W.unsqueeze(0)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (K. Jordan et al., Muon, 2024).

    For each matrix W (m, n) with gradient G:

        M <- momentum M + G
        U =  G + momentum M  (Nesterov), or M
        W <- (1 - lr weight_decay) W - lr sqrt(max(m, n)) newton_schulz(U)

    so that lr is about the root-mean-square of an element's update. A matrix with m = 3 n is taken for a
    fused q, k, v, whose three n x n blocks are orthogonalised separately, with sqrt(n). ValueError for a
    setting out of range, or a parameter that is not a matrix.

    With several processes each matrix has one owner, which alone keeps its state and orthogonalises its
    momentum; one all-gather shares the updates, bf16 on CUDA, else fp32. Gradients must be the same on all
    processes, as DDP leaves them.
    """

    def __init__(self, params, lr=3.6e-4, momentum=0.95, nesterov=True, ns_steps=5, weight_decay=0.0,
                 more={}):  # the settings of a subclass
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps,
                                      weight_decay=weight_decay, **more))
        for group in self.param_groups:
            if wrong := out_of_range(group):
                raise ValueError(wrong)
        self.matrices = [p for group in self.param_groups for p in group["params"]]
        for p in self.matrices:
            if p.ndim != 2:
                raise ValueError(f"a parameter of shape {tuple(p.shape)}: "
                                 f"{type(self).__name__} updates matrices only")

        # the owner of each matrix, the most costly first: the process with the least work so far, in whose
        # row of `updates` its update follows those before
        self.owner = {}
        work = [0] * world_size()
        place = {}
        ends = [0] * world_size()
        for p in sorted(self.matrices, key=self.cost, reverse=True):
            owner = self.owner[p] = work.index(min(work))
            work[owner] += self.cost(p)
            place[p] = owner, slice(ends[owner], ends[owner] + p.numel())
            ends[owner] += p.numel()
        self.updates = torch.zeros(world_size(), max(ends), dtype=fast_dtype(p.device, p.dtype),
                                   device=p.device)
        self.update = {p: self.updates[place[p]].view_as(p) for p in self.matrices}

    def cost(self, p):
        """FLOPs of a Newton-Schulz iteration on matrix p: X X^T, A A and B X."""
        blocks, m, n = as_blocks(p).shape
        return 2 * blocks * min(m, n) ** 2 * (2 * max(m, n) + min(m, n))

    @torch.no_grad()
    def step(self):
        # 1. compute the updates of this process's own matrices
        for group in self.param_groups:
            if mine := [p for p in group["params"] if p.grad is not None and self.owner[p] == rank()]:
                self.compute_updates(mine, group)
        # 2. gather those of the other processes
        gather_rows(self.updates)
        # 3. apply them all
        for group in self.param_groups:
            if changed := [p for p in group["params"] if p.grad is not None]:
                if group["weight_decay"]:
                    torch._foreach_mul_(changed, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(changed, [self.update[p] for p in changed], alpha=-group["lr"])

    def compute_updates(self, matrices, group):
        """Writes the updates of these matrices into this process's row."""
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        G = [self.precondition(p, p.grad) for p in matrices]
        M = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_mul_(M, group["momentum"])
        torch._foreach_add_(M, G)
        U = torch._foreach_add(G, M, alpha=group["momentum"]) if group["nesterov"] else M
        blocks = dict(zip(matrices, map(as_blocks, U)))
        for shape in {b.shape for b in blocks.values()}:  # those of one shape as one batch
            same = [p for p in matrices if blocks[p].shape == shape]
            O = self.orthogonalize(same, torch.cat([blocks[p] for p in same]), group)
            torch._foreach_copy_([as_blocks(self.update[p]) for p in same], O.split(shape[0]))

    def precondition(self, p, G):
        """What takes the place of the gradient G of matrix p."""
        return G

    def orthogonalize(self, matrices, U, group):
        """Updates of `matrices`, which are of one shape, from U: both (matrices x blocks, m, n)."""
        return newton_schulz(U, group["ns_steps"]) * math.sqrt(max(U.shape[-2:]))

    def state_dict(self):
        """On process 0 with the state of all matrices, elsewhere its own. All processes must call it."""
        state = super().state_dict()
        if world_size() > 1:
            mine = tree_map_only(torch.Tensor, torch.Tensor.cpu, state["state"])
            parts = [{}] * world_size()
            dist.gather_object(mine, parts if rank() == 0 else None)
            for part in parts:
                state["state"].update(part)
        return state

    def load_state_dict(self, state_dict):
        mine = {i: state for i, state in state_dict["state"].items()
                if self.owner[self.matrices[i]] == rank()}
        super().load_state_dict(state_dict | {"state": mine})


class NewtonMuon(Muon):
    """Muon on gradients preconditioned by the second moment of the layers' inputs (arXiv:2604.01472).

    Each matrix W (m, n) of a layer with inputs Z (n, N tokens) keeps K (n, n), at first 1e-3 I. A refresh:

        K <- ewma K + (1 - ewma) Z Z^T / N
        P =  (K + (ridge tr(K) / n + 1e-8) I)^-1

    and from the first refresh on, each step replaces G by G P before Muon's momentum. A matrix wider than
    tall has n / m diagonal blocks instead of one K, one for each slice of its inputs; fused q, k, v share
    theirs. If a factorisation fails, that block keeps its previous P, and `failures` counts it.
    Raises ValueError as Muon does.
    """

    def __init__(self, params, lr=4e-4, momentum=0.95, nesterov=True, ns_steps=5, weight_decay=0.0,
                 refresh_interval=32, ewma=0.95, ridge=0.2):
        super().__init__(params, lr, momentum, nesterov, ns_steps, weight_decay,
                         more=dict(refresh_interval=refresh_interval, ewma=ewma, ridge=ridge))
        for p in self.matrices:
            if p.size(1) % min(p.shape):
                raise ValueError(f"a matrix of shape {tuple(p.shape)}: must be square, tall, "
                                 "or a whole number of times wider than tall")
        self.preconditioned = self.matrices  # in the order of the grams
        self.failures = torch.zeros((), dtype=torch.int64, device=p.device)

    def invert(self, A):
        """(inverse of each A (blocks, n, n), whether it is one (blocks,))."""
        L, info = torch.linalg.cholesky_ex(A)
        good = (info == 0) & L.isfinite().all(-1).all(-1)
        eye = torch.eye(A.size(-1), device=A.device)
        return torch.cholesky_inverse(torch.where(good[:, None, None], L, eye)), good

    @torch.no_grad()
    def refresh(self, grams, tokens):
        """Updates K and P. grams: of each of self.preconditioned in turn, the sum of z z^T over this
        process's inputs (n / m or 1, n, n); overwritten. tokens: N, over all processes."""
        grams = dict(zip(self.preconditioned, grams, strict=True))
        if world_size() > 1:
            for p, gram in grams.items():
                dist.reduce(gram, self.owner[p])
        for group in self.param_groups:
            mine = [p for p in group["params"] if p in grams and self.owner[p] == rank()]
            for n in {min(p.shape) for p in mine}:
                same = {p: grams[p] for p in mine if min(p.shape) == n}
                self.refresh_blocks(same, tokens, group)

    def refresh_blocks(self, grams, tokens, group):
        """Updates K and P from grams, {matrix: (blocks, n, n)}: all blocks are factorised as one batch."""
        states = [self.state[p] for p in grams]
        for state, gram in zip(states, grams.values()):
            if "K" not in state:
                state["P"] = torch.eye(gram.size(-1), device=gram.device).repeat(len(gram), 1, 1)
                state["K"] = 1e-3 * state["P"]
            state["K"].mul_(group["ewma"]).add_(gram, alpha=(1 - group["ewma"]) / tokens)
        K = torch.cat([state["K"] for state in states])  # (all blocks, n, n)
        diagonal = K.diagonal(dim1=-2, dim2=-1)  # (all blocks, n)
        diagonal += group["ridge"] * diagonal.mean(-1, keepdim=True) + 1e-8
        inverse, good = self.invert(K)
        self.failures += (~good).sum()
        kept = [state["P"] for state in states]
        P = torch.where(good[:, None, None], inverse, torch.cat(kept))
        torch._foreach_copy_(kept, P.split([len(blocks) for blocks in kept]))

    def precondition(self, p, G):
        P = self.state[p].get("P")  # (blocks, n, n), or None before the first refresh
        if P is None:
            return G
        G = G.view(len(G), len(P), -1)  # (m, blocks, n)
        return torch.einsum("mbi,bij->mbj", G, P.to(G.dtype)).flatten(1)


OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": Muon, "newton_muon": NewtonMuon, "sgd": torch.optim.SGD}


def make_optimizer(kind, parameters, patterns, **settings):
    """The optimizer `kind` of `parameters`, {name: p}.

    patterns: {pattern of names: {setting: value}}; a name belongs to the first that it matches, if any.
    """
    if not patterns:
        return kind(list(parameters.values()), **settings)
    groups = {}
    for name, p in parameters.items():
        pattern = next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), "")
        groups.setdefault(pattern, {"params": [], **patterns.get(pattern, {})})["params"].append(p)
    optimizer = kind(list(groups.values()), **settings)
    if unknown := set().union(*optimizer.param_groups) - {"params", *optimizer.defaults}:
        raise ValueError(f"{kind.__name__} has no setting '{min(unknown)}', "
                         f"only {', '.join(optimizer.defaults)}")
    return optimizer


def build_optimizers(model, config):
    """(AdamW of the tied embedding and head, optimizer of the hidden matrices).

    UserError if they cannot be made.
    """
    adamw = dict(betas=(config.beta1, config.beta2), fused=True)
    matrices = model.hidden_matrices()
    others = {name: p for name, p in model.named_parameters() if name not in matrices}
    try:
        patterns = json.loads(config.groups)
        for pattern in patterns:
            if not fnmatch.filter([*others, *matrices], pattern):
                raise ValueError(f"no parameter is named '{pattern}', only {', '.join([*others, *matrices])}")
        table = make_optimizer(torch.optim.AdamW, others, patterns, lr=config.learning_rate,
                               weight_decay=0.0, **adamw)
        if config.optimizer in OPTIMIZERS:  # its settings are the fields of their names
            kind = OPTIMIZERS[config.optimizer]
            names = inspect.signature(kind).parameters
            settings = {name: value for name, value in vars(config).items() if name in names}
            if kind is torch.optim.AdamW:
                settings |= adamw
        else:
            kind = pkgutil.resolve_name(config.optimizer)
            settings = {}
        inspect.signature(kind.step).bind(None)  # TypeError if it needs a closure, which the loop has not
        hidden = make_optimizer(kind, matrices, patterns, lr=config.hidden_learning_rate, **settings,
                                **json.loads(config.optimizer_args))
        set_mode(hidden, "train")
    except Exception as error:  # whatever somebody else's code raises
        raise UserError(f"optimizer = '{config.optimizer}' with optimizer_args = '{config.optimizer_args}' "
                        f"and groups = '{config.groups}' cannot be made: {type(error).__name__}: {error}")
    return table, hidden


def set_mode(optimizer, mode):
    """Calls train() or eval() of a schedule-free optimizer, which load the weights for that."""
    if hasattr(optimizer, mode):
        getattr(optimizer, mode)()


def set_learning_rates(optimizers, scale):
    """Each group's rate becomes `scale` times its first; an optimizer of one's own may have several."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group.setdefault("initial_lr", group.get("lr", 0.0))


def with_grams(model, optimizer):
    """Names of optimizer.preconditioned, the matrices whose grams refresh() takes; none without it."""
    names = {p: name for name, p in model.hidden_matrices().items()}
    return [names[p] for p in getattr(optimizer, "preconditioned", ())]


# ---- Several processes: these functions also work in a single one without a process group --------

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def from_torchrun(name):
    """The number that torchrun puts into the environment variable `name`; 0 without torchrun."""
    text = os.environ.get(name) or "0"
    if not text.isdecimal():
        raise UserError(f"{name} = {text!r} is no number; unset it, or start the processes with torchrun")
    return int(text)


def start_processes(config):
    """Joins the process group when torchrun started this process. Returns the device of this process."""
    world = from_torchrun("WORLD_SIZE")
    local_rank = from_torchrun("LOCAL_RANK")
    gpus = torch.cuda.device_count()
    if config.device == "cuda" and not gpus:
        raise UserError(f"device = 'cuda', but torch {torch.__version__} finds no GPU here; "
                        "use --device cpu, or install a CUDA build of torch")
    on_cpu = config.device == "cpu" or not gpus
    if world > 1:
        backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
        seconds = config.collective_timeout
        timeout = timedelta(seconds=seconds)
        try:
            store, process, world = next(dist.rendezvous("env://", timeout=timeout))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                store = dist.PrefixStore(name_of_this_attempt(store, process, world, seconds), store)
            dist.init_process_group(backend, store=store, rank=process, world_size=world, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"WORLD_SIZE is {world}, but the processes cannot find each other "
                            f"({str(error).splitlines()[0]}); start them with torchrun")
    if on_cpu:
        keep_freed_memory()
        return torch.device("cpu")
    if local_rank >= gpus:
        raise UserError(f"process {local_rank} of this node has no GPU: there are {gpus}; "
                        f"start at most {gpus} processes a node")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def name_of_this_attempt(store, process, world, seconds):
    """A name that all processes of this attempt find, and none of an earlier one.

    `store` is torchrun's own, which outlives a restart with all that was written there. So each process
    writes something new, and what they read together is the name if all of them have read the same.
    """
    store.set(f"new/{process}", os.urandom(8))
    for _ in range(seconds):
        name = sha256(b"".join(store.get(f"new/{other}") for other in range(world)))
        store.set(f"{name}/{process}", "")
        with contextlib.suppress(RuntimeError):  # some of it was old
            store.wait([f"{name}/{other}" for other in range(world)], timedelta(seconds=1))
            return name
    raise RuntimeError("some are missing")


def keep_freed_memory():
    """Saves 10 to 20 % of the time on a CPU: glibc would give the memory of large tensors back, only to
    fault it in again."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        for parameter, value in ((-1, 2 ** 30), (-2, 2 ** 26), (-3, 2 ** 25)):
            ctypes.CDLL(None).mallopt(parameter, value)  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def gather_rows(rows):
    """Fills row i of `rows` (processes, elements) with that of process i."""
    if world_size() > 1:
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the second: torch 2.11
        gather(rows.view(-1), rows[rank()])


def gathered(number):
    """The values of this number on all processes, in float64."""
    values = torch.full((world_size(), 1), number, dtype=torch.float64)
    gather_rows(values)
    return values.flatten().tolist()


def first_to_fail():
    """Whether no other process has failed yet: those that follow end because of it, and say nothing."""
    if not dist.is_initialized():
        return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return dist.group.WORLD.get_group_store().add("failed", 1) == 1
    except RuntimeError:  # the store's process is gone
        return True


def lost_processes(error):
    """A sentence on the RuntimeError of a collective: which processes do not answer within 15 seconds."""
    store = dist.group.WORLD.get_group_store()
    processes = [f"process {process}" for process in range(world_size())]  # keys of the store
    reason = "processes lost each other"
    with contextlib.suppress(RuntimeError):  # the store's process is gone, too
        store.set(processes[rank()], "alive")
        with contextlib.suppress(RuntimeError):
            store.wait(processes, timedelta(seconds=15))
        if missing := [process for process in processes if not store.check([process])]:
            reason = f"no answer from {', '.join(missing)}"
    cause = str(error).splitlines()[0].split(". ")[0]
    return f"{processes[rank()]}: {reason} ({cause}); what was saved is kept; continue with --resume"


# ---- Checkpoints: process 0 writes and reads them, any number of processes can load them ---------

MAY_CHANGE_ON_RESUME = set("device_batch_size compile device collective_timeout log_dir run_name log_every "
                           "save_every resume wandb_project target_val_loss stop_at_target".split())


@dataclasses.dataclass
class Progress:
    """How far a run has come."""
    step: int = 0
    train_time: float = 0.0  # seconds
    reached: tuple | None = None  # (step, seconds) of the first evaluation at the target
    log_bytes: dict | None = None  # lengths of the logs


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def code_sha256():
    return sha256(Path(__file__).read_bytes())


def write_atomically(path, content):
    """Writes the bytes `content` beside `path`, then renames that: `path` is never half-written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems cannot, and say EINVAL
            os.fsync(folder)  # the new name, too, is on the disk from here on
        os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; what was there before is untouched")


def checkpoints(folder):
    """{step: path} of the checkpoints of the run in `folder`, the oldest first."""
    found = {int(p.stem[5:]): p for p in folder.glob("checkpoints/step_*.pt") if p.stem[5:].isdecimal()}
    return dict(sorted(found.items()))


def not_finite(model):
    """Name of the first parameter with an infinite or NaN element, or None."""
    return next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)


def save_checkpoint(folder, config, model, optimizers, progress):
    """Writes checkpoints/step_XXXXXX.pt and keeps the one before it. All processes must call it.

    UserError if it cannot, or a weight is not finite.
    """
    if name := not_finite(model):
        raise UserError(f"{name} is not finite after step {progress.step}, so nothing was saved; "
                        "start another run with lower learning rates")
    states = [optimizer.state_dict() for optimizer in optimizers]
    if rank() == 0:
        checkpoint = dict(config=vars(config), code_sha256=code_sha256(), progress=vars(progress),
                          model=model.state_dict(), optimizers=states, rng=torch.get_rng_state())
        content = io.BytesIO()  # not the file: write_atomically() reports a full disk
        torch.save(checkpoint, content)
        write_atomically(folder / f"checkpoints/step_{progress.step:06d}.pt", content.getbuffer())
        for old in list(checkpoints(folder).values())[:-2]:
            old.unlink()


def find_checkpoint(config):
    """(path, content) of the checkpoint that config.resume names; None if `auto` finds none.

    UserError if none can be loaded.
    """
    path = Path(config.log_dir, config.run_name) if config.resume == "auto" else Path(config.resume)
    candidates = [path] if path.is_file() else list(checkpoints(path).values())[::-1]
    for candidate in candidates:
        try:
            content = torch.load(candidate, map_location="cpu", weights_only=True)
            return candidate.absolute(), content  # not resolved: checkpoints/ may be a link
        except Exception as error:  # torch.load raises whatever the bytes make it raise
            print(f"warning: {candidate} cannot be loaded ({type(error).__name__}), trying an older one",
                  file=sys.stderr)
    if candidates or config.resume != "auto":
        raise UserError(f"resume = '{config.resume}': no checkpoint there that can be loaded; "
                        "name a step_*.pt file or the folder of a run that has one")
    run_json = path / "run.json"
    if run_json.is_file() and '"end"' in run_json.read_text():
        raise UserError(f"{path} holds a finished run without a checkpoint; "
                        "take another run_name, or delete it")


def restore(config, model, optimizers):
    """Loads the checkpoint that config.resume names into the model and the optimizers.

    Returns (folder of its run, its Progress), without one (None, Progress()). UserError unless a run of
    `config` by this code may have written it.
    """
    found = [find_checkpoint(config) if config.resume and rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    if not found[0]:
        return None, Progress()
    path, checkpoint = found[0]
    folder = path.parent.parent
    if config.run_name not in ("", folder.name):
        raise UserError(f"resume = '{config.resume}' continues the run in {folder}, "
                        f"not run_name = '{config.run_name}'; leave that out")
    try:
        if checkpoint["code_sha256"] != code_sha256():
            raise UserError(f"{path} was written by another version of train_gpt2.py; "
                            "resume with the one in the run's folder")
        for name, theirs in checkpoint["config"].items():
            ours = getattr(config, name)
            if name not in MAY_CHANGE_ON_RESUME and theirs != ours:
                raise UserError(f"{path} is of a run with {name} = {theirs!r}, not {ours!r}; "
                                f"add --{name} {theirs!r}")
        progress = Progress(**checkpoint["progress"])
        if not 0 < progress.step <= config.num_iterations or min(progress.log_bytes.values()) < 0:
            raise ValueError(progress)
        model.load_state_dict(checkpoint["model"])
        if name := not_finite(model):
            raise ValueError(f"{name} is not finite")
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        torch.set_rng_state(checkpoint["rng"])
        if checkpoint["config"]["target_val_loss"] != config.target_val_loss:
            progress.reached = None
    except UserError:
        raise
    except Exception as error:  # whatever the bytes make these raise
        raise UserError(f"{path} is no checkpoint of train_gpt2.py that fits this run "
                        f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); move it away")
    return folder, progress


def read_facts(folder, config, facts):
    """What the run.json in `folder` says, and that the run of `facts` resumes it.

    UserError if that run began with other shards or other code.
    """
    try:
        began = json.loads((folder / "run.json").read_text())
        if began["optimizer_sha256"] != facts["optimizer_sha256"]:
            raise UserError(f"the run in {folder} began with another version of {config.optimizer}, "
                            "which it keeps as optimizer.py; restore that")
        for name, pattern in (("train_shards", config.input_bin), ("val_shards", config.input_val_bin)):
            pairs = zip(began[name], facts[name])
            if config.data_seed or config.allow_repeat:  # else shards may come or go at the end
                pairs = [(began[name], facts[name])]
            if any(then != now for then, now in pairs):
                raise UserError(f"'{pattern}' has other shards than the run in {folder} began with; "
                                "restore them")
        entry = {name: facts[name] for name in ("config", "machine", "world_size")}
        began["resumed"] += [dict(time=utc_now(), **entry)]
        return began
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{folder} has checkpoints but no run.json that can be read; "
                        "restore it, or move them: to the run that they are of, or away")


# ---- Log -----------------------------------------------------------------------------------------

WANDB_SECONDS = 60
# in a process of its own: a wandb that fails or hangs neither ends nor slows the run
WANDB = """
import json, os, select, sys
project, folder = sys.argv[1:]
try:
    import wandb
    config = json.load(open(folder + "/run.json"))["config"]
    run = wandb.init(project=project, name=os.path.basename(folder), config=config, dir=folder)
    file = open(folder + "/metrics.jsonl")
    ended = False
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], 1)[0])  # the trainer has closed it, or is gone
        for record in map(json.loads, file):
            run.log(record, step=record["step"])
    run.finish()
except Exception as error:
    print(f"warning: wandb failed ({type(error).__name__}: {error}); the run continues without it",
          file=sys.stderr)
"""


def utc_now():
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


def output(command):
    """What the shell command prints, in this file's folder; nothing if it fails."""
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def describe_machine(device):
    """The software and hardware of this process."""
    return dict(
        python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
        cuda=torch.version.cuda, triton=triton and triton.__version__, platform=platform.platform(),
        cpu=output("sed -n '/^model name/{s/.*: //p;q}' /proc/cpuinfo") or platform.machine(),
        cpu_threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        git_commit=output("git rev-parse HEAD") or None,
        git_changes=bool(output("git status --porcelain -uno")))


class Log:
    """The folder of a run, its files and the terminal. Only process 0 writes."""

    def __init__(self, config, folder, progress, facts, source):
        """Continues the run in `folder` from `progress`, or begins a new one if that is None.

        run.json gets `facts`, and optimizer.py the code of an optimizer of one's own, the file `source`.
        """
        self.config = config
        name = config.run_name or time.strftime("%Y%m%d-%H%M%S_") + config.optimizer.replace(":", "-")
        self.folder = folder or Path(config.log_dir, name)
        self.files = {}
        self.live = sys.stdout and sys.stdout.isatty()
        self.wandb = None
        if rank() != 0:
            return
        if sys.stdout:  # names may have letters that the terminal lacks
            sys.stdout.reconfigure(errors="backslashreplace")
        if folder:
            self.facts = read_facts(folder, config, facts)
        else:
            self.facts = {**facts, "start": utc_now(), "resumed": []}
            if config.resume != "auto" and ((self.folder / "log.txt").exists() or checkpoints(self.folder)):
                raise UserError(f"{self.folder} already holds a run; "
                                "take another run_name, or resume that run with --resume auto")
        try:
            self.open_files(progress)
            write_atomically(self.folder / "train_gpt2.py", Path(__file__).read_bytes())
            if source:
                write_atomically(self.folder / "optimizer.py", Path(source).read_bytes())
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another --log_dir")
        if not folder:  # the head of log.txt; what a resumed run started with stays
            machine = json.dumps(facts["machine"], indent=1) + "\n" + output("timeout 30 nvidia-smi")
            for part in (Path(__file__).read_text(), machine, json.dumps(facts["config"], indent=1)):
                self.write("log.txt", part.rstrip() + "\n" + "=" * 100)
        self.write_facts()
        if config.wandb_project:
            self.wandb = subprocess.Popen(
                [sys.executable, "-c", WANDB, config.wandb_project, str(self.folder)],
                stdin=subprocess.PIPE, start_new_session=True)

    def open_files(self, progress):
        """Opens the logs. What came after `progress` goes: it will be logged and saved again."""
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for name in ("log.txt", "metrics.jsonl"):
            file = self.files[name] = open(self.folder / name, "a", buffering=1, encoding="utf-8",
                                           errors="replace")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is writing to {self.folder}; "
                                "let it end, or take another run_name")
            except OSError:
                pass  # a file system without locks
            if not progress.step and checkpoints(self.folder):
                raise UserError(f"{self.folder} has a checkpoint that was not there a moment ago; "
                                "start again, to continue from it")
            kept = progress.log_bytes[name] if progress.step else 0
            file.truncate(min(kept, os.path.getsize(file.name)))
        for step, path in checkpoints(self.folder).items():
            if step > progress.step:
                path.unlink()

    def write_facts(self):
        write_atomically(self.folder / "run.json", json.dumps(self.facts, indent=1).encode())

    def write(self, name, text):
        try:
            self.files[name].write(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.folder / name}: {error.strerror}; "
                            "free some space and use --resume")

    def print(self, text, end="\n"):
        """A line for log.txt and the terminal."""
        if self.files:
            self.write("log.txt", text)
            try:
                print(("\r\033[K" if self.live else "") + text, end=end, flush=True)
            except OSError:  # the terminal or the pipe is gone; the run continues
                sys.stdout = None

    def loss(self, name, step, seconds, losses, **more):
        """Logs the mean of `losses`, one a process, after `seconds` of training. UserError for NaN."""
        loss = sum(losses) / len(losses)
        N = self.config.num_iterations
        ms = 1000 * seconds
        if self.files:
            text = (f"step:{step}/{N} {name}:{loss:.4f} train_time:{ms:.0f}ms "
                    f"step_avg:{ms / step if step else math.nan:.2f}ms")
            record = {"step": step, name: loss, **more, "train_time_ms": round(ms, 3)}
            self.write("metrics.jsonl", json.dumps(record))
            if name == "val_loss":
                self.print(text)
            elif self.live:  # the next line takes its place
                self.print(text, end=f" {seconds / step * (N - step):.0f} s left")
            else:
                self.write("log.txt", text)
        if bad := [str(i) for i, value in enumerate(losses) if not math.isfinite(value)]:
            where = f" on process {', '.join(bad)}" if len(losses) > 1 else ""
            raise UserError(f"the {name.replace('_', ' ')} is {loss} at step {step}{where}; "
                            "lower learning_rate or hidden_learning_rate")

    def end(self, text, facts):
        """Adds the last line and the `facts` of a finished run, and lets wandb send what it has."""
        self.print(text)
        if facts and self.files:
            self.facts.update(facts, end=utc_now())
            self.write_facts()
        if self.wandb:
            try:
                self.wandb.communicate(timeout=WANDB_SECONDS)
            except subprocess.TimeoutExpired:
                self.wandb.kill()
                print("warning: wandb does not finish; the run is complete without it", file=sys.stderr)


# ---- Training ------------------------------------------------------------------------------------

def training_dtype(config, device):
    return fast_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)


def autocast(device, dtype):
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def synchronized_time(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def wrapped(model, config, device):
    """(the model, compiled if config.compile, and in DDP if there are several processes; a note, if kernels
    cannot be compiled and the model does without)."""
    note = ""
    try:
        if device.type == "cuda":
            x = torch.zeros(128, 128, dtype=fast_dtype(device), device=device)
            head_loss(x, x, x[0].long(), 128)
        if config.compile:
            torch.compile(torch.sin)(torch.ones(8, device=device))
    except torch.OutOfMemoryError:  # says nothing about kernels
        raise
    except Exception as error:  # no Triton, no C compiler, an old card: each has an exception of its own
        note = ("no kernels can be compiled here, so training goes without torch.compile and fused loss "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]})")
    if any(gathered(bool(note))):
        note = note or "no kernels can be compiled on another process, so training goes without them"
        model.fused_loss = False
    elif config.compile:
        # the gradients of q, k and v joined by a kernel each: half the time of one with three branches
        names = "max_pointwise_cat_inputs", "max_complex_pointwise_cat_inputs"
        options = {name: 2 for name in names if hasattr(torch._inductor.config, name)}
        model = torch.compile(model, dynamic=False, options=options)
    if world_size() > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        model.broadcast_buffers = False  # the rotary tables are the same everywhere
    return model, note


def choose_micro_batch(model, config, device, per_process, dtype):
    """Sequences in one forward pass: device_batch_size or, if that is 0, the largest power of two that
    divides per_process and fits. Of 50 L C bytes a token in bf16, a forward pass keeps 41."""
    if config.device_batch_size:
        return config.device_batch_size
    tokens = 16384  # on a CPU more at a time are no faster
    if device.type == "cuda":
        memory = min(0.9, torch.cuda.get_per_process_memory_fraction(device))
        memory *= torch.cuda.get_device_properties(device).total_memory
        memory -= 32 * model.num_parameters()  # each with gradient, state, update, statistics
        memory -= 2 * CHUNK * config.vocab_size  # the logits of a chunk
        token = 25 * dtype.itemsize * config.n_layer * config.n_embd  # bytes
        if not model.fused_loss:
            token += 12 * config.vocab_size  # in fp32: log-probabilities and two gradients
        tokens = memory / token
    size = 1
    while per_process % (2 * size) == 0 and 2 * size * config.sequence_length <= tokens:
        size *= 2
    return size


def accumulate(model, micro_batches, collect, dtype):
    """Adds the gradient of the mean loss of `micro_batches`, [(idx, targets), ...]; DDP averages it.

    Returns that loss and the grams of the matrices whose names are in `collect`.
    """
    n = len(micro_batches)
    mean = 0.0
    sums = []
    for i, (idx, targets) in enumerate(micro_batches, start=1):
        model.require_backward_grad_sync = i == n  # DDP averages in the last backward pass
        with autocast(idx.device, dtype):
            loss, grams = model(idx, targets, collect)
        (loss / n).backward()
        mean += loss.detach() / n
        sums = [a.add_(b) for a, b in zip(sums, grams)] if sums else grams
    return mean, sums


def evaluate(model, shards, config, device, dtype, micro_batch):
    """Mean loss over exactly val_tokens tokens, shared by all processes."""
    mine = np.arange(rank(), config.val_tokens // config.sequence_length, world_size())
    batches = np.pad(mine, (0, -len(mine) % micro_batch), constant_values=-1).reshape(-1, micro_batch)
    total = 0.0
    # compiled, the training step's graph serves: one without gradients would be a third
    with torch.set_grad_enabled(config.compile), autocast(device, dtype):
        for (idx, targets), batch in zip(prefetched(shards, batches, device), batches):
            targets[batch < 0] = -1  # padding does not count
            loss = model(idx.to(device), targets.to(device))[0].detach()  # without its graph's activations
            total += loss.double() * (targets >= 0).sum()
    return sum(gathered(float(total))) / config.val_tokens


def warm_up(model, raw_model, names, config, device, dtype, micro_batch):
    """Builds graphs and memory pools with steps on dummy data, and restores the weights.

    UserError for an optimizer's state that no checkpoint can hold.
    """
    rng = torch.get_rng_state()
    weights = copy.deepcopy(raw_model.state_dict())
    _, hidden = optimizers = build_optimizers(raw_model, config)  # a second pair, thrown away after this
    idx, targets = torch.randint(config.vocab_size, (2, micro_batch, config.sequence_length)).to(device)
    for collect in [(), (), names] if names else [(), ()]:  # DDP rearranges its buckets after the first
        _, grams = accumulate(model, [(idx, targets)] * 2, collect, dtype)
        if grams:
            hidden.refresh(grams, 2 * idx.numel() * world_size())
        for optimizer in optimizers:
            optimizer.step()
    raw_model.zero_grad()
    if ":" in config.optimizer:
        check_state(hidden, config)
    raw_model.load_state_dict(weights)
    torch.set_rng_state(rng)


def check_state(optimizer, config):
    """UserError if its state cannot be saved and loaded: now, rather than at the first checkpoint."""
    content = io.BytesIO()
    try:
        state = optimizer.state_dict()
        names = repr(list(state["state"])).encode()
        torch.save(state, content)
        content.seek(0)
        optimizer.load_state_dict(torch.load(content, map_location="cpu", weights_only=True))
    except RuntimeError:  # no memory, or a process is gone
        raise
    except Exception as error:  # whatever somebody else's code raises
        found = re.search(r"GLOBAL (\S+)", str(error))  # a class or function
        what = found[1] if found else str(error).partition("\n")[0]
        raise UserError(f"the state of optimizer = '{config.optimizer}' cannot be saved and loaded "
                        f"({type(error).__name__}: {what}); keep only tensors, numbers and strings there")
    kept = set(gathered(zlib.crc32(names)))  # of which parameters
    if len(kept) > 1 and not isinstance(optimizer, Muon):  # which gathers its state
        raise UserError(f"optimizer = '{config.optimizer}' keeps the state of other parameters on other "
                        "processes, where no checkpoint has it; start one process")


def results(config, device, progress, val_loss):
    """(text for the log, facts for run.json) at the end of a run."""
    steps = progress.step
    seconds = progress.train_time
    speed = steps * config.batch_size * config.sequence_length / max(seconds, 1e-9)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    memory = int(max(gathered(memory)))
    met = "met at step {}, {:.1f} s".format(*progress.reached) if progress.reached else "not met"
    text = (f"final loss   {val_loss:.4f}; target {config.target_val_loss:g} {met}\n"
            f"training     {seconds:.1f} s, {1000 * seconds / max(1, steps):.1f} ms a step, "
            f"{speed:,.0f} tokens/s\n"
            f"memory       {memory / 2 ** 30:.2f} GiB at most in a process ({device.type})")
    return text, dict(final_val_loss=val_loss, train_time_ms=1000 * seconds, steps=steps,
                      tokens_per_second=speed, target_reached=progress.reached, peak_memory_bytes=memory)


def run(config):
    """This process's part of a run. Returns the exit code: 0, or 128 + the signal that ended it."""
    B, T, N = config.batch_size, config.sequence_length, config.num_iterations
    per_process = sequences_per_process(config, from_torchrun("WORLD_SIZE") or 1)
    device = start_processes(config)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU multiplies fp32: preconditioning
    dtype = training_dtype(config, device)

    # ---- data
    train_shards = Shards(config.input_bin, T, config.vocab_size, config.allow_repeat, config.data_seed)
    train_shards.require(N * B, f"{N} steps of {B} sequences",
                         "a lower number of steps, or allow_repeat = true")
    val_shards = Shards(config.input_val_bin, T, config.vocab_size)
    val_shards.require(config.val_tokens // T, "validation", "a lower val_tokens")

    # ---- model and optimizers
    torch.manual_seed(config.seed)
    raw_model = make_model(config).to(device)
    _, hidden = optimizers = build_optimizers(raw_model, config)
    names = with_grams(raw_model, hidden)
    model, note = wrapped(raw_model, config, device)
    micro_batch = choose_micro_batch(raw_model, config, device, per_process, dtype)

    # ---- what there is to resume, and the log
    source = inspect.getsourcefile(type(hidden)) if ":" in config.optimizer else None
    facts = dict(
        config=vars(config), machine=describe_machine(device), world_size=world_size(),
        dtype=str(dtype), compiled=config.compile and not note, micro_batch=micro_batch,
        code_sha256=code_sha256(), optimizer_sha256=sha256(Path(source).read_bytes()) if source else None,
        parameters=raw_model.num_parameters(), tokens_per_step=B * T,
        train_shards=train_shards.describe(), val_shards=val_shards.describe())
    validation = {shard["sha256_of_first_mebibyte"] for shard in facts["val_shards"]}
    for shard in facts["train_shards"]:
        if shard["sha256_of_first_mebibyte"] in validation:
            raise UserError(f"{shard['name']}, one of input_bin = '{config.input_bin}', is also one of "
                            "input_val_bin; a loss on what was trained on says nothing: keep them apart")
    folder, progress = restore(config, raw_model, optimizers)
    gathered(0)  # no log is touched before all processes have it
    log = Log(config, folder, progress, facts, source)
    if note:
        log.print(note)
    log.print(f"{config.optimizer}: {raw_model.num_parameters():,} parameters, {N} steps of {B * T:,} "
              f"tokens, {world_size()} process(es) on {device.type} in {str(dtype)[6:]} with "
              f"{micro_batch} of {per_process} sequences at a time, logs in {log.folder}")

    # ---- state before the first step
    warm_up(model, raw_model, names, config, device, dtype, micro_batch)
    start = progress.step
    if start:
        log.print(f"resumed at step {start}")
    failures = 0
    mine = (range(i, i + per_process) for i in range(start * B + rank() * per_process, N * B, B))
    batches = prefetched(train_shards, mine, device)
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # now they end the run after the step
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, lambda number, frame: signals.append(number))

    clock = synchronized_time(device)
    for step in range(start, N + 1):
        last = step == N
        stop = int(max(gathered(max(signals, default=0))))  # what any process has caught, or 0
        evaluates = last or (config.val_loss_every and step % config.val_loss_every == 0)
        saves = config.save_every and step % config.save_every == 0
        if stop or evaluates or saves:
            if step > start:  # not the moment before the first step
                progress.train_time += synchronized_time(device) - clock
            progress.step = step
            progress.log_bytes = {name: os.path.getsize(log.folder / name) for name in log.files}
            # as it is before the evaluation: a run resumed from it logs that once
            to_save = copy.copy(progress)

            if evaluates and not stop:
                set_mode(hidden, "eval")
                val_loss = evaluate(model, val_shards, config, device, dtype, micro_batch)
                log.loss("val_loss", step, progress.train_time, [val_loss])
                if val_loss <= config.target_val_loss and not progress.reached:
                    progress.reached = step, progress.train_time
                    log.print(f"target {config.target_val_loss} reached at step {step}, "
                              f"{progress.train_time:.1f} s")

            ends = stop or last or (evaluates and progress.reached and config.stop_at_target)
            changed = step > start or (last and hasattr(hidden, "eval"))
            if changed and (ends or saves):
                save_checkpoint(log.folder, config, raw_model, optimizers, to_save)
            if ends:
                break
            set_mode(hidden, "train")
            clock = synchronized_time(device)

        # ----------------------------------- the training step ------------------------------------
        scale = learning_rate_scale(config, step)
        set_learning_rates(optimizers, scale)
        idx, targets = (t.to(device, non_blocking=True).split(micro_batch) for t in next(batches))
        collect = names if names and (step + 1) % hidden.defaults["refresh_interval"] == 0 else ()
        loss, grams = accumulate(model, list(zip(idx, targets)), collect, dtype)
        if grams:
            hidden.refresh(grams, B * T)
        for optimizer in optimizers:
            optimizer.step()
        raw_model.zero_grad()
        # ------------------------------------------------------------------------------------------

        if (step + 1) % config.log_every == 0 or step + 1 == N:
            losses = gathered(float(loss))  # waits for the GPU
            seconds = progress.train_time + time.perf_counter() - clock
            failed = int(sum(gathered(float(getattr(hidden, "failures", 0)))))
            log.loss("train_loss", step + 1, seconds, losses, learning_rate_scale=scale,
                     failed_factorisations=failed)
            if failed > failures:
                log.print(f"warning: {failed - failures} factorisations failed up to step {step + 1}; "
                          "those blocks keep their last preconditioner")
                failures = failed

    # ---- end
    if stop:
        how = f"; continue with --resume {log.folder}" if step else ""
        log.end(f"stopped by {signal.Signals(stop).name} after step {step}{how}", {})
    else:
        log.end(*results(config, device, progress, val_loss))
    gathered(0)  # no process exits before all have reached this line
    return stop and 128 + stop


# ---- main() --------------------------------------------------------------------------------------

def explanation(error):
    """What to tell the user about `error`, or None if it is a bug."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):  # Ctrl-C before the first step
        return "interrupted"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"{text.splitlines()[0]} Set a smaller device_batch_size (the log has its value) or model."
    if world_size() > 1 and isinstance(error, RuntimeError):
        if re.search("(?i)gloo|nccl|connection|timed out", text):
            return lost_processes(error)
    if isinstance(error, (UserError, OSError)):
        return text


def main():
    try:
        code = run(load_config(sys.argv[1:]))
    except (Exception, KeyboardInterrupt) as error:
        message = explanation(error)
        if not message:
            raise  # a bug
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        if first_to_fail():
            print(f"error: {message}", file=sys.stderr)
    if world_size() > 1:
        os._exit(code)  # at once: to leave a process group can mean to wait for processes that are gone
    sys.exit(code)


if __name__ == "__main__":
    sys.modules["train_gpt2"] = sys.modules["__main__"]  # an optimizer that imports it gets no second copy
    main()
