"""Turn text into token shards for train_gpt2.py.

    python data/tokenize_text.py INPUT... --out data/mine --name mine [--tokenizer gpt2|bytes]

INPUT is .txt (a document per file) or .jsonl (a document per line, in the field --text_field), both also
compressed as .gz or .zst, or .parquet (a document per row, in the column --text_field). Documents keep
their order. Each starts with <|endoftext|>: 50256 in GPT-2's BPE, 255 in bytes. The first documents,
until they have more than --val_tokens tokens, become NAME_val_000000.bin, the rest NAME_train_000001.bin
and so on. Every shard but the last of its kind has --shard_tokens tokens, so a document may continue in
the next shard, but never from validation to training. NAME.json lists the shards with their SHA-256.

The shards are the same for any number of workers, and replace an earlier data set NAME only when all of
them are complete. Empty documents are counted and skipped; text that cannot be read is refused with its
file and line. Memory stays below 1 GB: a .txt of any size is tokenized in pieces, but a JSON line or a
Parquet row is held whole.
"""
import argparse
import codecs
import contextlib
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
import time
import zlib
from multiprocessing.connection import wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command, locked  # first: it says what is not installed
import numpy as np

from data.shards import END_OF_TEXT, gpt2_encoding, manifest_entry, shard_header, write_manifest
from train_gpt2 import HEADER_BYTES, UserError

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CHUNK = 1 << 19  # bytes of text that a worker gets at once, 50 ms of work
AHEAD = 8  # chunks for each worker that are encoded before their turn, at most
LONGEST_PIECE = 1 << 23  # characters
SHORTEN = "split long documents, free some memory, or use fewer --workers"
INPUT_NAME = re.compile(r".*\.(?:(txt|jsonl)(?:\.gz|\.zst)?|(parquet))")
# The longest beginning of a text that can be tokenized apart from the rest. GPT-2's pattern splits wherever
# whitespace follows other text: no match continues from text into whitespace, none looks back, and only
# matches of whitespace look ahead.
BEGINNING = {"gpt2": re.compile(r"(?s:.*)\S(?=[ \n])"), "bytes": re.compile(r"(?s:.*)")}


def bytes_encoder():
    """encode(text) -> 255 and the bytes of the text in UTF-8, (n,) uint16.

    encode raises ValueError for lone surrogates.
    """
    def encode(text):
        return np.frombuffer(b"\xff" + text.encode(), dtype=np.uint8).astype("<u2")
    return encode


def gpt2_encoder():
    """encode(text) -> 50256 and the text in GPT-2's BPE, (n,) uint16.

    encode raises ValueError for lone surrogates, and for what tiktoken's regular expression cannot split.
    """
    encoding = gpt2_encoding()
    start = [END_OF_TEXT["gpt2"]]

    def encode(text):
        try:
            # "<|endoftext|>" in a text is text
            tokens = encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:
            hint = "; shorten runs of a million spaces or line breaks" if "backtracking" in str(error) else ""
            raise ValueError(f"{error}{hint}") from None
        return np.concatenate((start, tokens), dtype="<u2", casting="unsafe")
    return encode


ENCODERS = {"gpt2": gpt2_encoder, "bytes": bytes_encoder}


class ShardWriter:
    """Writes tokens, as they come, into shards of `shard_tokens`. Raises OSError.

    `shards` has the manifest entries of those that are complete.
    """

    def __init__(self, folder, name, shard_tokens):
        self.folder = folder
        self.name = name
        self.shard_tokens = shard_tokens
        self.numbers = {"val": 0, "train": 1}  # of the next shard
        self.shards = []
        self.file = None
        self.room = 0  # in the open shard, in tokens

    def write(self, kind, tokens):
        while len(tokens):
            if self.file is None:
                self.open(kind)
            part = tokens[:self.room]
            self.file.write(part.tobytes())
            self.room -= len(part)
            tokens = tokens[len(part):]
            if not self.room:
                self.close()

    def open(self, kind):
        path = Path(self.folder, f"{self.name}_{kind}_{self.numbers[kind]:06d}.bin")
        self.file = open(path, "wb")
        self.file.write(bytes(HEADER_BYTES))  # until the number of tokens is known
        self.numbers[kind] += 1
        self.room = self.shard_tokens

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
    """The file `path` in binary, decompressed."""
    if path.suffix == ".zst":
        import pyarrow
        # unlike zstandard, it detects truncation
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    if path.suffix == ".gz":
        return gzip.open(path)
    return open(path, "rb")


