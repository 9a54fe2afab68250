"""Verify token shards and show what is in them.

    python data/check_shards.py SHARD...

For each shard: whether its header and size are right, whether its SHA-256 is the one in the manifest
(NAME.json beside it), how many documents and tokens it has, the most frequent tokens, and how its text
begins. Exits with 1 if any shard is bad. Takes a second for a shard of 200 MB, after 2 seconds to start.
"""
import argparse
import functools
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command, printable  # first: it says what is not installed
import numpy as np

from data.shards import END_OF_TEXT, VOCABULARY, gpt2_encoding, manifest_entry
from train_gpt2 import UserError, open_shard

BLOCK = 1 << 22  # tokens counted at once
ROWS = 10  # of the table of frequent tokens
LINES = 5  # of the text
COLUMNS = 100


def decode_bytes(tokens):
    documents = bytes(tokens.astype(np.uint8)).split(b"\xff")
    return b"<|endoftext|>".join(documents).decode(errors="replace")


@functools.cache
def decoder(tokenizer):
    """decode(tokens) -> text; None, after a note, if tiktoken cannot get its files."""
    if tokenizer == "bytes":
        return decode_bytes
    try:
        encoding = gpt2_encoding()
    except UserError as error:
        print(f"tokens are not decoded: {error}")
        return None
    return lambda tokens: encoding.decode(tokens.tolist())


def find_manifest(path):
    """(file, content) of the manifest beside the shard; the content is None if there is none.

    Raises UserError if it is damaged.
    """
    file = path.with_name(re.sub(r"_(val|train)_\d+\.bin$|\.bin$", "", path.name) + ".json")
    try:
        if file.exists() and not file.is_file():  # reading a pipe would wait for ever
            raise OSError("it is not a regular file")
        manifest = json.loads(file.read_text())
        shards = {str(shard["file"]): (shard["tokens"], shard["sha256"]) for shard in manifest["shards"]}
        return file, dict(tokenizer=str(manifest["tokenizer"]), source=manifest["source"], shards=shards)
    except FileNotFoundError:
        return file, None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"its manifest {file.name} cannot be read ({error!r}); make the data set again") from None


def compare_with_manifest(entry, file, listed):
    """Raises UserError unless `listed`, {shard: (tokens, SHA-256)} of the manifest `file`, has this entry."""
    name = entry["file"]
    if name not in listed:
        raise UserError(
            f"{file.name} does not list it: it is left from another run, or was added since; "
            "make the data set again, or delete it "
            "(a shard of FineWeb: run data/fineweb.py, which asks the hub)")
    if listed[name] != (entry["tokens"], entry["sha256"]):
        raise UserError(
            f"changed since it was written: SHA-256 {entry['sha256']} instead of {listed[name][1]} "
            f"in {file.name}; make it again")


def count(tokens, start):
    """How often each of the 65536 values occurs in `tokens` (n,), and the positions of `start`."""
    counts = np.zeros(65536, dtype=np.int64)
    starts = [np.zeros(0, np.int64)]
    for i in range(0, len(tokens), BLOCK):
        counts += np.bincount(tokens[i:i + BLOCK], minlength=65536)
        starts.append(i + np.flatnonzero(tokens[i:i + BLOCK] == start))
    return counts, np.concatenate(starts)


def show(path, tokenizer):
    """Prints what the shard `path` holds; `tokenizer` applies if no manifest names one.

    Raises UserError if the shard is bad.
    """
    entry = manifest_entry(path)
    tokens = open_shard(path)
    file, manifest = find_manifest(path)
    if manifest:
        compare_with_manifest(entry, file, manifest["shards"])
        tokenizer = manifest["tokenizer"]
        told = f"according to {file.name}"
    elif tokenizer:
        told = "as --tokenizer says"
    else:
        ends_as_bytes = len(tokens) and tokens.max() == END_OF_TEXT["bytes"]
        tokenizer = "bytes" if ends_as_bytes else "gpt2"
        told = "a guess; set it with --tokenizer"
    if tokenizer not in VOCABULARY:
        raise UserError(f"{file.name} names the tokenizer '{tokenizer}', not {' or '.join(VOCABULARY)}; "
                        "make the data set again")
    counts, starts = count(tokens, END_OF_TEXT[tokenizer])
    used = np.flatnonzero(counts)
    if len(used) and used[-1] >= VOCABULARY[tokenizer]:
        raise UserError(
            f"token {used[-1]} is outside the {VOCABULARY[tokenizer]} tokens of {tokenizer} ({told}); "
            "make it again")
    decode = decoder(tokenizer)
    show_origin(path, entry, file, manifest)
    documents = f"{len(tokens):,} tokens ({tokenizer}, {told}); {len(starts):,} documents start here"
    if len(starts):
        lengths = np.diff(starts, append=len(tokens))
        documents += f", with {lengths.min():,} to {lengths.max():,} tokens, median {np.median(lengths):,.0f}"
    print(f"  {documents}")
    if len(tokens):
        show_frequent_tokens(counts, VOCABULARY[tokenizer], decode)
        if decode:
            show_text(decode(tokens[:2000]))


def show_origin(path, entry, file, manifest):
    """Prints that the shard is good, by what, and what its manifest says about the data set."""
    if not manifest:
        print(f"{path}: ok by its header; there is no {file.name} to compare its SHA-256 with")
        print(f"  SHA-256 {entry['sha256']}")
        return
    print(f"{path}: ok")
    print(f"  SHA-256 {entry['sha256']}, as in {file.name}")
    print(printable(f"  made from {manifest['source']}"[:3 * COLUMNS]))
    missing = [name for name in manifest["shards"] if not os.path.exists(path.parent / name)]  # any name
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        print(printable(f"  {file.name} also lists missing shards: {', '.join(missing[:3])}{more}"))


def show_frequent_tokens(counts, vocabulary, decode):
    """Prints a table with a bar for each; counts (65536,), not all 0."""
    used = np.flatnonzero(counts)
    total = counts.sum()
    print(f"  {len(used):,} of the vocabulary's {vocabulary:,} tokens occur, from {used[0]} to {used[-1]}; "
          "the most frequent:")
    top = np.argsort(-counts, kind="stable")[:min(ROWS, len(used))]
    for token in top:
        bar = "#" * round(30 * counts[token] / counts[top[0]])
        text = repr(decode(np.array([token]))) if decode else ""
        print(f"    {token:5} {counts[token]:14,} {counts[token] / total:7.2%} {bar:30} {text}")


def show_text(text):
    """Prints the first lines that are not blank, without control characters."""
    print("  its first lines:")
    lines = [line for line in text.split("\n") if line.strip()]
    for line in lines[:LINES]:
        print("    " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in line[:COLUMNS]))


@command()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", nargs="+", type=Path, help="such as NAME_train_000001.bin")
    parser.add_argument("--tokenizer", choices=VOCABULARY,
                        help="of shards without a manifest (default: guessed)")
    args = parser.parse_args()
    bad = 0
    for path in args.shard:
        try:
            show(path, args.tokenizer)
        except UserError as error:
            bad += 1
            print(f"{path}: BAD: {str(error).removeprefix(f'{path}: ')}")
    if len(args.shard) > 1:
        print(f"{len(args.shard) - bad} of {len(args.shard)} shards are ok")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
