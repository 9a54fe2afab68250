"""Turn text into token shards for train_gpt2.py.

    python data/tokenize_text.py INPUT... --out data/mine --name mine [--tokenizer gpt2|bytes]

INPUT is .txt (a document per file) or .jsonl (a document per line, in the field --text_field), both also compressed as .gz or .zst, or
.parquet (a document per row, in the column --text_field). Documents keep their order. Each starts with <|endoftext|>: 50256 in
GPT-2's BPE, 255 in bytes. The first documents, until they have more than --val_tokens tokens, become NAME_val_000000.bin, the rest
NAME_train_000001.bin and so on. Every shard but the last of its kind has --shard_tokens tokens, so a document may continue in the
next shard, but never from validation to training. NAME.json lists the shards with their SHA-256.

The shards are the same for any number of workers, and replace an earlier data set NAME only when all of them are complete.
Empty documents are counted and skipped; text that cannot be read is refused with its file and line. Memory stays below 1 GB:
a .txt of any size is tokenized in pieces, but a JSON line or a Parquet row is held whole.
"""
import argparse
import codecs
import gzip
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command, locked  # first: it says what is not installed
import numpy as np

from data.shards import END_OF_TEXT, gpt2_encoding, manifest_entry, shard_header, write_manifest
from train_gpt2 import HEADER_BYTES, UserError

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CHUNK = 1 << 19  # bytes of text that a worker gets at once, 50 ms of work
LONGEST_PIECE = 1 << 23  # characters
INPUT_NAME = re.compile(r".*\.(?:(txt|jsonl)(?:\.gz|\.zst)?|(parquet))")
# The longest beginning of a text that can be tokenized apart from the rest. GPT-2's pattern splits wherever whitespace follows
# other text: no match continues from text into whitespace, none looks back, and only matches of whitespace look ahead.
BEGINNING = {"gpt2": re.compile(r"(?s:.*)\S(?=[ \n])"), "bytes": re.compile(r"(?s:.*)")}


def bytes_encoder():
    """encode(text) -> 255 and the bytes of the text in UTF-8, (n,) uint16. encode raises ValueError for lone surrogates."""
    def encode(text):
        return np.frombuffer(b"\xff" + text.encode(), dtype=np.uint8).astype("<u2")
    return encode


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


class ShardWriter:
    """Writes tokens, as they come, into shards of `shard_tokens`; `shards` has the manifest entries of the complete ones."""

    def __init__(self, folder, name, shard_tokens):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.file, self.shards, self.numbers = None, [], {"val": 0, "train": 1}

    def write(self, kind, tokens):
        while len(tokens):
            if self.file is None:
                self.file = open(Path(self.folder, f"{self.name}_{kind}_{self.numbers[kind]:06d}.bin"), "wb")
                self.file.write(bytes(HEADER_BYTES))  # until the number of tokens is known
                self.numbers[kind] += 1
                self.room = self.shard_tokens
            self.file.write(tokens[:self.room].tobytes())
            tokens, self.room = tokens[self.room:], max(0, self.room - len(tokens))
            if not self.room:
                self.close()

    def close(self):
        """Completes the open shard, if any."""
        if self.file:
            with self.file as file:
                file.seek(0)
                file.write(shard_header(self.shard_tokens - self.room))
                file.flush()
                os.fsync(file.fileno())
            self.shards.append(manifest_entry(file.name))
            self.file = None


# Reading: chunks (kind, number of the first line or row, items) of one file, the input of encode_chunk


