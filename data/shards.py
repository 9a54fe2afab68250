"""What the scripts in data/ share: the two tokenizers, and writing shards."""
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from train_gpt2 import MAGIC, VERSION, UserError, open_shard, write_atomically

VOCABULARY = {"gpt2": 50257, "bytes": 256}
END_OF_TEXT = {"gpt2": 50256, "bytes": 255}  # precedes each document; no UTF-8 text contains the byte 255


# how tiktoken's cache names GPT-2's two files: by the SHA-1 of the addresses where it downloads them
CACHED = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


def gpt2_encoding():
    """tiktoken's GPT-2 encoding. Raises UserError if tiktoken cannot get its files."""
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # from requests, the file system, or a wrong SHA-256
        if isinstance(error, OSError) and error.filename:
            raise UserError(
                f"tiktoken cannot use its cache, {error.filename} ({error.strerror}); "
                "set TIKTOKEN_CACHE_DIR to a folder that you can write to") from None
        folder = os.environ.get("TIKTOKEN_CACHE_DIR") or "not set"
        files = " and ".join(f"{file} as {name}" for file, name in CACHED.items())
        raise UserError(
            f"tiktoken cannot download GPT-2's tokenizer ({type(error).__name__}); check the connection, or "
            "copy its two files into the folder that TIKTOKEN_CACHE_DIR names "
            f"(now {folder}): {files}") from None


def shard_header(n):
    """The header, as bytes, of a shard of n tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, n
    return header.tobytes()


def write_shard(path, tokens):
    """Writes `tokens`, n integers below 2^16, to the shard `path` and returns its manifest entry.

    Raises UserError if the file cannot be written, ValueError for a token that a shard cannot hold.
    """
    tokens = np.asarray(tokens)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2 ** 16:
        raise ValueError(f"{path}: tokens from {tokens.min()} to {tokens.max()}; a shard holds 0 to 65535")
    write_atomically(Path(path), shard_header(len(tokens)) + tokens.astype("<u2").tobytes())
    return manifest_entry(path)


def manifest_entry(path):
    """Name, tokens, bytes and SHA-256 of the shard `path`. Raises UserError if it is damaged."""
    n = len(open_shard(path))
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return dict(file=Path(path).name, tokens=n, bytes=os.path.getsize(path), sha256=sha256)


def write_manifest(folder, name, tokenizer, source, shards):
    """Writes NAME.json: tokenizer, source and the entries of the shards.

    Leaves the file alone if it says that already.
    """
    path = Path(folder, f"{name}.json")
    manifest = dict(name=name, tokenizer=tokenizer, source=source, shards=shards)
    content = (json.dumps(manifest, indent=1) + "\n").encode()
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)
