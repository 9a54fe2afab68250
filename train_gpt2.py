"""Trains GPT-2 124M to a loss of 3.28 on FineWeb (published: 22 minutes on 8 H100s, 2 hours on one), or a small model on a laptop in a minute.

    python train_gpt2.py configs/cpu_muon.toml --num_iterations 300     one process, CPU or GPU; --help lists all fields to override
    torchrun --nproc_per_node 8 train_gpt2.py configs/speedrun_newton_muon.toml

The optimizer is AdamW, Muon, Newton-Muon, SGD or your own. A run writes LOG_DIR/RUN_NAME/: log.txt (this code, the machine, the
losses), metrics.jsonl (the losses as JSON), run.json (configuration, versions, hashes, results), train_gpt2.py and checkpoints/.
The times it reports are training time: validation, checkpoints and the warm-up that compiles the model do not count.
Model and defaults are those of record 4 of the Modded-NanoGPT speedrun (2024-10-10). Newton-Muon is arXiv:2604.01472."""
import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import fcntl
import glob
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch starts its CPU threads: how long they spin before they yield the core
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.parallel import DistributedDataParallel

try:  # comes with torch's CUDA build
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# ---- Configuration --------------------------------------------------------------------------------------------------

OPTIMIZERS = ("adamw", "muon", "newton_muon", "sgd")


class UserError(Exception):
    """Something the user can fix: one sentence, which main() prints before it exits with 1."""


@dataclasses.dataclass
class Config:
    """One run. Precedence: these defaults < TOML file < command line. A field's comment is its --help text."""

    # data
    input_bin: str = "data/fineweb10B/fineweb_train_*.bin"  # training shards: glob pattern, read in order of name
    input_val_bin: str = "data/fineweb10B/fineweb_val_*.bin"  # validation shards: glob pattern
    batch_size: int = 512  # sequences in one optimizer step, over all processes
    device_batch_size: int = 0  # sequences in a forward pass; 0: the largest power of two that fits the GPU (on a CPU 16384 tokens)
    sequence_length: int = 1024  # tokens in a sequence
    allow_repeat: bool = False  # start over when the shards are used up, instead of refusing to start
    data_seed: int = 0  # order of the training sequences; 0: as in the files; any other seed: all shuffled, the same way for the same seed
    # schedule
    num_iterations: int = 6200  # optimizer steps
    warmup_iters: int = 0  # steps over which the learning rates rise linearly
    warmdown_iters: int = 1800  # steps at the end over which the learning rates fall linearly to 0
    val_loss_every: int = 125  # steps between evaluations; 0: only at the end
    val_tokens: int = 10485760  # tokens of an evaluation: the first ones of the validation shards
    target_val_loss: float = 3.28  # the log says when an evaluation first reaches this loss (if it was changed on resume: from there on)
    stop_at_target: bool = False  # end the run when an evaluation reaches target_val_loss
    # model
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width
    vocab_size: int = 50257  # tokens that can be predicted (the embedding is padded to a multiple of 128 rows)
    # optimizer of the hidden matrices; the tied embedding and head always has AdamW
    optimizer: str = "muon"  # adamw, muon, newton_muon, sgd, or module:Class of any torch.optim.Optimizer, for the hidden matrices
    learning_rate: float = 0.0036  # AdamW learning rate of the tied embedding and head
    hidden_learning_rate: float = 0.00036  # learning rate of the hidden matrices; for muon and newton_muon roughly the RMS of an update
    weight_decay: float = 0.0  # weight decay of the hidden matrices; decoupled, except for sgd
    beta1: float = 0.9  # AdamW's decay of the mean of the gradients
    beta2: float = 0.95  # AdamW's decay of the mean of the squared gradients
    momentum: float = 0.95  # momentum of muon, newton_muon and sgd
    nesterov: bool = True  # Nesterov momentum for muon, newton_muon and sgd
    ns_steps: int = 5  # Newton-Schulz iterations of muon and newton_muon
    refresh_interval: int = 32  # newton_muon: steps between refreshes of the preconditioner
    ewma: float = 0.95  # newton_muon: weight of the past in the second moment of the inputs
    ridge: float = 0.2  # newton_muon: ridge, relative to the mean eigenvalue of the second moment
    optimizer_args: str = "{}"  # arguments of a module:Class other than lr, as a JSON object
    # machine
    seed: int = 0  # seed of the initial weights
    device: str = "auto"  # cuda, cpu, or auto: cuda if there is a GPU
    dtype: str = "auto"  # type of matrix products: bfloat16, float32, or auto: bfloat16 on GPUs that have it (weights stay float32)
    compile: bool = False  # use torch.compile
    collective_timeout: int = 600  # seconds that a process waits for the others before it ends the job
    # output
    log_dir: str = "logs"  # folder of the runs
    run_name: str = ""  # folder of this run in log_dir; empty: named after the time and the optimizer
    log_every: int = 10  # steps between training losses in the log; a loss that is not finite ends the run then
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    resume: str = ""  # checkpoint or folder of a run to resume; auto: the newest checkpoint of run_name, if it has one
    wandb_project: str = ""  # also log to this Weights & Biases project


def boolean(text):
    return ("false", "true").index(text.lower()) == 1


