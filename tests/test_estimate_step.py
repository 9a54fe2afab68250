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
from train_gpt2 import Config, make_model

pytest.importorskip("triton", reason="triton is not installed; there are versions for Linux only")

@pytest.fixture(scope="module")
def printed():
    done = run(sys.executable, ROOT / "tests/estimated.py", env=PATHS)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def found(printed):
    return json.loads(printed[-1])


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


@pytest.mark.parametrize("name, rows, width", [("trainer", 1024, 128), ("track", 1000, 136)])
def test_the_loss_counts_where_the_model_uses_head_loss(found, name, rows, width):
    """Logits in bf16 and the sum of the head's gradient in fp32, each read and written once."""
    logits, gradient = found[name]["loss"]
    assert logits["launches"] * logits["bytes"] == 2 * 8 * 64 * rows * 2
    assert gradient["launches"] * gradient["bytes"] == 2 * rows * width * 4


def test_flops_of_the_optimizer_track(found):
    """Layers with bias are products, too; its head has 8 inputs more, for its bias."""
    flops = found["track"]["flops"]
    tokens = 8 * 64
    assert flops["aten.mm"] + flops["aten.addmm"] == 6 * 12 * 128 ** 2 * tokens
    assert flops["train_gpt2.head_loss"] == 6 * 1000 * 136 * tokens


def test_flops_and_traffic_of_another_trainer(found):
    """All logits in one product, and the loss in generated kernels, which read them at least twice."""
    step = found["NanoGPT"]
    tokens = 8 * 64
    assert step["loss"] == []
    assert step["flops"]["aten.mm"] == 6 * (12 * 128 ** 2 + 50304 * 128) * tokens
    assert sum(kernel["launches"] * kernel["bytes"] for kernel in step["kernels"]) > 2 * 2 * tokens * 50304


def test_a_bf16_residual_stream_moves_less(found):
    faster, trainer = (found[name] for name in ("faster_ddp", "trainer_ddp"))
    traffic = [sum(kernel["launches"] * kernel["bytes"] for kernel in step["kernels"])
               for step in (faster, trainer)]
    assert traffic[0] < traffic[1]
    assert faster["flops"] == trainer["flops"]


def test_nothing_is_left_uncounted(found):
    assert not any(step["unknown"] for step in found.values())


def test_the_table_compares_the_middles_of_the_ranges(found, printed):
    middles = {name: sum(map(sum, found[name]["parts"].values())) for name in ("trainer", "NanoGPT")}
    rows = {line.split()[0]: line.split() for line in printed[:-1]}
    assert rows["trainer"][-1] == "1.000"
    assert float(rows["NanoGPT"][-1]) == pytest.approx(middles["NanoGPT"] / middles["trainer"], abs=0.001)
    assert int(rows["NanoGPT"][1]) == sum(kernel["launches"] for kernel in found["NanoGPT"]["kernels"])


def test_times_are_ranges(found):
    for step in found.values():
        for slow, fast in step["parts"].values():
            assert slow >= fast >= 0


# ---- The models of other trainers

@pytest.mark.parametrize("name, parameters", [
    ("Record4", 123_532_032),
    ("Record7", 12 * 12 * 768 ** 2 + 50304 * 768),
    ("Nanochat", 12 * 12 * 768 ** 2 + 2 * 50304 * 768),
    ("NanoGPT", 123_590_000 + 1024 * 768),  # it reports 123.59 M, without positions
])
def test_parameters_of_other_trainers(name, parameters):
    with torch.device("meta"):
        model = make_model(Config(model=f"models.peers:{name}"))
    found = sum(p.numel() for p in model.parameters())
    assert found == pytest.approx(parameters, abs=5000 if name == "NanoGPT" else 0)


@pytest.mark.parametrize("name", ["Record4", "Record7", "Nanochat", "NanoGPT"])
def test_models_of_other_trainers_look_back_only(name):
    """The loss at token 5 depends on tokens 0 to 5, and every parameter has a gradient."""
    torch.manual_seed(0)
    model = make_model(Config(model=f"models.peers:{name}", n_layer=1, n_embd=128, sequence_length=16))
    idx = torch.randint(1000, (2, 16))
    targets = torch.full_like(idx, -1)
    targets[:, 5] = idx[:, 6]
    losses = []
    for changed in (15, 6, 5, 0):
        other = idx.clone()
        other[:, changed] += 1
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(other, targets, [])[0]
        losses.append(loss.item())
    loss.backward()
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    assert all(p.grad.count_nonzero() for p in model.parameters())


# ---- The command

@pytest.mark.parametrize("arguments, error", [
    (("--n_layer", 0), "--n_layer 0: must be at least 1"),
    (("--collect", "--peers"), "--collect with --ddp or --peers: only one of the three at a time"),
    (("--model", "models.peers:Record5"), "model = 'models.peers:Record5' cannot be made"),
    (("--model", "models.peers:Record4", "--collect"),
     "--collect: models.peers:Record4 has no hidden_matrices()"),
])
def test_usage_errors(arguments, error):
    done = fork(ROOT / "scripts/estimate_step.py", *arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {error}")
