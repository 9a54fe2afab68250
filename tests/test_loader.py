"""Shards as the trainer reads them: whole, damaged, changed, and ahead of time."""
import os
import re
import struct
import threading
from array import array
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from data.shards import write_shard
from train_gpt2 import Shards, UserError, open_shard, prefetched

T, CPU = 4, torch.device("cpu")


def test_batches_are_the_sequences_in_order(tmp_path):
    for i, n in enumerate((10, 4, 14)):  # in sequences of 4 and the token after them: 2, 0 and 3
        write_shard(tmp_path / f"{i}.bin", np.arange(n) + 100 * i)
    shards = Shards(str(tmp_path / "*.bin"), T, 300)
    idx, targets = shards.batch(range(5))
    assert idx.tolist() == [
        [0, 1, 2, 3], [4, 5, 6, 7], [200, 201, 202, 203], [204, 205, 206, 207], [208, 209, 210, 211]]
    assert targets.tolist() == [[t + 1 for t in row] for row in idx.tolist()]
    shards.require(5, "this test", "less")
    with pytest.raises(UserError, match="needs 24: add 1 more shards like the largest one, or set less$"):
        shards.require(6, "this test", "less")
    with pytest.raises(UserError, match="needs 60: add 4 more shards"):
        shards.require(15, "this test", "less")
    with pytest.raises(UserError, match="needs 4: add longer shards"):
        Shards(str(tmp_path / "1.bin"), T, 300).require(1, "this test", "less")
    again = Shards(str(tmp_path / "*.bin"), T, 300, allow_repeat=True)
    again.require(100, "this test", "less")
    assert again.batch([5, 14])[0].tolist() == idx[[0, 4]].tolist()


def test_a_data_seed_permutes_the_sequences(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(4 * 50 + 1))
    write_shard(tmp_path / "b.bin", 201 + np.arange(4 * 50 + 1))

    def sequences(data_seed):
        shards = Shards(str(tmp_path / "*.bin"), T, 500, data_seed=data_seed)
        return shards.batch(range(100))[0].tolist()
    files = sequences(0)
    one = sequences(1)
    two = sequences(2)
    assert sequences(1) == one
    assert sorted(files) == sorted(one) == sorted(two)
    assert files != one and files != two and one != two
    order = np.random.RandomState(1).permutation(100)  # a stream that numpy promises never to change
    assert one == np.array(files)[order].tolist()


def test_prefetched_batches_and_errors_keep_their_order(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(100))
    shards = Shards(str(tmp_path / "a.bin"), T, 84)
    numbers = [[3], [1, 2], [7, 0, 19], [5], [20]]
    batches = prefetched(shards, numbers, CPU)
    for wanted in numbers[:-1]:
        assert all(map(torch.equal, next(batches), shards.batch(wanted)))
    with pytest.raises(UserError, match="token 84 after position 80 is outside vocab_size = 84"):
        next(batches)


def test_next_batch_is_read_ahead():
    reading = {i: threading.Event() for i in range(5)}
    shards = SimpleNamespace(waited=0.0, batch=lambda i: reading[i].set())
    batches = prefetched(shards, range(5), CPU)
    for i in range(4):
        next(batches)
        assert reading[i + 1].wait(300)  # without another call
        assert not any(reading[later].is_set() for later in range(i + 2, 5))


def test_memory_does_not_grow_with_the_data(tmp_path):
    """3 shards of 32 MB, against the peak after the first tenth of the first."""
    for i in range(3):
        (tmp_path / f"{i}.bin").write_bytes(struct.pack("<256i", 20240520, 1, 16_000_000, *[0] * 253))
        os.truncate(tmp_path / f"{i}.bin", 1024 + 32_000_000)
    shards = Shards(str(tmp_path / "*.bin"), 10_000, 10)
    batches = [range(i, i + 10) for i in range(0, 3 * 1590, 10)]
    sizes = []  # MB
    for _ in prefetched(shards, batches, CPU):
        status = Path("/proc/self/status").read_text()
        sizes.append(int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024)
    # the pages of one shard may be there, those of three may not
    assert max(sizes[16:]) - max(sizes[:16]) < 40