def read_toml(path):
    """Fields of the TOML file at `path`. Raises UserError for an unknown key or a value of the wrong type."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}; configs/ has some to start from") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError
        raise UserError(f"{path} is not valid TOML: {error}") from None
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    for key, value in values.items():
        if key not in types:
            raise UserError(f"{path}: unknown key '{key}'; the nearest valid one is '{difflib.get_close_matches(key, types, n=1, cutoff=0)[0]}'")
        if types[key] is float and type(value) is int and abs(value) < 2 ** 63:
            values[key] = float(value)
        elif type(value) is not types[key]:
            raise UserError(f"{path}: {key} = {value!r} is a {type(value).__name__}, not a {types[key].__name__}")
    return values


def load_config(argv):
    """Config from the command line `argv`: CONFIG.toml [--field value ...]. Usage errors exit with 2."""
    parser = argparse.ArgumentParser(usage="[torchrun ...] train_gpt2.py CONFIG.toml [--field value ...]", description=__doc__,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.toml", help="configuration file, for example configs/cpu_muon.toml")
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", type=boolean if field.type is bool else field.type, metavar=field.type.__name__,
                            default=argparse.SUPPRESS, help=f"{comments[field.name]} (default: {json.dumps(field.default)})")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0], [f"--{key}" for key in comments], n=1, cutoff=0)[0]
        parser.error(f"unknown argument '{unknown[0]}'; the nearest valid one is '{near}' (--help lists all)")
    config = Config(**{**read_toml(args.config), **{key: value for key, value in vars(args).items() if key != "config"}})
    check_config(config)
    return config


def check_config(config):
    """Raises UserError for a value that is out of range, whatever the data and the machine."""
    c, args = config, None
    with contextlib.suppress(json.JSONDecodeError, RecursionError):
        args = json.loads(c.optimizer_args)
    rules = [(low <= getattr(c, name) < end, name, must) for names, low, end, must in (
            ("batch_size sequence_length num_iterations val_tokens n_layer n_head n_embd ns_steps vocab_size refresh_interval "
             "collective_timeout log_every", 1, 2 ** 32, "at least 1, below 2^32"),
            ("device_batch_size warmup_iters warmdown_iters val_loss_every save_every seed data_seed", 0, 2 ** 32, "0 or more, below 2^32"),
            ("learning_rate hidden_learning_rate weight_decay", 0, 1e38, "0 or more, and below 1e38"),
            ("beta1 beta2 momentum ewma", 0, 1, "at least 0 and below 1")) for name in names.split()] + [
        (0 < c.ridge < math.inf, "ridge", "positive and finite"), (abs(c.target_val_loss) < 1e6, "target_val_loss", "between -1e6 and 1e6"),
        (c.warmup_iters + c.warmdown_iters <= c.num_iterations, "warmup_iters warmdown_iters num_iterations", "such that both fit into the run"),
        (c.n_embd % max(1, 2 * c.n_head) == 0, "n_embd n_head", "such that n_embd / n_head is even (rotary embeddings turn pairs)"),
        (c.val_tokens % max(1, c.sequence_length) == 0, "val_tokens sequence_length", "such that sequence_length divides val_tokens"),
        (c.vocab_size <= 65536, "vocab_size", "at most 65536 (shards hold 16-bit tokens)"),
        (c.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda"),
        (c.dtype in ("auto", "float32", "bfloat16"), "dtype", "auto, float32 or bfloat16"),
        (c.optimizer in OPTIMIZERS or re.fullmatch(r"[\w.]+:\w+", c.optimizer), "optimizer", f"{', '.join(OPTIMIZERS)} or module:Class"),
        (os.path.basename(c.run_name) == c.run_name and c.run_name not in (".", ".."), "run_name", "a folder name; log_dir is the path above it"),
        (c.weight_decay == 0 or ":" not in c.optimizer, "weight_decay optimizer", "0 for a module:Class, whose own goes into optimizer_args"),
        (c.resume != "auto" or c.run_name, "resume run_name", "given together: auto needs a run_name"),
        (isinstance(args, dict) and (":" in c.optimizer or not args), "optimizer_args optimizer", "a JSON object, '{}' without a module:Class")]
    for valid, names, must in rules:
        if not valid:
            raise UserError(", ".join(f"{name} = {getattr(c, name)!r}" for name in names.split()) + f": must be {must}")


def sequences_per_process(config, world):
    """Sequences of one process in a step. Raises UserError unless the batch can be split over `world` processes and micro-batches."""
    def divisors(n, wanted):  # the nearest first
        return sorted((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))
    per_process, size = config.batch_size // world, config.device_batch_size
    if config.batch_size % world:
        raise UserError(f"batch_size = {config.batch_size} cannot be split over {world} processes; the nearest numbers of processes that "
                        f"can are {' and '.join(map(str, sorted(divisors(config.batch_size, world)[:2])))}")
    if size and per_process % size:
        raise UserError(f"device_batch_size = {size} does not divide the {per_process} sequences that each of {world} processes has in a step "
                        f"(batch_size = {config.batch_size}); the nearest that does is {divisors(per_process, size)[0]}")
    return per_process


def learning_rate_scale(config, step):
    """Factor on both learning rates in step `step` (from 0): linear rise, constant, linear fall to 0."""
    return min(1.0, (step + 1) / max(1, config.warmup_iters), (config.num_iterations - step) / max(1, config.warmdown_iters))


# ---- Token shards: 256 little-endian int32 (20240520, version 1, number of tokens, rest 0), then uint16 tokens ------

HEADER_BYTES, MAGIC, VERSION = 1024, 20240520, 1
FIX = "make it again with the script in data/ that made it"


def open_shard(path):
    """Memory-mapped tokens of the shard at `path`: (n,) uint16. Raises UserError if it is missing or damaged."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait forever
            raise OSError("it is not a regular file")
        with open(path, "rb") as file:
            header, size = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4"), os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); {FIX}") from None
    if size < HEADER_BYTES or header[0] != MAGIC:
        raise UserError(f"{path}: not a token shard (it should start with {MAGIC}); {FIX}")
    if header[1] != VERSION:
        raise UserError(f"{path}: shard version {header[1]}, this code reads version {VERSION}; {FIX}")
    n = int(header[2])
    if n < 0 or size != HEADER_BYTES + 2 * n:
        raise UserError(f"{path}: damaged: {size:,} bytes, but its header says {n:,} tokens, which is {HEADER_BYTES + 2 * n:,} bytes; {FIX}")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(n,)) if n else np.zeros(0, "<u2")


