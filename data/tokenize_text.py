"""Turn text into token shards that train_gpt2.py reads.

    python data/tokenize_text.py INPUT... --out data/mine --name mine [--tokenizer gpt2|bytes]

INPUT is .txt (one document a file), .jsonl or .jsonl.gz (one document a line, in the field --text_field). Documents keep their
order; each starts with <|endoftext|>: 50256 in GPT-2 BPE, 255 in bytes (no UTF-8 text contains it). The first documents, up to
--val_tokens tokens, become NAME_val_000000.bin, the rest NAME_train_000001.bin and on, and NAME.json lists them with their SHA-256.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository instead of data/: train_gpt2 is there

import argparse
import gzip
import hashlib
import json

import numpy as np

from train_gpt2 import MAGIC, VERSION, UserError, write_atomically


def bytes_encoder():
    def encode(text):
        return np.frombuffer(b"\xff" + text.encode(), dtype=np.uint8).astype("<u2")
    return encode


def gpt2_encoder():
    import tiktoken
    encoding = tiktoken.get_encoding("gpt2")

    def encode(text):
        return np.array([encoding.eot_token, *encoding.encode_ordinary(text)], dtype="<u2")
    return encode


ENCODERS = {"gpt2": gpt2_encoder, "bytes": bytes_encoder}


def write_shard(path, tokens):
    """Writes `tokens` (n,) as the shard `path`; returns its entry of the manifest."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    content = header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes()
    write_atomically(Path(path), content)
    return dict(file=Path(path).name, tokens=len(tokens), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_manifest(folder, name, tokenizer, source, shards):
    text = json.dumps(dict(name=name, tokenizer=tokenizer, source=source, shards=shards), indent=1) + "\n"
    write_atomically(Path(folder, f"{name}.json"), text.encode())


def read_documents(path, text_field):
    """The documents of one input file, as strings. Raises UserError with file and line for what is no document."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind not in ("txt", "jsonl"):
        raise UserError(f"{path}: neither .txt, .jsonl nor .jsonl.gz; convert it to one of them")
    line = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            if kind == "txt":
                yield file.read().decode("utf-8")
            else:
                for line, text in enumerate(file, start=1):
                    document = json.loads(text)[text_field]
                    if not isinstance(document, str):
                        raise TypeError(f"'{text_field}' is no string")
                    yield document
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        reason = f"there is no field {error}; name the right one by --text_field" if isinstance(error, KeyError) else error
        raise UserError(f"{path}{f', line {line}' if line else ''}: {reason}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="+", type=Path, help=".txt, .jsonl or .jsonl.gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--name", required=True, help="first part of their names")
    parser.add_argument("--tokenizer", choices=ENCODERS, default="gpt2", help="(default: gpt2)")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard (default: 100000000)")
    parser.add_argument("--val_tokens", type=int, default=0, help="tokens of validation, rounded up to documents (default: 0)")
    parser.add_argument("--text_field", default="text", help="field of the text in JSON lines (default: text)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    encode = ENCODERS[args.tokenizer]()
    shards, pending, waiting, total, documents, empty = [], [], 0, 0, 0, 0

    def flush(kind, number, last):
        """Writes the pending documents, in shards of shard_tokens, and what is left over too if this is the last."""
        nonlocal pending, waiting
        tokens = np.concatenate(pending) if pending else np.zeros(0, "<u2")
        while len(tokens) >= args.shard_tokens or (last and len(tokens)):
            shards.append(write_shard(args.out / f"{args.name}_{kind}_{number:06d}.bin", tokens[:args.shard_tokens]))
            tokens, number = tokens[args.shard_tokens:], number + 1
        pending, waiting = [tokens], len(tokens)
        return number

    number, validating = 1, args.val_tokens > 0
    for path in args.input:
        for document in read_documents(path, args.text_field):
            documents += 1
            empty += not document
            if not document:
                continue
            tokens = encode(document)
            pending.append(tokens)
            waiting, total = waiting + len(tokens), total + len(tokens)
            if validating and total > args.val_tokens:
                flush("val", 0, last=True)
                validating = False
            elif not validating and waiting >= args.shard_tokens:
                number = flush("train", number, last=False)
    if validating and args.val_tokens:
        raise UserError(f"the input has {total:,} tokens, not more than val_tokens = {args.val_tokens:,}: nothing is left to train on")
    flush("train", number, last=True)
    write_manifest(args.out, args.name, args.tokenizer, [str(path) for path in args.input], shards)
    print(f"{total:,} tokens of {documents:,} documents ({empty} empty, skipped) in {len(shards)} shards in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
