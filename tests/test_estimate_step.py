"""The estimate from generated code: what it counts of small functions, against counts by hand.

All counting happens in one process of its own, which believes in a GPU.
"""
import json
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from conftest import ROOT, run

pytest.importorskip("triton", reason="triton is not installed; there are versions for Linux only")

ROWS = 4096
COUNT = f"""
import json
import sys
from dataclasses import asdict
sys.path[:0] = ["{ROOT}", "{ROOT / 'tests'}"]
from scripts import estimate_step
import torch
import train_gpt2
import test_estimate_step as functions

estimate_step.pretend()
found = {{}}
for name, ddp in (("pointwise", 0), ("flip", 0), ("slices", 0), ("product", 0), ("trainer", 0), ("trainer", 1)):
    function, inputs = getattr(functions, name)()
    step = estimate_step.count(function, inputs, ddp)
    parts = estimate_step.times(step, [])
    found[name + "_ddp" * ddp] = dict(asdict(step), parts=parts)
print("FOUND", json.dumps(found))
"""


def pointwise():
    """Reads x and y in fp32, writes the sum in bf16; its backward pass has the two ways to go back."""
    def function(x, y):
        return (x * 2 + y.sin()).to(torch.bfloat16)
    return function, [torch.zeros(ROWS, 128, requires_grad=True), torch.zeros(ROWS, 128)]


def flip():
    """Loads each row of x twice, in two orders."""
    def function(x):
        return x + 2 * x.flip(-1)
    return function, [torch.zeros(ROWS, 128, requires_grad=True)]


def slices():
    """Loads one of three slices of x."""
    def function(x):
        return x[:, 128:256] * 3
    return function, [torch.zeros(ROWS, 384, requires_grad=True)]


def product():
    """Keeps x, and v as a view of a buffer three times as large; the sine and the sum need nothing new."""
    weight = torch.zeros(48, 16, requires_grad=True)

    def function(x):
        q, k, v = (x @ weight.mT).view(-1, 3, 16).unbind(1)
        return ((q.sin() * v) @ (k.mT.to(v.dtype) @ v)).sum()
    return function, [torch.zeros(64, 16)]


def trainer():
    import train_gpt2
    config = train_gpt2.Config(n_layer=2, n_head=2, n_embd=128, vocab_size=1000, sequence_length=64)
    idx = torch.zeros(8, 64, dtype=torch.long)
    return train_gpt2.GPT(config), [idx, idx, True]


@pytest.fixture(scope="module")
def found():
    done = run(sys.executable, "-c", COUNT, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))


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
    assert step["flops"]["aten.bmm"] == 2 * 7 * 2 * 128 ** 2 * tokens  # Z Z^T of seven 128 x 128 blocks a layer
    attention = 4 * 2 * 8 * 64 * 64 * 128  # both products, in both layers
    assert step["flops"]["aten._scaled_dot_product_flash_attention"] == attention


def test_the_trainer_keeps_the_qkv_buffer(found):
    """At least the 41 L C bytes of a token in bf16; and weights in bf16, the head's gradient, statistics."""
    step = found["trainer"]
    assert step["graphs"] == 1
    assert step["saved"] > 8 * 64 * 39 * 2 * 128


def test_ddp_cuts_the_model(found):
    plain, cut = found["trainer"], found["trainer_ddp"]
    assert cut["graphs"] > 1
    assert cut["flops"] == plain["flops"]
    launches, more = (sum(kernel["launches"] for kernel in step["kernels"]) for step in (plain, cut))
    assert more >= launches


def test_times_are_ranges(found):
    for step in found.values():
        for slow, fast in step["parts"].values():
            assert slow >= fast >= 0


def test_usage_error():
    done = run(sys.executable, ROOT / "scripts/estimate_step.py", "--n_layer", "0", timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: --n_layer 0 --sequences 64: must be at least 1"