class Shards:
    """All shards that match a glob pattern, cut into sequences.

    Sequence i is sequence_length tokens and the one after them; sequences follow each other in a shard, shards in order of name, and no
    sequence spans two shards. Step t of a run trains on sequences t * batch_size to (t + 1) * batch_size - 1, however many processes share
    them. A data_seed above 0 numbers the sequences in another order. A shard is mapped only while a batch is read: memory stays flat."""

    def __init__(self, pattern, sequence_length, vocab_size, allow_repeat=False, data_seed=0):
        self.paths = sorted(glob.glob(pattern))
        if not self.paths:
            raise UserError(f"no file matches '{pattern}' from {os.getcwd()}; data/fineweb.py, data/shakespeare.py and data/tokenize_text.py make shards")
        self.lengths = [len(open_shard(path)) for path in self.paths]  # in tokens
        self.pattern, self.T, self.vocab_size, self.allow_repeat = pattern, sequence_length, vocab_size, allow_repeat
        self.ends = np.cumsum([max(0, n - 1) // sequence_length for n in self.lengths])  # in sequences
        self.order = np.random.RandomState(data_seed).permutation(self.ends[-1]) if data_seed else None  # numpy never changes these
        self.waited = 0.0  # seconds that prefetched() kept its caller waiting

    def require(self, sequences, what):
        """Raises UserError unless there are `sequences` sequences for `what`."""
        have, largest = int(self.ends[-1]), max(0, max(self.lengths) - 1) // self.T
        if have < sequences and not (self.allow_repeat and have):
            missing = f"{math.ceil((sequences - have) / largest)} more shards like the largest one" if largest else "longer shards"
            raise UserError(f"'{self.pattern}' holds {have * self.T:,} tokens in sequences of {self.T}, {what} needs {sequences * self.T:,}: add "
                            f"{missing}, or set " + ("a lower val_tokens" if what == "validation" else "a lower number of steps, or allow_repeat = true"))

    def describe(self):
        """For run.json: name and tokens of each shard, SHA-256 of its header and size, and of its first MiB."""
        def facts(path, n):
            with open(path, "rb") as file:
                start, size = file.read(2 ** 20), str(os.path.getsize(path)).encode()
            return dict(name=os.path.basename(path), tokens=n, sha256_of_first_mebibyte=hashlib.sha256(start).hexdigest(),
                        sha256_of_header_and_size=hashlib.sha256(start[:HEADER_BYTES] + size).hexdigest())
        return list(map(facts, self.paths, self.lengths))

    def batch(self, sequences):
        """Inputs and targets of these sequences, each (len(sequences), T) int64. UserError for a changed shard, or a token out of range."""
        rows, opened = np.empty((len(sequences), self.T + 1), dtype=np.int64), None
        for row, i in zip(rows, sequences):
            i = i % int(self.ends[-1]) if self.order is None else int(self.order[i % len(self.order)])
            shard = int(np.searchsorted(self.ends, i, side="right"))
            start = (i - (int(self.ends[shard - 1]) if shard else 0)) * self.T
            if shard != opened:
                tokens, opened = open_shard(self.paths[shard]), shard
                if len(tokens) != self.lengths[shard]:
                    raise UserError(f"{self.paths[shard]}: had {self.lengths[shard]:,} tokens at first, now {len(tokens):,}; restore it")
            row[:] = tokens[start:start + self.T + 1]
            if row.max() >= self.vocab_size:
                raise UserError(f"{self.paths[shard]}: token {row.max()} after position {start} is outside vocab_size = {self.vocab_size}; "
                                "use the vocabulary of the tokenizer that made the shard")
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def prefetched(shards, batches, device):
    """Yields shards.batch(sequences) for each of `batches`; a thread reads one batch ahead, into pinned memory for a GPU."""
    def read(sequences):
        batch = shards.batch(sequences)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread is on GPU 0, whatever the GPU of its process
            batch = [t.pin_memory() for t in batch]
        return batch
    with ThreadPoolExecutor(1) as thread:
        futures = (thread.submit(read, sequences) for sequences in batches)
        following = next(futures, None)
        while following:
            current, following = following, next(futures, None)
            start = time.perf_counter()
            batch = current.result()
            shards.waited += time.perf_counter() - start
            yield batch


# ---- Model: pre-norm GPT-2 with RMSNorm, rotary embeddings, no biases, no learned norm gains, tied embedding and head

def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotate(x, cos, sin):
    """Rotary embedding of x (B, T, n_head, D), half-split layout: element i turns with element i + D / 2. Tables (T, 1, D)."""
    z = x.float()
    return (z * cos + z.unflatten(-1, (2, -1)).flip(-2).flatten(-2) * sin).type_as(x)


def on_gpu(x):
    return x.is_cuda  # a function, so that tests can send CPU tensors down the GPU path


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


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.n_head, self.attn_scale = config.n_embd, config.n_head, 1 / math.sqrt(2 * config.n_layer)
        self.c_attn, self.attn_proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.c_fc, self.mlp_proj = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x, cos, sin, grams):
        B, T, C = x.size()
        z = norm(x)
        q, k, v = self.c_attn(z).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x.add(self.attn_proj(y), alpha=self.attn_scale)
        u = norm(x)
        h = F.gelu(self.c_fc(u))
        if grams is not None:
            grams += [gram(t, C) for t in (z, y, u, h)]
        return x + self.mlp_proj(h)


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
        """(mean cross-entropy of `targets` (B, T), ignoring -1, given the tokens `idx` (B, T); grams): with `collect`,
        Z Z^T of the inputs of each of hidden_matrices(), else None."""
        x, grams = self.features(idx, collect)
        if triton and on_gpu(x):
            return head_loss(x.flatten(0, 1).to(matmul_dtype(x)), self.lm_head.weight, targets.flatten(), self.vocab_size)[0], grams
        return F.cross_entropy(self.lm_head(x)[..., :self.vocab_size].float().flatten(0, 1), targets.flatten(), ignore_index=-1), grams

    def logits(self, idx):
        """Logits (B, T, vocab_size) fp32 for tokens `idx` (B, T)."""
        return self.lm_head(self.features(idx)[0])[..., :self.vocab_size].float()

    def features(self, idx, collect=False):
        """Input (B, T, C) of the head for tokens `idx` (B, T), and the grams of forward()."""
        x, grams = self.wte(idx), [] if collect else None
        for block in self.h:
            x = block(x, self.cos[:idx.size(1)], self.sin[:idx.size(1)], grams)
        return norm(x), grams

    def hidden_matrices(self):
        """{name: weight} of the matrices in the blocks, in the order of the grams."""
        return {name: p for name, p in self.named_parameters() if name.startswith("h.")}

    def flops_per_token(self):
        """Forward and backward: 6 for each parameter, and attention's 12 L C T."""
        return 6 * self.num_parameters() + 12 * len(self.h) * self.lm_head.weight.size(1) * len(self.cos)

    def num_parameters(self):
        """Parameters, without the rows that pad the table."""
        return sum(p.numel() for p in self.parameters()) - self.lm_head.weight[self.vocab_size:].numel()


# ---- Loss on a GPU: head and cross-entropy with their gradients, one chunk of tokens at a time: the full logits are never materialised

CHUNK = 16384  # tokens

if triton:
    @triton.jit
    def cross_entropy_kernel(logits, targets, losses, scale, vocab_size: tl.constexpr, stride: tl.constexpr, BLOCK: tl.constexpr):
        """One program per row of `logits`, whose columns from vocab_size on are padding: losses <- logsumexp(row) - row[target],
        and row <- scale (softmax(row) - onehot(target)), 0 in the padding; both 0 for a target of -1."""
        log2e: tl.constexpr = 1.4426950408889634  # exp2 and log2 are what the hardware has
        row = tl.program_id(0)
        logits += row.to(tl.int64) * stride
        target = tl.load(targets + row).to(tl.int32)
        counts = target >= 0
        at_target, scale = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32), tl.where(counts, tl.load(scale), 0.0)
        columns, top, total = tl.arange(0, BLOCK), -float("inf"), tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):  # running maximum, and the sums of exponentials relative to it
            x = tl.load(logits + start + columns, mask=columns < stride - start, other=0.0).to(tl.float32) * log2e
            x = tl.where(columns < vocab_size - start, x, -float("inf"))  # as the load's mask, this would prevent wide loads
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
    """(loss, d loss / d x, d loss / d weight in fp32): mean cross-entropy of `targets` (N,), ignoring -1, under the first
    vocab_size logits of x weight^T, x (N, C) and weight (rows, C)."""
    scale, losses, dx = 1 / (targets >= 0).sum(), torch.empty(len(x), device=x.device), torch.empty_like(x)
    dweight, weight = torch.zeros(weight.shape, device=x.device), weight.to(x.dtype)
    fp32_sums = {} if x.dtype == torch.float32 else dict(out_dtype=torch.float32)
    for x_, dx_, targets_, losses_ in zip(*(t.split(CHUNK) for t in (x, dx, targets, losses))):
        logits = x_ @ weight.mT
        cross_entropy_kernel[(len(logits),)](logits, targets_, losses_, scale, vocab_size, logits.stride(0), BLOCK=4096, num_warps=8)
        torch.mm(logits, weight, out=dx_)  # the kernel left their gradient there
        torch.addmm(dweight, logits.mT, x_, out=dweight, **fp32_sums)
    return losses.sum() * scale, dx, dweight


head_loss.register_fake(lambda x, weight, *_: (x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight)))
head_loss.register_autograd(lambda ctx, gradient, *_: (*(gradient * t for t in ctx.saved_tensors), None, None),
                            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*output[1:]))


# ---- Optimizers -----------------------------------------------------------------------------------------------------

def fast_dtype(device):
    """bfloat16 on GPUs that multiply it, else float32."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def newton_schulz(U, steps=5):
    """Approximately the nearest orthogonal matrix, U V^T of the singular value decomposition, of each matrix in U (..., m, n).

    X = U / (||U||_F + 1e-7), then `steps` times A = X X^T, X <- a X + (b A + c A A) X. The coefficients trade accuracy for
    speed: singular values end between about 0.7 and 1.2 (K. Jordan et al., Muon, 2024). bf16 on GPUs that have it."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X, tall = (U.to(fast_dtype(U.device)) if U.is_cuda else U).reshape(-1, *U.shape[-2:]), U.size(-2) > U.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).reshape(U.shape)