def read_txt(path, beginning):
    """One document, without a byte order mark, in pieces that have the same tokens as the whole.

    Yields ("txt" or, after the first piece, "rest of txt", line, piece). `beginning` is one of BEGINNING.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    kind = "txt"
    text = ""  # decoded, and not yet part of a piece
    line = 1  # where `text` begins
    at_end = False
    with open_text(path) as file:
        while not at_end:
            block = file.read(CHUNK)
            at_end = not block
            try:
                text += decoder.decode(block, final=at_end)
            except UnicodeDecodeError as error:
                line += text.count("\n") + error.object.count(b"\n", 0, error.start)
                raise ValueError(f"line {line}: {error}; save it as UTF-8") from None
            cut = len(text)
            if not at_end:
                found = beginning.match(text)
                cut = found.end() if found else 0
            if cut or at_end:
                yield kind, line, text[:cut]
                line += text.count("\n", 0, cut)
                text = text[cut:]
                kind = "rest of txt"
            elif len(text) > LONGEST_PIECE:
                raise ValueError(
                    f"line {line}: {len(text):,} characters without a space or line break after text are "
                    "too many for GPT-2's tokenizer; insert line breaks, or use --tokenizer bytes")


def read_jsonl(path):
    """Yields ("line", number of the first one, lines as bytes)."""
    line = 1
    with open_text(path) as file:
        while block := file.read(CHUNK):
            try:
                block += file.readline()  # the rest of its last line
            except MemoryError:
                number = line + block.count(b"\n")
                raise ValueError(f"line {number} is too long for the memory; {SHORTEN}") from None
            yield "line", line, block
            line += block.count(b"\n")


def read_parquet(path, column):
    """Yields ("row", number of the first one, list of bytes or None). Reads pages, not whole row groups."""
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as file:
        string = string_type(file.schema_arrow, column)
        metadata = file.metadata
        size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        rows = CHUNK * metadata.num_rows // max(1, size)
        rows = max(1, min(10_000, rows))
        row = 1
        for batch in file.iter_batches(rows, columns=[column], use_threads=False):
            # encode_chunk decodes UTF-8, to name the bad row
            values = batch.column(0).cast(string).cast(pyarrow.large_binary())
            yield "row", row, values.to_pylist()
            row += len(batch)


def string_type(schema, column):
    """The type of the column's strings, also where they are in a dictionary.

    Raises ValueError if there is no such column, or if it has other values.
    """
    import pyarrow
    names = schema.names
    if names.count(column) != 1:
        raise ValueError(f"should have one column '{column}', but has {', '.join(names)}; "
                         "name the text's column with --text_field")
    kind = schema.field(column).type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if value not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null()):
        raise ValueError(
            f"column '{column}' holds {kind}, not strings; cast it to strings, or name another column with "
            "--text_field")
    return value


def read_input(path, text_field, beginning):
    """Yields (path, kind, number, items) for the chunks of one file.

    Raises UserError for a file that cannot be read.
    """
    text_format, is_parquet = INPUT_NAME.fullmatch(path.name).groups()
    if is_parquet:
        chunks = read_parquet(path, text_field)
    elif text_format == "jsonl":
        chunks = read_jsonl(path)
    else:
        chunks = read_txt(path, beginning)
    chunk = None
    try:
        for chunk in chunks:
            yield path, *chunk
        compressed = path.suffix in (".gz", ".zst")
        if chunk is None or compressed and not path.stat().st_size:
            raise ValueError("holds no document; leave it out, or fetch it again if it should hold some")
    except MemoryError:  # pyarrow's is one, too
        raise UserError(f"{path}: a document is too long for the memory; {SHORTEN}") from None
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:  # pyarrow's are among them
        reason = getattr(error, "strerror", None) or str(error)
        if "Frame requires too much memory" in reason:  # pyarrow's zstd takes windows of up to 128 MiB
            reason = "compressed with a window of over 128 MiB; unpack it with zstd -d --long=31"
            reason += ", and name the result"
        raise UserError(f"{path}: {' '.join(reason.split())}") from None


# In the workers


def work(connection, others, encode, text_field):
    """Encodes the chunks that come through the connection, and sends back results or UserErrors.

    It never returns: it ends with the parent. `others` are the parent's ends of the connections so far. This
    process has copies of them: while one is open, its worker would not notice that the parent has ended.
    """
    for other in others:
        other.close()
    set_signals(signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent ends this one
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        while True:
            try:
                result = encode_chunk(encode, text_field, *connection.recv())
            except UserError as error:
                result = error
            connection.send(result)
    except (EOFError, OSError, MemoryError):
        os._exit(0)  # the parent has ended, or will say that this process has


INVALID = (ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError)


def encode_chunk(encode, text_field, path, kind, first, items):
    """(tokens (n,) uint16, empty documents) of a chunk.

    Raises UserError, with file and line or row, for an invalid document.
    """
    if kind == "line":
        items = items.removesuffix(b"\n").split(b"\n")
    elif kind != "row":
        items = [items]
    tokens = [np.zeros(0, "<u2")]
    empty = 0
    for number, item in enumerate(items, start=first):
        try:
            text = text_of(kind, item, text_field)
            if text in (None, "", b""):
                empty += kind != "rest of txt"
            else:
                document = encode(text)
                tokens.append(document[1:] if kind == "rest of txt" else document)  # no second start
        except INVALID as error:
            place = "row" if kind == "row" else "line"
            raise UserError(f"{path}, {place} {number}: {reason_of(error, text_field)}") from None
    return np.concatenate(tokens), empty


def text_of(kind, item, text_field):
    """The text of a line of JSON, of a row, or of a piece of a .txt, whose kind says which it is."""
    if kind == "line":
        return json.loads(item)[text_field] if item.strip() else ""
    if kind == "row":
        return item and item.decode()
    return item


def reason_of(error, text_field):
    """Why a document is invalid, for the user, from the exception that reading it raised."""
    if isinstance(error, (ValueError, RecursionError)):
        return error
    if isinstance(error, MemoryError):
        return f"too long for the memory; {SHORTEN}"
    if isinstance(error, KeyError):
        return f"no field '{text_field}'; name the text's field with --text_field"
    return f"not a JSON object with a string in its field '{text_field}'; correct or delete it"


# In the parent


SIGNALS = (signal.SIGINT, signal.SIGTERM)


def set_signals(handler):
    for number in SIGNALS:
        signal.signal(number, handler)


def interrupt(number, frame):
    set_signals(signal.SIG_IGN)  # a second Ctrl-C must not interrupt the cleanup
    raise KeyboardInterrupt


def start_workers(number, encode, text_field, processes, connections):
    """Forks the workers and adds them and the connections to them to the lists.

    Raises OSError if the system refuses a process or a pipe.
    """
    context = multiprocessing.get_context("fork")
    for _ in range(number):
        ours, its = context.Pipe()
        connections.append(ours)
        with its:
            arguments = (its, connections, encode, text_field)
            process = context.Process(target=work, args=arguments, daemon=True)
            process.start()
        processes.append(process)


@contextlib.contextmanager
def workers(number, encode, text_field):
    """The connections to `number` workers, which are dead at the end, whatever they were doing.

    Each has pipes of its own, and none shares a lock, so that a killed one leaves nothing behind that another
    waits for. Raises UserError if they cannot be started.
    """
    processes = []
    connections = []
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they come later, here, and not in a new worker
        try:
            start_workers(number, encode, text_field, processes, connections)
        except OSError as error:
            raise UserError(f"{number} worker processes cannot be started ({error.strerror}); "
                            "use fewer --workers") from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield connections
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for connection in connections:
            connection.close()


def encode_in_order(connections, chunks):
    """Yields the results of the chunks in order. Raises UserError for an invalid chunk or a lost worker.

    A worker has one chunk at a time: if it were sent a second one while it sends its result, both sides would
    wait for the other. Results that come before their turn are kept, but no more than AHEAD for each worker.
    """
    chunks = enumerate(chunks)
    idle = list(connections)
    busy = {}  # {connection: number of its chunk}
    results = {}  # {number: result}
    turn = 0  # the number of the next result to yield
    while True:
        while turn in results:
            result = results.pop(turn)
            turn += 1
            if isinstance(result, UserError):
                raise result
            yield result
        try:
            while idle and len(busy) + len(results) < AHEAD * len(connections):
                number, chunk = next(chunks)
                connection = idle.pop()
                exchange(connection.send, chunk)
                busy[connection] = number
        except StopIteration:
            if not busy:
                return
        for connection in wait(list(busy)):
            results[busy.pop(connection)] = exchange(connection.recv)
            idle.append(connection)


def exchange(send_or_receive, *values):
    """Calls it. Raises UserError if there is no process at the other end, or no memory."""
    try:
        return send_or_receive(*values)
    except (EOFError, OSError):
        raise UserError(
            "a worker process was killed, perhaps for lack of memory; nothing was written; run the command "
            "again, with fewer --workers if it happens again") from None
    except MemoryError:
        raise UserError(f"a document is too long for the memory; {SHORTEN}") from None


@contextlib.contextmanager
def writing(folder):
    """What fails here fails because of the folder that --out names."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; free some space, or choose another "
                        "folder with --out") from None


