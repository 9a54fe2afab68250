"""Turn text into token shards that train_gpt2.py reads.

    python data/tokenize_text.py INPUT... --out data/mine --name mine [--tokenizer gpt2|bytes]

INPUT is .txt (one document a file), .jsonl (one document a line, in the field --text_field), either of them also as .gz or .zst,
or .parquet (one document a row, in the column --text_field). Documents keep their order; each starts with <|endoftext|>: 50256 in
GPT-2 BPE, 255 in bytes (no UTF-8 text contains it). The first documents, until they have more than --val_tokens tokens, become
NAME_val_000000.bin, the rest NAME_train_000001.bin and on: every shard but the last of its kind has --shard_tokens tokens, so a
document may go on in the next shard, but never from validation to training. NAME.json lists the shards with their SHA-256.

The shards are the same whatever the number of workers, and replace an earlier data set NAME only when all of them are complete.
Empty documents are counted and skipped; text that cannot be read is refused with its file and line. Memory stays below 1 GB: a
.txt of any size is tokenised in pieces, but a JSON line, or a Parquet row, is held whole.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository instead of data/, whose inspect.py is not Python's

import argparse
import codecs
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

# train_gpt2 is imported where it is needed: it brings torch, 2 seconds and 200 MB, which the workers, forked before, do without

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
END_OF_TEXT = {"gpt2": 50256, "bytes": 255}
CHUNK = 1 << 19  # bytes of text that a worker gets at once, 50 ms of work
LONGEST_PIECE = 1 << 23  # characters
INPUT_NAME = re.compile(r".*\.(txt|jsonl)(\.gz|\.zst)?|.*\.parquet")
# The longest beginning of a text that can be tokenised apart from the rest. GPT-2's pattern splits wherever whitespace follows
# other text: no match goes on from text to whitespace, none looks back, and only matches of whitespace look ahead.
BEGINNING = {"gpt2": re.compile(r"(?s:.*)\S(?=[ \n])"), "bytes": re.compile(r"(?s:.*)")}


class InputError(Exception):
    """Something about the input or the arguments that the user can put right: a sentence."""


def bytes_encoder():
    """encode(text) -> 255 and the bytes of the text in UTF-8, (n,) uint16. encode raises ValueError for lone surrogates."""
    def encode(text):
        return np.frombuffer(b"\xff" + text.encode(), dtype=np.uint8).astype("<u2")
    return encode


def gpt2_encoding():
    """tiktoken's GPT-2 encoding. Raises InputError if tiktoken cannot get its files."""
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # what requests raises, OSError, or ValueError for an unknown SHA-256
        raise InputError(f"tiktoken cannot download GPT-2's tokenizer ({type(error).__name__}): check the connection, or set "
                         "TIKTOKEN_CACHE_DIR to a folder where it has put its files") from None


def gpt2_encoder():
    """encode(text) -> 50256 and the text in GPT-2's BPE, (n,) uint16. encode raises ValueError for lone surrogates."""
    encoding = gpt2_encoding()

    def encode(text):
        try:
            tokens = encoding.encode_to_numpy(text, disallowed_special=())  # "<|endoftext|>" in a text is text
        except ValueError as error:
            hint = "; shorten runs of a million spaces or line breaks" if "backtracking" in str(error) else ""
            raise ValueError(f"{error}{hint}") from None
        return np.concatenate(([END_OF_TEXT["gpt2"]], tokens), dtype="<u2", casting="unsafe")
    return encode


ENCODERS = {"gpt2": gpt2_encoder, "bytes": bytes_encoder}


def shard_header(n):
    from train_gpt2 import MAGIC, VERSION
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, n
    return header.tobytes()