def as_blocks(W):
    """View of a matrix W (m, n) as the blocks to orthogonalise: (3, n, n) for a fused q, k, v, else (1, m, n)."""
    m, n = W.shape
    return W.view(3, n, n) if m == 3 * n else W.unsqueeze(0)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (K. Jordan et al., Muon, 2024).

    For each matrix W (m, n) with gradient G:

        M <- momentum M + G
        U =  G + momentum M  (Nesterov), or M
        W <- (1 - lr weight_decay) W - lr sqrt(max(m, n)) newton_schulz(U)

    so that lr is about the root-mean-square of an element's update. A matrix with m = 3 n is taken for a fused q, k, v, whose three
    n x n blocks are orthogonalised separately, with sqrt(n). ValueError for a setting out of range, or a parameter that is not a matrix.

    With several processes each matrix has one owner, which alone keeps its state and orthogonalises its momentum; one
    all-gather shares the updates, bf16 on CUDA, else fp32. Gradients must be the same on all processes, as DDP leaves them."""

    def __init__(self, params, lr=3.6e-4, momentum=0.95, nesterov=True, ns_steps=5, weight_decay=0.0, more={}):  # more: a subclass's own
        if not (0 <= lr < math.inf and 0 <= weight_decay < math.inf and 0 <= momentum < 1 and ns_steps >= 1):
            raise ValueError(f"lr = {lr}, weight_decay = {weight_decay}, momentum = {momentum}, ns_steps = {ns_steps}: must be >= 0, >= 0, < 1, > 0")
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, weight_decay=weight_decay, **more))
        self.matrices = [p for group in self.param_groups for p in group["params"]]
        if other := [tuple(p.shape) for p in self.matrices if p.ndim != 2]:
            raise ValueError(f"a parameter of shape {other[0]}: {type(self).__name__} updates matrices only")
        self.owner = dict(zip(self.matrices, assign_owners([self.flops(p) for p in self.matrices], world_size())))
        self.start, used = {}, [0] * world_size()  # where the update of a matrix begins in its owner's row of `updates`
        for p in self.matrices:
            self.start[p] = used[self.owner[p]]
            used[self.owner[p]] += p.numel()
        self.updates = torch.zeros(world_size(), max(used), dtype=fast_dtype(p.device) if p.is_cuda else p.dtype, device=p.device)

    def flops(self, p):
        """FLOPs of the owner's work on matrix p in a step: X X^T, A A and their product with X in each Newton-Schulz iteration."""
        b, (r, R) = len(as_blocks(p)), sorted(as_blocks(p).shape[1:])
        return self.defaults["ns_steps"] * b * (4 * r * r * R + 2 * r ** 3)

    def precondition(self, p, G):
        return G

    def orthogonalize(self, matrices, U, group):
        """Updates of `matrices`, which are of one shape, from U: both (matrices x blocks, m, n)."""
        return newton_schulz(U, group["ns_steps"]) * math.sqrt(max(U.shape[-2:]))

    @torch.no_grad()
    def step(self):
        # 1. compute: the updates of this process's own matrices, those of one shape as one batch
        for group in self.param_groups:
            if not (mine := [p for p in group["params"] if self.owner[p] == rank() and p.grad is not None]):
                continue
            for p in mine:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            G, M = [self.precondition(p, p.grad) for p in mine], [self.state[p]["momentum_buffer"] for p in mine]
            torch._foreach_mul_(M, group["momentum"])
            torch._foreach_add_(M, G)
            U = torch._foreach_add(G, M, alpha=group["momentum"]) if group["nesterov"] else M
            for shape in {as_blocks(p).shape for p in mine}:
                matrices, Us = zip(*((p, as_blocks(u)) for p, u in zip(mine, U) if as_blocks(p).shape == shape))
                O = self.orthogonalize(matrices, torch.cat(Us), group)  # (matrices x blocks, m, n)
                torch._foreach_copy_([as_blocks(self.part(self.updates, p)) for p in matrices], O.split(shape[0]))
        # 2. gather: (processes, elements), each row from the process that owns those matrices
        if world_size() > 1:
            getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(self.updates.view(-1), self.updates[rank()])  # torch 2.11 has the second
        # 3. apply
        updates = self.updates.to(self.matrices[0].dtype)
        for group in self.param_groups:
            if changed := [p for p in group["params"] if p.grad is not None]:
                if group["weight_decay"]:
                    torch._foreach_mul_(changed, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(changed, [self.part(updates, p) for p in changed], alpha=-group["lr"])

    def part(self, updates, p):
        """The part of `updates` (processes, elements) that belongs to matrix p, in its shape."""
        return updates[self.owner[p], self.start[p]:self.start[p] + p.numel()].view_as(p)

    def state_dict(self):
        """On process 0 with the state of all matrices, whichever process owns them (all processes must call it); elsewhere its own."""
        state = super().state_dict()
        parts = [{i: {k: v.cpu() if torch.is_tensor(v) else v for k, v in s.items()} for i, s in state["state"].items()}] * world_size()
        if world_size() > 1:
            dist.gather_object(parts[0], parts if rank() == 0 else None)
        for part in parts:
            state["state"].update(part)
        return state

    def load_state_dict(self, state_dict):
        owned = {i: state for i, state in state_dict["state"].items() if self.owner[self.matrices[i]] == rank()}
        super().load_state_dict({**state_dict, "state": owned})


class NewtonMuon(Muon):
    """Muon on gradients preconditioned by the second moment of each layer's inputs (Du and Su, arXiv:2604.01472).

    Each matrix W (m, n) of a layer with inputs Z (n, N tokens) keeps K (n, n), at first 1e-3 I. A refresh does

        K <- ewma K + (1 - ewma) Z Z^T / N
        P =  (K + (ridge tr(K) / n + 1e-8) I)^-1

    and from the first refresh on, each step replaces G by G P before Muon's momentum. A matrix wider than tall has n / m
    diagonal blocks instead of one K, one for each slice of its inputs; fused q, k, v share theirs. If a factorisation fails,
    that block keeps its previous P, and `failures` counts it. Raises ValueError as Muon does."""

    def __init__(self, params, lr=4e-4, momentum=0.95, nesterov=True, ns_steps=5, weight_decay=0.0, refresh_interval=32, ewma=0.95, ridge=0.2):
        if not (0 <= ewma < 1 and 0 < ridge < math.inf and refresh_interval >= 1):
            raise ValueError(f"ewma = {ewma}, ridge = {ridge}, refresh_interval = {refresh_interval}: ewma must be in [0, 1), the others > 0")
        super().__init__(params, lr, momentum, nesterov, ns_steps, weight_decay, dict(refresh_interval=refresh_interval, ewma=ewma, ridge=ridge))
        if other := [tuple(p.shape) for p in self.matrices if p.size(1) % min(p.shape)]:
            raise ValueError(f"a matrix of shape {other[0]}: must be square, tall, or a whole number of times wider than tall")
        self.failures = torch.zeros((), dtype=torch.int64, device=self.updates.device)

    def invert(self, A):
        """(inverse of each A (..., n, n), whether it is one (...))."""
        L, info = torch.linalg.cholesky_ex(A)
        good = (info == 0) & L.isfinite().all(-1).all(-1)
        return torch.cholesky_inverse(torch.where(good[:, None, None], L, torch.eye(A.size(-1), device=A.device))), good

    @torch.no_grad()
    def refresh(self, grams, tokens):
        """Updates K and P. grams: of each matrix in turn, the sum of z z^T over this process's inputs (n / m or 1, n, n); overwritten.
        tokens: N, over all processes."""
        if world_size() > 1:
            for work in [dist.reduce(gram, self.owner[p], async_op=True) for p, gram in zip(self.matrices, grams, strict=True)]:
                work.wait()
        grams = dict(zip(self.matrices, grams, strict=True))
        for group in self.param_groups:
            owned = [p for p in group["params"] if self.owner[p] == rank()]
            for n in {min(p.shape) for p in owned}:  # all n x n blocks are factorised as one batch
                mine, eye = [p for p in owned if min(p.shape) == n], torch.eye(n, device=self.updates.device)
                for p in mine:
                    if "K" not in self.state[p]:
                        self.state[p]["K"], self.state[p]["P"] = (scale * eye.repeat(len(grams[p]), 1, 1) for scale in (1e-3, 1))
                    self.state[p]["K"].mul_(group["ewma"]).add_(grams[p], alpha=(1 - group["ewma"]) / tokens)
                K, P = (torch.cat([self.state[p][key] for p in mine]) for key in "KP")  # (blocks, n, n)
                ridge = group["ridge"] * K.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-8
                inverse, good = self.invert(K + ridge[:, None, None] * eye)
                P = torch.where(good[:, None, None], inverse, P).split([len(grams[p]) for p in mine])
                torch._foreach_copy_([self.state[p]["P"] for p in mine], P)
                self.failures += (~good).sum()

    def precondition(self, p, G):
        P = self.state[p].get("P")  # None before the first refresh
        return G if P is None else torch.einsum("mbi,bij->mbj", G.view(G.size(0), P.size(0), -1), P.to(G.dtype)).reshape_as(G)


def build_optimizers(model, config):
    """(optimizer of the tied embedding and head, optimizer of the hidden matrices). Raises UserError if the second cannot be made."""
    adamw, momentum = dict(betas=(config.beta1, config.beta2), fused=True), dict(momentum=config.momentum, nesterov=config.nesterov)
    muon = dict(**momentum, ns_steps=config.ns_steps)
    newton = dict(**muon, refresh_interval=config.refresh_interval, ewma=config.ewma, ridge=config.ridge)
    table = torch.optim.AdamW([model.lm_head.weight], lr=config.learning_rate, weight_decay=0.0, **adamw)
    hidden = dict(params=list(model.hidden_matrices().values()), lr=config.hidden_learning_rate)
    built_in = {"adamw": (torch.optim.AdamW, adamw), "sgd": (torch.optim.SGD, momentum), "muon": (Muon, muon), "newton_muon": (NewtonMuon, newton)}
    try:
        if config.optimizer in built_in:
            optimizer, arguments = built_in[config.optimizer]
            return table, optimizer(**hidden, weight_decay=config.weight_decay, **arguments)
        module, name = config.optimizer.split(":")
        optimizer = getattr(importlib.import_module(module), name)
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure and closure.default is closure.empty:
            raise TypeError("its step() needs a closure, which the training loop does not have")
        hidden = optimizer(**hidden, **json.loads(config.optimizer_args))
        getattr(hidden, "train", bool)()  # a schedule-free optimizer also has eval(), which loads the weights to evaluate
        return table, hidden
    except Exception as error:  # whatever somebody else's code raises
        raise UserError(f"optimizer = '{config.optimizer}' with optimizer_args = '{config.optimizer_args}' cannot be made: "
                        f"{type(error).__name__}: {error}") from error


# ---- Distributed helpers: all of them also work in a single process without a process group -------------------------

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes(config):
    """Joins the process group when torchrun started this process. Returns the device of this process."""
    world, local_rank, gpus = int(os.environ.get("WORLD_SIZE") or 1), int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if config.device == "cuda" and not gpus:
        raise UserError(f"device = 'cuda', but torch {torch.__version__} finds no GPU here; use --device cpu, or install a CUDA build of torch")
    device = torch.device("cuda", local_rank) if config.device != "cpu" and gpus else torch.device("cpu")
    if world > 1:
        backend, timeout = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(seconds=config.collective_timeout)
        try:
            store, process, world = next(dist.rendezvous("env://", timeout=timeout))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"WORLD_SIZE is {world}, but the processes cannot find each other: {error}; start them with torchrun") from None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own store outlives a restart, with the old addresses
            store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=process, world_size=world, timeout=timeout)
    if device.type == "cuda":
        if local_rank >= gpus:
            raise UserError(f"process {local_rank} of this node has no GPU: there are {gpus}; start at most {gpus} processes a node")
        torch.cuda.set_device(device)
    elif sys.platform == "linux":
        # glibc gives the memory of large tensors back to the kernel and faults it in again in the same step; keeping it saves 10 to 20 %
        with contextlib.suppress(OSError, AttributeError):  # another libc
            for parameter, value in ((-1, 2 ** 30), (-2, 2 ** 26), (-3, 2 ** 25)):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(parameter, value)
    return device


