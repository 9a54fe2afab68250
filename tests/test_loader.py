"""Shards as the trainer reads them: whole, damaged, changed, and ahead of time."""
import contextlib
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from array import array
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from shards import write_shard
from train_gpt2 import Shards, UserError, open_shard, prefetched

T = 4


def test_batches_are_the_sequences_in_order(tmp_path):
    for i, n in enumerate((10, 3, 14)):  # in sequences of 4 and the token after them: 2, 0 and 3
        write_shard(tmp_path / f"{i}.bin", np.arange(n) + 100 * i)
    shards = Shards(str(tmp_path / "*.bin"), T, 300)
    idx, targets = shards.batch(range(5))
    assert idx.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [200, 201, 202, 203], [204, 205, 206, 207], [208, 209, 210, 211]]
    assert targets.tolist() == [[t + 1 for t in row] for row in idx.tolist()]
    shards.require(5, "this test")
    with pytest.raises(UserError, match="needs 24: add 1 more shards"):
        shards.require(6, "this test")


def test_repeated_data_start_over(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(9))
    shards = Shards(str(tmp_path / "*.bin"), T, 10, allow_repeat=True)
    shards.require(100, "this test")
    assert shards.batch([0])[0].tolist() == shards.batch([2])[0].tolist() != shards.batch([1])[0].tolist()


def test_a_data_seed_permutes_the_sequences(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(4 * 50 + 1))
    write_shard(tmp_path / "b.bin", 201 + np.arange(4 * 50 + 1))
    files, again, one, two = (Shards(str(tmp_path / "*.bin"), T, 500, data_seed=i).batch(range(100))[0].tolist() for i in (0, 1, 1, 2))
    assert again == one and len({str(order) for order in (files, one, two)}) == 3
    assert sorted(files) == sorted(one) == sorted(two)
    assert one == np.array(files)[np.random.RandomState(1).permutation(100)].tolist()  # a stream that numpy keeps for ever


# prefetching


def test_prefetched_batches_keep_their_order(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(100))
    shards = Shards(str(tmp_path / "a.bin"), T, 100)
    numbers = [[3], [1, 2], [7, 0, 20], [5]]
    got = list(prefetched(shards, numbers, torch.device("cpu")))
    assert all(torch.equal(a, b) for pair, wanted in zip(got, numbers, strict=True) for a, b in zip(pair, shards.batch(wanted)))


def test_the_next_batch_is_read_while_this_one_is_used():
    reading = {i: threading.Event() for i in range(5)}

    class Recorder:
        waited = 0.0

        def batch(self, i):
            reading[i].set()
            return ()

    batches = prefetched(Recorder(), range(5), torch.device("cpu"))
    for i in range(4):
        next(batches)
        assert reading[i + 1].wait(10)  # without another call
        assert not any(reading[later].is_set() for later in range(i + 2, 5))


def test_errors_come_with_their_batch(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(100))
    shards = Shards(str(tmp_path / "a.bin"), T, 50)
    batches = prefetched(shards, [[0], [1], [20]], torch.device("cpu"))
    next(batches), next(batches)
    with pytest.raises(UserError, match="token 84 after position 80 is outside vocab_size = 50") as raised:
        next(batches)


@pytest.mark.parametrize("change, words", [
    (lambda path: path.unlink(), "cannot be read"),
    (lambda path: write_shard(path, np.arange(60)), "had 100 tokens when the run started and has 60 now"),
    (lambda path: os.truncate(path, 1100), "damaged: 1,100 bytes, but its header says 100 tokens"),
])
def test_a_changing_shard_is_an_error(tmp_path, change, words):
    write_shard(tmp_path / "a.bin", np.arange(100))
    shards = Shards(str(tmp_path / "a.bin"), T, 100)
    shards.batch([0])
    change(tmp_path / "a.bin")
    with pytest.raises(UserError, match=words):
        shards.batch([1])


