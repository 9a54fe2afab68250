"""Reading files, and the form of what is in run.json, metrics.jsonl and track.toml.

A kind says what a value must be. It is one of the sentences in IS, [kind] for a list of that kind, or
{name: kind} for an object. A "?" at the end of a name marks one that may be missing. "*" stands for every
name that is not listed; without it, other names are not checked.
"""
import json
import math
import os
import stat

from train_gpt2 import UserError

LARGEST_LOG = 2 ** 26  # bytes
DEEPEST_JSON = 50  # lists and objects in one another: Python's own limit is met at a depth that varies

COUNT = "a non-negative integer"
COUNT_OR_NULL = "a non-negative integer or null"
FINITE = "a finite number"
NUMBER_OR_NAN = "a number or NaN"
FLAG = "true or false"
TEXT = "a string"
TEXT_OR_NULL = "a string or null"
SIMPLE = "a string, a finite number, true, false or null"


def is_count(value):
    return type(value) is int and 0 <= value < 2 ** 63


def is_finite(value):
    return type(value) in (int, float) and abs(value) < 1e15


def is_number_or_nan(value):
    return type(value) is float or is_finite(value)


def is_simple(value):
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is int:
        return abs(value) < 2 ** 63
    return value is None or type(value) in (str, bool)


IS = {
    COUNT: is_count,
    COUNT_OR_NULL: lambda value: value is None or is_count(value),
    FINITE: is_finite,
    NUMBER_OR_NAN: is_number_or_nan,
    FLAG: lambda value: type(value) is bool,
    TEXT: lambda value: type(value) is str,
    TEXT_OR_NULL: lambda value: value is None or type(value) is str,
    SIMPLE: is_simple,
}

# the speedrun's track: its model, batch and validation
SPEEDRUN = {
    "batch_size": 512,
    "sequence_length": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "vocab_size": 50257,
    "val_tokens": 10485760,
}

SHARD = {
    "name": TEXT,
    "tokens": COUNT,
    "sha256_of_first_mebibyte?": TEXT,
    "sha256_of_header_and_size?": TEXT,  # before 2026-12
}
MACHINE = {
    "torch": TEXT,
    "cpu": TEXT_OR_NULL,
    "cpu_threads": COUNT_OR_NULL,
    "gpu": TEXT_OR_NULL,
    "git_commit": TEXT_OR_NULL,
    "git_changes": FLAG,
}
CONFIG = {
    **dict.fromkeys(SPEEDRUN, COUNT),
    "num_iterations": COUNT,
    "val_loss_every": COUNT,
    "log_every": COUNT,
    "seed": COUNT,
    "data_seed?": COUNT,
    "target_val_loss": FINITE,
    "stop_at_target": FLAG,
    "allow_repeat": FLAG,
    "optimizer": TEXT,
    "run_name": TEXT,
    "*": SIMPLE,
}
RUN_JSON = {
    "config": CONFIG,
    "machine": MACHINE,
    "world_size": COUNT,
    "dtype": TEXT,
    "code_sha256": TEXT,
    "optimizer_sha256?": TEXT_OR_NULL,
    "parameters": COUNT,
    "tokens_per_step": COUNT,
    "train_shards": [SHARD],
    "val_shards": [SHARD],
    "resumed": [{"machine": MACHINE, "world_size": COUNT}],
    "start": TEXT,
    "end?": TEXT,
    "steps?": COUNT,
    "final_val_loss?": FINITE,
}
METRICS = {
    "step": COUNT,
    "train_time_ms": FINITE,
    "val_loss?": NUMBER_OR_NAN,
    "train_loss?": NUMBER_OR_NAN,
}


def shown(value):
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return repr(value)[:40]


def mismatch(value, kind, name, complete):
    """How `value`, called `name`, differs from `kind`, in words; "" if it does not.

    If `complete`, a missing name is a difference too.
    """
    parts = []
    if isinstance(kind, list):
        if not isinstance(value, list):
            return f"{name} is {shown(value)}, not a list"
        for i, part in enumerate(value):
            parts.append((part, kind[0], f"{name}[{i}]"))
    elif isinstance(kind, dict):
        if not isinstance(value, dict):
            return f"{name} is {shown(value)}, not an object"
        if complete:
            for key in kind:
                if key[-1] not in "?*" and key not in value:
                    return f"{name} lacks {key}"
        known = {key.rstrip("?"): part for key, part in kind.items()}
        for key, part in value.items():
            if key in known or "*" in known:
                parts.append((part, known.get(key, known.get("*")), f"{name}.{key}"))
    elif not IS[kind](value):
        return f"{name} is {shown(value)}, not {kind}"
    for part in parts:
        difference = mismatch(*part, complete)
        if difference:
            return difference
    return ""


def read_bytes(path):
    """What is in a file. UserError if it cannot be read, or is no regular file: a pipe would never end."""
    try:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is not a regular file")
        if facts.st_size > LARGEST_LOG:
            raise ValueError(f"it has {facts.st_size:,} bytes, more than any log")
        if facts.st_size == 0:
            return b""  # also what the kernel shows under /proc, where a read may wait for ever
        with open(path, "rb") as file:
            return file.read(LARGEST_LOG)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_text(path):
    """The text in a file, its lines ended by newlines. What is no UTF-8 is replaced.

    UserError as from read_bytes().
    """
    text = read_bytes(path).decode("utf-8", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_deep(value):
    """Whether lists and objects lie more than DEEPEST_JSON deep in one another."""
    level = [value]
    for _ in range(DEEPEST_JSON):
        inner = []
        for part in level:
            if isinstance(part, dict):
                inner += part.values()
            elif isinstance(part, list):
                inner += part
        level = inner
    return any(isinstance(part, (dict, list)) for part in level)


def read_json(text, kind, name, complete=False):
    """The JSON value in `text`. UserError, which calls it `name`, unless it is of `kind`, see mismatch()."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} cannot be read: it is not valid JSON ({str(error):.80})") from None
    if is_deep(value):
        raise UserError(f"{name} cannot be read: it is nested more than {DEEPEST_JSON} deep")
    difference = mismatch(value, kind, "it", complete)
    if difference:
        raise UserError(f"{name} cannot be read: {difference}")
    return value