def first_to_fail():
    """Whether this is the first process of the job that fails: the others end because of it, and need not say so."""
    with contextlib.suppress(RuntimeError):  # the store's process is gone
        return dist.group.WORLD.get_group_store().add("failed", 1) == 1 if dist.is_initialized() else (os.environ.get("LOCAL_RANK") or "0") == "0"
    return True


def lost_processes(error):
    """A sentence about the RuntimeError of a collective, that names the processes which do not answer within 5 seconds."""
    store, missing = dist.group.WORLD.get_group_store(), []
    for other in range(world_size()):
        try:
            store.set(f"alive/{rank()}", "")
            store.wait([f"alive/{other}"], timedelta(seconds=5))
        except RuntimeError:
            missing.append(str(other))
    reason = f"process {', '.join(missing)} does not answer any more" if 0 < len(missing) < world_size() else "processes lost each other"
    return f"process {rank()}: {reason} ({str(error).splitlines()[0].split('. ')[0]}); what was saved is kept; continue with --resume"


def assign_owners(costs, world):
    """Owner (0 .. world - 1) of each matrix: the most costly first, each to the process with the least work so far."""
    load, owners = [0] * world, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(world), key=lambda r: load[r])
        load[owners[i]] += costs[i]
    return owners


def reduced(op, *values):
    """Sum (op "sum") or maximum ("max") of each of these numbers over all processes, in float64."""
    numbers = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(numbers, getattr(dist.ReduceOp, op.upper()))
    return numbers.tolist()


# ---- Checkpoints: process 0 writes and reads them, in a form that any number of processes can load ------------------