# damage


GOOD = struct.pack("<256i", 20240520, 1, 50, *[0] * 253) + array("H", range(50)).tobytes()
position = st.integers(0, len(GOOD))
number = st.one_of(
    st.integers(-2 ** 31, 2 ** 31 - 1),
    st.sampled_from([0, 1, -1, 2, 20240520, 20240521, 49, 50, 51, 100]),
)
change = st.one_of(  # (start, stop, the bytes that replace those)
    st.tuples(position, st.just(len(GOOD)), st.sampled_from([b"", bytes(2), bytes(100), GOOD])),
    st.tuples(position, position, st.binary(max_size=9)),
    st.builds(lambda field, n: (4 * field, 4 * field + 4, struct.pack("<i", n)), st.integers(0, 4), number),
    st.builds(lambda start, n: (start, start + n, bytes(n)), position, position),
)


@pytest.mark.parametrize("cases", [500, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_damaged_bytes_are_one_error(tmp_path, cases):
    path = tmp_path / "a.bin"

    @settings(max_examples=cases, deadline=None, derandomize=True, database=None)
    @given(changes=st.lists(change, max_size=3))
    def check(changes):
        content = bytearray(GOOD)
        for start, stop, new in changes:
            content[start:stop] = new
        path.write_bytes(content)
        magic, version, n = struct.unpack_from("<3i", content.ljust(12))
        if magic == 20240520 and version == 1 and n >= 0 and len(content) == 1024 + 2 * n:
            assert open_shard(path).tolist() == list(struct.unpack_from(f"<{n}H", content, 1024))
        else:
            with pytest.raises(UserError, match=f"^{path}: .*make it again[^\n]*$"):
                open_shard(path)
    check()


def make_pipe(path):
    """With a shard in it, so that a reader would get it instead of waiting."""
    os.mkfifo(path)
    os.write(os.open(path, os.O_RDWR), GOOD)


@pytest.mark.parametrize("make, words", [
    (lambda path: path.mkdir(), "it is not a regular file"),
    (make_pipe, "it is not a regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
    (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    (lambda path: path.write_bytes(b""), "not a token shard"),
    (lambda path: path.write_bytes(b"tokens"), "not a token shard"),
    (lambda path: path.write_bytes(bytes(4) + GOOD[4:]), "not a token shard (it should start with 20240520)"),
    (lambda path: path.write_bytes(GOOD[:4] + b"\2" + GOOD[5:]), "version 2"),
    (lambda path: path.write_bytes(GOOD[:8] + b"\xfb\xff\xff\xff" + GOOD[12:]), "-5 tokens"),
    (lambda path: path.write_bytes(GOOD[:512]), "not a token shard"),
    (lambda path: path.write_bytes(GOOD[:-3]), "damaged: 1,121 bytes, but its header says 50 tokens"),
])
def test_damage_is_refused_at_the_start(start, shards, tmp_path, make, words):
    (tmp_path / "a.bin").symlink_to(shards / "train_000001.bin")
    make(tmp_path / "b.bin")
    done = start(input_bin=tmp_path / "*.bin")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'b.bin'}: ")
    assert words in done.stderr
    assert "make it again" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("change, words", [
    (lambda path: path.unlink(), "cannot be read"),
    (lambda path: write_shard(path, np.arange(60)), "had 100 tokens at first, now 60; restore it"),
    (lambda path: os.truncate(path, 1100), "damaged: 1,100 bytes, but its header says 100 tokens"),
])
def test_a_changing_shard_is_an_error(tmp_path, change, words):
    write_shard(tmp_path / "a.bin", np.arange(100))
    shards = Shards(str(tmp_path / "a.bin"), T, 100)
    shards.batch([0])
    change(tmp_path / "a.bin")
    with pytest.raises(UserError, match=words):
        shards.batch([1])