def check_arguments(args):
    """Raises UserError for arguments that cannot be used."""
    for path in args.input:
        check_input(path)
    if not re.fullmatch(r"\w[\w.-]{0,199}", args.name):
        raise UserError(f"--name {args.name}: file names start with it, so use letters, digits, '_', '-' "
                        "and '.' only, and at most 200")
    for field, least in (("shard_tokens", 1), ("val_tokens", 0), ("workers", 1)):
        if not least <= getattr(args, field) < 2 ** 31:  # a shard's header has 31 bits for its tokens
            raise UserError(
                f"--{field} {getattr(args, field)}: should be at least {least} and below 2^31")


def check_input(path):
    """Raises UserError unless `path` is there and has a name that says what it is."""
    try:
        is_folder = path.is_dir()
        exists = path.exists()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a file that can be read") from None
    if is_folder:
        raise UserError(f"{path}: is a folder; name the files in it")
    if not exists:
        raise UserError(f"{path}: there is no such file")
    if not INPUT_NAME.fullmatch(path.name):
        raise UserError(f"{path}: not .txt or .jsonl, either of them with .gz or .zst, or .parquet; "
                        "convert it to one of these")


class Progress:
    """Counts tokens and documents, and shows them on standard error."""

    def __init__(self):
        self.tokens = 0
        self.documents = 0  # the empty ones are among them
        self.empty = 0
        self.start = time.monotonic()
        self.shown = self.start
        self.terminal = sys.stderr.isatty()

    def show(self):
        now = time.monotonic()
        pause = 0.2 if self.terminal else 10
        if now - self.shown > pause:
            self.shown = now
            speed = self.tokens / (now - self.start)
            text = f"{self.tokens:,} tokens of {self.documents:,} documents, {speed:,.0f} tokens/s"
            print(text, file=sys.stderr, end="   \r" if self.terminal else "\n", flush=True)