MAY_CHANGE_ON_RESUME = {"device_batch_size", "compile", "collective_timeout", "log_dir", "run_name", "log_every", "save_every", "resume",
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
        raise UserError(f"cannot write {path}: {error.strerror}; what was there before is untouched") from None


def checkpoints(folder):
    """The checkpoints of the run in `folder`, the oldest first."""
    return sorted((p for p in folder.glob("checkpoints/step_*.pt") if p.stem[5:].isdecimal()), key=lambda p: int(p.stem[5:]))


def save_checkpoint(log, config, model, optimizers, progress):
    """Writes checkpoints/step_XXXXXX.pt and keeps the one before it. All processes must call it. UserError if it cannot, or a weight is not finite."""
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(f"{name} is not finite after step {progress['step']}, so nothing was saved; start another run with lower learning rates")
    states = [optimizer.state_dict() for optimizer in optimizers]
    if rank() == 0:
        torch.save(dict(config=dataclasses.asdict(config), code_sha256=code_sha256(), model=model.state_dict(), optimizers=states,
                        progress=progress, rng=torch.get_rng_state()), content := io.BytesIO())  # not to the file: write_atomically() reports a full disk
        write_atomically(log.folder / f"checkpoints/step_{progress['step']:06d}.pt", content.getbuffer())
        for old in checkpoints(log.folder)[:-2]:
            old.unlink()


def find_checkpoint(config, train_shards, val_shards):
    """(checkpoint that config.resume names, folder of its run); Nones if `auto` finds none. UserError if this run could not have written it."""
    path = Path(config.log_dir, config.run_name) if config.resume == "auto" else Path(config.resume)
    candidates = [path] if path.is_file() else checkpoints(path)[::-1]
    for candidate in candidates:
        try:
            checkpoint = torch.load(candidate, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever the bytes make it raise
            print(f"warning: {candidate} cannot be loaded ({type(error).__name__}), looking for an older one", file=sys.stderr)
            continue
        folder = candidate.resolve().parent.parent
        if not isinstance(checkpoint, dict) or "code_sha256" not in checkpoint or candidate.resolve().parent.name != "checkpoints":
            raise UserError(f"{candidate}: not a checkpoint of train_gpt2.py in the checkpoints/ of its run's folder")
        if checkpoint["code_sha256"] != code_sha256():
            raise UserError(f"{candidate} was written by another version of train_gpt2.py; resume with the one in the run's folder")
        for name, theirs in checkpoint["config"].items():
            if name not in MAY_CHANGE_ON_RESUME and theirs != getattr(config, name):
                raise UserError(f"{candidate} is of a run with {name} = {theirs!r}, not {getattr(config, name)!r}; add --{name} {theirs!r}")
        if config.run_name not in ("", folder.name):
            raise UserError(f"resume = '{config.resume}' continues the run in {folder}, not run_name = '{config.run_name}'; leave that out")
        try:
            facts = checkpoint.setdefault("facts", json.loads((folder / "run.json").read_text()))
            for shards, name in ((train_shards, "train_shards"), (val_shards, "val_shards")):
                began, now = facts[name], shards.describe()  # without an order of their own, shards may come or go at the end
                if began != now and (shards.order is not None or shards.allow_repeat or began[:len(now)] != now[:len(began)]):
                    raise UserError(f"'{shards.pattern}' has other shards than the run in {folder} began with; restore them")
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(f"{folder} has checkpoints but no run.json that can be read; restore it, or move the checkpoints away") from None
        return checkpoint, folder
    if config.resume == "auto" and not candidates:
        if (path / "run.json").is_file() and '"end"' in (path / "run.json").read_text():
            raise UserError(f"{path} holds a finished run without a checkpoint; take another run_name, or delete it")
        return None, None
    raise UserError(f"resume = '{config.resume}': no checkpoint there that can be loaded; name a step_*.pt file or the folder of a run that has one")


# ---- Logging --------------------------------------------------------------------------------------------------------

# dense bf16 matrix products, FLOP/s, from NVIDIA's data sheets; the first that is part of the device's name
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 225e13, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
WANDB_SECONDS = 60
# a separate process that follows metrics.jsonl: a wandb that fails or hangs neither ends nor slows the run
WANDB = """
import json, os, select, sys
project, folder = sys.argv[1:]
try:
    import wandb
    run = wandb.init(project=project, name=os.path.basename(folder), config=json.load(open(folder + "/run.json"))["config"], dir=folder)
    file, ended = open(folder + "/metrics.jsonl"), False
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], 1)[0])  # the trainer has closed it, or is gone
        for record in map(json.loads, file):
            run.log(record, step=record["step"])
    run.finish()
except Exception as error:
    print(f"warning: wandb failed ({type(error).__name__}: {error}); the run continues without it", file=sys.stderr)
"""


def describe_machine(device):
    """The software and hardware of this process."""
    def output(*command):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=30).stdout.strip()
    cpu, gpu = platform.processor() or platform.machine(), device.type == "cuda"
    with contextlib.suppress(OSError, AttributeError):  # other systems, other processors
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, cuda=torch.version.cuda,
                triton=triton and triton.__version__, platform=platform.platform(), cpu=cpu, cpu_threads=torch.get_num_threads(),
                gpu=torch.cuda.get_device_name(device) if gpu else None, nvidia_smi=gpu and output("nvidia-smi") or "",
                git_commit=output("git", "rev-parse", "HEAD") or None, git_changes=bool(output("git", "status", "--porcelain", "-uno")))


class Log:
    """The folder of a run, its files and the terminal. Only process 0 writes."""

    def __init__(self, config, checkpoint, folder, facts, source):
        """Opens `folder` to continue from `checkpoint`, or a new one; run.json gets `facts`, optimizer.py the file `source`, if any."""
        self.config, self.folder, self.files, self.live, self.wandb = config, folder, {}, sys.stdout and sys.stdout.isatty(), None
        if rank() != 0:
            return
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # names may have letters that the terminal lacks
        if not checkpoint:
            self.folder = Path(config.log_dir, config.run_name or time.strftime("%Y%m%d-%H%M%S_") + config.optimizer.replace(":", "-"))
            if config.resume != "auto" and ((self.folder / "log.txt").exists() or checkpoints(self.folder)):
                raise UserError(f"{self.folder} already holds a run; take another run_name, or resume that run with --resume auto")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.facts = checkpoint["facts"] if checkpoint else {**facts, "start": now, "resumed": []}
        if self.facts.get("optimizer_sha256") != facts["optimizer_sha256"]:
            raise UserError(f"the run in {folder} began with another version of {config.optimizer}, which it keeps as optimizer.py; restore that")
        try:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            for name in ("log.txt", "metrics.jsonl"):  # what was logged after the checkpoint will be logged again
                self.files[name] = file = open(self.folder / name, "a", buffering=1, encoding="utf-8", errors="replace")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if isinstance(error, BlockingIOError):  # else the file system has no locks
                        raise UserError(f"another process is writing to {self.folder}; let it end, or take another run_name") from None
                if not checkpoint and checkpoints(self.folder):
                    raise UserError(f"{self.folder} has a checkpoint that was not there a moment ago; start again, to continue from it")
                file.truncate(min(os.path.getsize(self.folder / name), checkpoint["progress"]["log_bytes"][name]) if checkpoint else 0)
            for path in checkpoints(self.folder):  # and what was saved after it, saved again
                if int(path.stem[5:]) > checkpoint["progress"]["step"]:
                    path.unlink()
            for path, name in ((__file__, "train_gpt2.py"), (source, "optimizer.py")):
                if path and Path(path).resolve() != (self.folder / name).resolve():
                    shutil.copyfile(path, self.folder / name)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another --log_dir") from None
        if checkpoint:  # what the run started with stays, as in log.txt
            self.facts["resumed"].append(dict(time=now, **{name: facts[name] for name in ("config", "machine", "world_size")}))
        else:
            machine = json.dumps({**facts["machine"], "nvidia_smi": ""}, indent=1) + "\n" + facts["machine"]["nvidia_smi"]
            for part in (Path(__file__).read_text(), machine, json.dumps(facts["config"], indent=1)):
                self.write("log.txt", part.rstrip() + "\n" + "=" * 100)
        write_atomically(self.folder / "run.json", json.dumps(self.facts, indent=1).encode())
        if config.wandb_project:
            self.wandb = subprocess.Popen([sys.executable, "-c", WANDB, config.wandb_project, str(self.folder)], stdin=subprocess.PIPE,
                                          start_new_session=True)

    def end(self, **facts):
        """Adds `facts` of a finished run to run.json, and gives wandb WANDB_SECONDS to send what it has."""
        if facts and self.files:
            self.facts.update(facts, end=datetime.now(timezone.utc).isoformat(timespec="seconds"))
            write_atomically(self.folder / "run.json", json.dumps(self.facts, indent=1).encode())
        if self.wandb:
            self.wandb.stdin.close()
            try:
                self.wandb.wait(WANDB_SECONDS)
            except subprocess.TimeoutExpired:
                self.wandb.kill()
                print("warning: wandb does not finish; the run is complete without it", file=sys.stderr)

    def write(self, name, text):
        try:
            self.files[name].write(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.folder / name}: {error.strerror}; free some space and use --resume") from None

    def print(self, text, end="\n"):
        """A line for log.txt and the terminal."""
        if self.files:
            self.write("log.txt", text)
            try:
                print(("\r\033[K" if self.live else "") + text, end=end, flush=True)
            except OSError:  # the terminal or the pipe is gone; the run continues
                sys.stdout = None

    def loss(self, name, step, train_time, losses, **more):
        """Logs and returns the mean of `losses`, one for each process, after train_time seconds of training. UserError if one is not finite."""
        loss, N = sum(losses) / len(losses), self.config.num_iterations
        if self.files:
            text = (f"step:{step}/{N} {name}:{loss:.4f} train_time:{1000 * train_time:.0f}ms "
                    f"step_avg:{1000 * train_time / step if step else math.nan:.2f}ms")
            if name == "val_loss" or self.live:
                self.print(text, "\n" if name == "val_loss" else f" {train_time / step * (N - step):.0f} s left")
            else:
                self.write("log.txt", text)
            self.write("metrics.jsonl", json.dumps({"step": step, name: loss, **more, "train_time_ms": round(1000 * train_time, 3),
                                                    "tokens": step * self.config.batch_size * self.config.sequence_length}))
        if not math.isfinite(loss):
            where = f" on process {', '.join(str(r) for r, value in enumerate(losses) if not math.isfinite(value))}" if len(losses) > 1 else ""
            raise UserError(f"the {name.replace('_', ' ')} is {loss} at step {step}{where}; lower learning_rate or hidden_learning_rate")
        return loss