def open_text(path):
    if path.suffix == ".zst":
        import pyarrow
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))  # unlike zstandard, it detects truncation
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def read_txt(path, beginning):
    """One document, without a byte order mark, in pieces that have the same tokens as the whole."""
    decoder, text, line, kind, block = codecs.getincrementaldecoder("utf-8-sig")(), "", 1, "txt", True
    with open_text(path) as file:
        while block:
            block = file.read(CHUNK)
            try:
                text += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += text.count("\n") + error.object.count(b"\n", 0, error.start)
                raise ValueError(f"line {line}: {error}; save it as UTF-8") from None
            found = beginning.match(text)
            cut = len(text) if not block else found.end() if found else 0
            if cut or not block:
                yield kind, line, text[:cut]
                text, line, kind = text[cut:], line + text.count("\n", 0, cut), "rest of txt"
            elif len(text) > LONGEST_PIECE:
                raise ValueError(f"line {line}: {len(text):,} characters without a space or line break after text are too many for "
                                 "GPT-2's tokenizer; insert line breaks, or use --tokenizer bytes")


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
        if names.count(column) != 1:
            raise ValueError(f"should have one column '{column}', but has {', '.join(names)}; name the text's column with --text_field")
        kind = file.schema_arrow.field(column).type
        value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if value not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null()):
            raise ValueError(f"column '{column}' holds {kind}, not strings; name the text's column with --text_field")
        size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        rows = max(1, min(10_000, CHUNK * metadata.num_rows // max(1, size)))
        for batch in file.iter_batches(rows, columns=[column], use_threads=False):
            values = batch.column(0).cast(value).cast(pyarrow.large_binary())  # encode_chunk decodes UTF-8, to name the bad row
            yield "row", row, values.to_pylist()
            row += len(batch)


def read_input(path, text_field, beginning):
    """Yields (path, kind, number, items) for the chunks of one file. Raises UserError for a file that cannot be read."""
    match, chunk = INPUT_NAME.fullmatch(path.name), None
    try:
        for chunk in (read_parquet(path, text_field) if match[2] else
                      read_jsonl(path) if match[1] == "jsonl" else read_txt(path, beginning)):
            yield path, *chunk
        if chunk is None or path.suffix in (".gz", ".zst") and not path.stat().st_size:
            raise ValueError("holds no document; leave it out, or fetch it again if it should hold some")
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:  # pyarrow's errors are of three of these kinds
        raise UserError(f"{path}: {' '.join(str(getattr(error, 'strerror', None) or error).split())}") from None


# In the workers


def start_worker(*values):
    global encode, text_field
    encode, text_field = values
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()  # no orphans


def encode_chunk(path, kind, first, items):
    """(tokens (n,) uint16, empty documents) of a chunk. Raises UserError, with file and line or row, for an invalid document."""
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
                      f"no field '{text_field}'; name the text's field with --text_field" if isinstance(error, KeyError) else
                      f"not a JSON object with a string in its field '{text_field}'; correct or delete it")
            raise UserError(f"{path}, {'row' if kind == 'row' else 'line'} {number}: {reason}") from None
    return np.concatenate(tokens), empty


# In the parent


def set_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def interrupt(number, frame):
    set_signals(signal.SIG_IGN)  # a second Ctrl-C must not interrupt the cleanup
    raise KeyboardInterrupt


def encode_in_order(pool, chunks, ahead):
    """Yields the results of the chunks in order; the workers have at most `ahead` of them at a time."""
    waiting = deque()
    for chunk in chunks:
        waiting.append(pool.submit(encode_chunk, *chunk))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def check_arguments(args):
    """Raises UserError for arguments that cannot be used."""
    for path in args.input:
        try:
            folder, there = path.is_dir(), path.exists()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; name a file that can be read") from None
        if folder or not there:
            raise UserError(f"{path}: {'is a folder; name the files in it' if folder else 'there is no such file'}")
        if not INPUT_NAME.fullmatch(path.name):
            raise UserError(f"{path}: not .txt or .jsonl, either of them with .gz or .zst, or .parquet; convert it to one of these")
    if not re.fullmatch(r"\w[\w.-]{0,199}", args.name):
        raise UserError(f"--name {args.name}: file names start with it, so use letters, digits, '_', '-' and '.' only, and at most 200")
    for field, least in (("shard_tokens", 1), ("val_tokens", 0), ("workers", 1)):
        if not least <= getattr(args, field) < 2 ** 31:  # a shard's header has 31 bits for its tokens
            raise UserError(f"--{field} {getattr(args, field)}: should be at least {least} and below 2^31")


def write_shards(args, folder):
    """Writes the shards to `folder`. Returns their manifest entries and the numbers of tokens, documents and empty documents."""
    encode, writer = ENCODERS[args.tokenizer](), ShardWriter(folder, args.name, args.shard_tokens)
    chunks = (chunk for path in args.input for chunk in read_input(path, args.text_field, BEGINNING[args.tokenizer]))
    total, documents, empty, kind = 0, 0, 0, "val" if args.val_tokens else "train"
    start = shown = time.monotonic()
    terminal = sys.stderr.isatty()
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("fork"), start_worker, (encode, args.text_field)) as pool:
        set_signals(signal.SIG_IGN)  # in the workers too: they end when the parent does
        pool.submit(int).result()  # forks them
        set_signals(interrupt)
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
        raise UserError(f"{args.input[0]}: no text: all {empty} documents in {len(args.input)} files are empty; name other files")
    if kind == "val":
        raise UserError(f"--val_tokens {args.val_tokens}: all {documents - empty:,} documents would be for validation; lower it")
    return writer.shards, total, documents, empty