def write_shards(args, folder):
    """Writes the shards to `folder`. Returns their manifest entries and the final Progress."""
    encode = ENCODERS[args.tokenizer]()
    writer = ShardWriter(folder, args.name, args.shard_tokens)
    progress = Progress()
    kind = "val" if args.val_tokens else "train"
    set_signals(interrupt)
    with workers(args.workers, encode, args.text_field) as connections:
        for tokens, empty in encode_in_order(connections, read_inputs(args)):
            starts = np.flatnonzero(tokens == END_OF_TEXT[args.tokenizer])
            with writing(args.out):
                rest = tokens
                if kind == "val":
                    later = starts[starts + progress.tokens > args.val_tokens]
                    if len(later):  # this document starts after more than val_tokens
                        writer.write("val", tokens[:later[0]])
                        writer.close()
                        kind = "train"
                        rest = tokens[later[0]:]
                writer.write(kind, rest)
            progress.tokens += len(tokens)
            progress.documents += len(starts) + empty
            progress.empty += empty
            progress.show()
        with writing(args.out):
            writer.close()
    if not progress.tokens:
        raise UserError(f"{args.input[0]}: no text: all {progress.empty} documents in "
                        f"{len(args.input)} files are empty; name other files")
    if kind == "val":
        documents = progress.documents - progress.empty
        raise UserError(f"--val_tokens {args.val_tokens}: all {documents:,} documents would be for "
                        "validation; lower it")
    return writer.shards, progress