# ---- main() ---------------------------------------------------------------------------------------------------------

def wrapped(model, config, device):
    """(the model under torch.compile, if asked for and if it works here, and in DDP, if there are several processes; note on what failed)."""
    note = ""
    if config.compile:
        from torch._inductor import config as inductor
        # each gradient written to its place in that of the fused q, k, v takes half of the time of one kernel with three branches
        options = {key: 2 for key in ("max_pointwise_cat_inputs", "max_complex_pointwise_cat_inputs") if hasattr(inductor, key)}
        try:
            torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(8, device=device))
        except Exception as error:  # no Triton, no C compiler, an old card: each has an exception of its own
            note = f"torch.compile does not work here ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}): training without it"
        if reduced("max", bool(note)) == [0]:
            model = torch.compile(model, dynamic=False, options=options)
        else:
            note = note or "torch.compile does not work on another process: training without it"
    if world_size() > 1:
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # since torch 2.13
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True,
                                        **{"forward_sync_buffers" if new else "broadcast_buffers": False})
    return model, note


def choose_micro_batch(config, device, per_process, dtype):
    """Sequences in one forward pass: device_batch_size or, without one, the largest power of two that divides per_process and fits the GPU.
    Per token a bf16 forward pass keeps 37 L C bytes compiled, else 40.5 (records/bench); the rest of the 45 allowed for is for the backward pass."""
    tokens, rows = 16384, config.vocab_size + 128  # on a CPU more tokens at a time are no faster
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory * min(0.9, torch.cuda.get_per_process_memory_fraction(device))
        # for each parameter: weight, gradient, state, update, statistics; and the logits of a chunk
        memory -= 32 * (12 * config.n_layer * config.n_embd ** 2 + rows * config.n_embd) + 2 * CHUNK * rows
        tokens = memory / (22.5 * dtype.itemsize * config.n_layer * config.n_embd)
    fitting = [2 ** i for i in range(32) if per_process % 2 ** i == 0 and 2 ** i * config.sequence_length <= tokens]
    return config.device_batch_size or max(fitting, default=1)


