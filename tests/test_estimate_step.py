"""The estimate from generated code: what it counts of small functions, against counts by hand.

All counting happens in one process, tests/estimated.py, which believes in a GPU.
"""
import copy
import json
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from conftest import PATHS, ROOT, fork, run
from estimated import ROWS, product

pytest.importorskip("triton", reason="triton is not installed; there are versions for Linux only")

@pytest.fixture(scope="module")
def found():
    done = run(sys.executable, ROOT / "tests/estimated.py", env=PATHS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_bytes_of_a_pointwise_kernel(found):
    forward = found["pointwise"]["kernels"][0]
    assert forward["launches"] == 1
    assert forward["bytes"] == ROWS * 128 * (4 + 4 + 2)


def test_loads_that_a_flip_doubles_count_once(found):
    assert found["flip"]["kernels"][0]["bytes"] == ROWS * 128 * (4 + 4)


def test_only_the_slice_that_is_read_counts(found):
    assert found["slices"]["kernels"][0]["bytes"] == ROWS * 128 * (4 + 4)


def test_instructions_grow_with_the_work(found):
    """A flip's kernel computes x + 2 x; the sine of the other takes many instructions more."""
    sine, flip = (found[name]["kernels"][0]["instructions"] for name in ("pointwise", "flip"))
    assert sine > 1.5 * flip > 0


def test_saved_bytes_are_those_of_saved_tensors_hooks(found):
    """The same function compiled on the CPU, with torch's own partition: every buffer that it keeps, once."""
    function, (x,) = product()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        torch.compile(function, backend="aot_eager_decomp_partition")(x)
    kept.pop(x.untyped_storage().data_ptr(), None)
    assert 64 * 48 * 2 <= found["product"]["saved"] == sum(kept.values())


def test_flops_of_the_trainers_model(found):
    """6 FLOPs for each matrix parameter and token, all of them in products but for the table's lookup."""
    step = found["trainer"]
    tokens = 8 * 64
    hidden = 2 * 12 * 128 ** 2
    assert step["flops"]["aten.mm"] == 6 * hidden * tokens
    assert step["flops"]["train_gpt2.head_loss"] == 6 * 1024 * 128 * tokens
    statistics = 2 * 7 * 2 * 128 ** 2 * tokens  # Z Z^T of seven 128 x 128 blocks in each of two layers
    assert step["flops"]["aten.bmm"] == statistics
    attention = 4 * 2 * 8 * 64 * 64 * 128  # both products, in both layers
    assert step["flops"]["aten._scaled_dot_product_flash_attention"] == attention


def test_the_trainer_keeps_the_qkv_buffer(found):
    """At least the 41 L C bytes of a token in bf16; and weights in bf16, the head's gradient, statistics."""
    step = found["trainer"]
    assert step["graphs"] == 1
    assert step["saved"] > 8 * 64 * 39 * 2 * 128


def test_ddp_cuts_the_model(found):
    plain = copy.deepcopy(found["trainer"])
    cut = found["trainer_ddp"]
    assert cut["graphs"] > 1
    del plain["flops"]["aten.bmm"]  # the statistics
    assert cut["flops"] == plain["flops"]
    launches = [sum(kernel["launches"] for kernel in step["kernels"]) for step in (plain, cut)]
    assert launches[0] <= launches[1]


def test_times_are_ranges(found):
    for step in found.values():
        for slow, fast in step["parts"].values():
            assert slow >= fast >= 0


def test_usage_error():
    done = fork(ROOT / "scripts/estimate_step.py", "--n_layer", 0)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: --n_layer 0 --sequences 64: must be at least 1"