def read_inputs(args):
    """Yields the chunks of all input files in order."""
    for path in args.input:
        yield from read_input(path, args.text_field, BEGINNING[args.tokenizer])


def tokenize(args):
    """Writes the data set that the arguments describe; returns a summary.

    After a UserError the old data set is untouched.
    """
    check_arguments(args)
    start = time.monotonic()
    with locked(args.out):
        for left in args.out.glob(f"{args.name}.partial-*"):
            # by a process that was killed: nobody else holds the lock
            shutil.rmtree(left, ignore_errors=True)
        with writing(args.out):
            temporary = tempfile.TemporaryDirectory(prefix=f"{args.name}.partial-", dir=args.out)
        with temporary as folder:
            shards, total = write_shards(args, folder)
            with writing(args.out):
                replace_data_set(args, folder, shards)
    seconds = time.monotonic() - start
    return (f"{total.tokens:,} tokens of {total.documents:,} documents ({total.empty} empty, skipped) "
            f"in {len(shards)} shards in {args.out}; {seconds:.1f} s, {total.tokens / seconds:,.0f} tokens/s")


def replace_data_set(args, folder, shards):
    """Moves the shards from `folder` to args.out, removes those of the old data set, writes the manifest.

    Raises UserError if something that is not a file is in the way; then nothing was changed.
    """
    manifest = args.out / f"{args.name}.json"
    new = [args.out / shard["file"] for shard in shards]
    old = []
    for part in ("val", "train"):
        old.extend(args.out.glob(f"{args.name}_{part}_{'[0-9]' * 6}.bin"))
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


@command()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="+", type=Path, help="text files, see above")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--name", required=True, help="first part of the shards' names")
    parser.add_argument("--tokenizer", choices=ENCODERS, default="gpt2", help="(default: gpt2)")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000,
                        help="tokens in a shard (default: 100000000)")
    parser.add_argument("--val_tokens", type=int, default=0,
                        help="validation tokens, rounded up to whole documents (default: 0)")
    parser.add_argument("--text_field", default="text",
                        help="JSON field or Parquet column that holds the text (default: text)")
    parser.add_argument("--workers", type=int, default=CORES,
                        help="worker processes (default: all cores, %(default)s)")
    args = parser.parse_args()
    try:
        summary = tokenize(args)
    except KeyboardInterrupt:
        raise UserError("interrupted, nothing was written; run the command again") from None
    print(summary)


if __name__ == "__main__":
    main()