def write_shard(path, tokens):
    """Writes `tokens` (n,) as the shard `path`; returns its entry of the manifest. Raises UserError if it cannot be written."""
    from train_gpt2 import write_atomically
    content = shard_header(len(tokens)) + np.asarray(tokens, dtype="<u2").tobytes()
    write_atomically(Path(path), content)
    return dict(file=Path(path).name, tokens=len(tokens), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_manifest(folder, name, tokenizer, source, shards):
    """Writes NAME.json: tokenizer, source, and the entries of the shards. Raises UserError if it cannot be written."""
    from train_gpt2 import write_atomically
    text = json.dumps(dict(name=name, tokenizer=tokenizer, source=source, shards=shards), indent=1) + "\n"
    write_atomically(Path(folder, f"{name}.json"), text.encode())


class ShardWriter:
    """Writes tokens, as they come, into shards of `shard_tokens`; `shards` has the manifest's entries of the complete ones."""

    def __init__(self, folder, name, shard_tokens):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.file, self.shards, self.numbers = None, [], {"val": 0, "train": 1}

    def write(self, kind, tokens):
        while len(tokens):
            if self.file is None:
                self.file = open(Path(self.folder, f"{self.name}_{kind}_{self.numbers[kind]:06d}.bin"), "w+b")
                self.file.write(bytes(1024))  # where the header will be
                self.numbers[kind] += 1
                self.room = self.shard_tokens
            self.file.write(tokens[:self.room].tobytes())
            tokens, self.room = tokens[self.room:], max(0, self.room - len(tokens))
            if not self.room:
                self.close()

    def close(self):
        """Completes the shard that is open, if any."""
        if self.file:
            n = self.shard_tokens - self.room
            with self.file as file:
                file.seek(0)
                file.write(shard_header(n))
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                self.shards.append(dict(file=Path(file.name).name, tokens=n, bytes=1024 + 2 * n,
                                        sha256=hashlib.file_digest(file, "sha256").hexdigest()))
            self.file = None


# Reading: chunks (kind, number of the first line or row, items) of one file, as encode_chunk takes them


def open_text(path):
    if path.suffix == ".zst":
        import pyarrow
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))  # unlike zstandard's, it notices truncation
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def read_txt(path, beginning):
    """One document, in pieces whose tokens are together those of the whole."""
    decoder, text, line, kind, block = codecs.getincrementaldecoder("utf-8")(), "", 1, "txt", True
    with open_text(path) as file:
        while block:
            block = file.read(CHUNK)
            try:
                text += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += text.count("\n") + error.object.count(b"\n", 0, error.start)
                raise ValueError(f"line {line}: {error}") from None
            found = beginning.match(text)
            cut = len(text) if not block else found.end() if found else 0
            if cut or not block:
                yield kind, line, text[:cut]
                text, line, kind = text[cut:], line + text.count("\n", 0, cut), "rest of txt"
            elif len(text) > LONGEST_PIECE:
                raise ValueError(f"line {line}: no space or line break after text in {len(text):,} characters, too many for "
                                 "GPT-2's tokenizer at once; insert line breaks, or use --tokenizer bytes")


def read_jsonl(path):
    line = 1
    with open_text(path) as file:
        while block := file.read(CHUNK):
            block += file.readline()  # the rest of its last line
            yield "line", line, block
            line += block.count(b"\n")