def accumulate(model, micro_batches, collect, dtype):
    """Adds the gradient of the mean loss of `micro_batches`, [(idx, targets), ...]; DDP averages it. Returns that loss and, with `collect`, grams."""
    total, total_grams = 0.0, []
    for i, (idx, targets) in enumerate(micro_batches, start=1):
        alone = i == len(micro_batches) or not isinstance(model, DistributedDataParallel)
        with contextlib.nullcontext() if alone else model.no_sync():
            with torch.autocast(idx.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss, grams = model(idx, targets, collect)
            (loss / len(micro_batches)).backward()
        total += loss.detach() / len(micro_batches)
        if collect:
            total_grams = [a.add_(b) for a, b in zip(total_grams, grams)] if total_grams else grams
    return total, total_grams


def evaluate(model, shards, config, device, dtype, micro_batch, signals):
    """Mean loss over exactly val_tokens tokens, shared by all processes. None if a signal came meanwhile."""
    total, mine = 0.0, range(rank(), config.val_tokens // config.sequence_length, world_size())
    batches = [mine[i:i + micro_batch] for i in range(0, len(mine), micro_batch)]
    full = [[*numbers, *[0] * (micro_batch - len(numbers))] for numbers in batches]  # the last batch is padded
    # with torch.compile, use the graph of the training step: one without gradients would be a third to build
    with torch.set_grad_enabled(config.compile), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        for numbers, (idx, targets) in zip(batches, prefetched(shards, full, device)):
            if signals:
                break
            targets[len(numbers):] = -1  # padding does not count
            loss = model(idx.to(device), targets.to(device))[0].detach()  # before the next pass: a graph would keep its activations alive
            total += loss.double() * (len(numbers) * config.sequence_length)
    total, ended = reduced("sum", float(total), len(signals))
    return None if ended else total / config.val_tokens


def warm_up(model, raw_model, config, device, dtype, micro_batch):
    """Builds graphs and memory pools with steps on dummy data, and restores the weights. UserError for a state no checkpoint can hold."""
    rng, weights = torch.get_rng_state(), {name: p.detach().cpu().clone() for name, p in raw_model.state_dict().items()}
    optimizers = _, hidden = build_optimizers(raw_model, config)  # a second pair, thrown away after this
    idx, targets = torch.randint(config.vocab_size, (2, micro_batch, config.sequence_length), generator=torch.Generator().manual_seed(0)).to(device)
    try:
        for collect in (False, False, True) if hasattr(hidden, "refresh") and "refresh_interval" in hidden.defaults else (False, False):
            _, grams = accumulate(model, [(idx, targets)] * 2, collect, dtype)  # DDP rearranges its buckets after the first
            if collect:
                hidden.refresh(grams, 2 * idx.numel() * world_size())
            for optimizer in optimizers:
                optimizer.step()
    except torch.OutOfMemoryError:
        raise UserError(f"{micro_batch} sequences of {config.sequence_length} tokens at a time do not fit into the memory of the GPU; set "
                        + (f"device_batch_size = {micro_batch // 2}" if micro_batch > 1 else "a smaller sequence_length or model")) from None
    raw_model.zero_grad(set_to_none=True)
    if ":" in config.optimizer:  # known now, rather than at the first checkpoint or when the run resumes
        try:
            torch.save(hidden.state_dict(), content := io.BytesIO())
            hidden.load_state_dict(torch.load(io.BytesIO(content.getvalue()), map_location="cpu", weights_only=True))
        except Exception as error:  # whatever somebody else's code raises
            if isinstance(error, RuntimeError):  # no memory, or a process is gone
                raise
            what, = (re.findall(r"GLOBAL (\S+)", str(error)) or str(error).splitlines())[:1] or [""]  # GLOBAL: a class or function
            raise UserError(f"the state of optimizer = '{config.optimizer}' cannot be saved and loaded ({type(error).__name__}: {what}); "
                            "keep only tensors, numbers and strings there") from error
    raw_model.load_state_dict(weights), torch.set_rng_state(rng)


def synchronized_time(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def results(config, model, device, steps, train_time, val_loss, best, reached):
    """(facts for run.json, text for the log) at the end of a run. reached: (step, seconds) of the first evaluation at the target, or None."""
    speed, gpu = steps * config.batch_size * config.sequence_length / max(train_time, 1e-9), device.type == "cuda"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes there, else KiB
    memory, = reduced("max", torch.cuda.max_memory_allocated(device) if gpu else resident)
    peak = next((flops for name, flops in PEAK_FLOPS.items() if gpu and name in torch.cuda.get_device_name(device)), None)
    utilisation = model.flops_per_token() * speed / (peak * world_size()) if peak else None
    text = (f"final loss   {val_loss:.4f}; target {config.target_val_loss:g} "
            + (f"met at step {reached[0]}, {reached[1]:.1f} s" if reached else "not met")
            + f"\ntraining     {train_time:.1f} s, {1000 * train_time / max(1, steps):.1f} ms a step, {speed:,.0f} tokens/s"
            + f"\nmemory       {memory / 2 ** 30:.2f} GiB at most on a {'GPU' if gpu else 'process'}"
            + (f"\nutilisation  {utilisation:.1%} of {world_size()} x {peak / 1e12:.0f} TFLOP/s" if peak else ""))
    return dict(final_val_loss=val_loss, best_val_loss=best, train_time_ms=1000 * train_time, steps=steps, tokens_per_second=speed,
                target_reached=reached, peak_memory_bytes=int(memory), utilisation=utilisation), text


def run(config):
    """This process's part of a training run. Returns the exit code: 0, or 128 + the signal that ended it."""
    per_process = sequences_per_process(config, int(os.environ.get("WORLD_SIZE") or 1))
    device = start_processes(config)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU multiplies fp32: preconditioning
    B, T, N = config.batch_size, config.sequence_length, config.num_iterations
    train_shards = Shards(config.input_bin, T, config.vocab_size, config.allow_repeat, config.data_seed)
    train_shards.require(N * B, f"{N} steps of {B} sequences")
    val_shards = Shards(config.input_val_bin, T, config.vocab_size)
    val_shards.require(config.val_tokens // T, "validation")
    found = [*find_checkpoint(config, train_shards, val_shards)] if config.resume and rank() == 0 else [None, None]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    checkpoint, folder = found

    torch.manual_seed(config.seed)
    raw_model = GPT(config).to(device)
    optimizers = _, hidden = build_optimizers(raw_model, config)
    dtype = fast_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    model, note = wrapped(raw_model, config, device)
    micro_batch = choose_micro_batch(config, device, per_process, dtype)
    q = torch.empty(1, config.n_head, T, config.n_embd // config.n_head, dtype=dtype, device=device, requires_grad=True)
    source = inspect.getsourcefile(type(hidden)) if ":" in config.optimizer else None
    log = Log(config, checkpoint, folder, dict(
        config=dataclasses.asdict(config), machine=describe_machine(device), world_size=world_size(), device=device.type, dtype=str(dtype),
        compiled=config.compile and not note, attention=SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name.lower(),
        micro_batch=micro_batch, code_sha256=code_sha256(), optimizer_sha256=hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else None,
        parameters=raw_model.num_parameters(), hidden_parameters=sum(p.numel() for p in raw_model.hidden_matrices().values()),
        tokens_per_step=B * T, train_shards=train_shards.describe(), val_shards=val_shards.describe()), source)
    no_bf16 = device.type == "cuda" and config.dtype == "auto" and dtype == torch.float32
    for line in filter(None, (note, f"{torch.cuda.get_device_name(device)} has no bfloat16: training in float32" if no_bf16 else "")):
        log.print(line)
    warm_up(model, raw_model, config, device, dtype, micro_batch)

    start, train_time, best, reached, failures, signals = 0, 0.0, math.inf, None, 0, []
    if checkpoint:
        start, train_time, best, reached = (checkpoint["progress"][key] for key in ("step", "train_time", "best", "reached"))
        reached = reached if checkpoint["config"]["target_val_loss"] == config.target_val_loss else None
        raw_model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        torch.set_rng_state(checkpoint["rng"])
        log.print(f"resumed at step {start}")
    log.print(f"{config.optimizer}: {raw_model.num_parameters():,} parameters, {N} steps of {B * T:,} tokens, {world_size()} process(es) on "
              f"{device.type} with {micro_batch} of {per_process} sequences at a time, logs in {log.folder}")
    batches = prefetched(train_shards, (range(i, i + per_process) for i in range(start * B + rank() * per_process, N * B, B)), device)
    for number in (signal.SIGINT, signal.SIGTERM):  # from now on they end the run after the step
        signal.signal(number, lambda number, frame: signals.append(number))

    stopped = lambda: int(reduced("max", max(signals, default=0))[0])  # the signal that any process has caught, or 0
    clock = synchronized_time(device)
    for step in range(start, N + 1):
        stop, last = stopped(), step == N
        evaluates, saves = (last or (every and step % every == 0) for every in (config.val_loss_every, config.save_every))
        if stop or evaluates or saves:
            train_time += synchronized_time(device) - clock if step > start else 0.0  # not the moment before the first step
            # a checkpoint holds the state before the evaluation, so that a run resumed from it logs that evaluation only once
            progress = dict(step=step, train_time=train_time, best=best, reached=reached,
                            log_bytes={name: os.path.getsize(log.folder / name) for name in log.files})
            if evaluates and not stop:
                getattr(hidden, "eval", bool)()
                val_loss = evaluate(model, val_shards, config, device, dtype, micro_batch, signals)
                if val_loss is None:
                    stop = stopped()
                else:
                    best = min(best, log.loss("val_loss", step, train_time, [val_loss]))
                    if val_loss <= config.target_val_loss and not reached:
                        reached = step, train_time
                        log.print(f"target {config.target_val_loss} reached at step {step}, {train_time:.1f} s")
            ends = stop or last or (evaluates and reached and config.stop_at_target)
            if (step > start or last and hasattr(hidden, "eval")) and (ends or saves):
                save_checkpoint(log, config, raw_model, optimizers, progress)
            if ends:
                break
            getattr(hidden, "train", bool)()
            clock = synchronized_time(device)

        # ------------------------------------------------- the training step -------------------------------------------------
        for optimizer in optimizers:
            for group in optimizer.param_groups:  # an optimizer of one's own may have groups of different rates
                group["lr"] = group.setdefault("initial_lr", group.get("lr", 0.0)) * learning_rate_scale(config, step)
        idx, targets = (t.to(device, non_blocking=True).split(micro_batch) for t in next(batches))
        collect = hasattr(hidden, "refresh") and (step + 1) % hidden.defaults.get("refresh_interval", math.inf) == 0
        loss, grams = accumulate(model, list(zip(idx, targets)), collect, dtype)
        if collect:
            hidden.refresh(grams, B * T)
        for optimizer in optimizers:
            optimizer.step()
        raw_model.zero_grad(set_to_none=True)
        # ----------------------------------------------------------------------------------------------------------------------

        if (step + 1) % config.log_every == 0 or step + 1 == N:
            *losses, failed = reduced("sum", *(float(loss) if r == rank() else 0.0 for r in range(world_size())), float(getattr(hidden, "failures", 0)))
            log.loss("train_loss", step + 1, train_time + time.perf_counter() - clock, losses, learning_rate_scale=learning_rate_scale(config, step),
                     data_wait_ms=round(1000 * train_shards.waited, 3), failed_factorisations=int(failed))
            train_shards.waited = 0.0
            if failed > failures:
                log.print(f"warning: {int(failed - failures)} factorisations failed up to step {step + 1}; those blocks keep their last preconditioner")
                failures = failed
    facts, text = results(config, raw_model, device, step, train_time, val_loss, best, reached) if not stop else (
        {}, f"stopped by {signal.Signals(stop).name} after step {step}" + (f"; continue with --resume {log.folder}" if step else ""))
    log.print(text)
    log.end(**facts)
    reduced("max", 0)  # no process exits before all have reached this line
    return 128 + stop if stop else 0


def main():
    try:
        code = run(load_config(sys.argv[1:]))
    except (Exception, KeyboardInterrupt) as error:  # Ctrl-C before the first step
        message, code = ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else (str(error), 1)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in message:
            message = f"{message.splitlines()[0]} Set a smaller device_batch_size or model."
        elif isinstance(error, RuntimeError) and world_size() > 1 and re.search("gloo|nccl|connection|timed out", message, re.IGNORECASE):
            message = lost_processes(error)
        elif not isinstance(error, (UserError, OSError, KeyboardInterrupt)):
            raise  # a bug
        if first_to_fail():
            print(f"error: {message}", file=sys.stderr, flush=True)
    if world_size() > 1:
        print(end="", flush=True)
        os._exit(code)  # at once: tearing down a process group can wait for processes that are gone, or abort after all work is done
    sys.exit(code)


if __name__ == "__main__":
    sys.modules["train_gpt2"] = sys.modules["__main__"]  # for an optimizer that imports train_gpt2: not a second copy
    main()