def tokenize(args):
    """Writes the data set that the arguments describe; returns a summary. After a UserError or OSError the old one is untouched."""
    check_arguments(args)
    start = time.monotonic()
    with locked(args.out):
        for left in args.out.glob(f"{args.name}.partial-*"):
            shutil.rmtree(left, ignore_errors=True)  # by a process that was killed: nobody else holds the lock
        with tempfile.TemporaryDirectory(prefix=f"{args.name}.partial-", dir=args.out) as folder:
            shards, total, documents, empty = write_shards(args, folder)
            manifest, new = args.out / f"{args.name}.json", [args.out / shard["file"] for shard in shards]
            old = [path for part in ("val", "train") for path in args.out.glob(f"{args.name}_{part}_{'[0-9]' * 6}.bin")]
            for path in (manifest, *new, *old):
                if path.exists() and not path.is_file():
                    raise UserError(f"{path} is in the way, and not a file; move it elsewhere")
            set_signals(signal.SIG_IGN)  # the old data set or the new one, not parts of both
            manifest.unlink(missing_ok=True)
            for path in new:
                os.replace(Path(folder, path.name), path)
            for path in set(old).difference(new):
                path.unlink()
            write_manifest(args.out, args.name, args.tokenizer, [str(path) for path in args.input], shards)
    seconds = time.monotonic() - start
    return (f"{total:,} tokens of {documents:,} documents ({empty} empty, skipped) in {len(shards)} shards in {args.out}; "
            f"{seconds:.1f} s, {total / seconds:,.0f} tokens/s")


@command()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="+", type=Path, help="text files, see above")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--name", required=True, help="first part of the shards' names")
    parser.add_argument("--tokenizer", choices=ENCODERS, default="gpt2", help="(default: gpt2)")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard (default: 100000000)")
    parser.add_argument("--val_tokens", type=int, default=0, help="validation tokens, rounded up to whole documents (default: 0)")
    parser.add_argument("--text_field", default="text", help="JSON field or Parquet column that holds the text (default: text)")
    parser.add_argument("--workers", type=int, default=CORES, help="worker processes (default: all cores, %(default)s)")
    args = parser.parse_args()
    try:
        summary = tokenize(args)
    except KeyboardInterrupt:
        raise UserError("interrupted, nothing was written; run the command again") from None
    except BrokenProcessPool:
        raise UserError(f"one of {args.workers} worker processes was killed, perhaps for lack of memory; nothing was written; "
                        "run the command again, with fewer --workers if it happens again") from None
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror}; free some space, or choose another folder with --out") from None
    print(summary)


if __name__ == "__main__":
    main()