def read_parquet(path, column):
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as file:  # reads pages, not whole row groups
        names, metadata, row = file.schema_arrow.names, file.metadata, 1
        if column not in names:
            raise ValueError(f"there is no column '{column}', only {', '.join(names)}; name the right one by --text_field")
        kind = file.schema_arrow.field(column).type
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            raise ValueError(f"column '{column}' is no string but {kind}; name the right one by --text_field")
        size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        rows = max(1, min(10_000, CHUNK * metadata.num_rows // max(1, size)))
        for batch in file.iter_batches(rows, columns=[column], use_threads=False):
            yield "row", row, batch.column(0).cast(pyarrow.large_binary()).to_pylist()  # decoded by encode_chunk, row by row
            row += len(batch)


def read_input(path, text_field, beginning):
    """Yields (path, kind, number, items) for the chunks of one file. Raises InputError for a file that cannot be read."""
    chunk = None
    try:
        for chunk in (read_parquet(path, text_field) if path.suffix == ".parquet" else
                      read_jsonl(path) if ".jsonl" in path.suffixes[-2:] else read_txt(path, beginning)):
            yield path, *chunk
        if chunk is None or path.suffix in (".gz", ".zst") and not path.stat().st_size:
            raise ValueError("holds no document; leave it out, or fetch it again if it should hold some")
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:  # pyarrow has errors of three of these kinds
        raise InputError(f"{path}: {' '.join(str(getattr(error, 'strerror', None) or error).split())}") from None


# In the workers


def start_worker(*values):
    global encode, text_field
    encode, text_field = values
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()  # no orphans


def encode_chunk(path, kind, first, items):
    """(tokens (n,) uint16, empty documents) of a chunk. Raises InputError, with file and line or row, for what is no document."""
    items = items.removesuffix(b"\n").split(b"\n") if kind == "line" else items if kind == "row" else [items]
    tokens, empty = [np.zeros(0, "<u2")], 0
    for number, item in enumerate(items, start=first):
        try:
            text = item
            if kind == "line":
                text = json.loads(item)[text_field] if item.strip() else ""
            elif kind == "row":
                text = item and item.decode()
            if text in (None, "", b""):
                empty += kind != "rest of txt"
            else:
                tokens.append(encode(text)[kind == "rest of txt":])  # the rest has no <|endoftext|>
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = (error if isinstance(error, (ValueError, RecursionError)) else
                      f"there is no field '{text_field}'; name the right one by --text_field" if isinstance(error, KeyError) else
                      f"no JSON object with a string in its field '{text_field}'")
            raise InputError(f"{path}, {'row' if kind == 'row' else 'line'} {number}: {reason}") from None
    return np.concatenate(tokens), empty


# In the parent


def set_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def interrupt(number, frame):
    set_signals(signal.SIG_IGN)  # a second Ctrl-C must not keep the first from tidying up
    raise KeyboardInterrupt


def encode_in_order(pool, chunks, ahead):
    """Yields the results of the chunks in their order, of which the workers have at most `ahead` at a time."""
    waiting = deque()
    for chunk in chunks:
        waiting.append(pool.submit(encode_chunk, *chunk))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def tokenize(args):
    """Writes the data set that the arguments describe. Raises InputError, UserError or OSError, and then has written nothing."""
    for path in args.input:
        if path.is_dir() or not path.exists():
            raise InputError(f"{path}: {'is a folder; give the files in it' if path.is_dir() else 'there is no such file'}")
        if not INPUT_NAME.fullmatch(path.name):
            raise InputError(f"{path}: not .txt or .jsonl, .gz or .zst of these, or .parquet; convert it to one of them")
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        raise InputError(f"--name {args.name}: should be letters, digits, '_', '-' and '.', as the names of files begin with it")
    for field, least in (("shard_tokens", 1), ("val_tokens", 0), ("workers", 1)):
        if not least <= getattr(args, field) < 2 ** 31:  # a shard's header has 31 bits for its tokens
            raise InputError(f"--{field} {getattr(args, field)}: should be at least {least}, and below 2^31")
    encode = ENCODERS[args.tokenizer]()
    args.out.mkdir(parents=True, exist_ok=True)
    chunks = (chunk for path in args.input for chunk in read_input(path, args.text_field, BEGINNING[args.tokenizer]))
    total, documents, empty, kind = 0, 0, 0, "val" if args.val_tokens else "train"
    start = shown = time.monotonic()
    terminal = sys.stderr.isatty()
    with (ProcessPoolExecutor(args.workers, multiprocessing.get_context("fork"), start_worker, (encode, args.text_field)) as pool,
          tempfile.TemporaryDirectory(prefix=f"{args.name}.partial-", dir=args.out) as folder):
        set_signals(signal.SIG_IGN)  # in the workers, too: they end when the parent does
        pool.submit(int).result()  # forks them
        set_signals(interrupt)
        writer = ShardWriter(folder, args.name, args.shard_tokens)
        for tokens, empty_here in encode_in_order(pool, chunks, 8 * args.workers):
            starts = np.flatnonzero(tokens == END_OF_TEXT[args.tokenizer])
            documents, empty, total = documents + len(starts) + empty_here, empty + empty_here, total + len(tokens)
            if kind == "val":
                starts = starts[starts + total - len(tokens) > args.val_tokens]  # of documents that follow more than val_tokens
                if len(starts):
                    writer.write("val", tokens[:starts[0]])
                    writer.close()
                    tokens, kind = tokens[starts[0]:], "train"
            writer.write(kind, tokens)
            if time.monotonic() - shown > (0.2 if terminal else 10):
                shown = time.monotonic()
                print(f"{total:,} tokens of {documents:,} documents, {total / (shown - start):,.0f} tokens/s", file=sys.stderr,
                      end="   \r" if terminal else "\n", flush=True)
        writer.close()
        if not total:
            raise InputError(f"{args.input[0]}: no text, only {empty} empty documents in {len(args.input)} files; give others")
        if kind == "val":
            raise InputError(f"--val_tokens {args.val_tokens}: all {documents - empty:,} documents go there; lower it")
        Path(args.out, f"{args.name}.json").unlink(missing_ok=True)  # from here to the new manifest the data set is not complete
        for part in ("val", "train"):
            for old in args.out.glob(f"{args.name}_{part}_{'[0-9]' * 6}.bin"):
                old.unlink()
        for shard in writer.shards:
            os.replace(Path(folder, shard["file"]), args.out / shard["file"])
        write_manifest(args.out, args.name, args.tokenizer, [str(path) for path in args.input], writer.shards)
    seconds = time.monotonic() - start
    print(f"{total:,} tokens of {documents:,} documents ({empty} empty, skipped) in {len(writer.shards)} shards in {args.out}; "
          f"{seconds:.1f} s, {total / seconds:,.0f} tokens/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="+", type=Path, help="files of text, see above")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--name", required=True, help="first part of their names")
    parser.add_argument("--tokenizer", choices=ENCODERS, default="gpt2", help="(default: gpt2)")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard (default: 100000000)")
    parser.add_argument("--val_tokens", type=int, default=0, help="tokens of validation, rounded up to documents (default: 0)")
    parser.add_argument("--text_field", default="text", help="field of the text in JSON, or column in Parquet (default: text)")
    parser.add_argument("--workers", type=int, default=CORES, help="(default: all cores, %(default)s)")
    args = parser.parse_args()
    try:
        tokenize(args)
    except KeyboardInterrupt:
        sys.exit(f"interrupted; only a data set that {args.name}.json lists is complete in {args.out}; run the command again")
    except BrokenProcessPool:
        sys.exit(f"error: one of {args.workers} worker processes was killed, perhaps as memory ran out; nothing was written; "
                 "run the command again, with fewer --workers if it happens again")
    except ImportError as error:
        sys.exit(f"error: {error}; install what requirements.txt lists")
    except OSError as error:
        sys.exit(f"error: cannot write in {args.out}: {error.strerror}; free some space, or choose another folder by --out")
    except Exception as error:
        from train_gpt2 import UserError
        if not isinstance(error, (InputError, UserError)):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