def test_memory_does_not_grow_with_the_data(tmp_path):
    """In a process of its own: 3 shards of 32 MB, against the peak after the first tenth of the first."""
    for i in range(3):
        (tmp_path / f"{i}.bin").write_bytes(struct.pack("<256i", 20240520, 1, 16_000_000, *[0] * 253))
        os.truncate(tmp_path / f"{i}.bin", 1024 + 32_000_000)
    code = ("import re, sys, torch\n"
            "from train_gpt2 import Shards, prefetched\n"
            "def resident():\n"
            "    return int(re.search(r'VmRSS:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) / 1024\n"
            "shards, batches = Shards(sys.argv[1], 10_000, 10), (range(i, i + 10) for i in range(0, 3 * 1590, 10))\n"
            "sizes = [resident() for batch in prefetched(shards, batches, torch.device('cpu'))]\n"
            "print(max(sizes[16:]) - max(sizes[:16]))\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "*.bin")], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert float(done.stdout) < 40, done.stdout + done.stderr  # MB; the pages of one shard may be there, those of three may not


# damage


GOOD = struct.pack("<256i", 20240520, 1, 50, *[0] * 253) + array("H", range(50)).tobytes()
position = st.integers(0, len(GOOD))
number = st.one_of(st.integers(-2 ** 31, 2 ** 31 - 1), st.sampled_from([0, 1, -1, 2, 20240520, 20240521, 49, 50, 51, 100]))
change = st.one_of(  # (start, stop, the bytes that replace those)
    st.tuples(position, st.just(len(GOOD)), st.just(b"")),
    st.tuples(position, position, st.binary(max_size=9)),
    st.tuples(st.just(len(GOOD)), st.just(len(GOOD)), st.sampled_from([bytes(2), bytes(100), GOOD])),
    st.builds(lambda field, n: (4 * field, 4 * field + 4, struct.pack("<i", n)), st.integers(0, 4), number),
    st.builds(lambda start, n: (start, start + n, bytes(n)), position, position),
)
place = st.sampled_from(["file"] * 12 + ["directory", "loop", "dangling", "forbidden", "pipe", "device", "link", "gone"])


def meaning(content):
    """The tokens of a shard with these bytes, by its definition; None if it is none."""
    magic, version, n = struct.unpack_from("<3i", content) if len(content) >= 1024 else (0, 0, 0)
    if magic == 20240520 and version == 1 and len(content) == 1024 + 2 * n:
        return list(struct.unpack_from(f"<{n}H", content, 1024))


def put(path, where, content):
    """Puts `content` at `path` as `where` says. Returns what a reader may get: tokens, or None."""
    if where == "directory":
        path.mkdir()
    elif where == "pipe":
        os.mkfifo(path)
    elif where in ("file", "forbidden"):
        path.write_bytes(content)
        path.chmod(0 if where == "forbidden" else 0o644)
    elif where != "gone":
        path.with_name("target").write_bytes(content)
        path.symlink_to(dict(link=path.with_name("target"), loop=path, dangling=path.with_name("nowhere"), device="/dev/zero")[where])
    return meaning(content) if where in ("file", "link") else None


@pytest.fixture
def folder():
    """A folder that everybody can enter; and an alarm that ends what hangs."""
    handler = signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("hangs"))
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
    signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def as_nobody():
    """Meanwhile without the rights of root, who may read everything; and not for longer than 20 s."""
    user = os.geteuid()
    signal.alarm(20)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        signal.alarm(0)


@pytest.mark.parametrize("cases", [500, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_a_damaged_shard_is_one_error(folder, cases):
    @settings(max_examples=cases, deadline=None, derandomize=True, database=None)
    @given(where=place, changes=st.lists(change, max_size=3), damaged_first=st.booleans())
    def check(where, changes, damaged_first):
        path, other = folder / ("a.bin" if damaged_first else "c.bin"), folder / "b.bin"
        other.write_bytes(GOOD)
        content = bytearray(GOOD)
        for start, stop, new in changes:
            content[start:stop] = new
        tokens = put(path, where, content)
        try:
            with as_nobody():
                got = open_shard(path).tolist()
        except UserError as error:
            assert tokens is None and str(path) in str(error) and "make it again" in str(error) and "\n" not in str(error)
        else:
            assert got == tokens
        expected = [[*range(i, i + T + 1)] for i in range(0, 45, T)]
        mine = [tokens[i:i + T + 1] for i in range(0, len(tokens) - T, T)] if tokens else []
        expected = mine + expected if damaged_first else expected + mine
        try:
            with as_nobody():
                idx, targets = Shards(str(folder / "?.bin"), T, 65536).batch(range(len(expected)))
        except UserError as error:
            assert tokens is None and str(path) in str(error)
        else:
            assert tokens is not None or where == "gone"
            assert [[*row, last[-1]] for row, last in zip(idx.tolist(), targets.tolist())] == expected
        path.rmdir() if where == "directory" else path.unlink(missing_ok=True)
    check()


def test_a_run_refuses_damage_before_its_first_step(start, shards, tmp_path):
    for kind in ("directory", "loop", "pipe"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "a.bin").write_bytes((shards / "train_000001.bin").read_bytes())
        put(folder / "b.bin", kind, b"")
        done = start(run_name=kind, input_bin=folder / "*.bin")
        assert done.returncode == 1 and "b.bin" in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "logs" / kind).exists()
