"""models/fused_mlp.py. Without a GPU: by Triton's interpreter, and compiled for three generations of GPUs."""
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.backends.registry import lookup_backend

import train_gpt2
from conftest import ROOT, run
from train_gpt2 import Config, make_model

pytest.importorskip("triton", reason="triton is not installed; there are versions for Linux only")
from models import fused_mlp
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU by Triton's interpreter (conftest.py)
ON_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU multiplies fp32 as TF32")


@pytest.fixture
def bf16(monkeypatch):
    """The interpreter multiplies bf16 as if it were integers, and truncates fp32 to it. GPUs do neither."""
    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *more):
        if a.dtype.scalar == tl.bfloat16:
            a = self.create_fp_ext(a, tl.float32)
            b = self.create_fp_ext(b, tl.float32)
        return dot(self, a, b, *more)

    def create_fp_trunc(self, x, dtype):
        if dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(x.data).bfloat16().view(torch.uint16)
            return TensorHandle(rounded.numpy(), tl.bfloat16)
        return self.cast_impl(x, dtype)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", create_fp_trunc)


@pytest.fixture
def fused(monkeypatch):
    """The MLP's code path of a GPU, on the CPU, too."""
    monkeypatch.setattr(fused_mlp, "on_gpu", lambda x: True)


def tensors(M, C, dtype):
    """Inputs of the MLP and the gradient of its output. Inputs of gelu are between -4 and 4."""
    generator = torch.Generator().manual_seed(0)
    shapes = (M, C), (4 * C, C), (C, 4 * C), (M, C)
    u, up, down, d_out = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    *inputs, d_out = (x.to(dtype) for x in (u, up / C ** 0.5, down / C ** 0.5, d_out))
    return [x.requires_grad_() for x in inputs], d_out


def plain(inputs, d_out):
    """[out, h, gradients of u, up and down]"""
    u, up, down = inputs
    h = F.gelu(F.linear(u, up))
    out = F.linear(h, down)
    return [out, h, *torch.autograd.grad(out, inputs, d_out)]


def error(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype, tolerance", [
    pytest.param(torch.float32, 1e-6, marks=ON_CPU),
    (torch.float16, 1e-3),
    (torch.bfloat16, 4e-3),  # it rounds by up to 2^-9
])
@pytest.mark.parametrize("M, C", [(70, 24), (256, 32), (131, 136)])
def test_the_mlp_and_its_gradients_are_those_of_float64(bf16, dtype, tolerance, M, C):
    """C = 136 is more than two steps of the sum over C, and 4 C more than four tiles; neither divides."""
    inputs, d_out = tensors(M, C, dtype)
    out, h, _ = fused_mlp.mlp(*inputs)
    results = [out, h, *torch.autograd.grad(out, inputs, d_out)]
    exact = plain([x.detach().double().requires_grad_() for x in inputs], d_out.double())
    for x, rounded, expected in zip(results, plain(inputs, d_out), exact, strict=True):
        assert x.dtype == dtype and x.shape == expected.shape
        assert error(x, expected) < tolerance
        if dtype != torch.float32:  # as what is between product and gelu is not rounded
            assert error(x, expected) < 1.1 * error(rounded, expected)


@ON_CPU
@pytest.mark.filterwarnings("ignore:overflow")  # of the square of 1e20
def test_gelu_and_its_derivative_at_all_magnitudes():
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e-30, -1e-30, 1e20, -1e20])))
    u = torch.zeros(len(x), 8)
    u[:, 0] = x
    up = torch.zeros(32, 8)
    up[0, 0] = 1.0
    _, h, slope = fused_mlp.mlp(u, up, torch.zeros(8, 32))
    x = x.double().requires_grad_()
    y = F.gelu(x)
    y.sum().backward()
    assert (h[:, 0] - y).abs().div(y.detach().abs().clamp(min=1)).max() < 3e-7
    assert (slope[:, 0] - x.grad).abs().max() < 3e-7


def small(name):
    """(a model of the name, tokens)"""
    config = Config(n_layer=1, n_head=2, n_embd=32, vocab_size=100, sequence_length=20, model=name)
    torch.manual_seed(0)
    model = make_model(config).to(DEVICE)
    return model, torch.randint(100, (3, 20), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def results(model, forward, idx, dtype):
    """The loss, the grams and the gradients."""
    names = list(train_gpt2.GPT.hidden_matrices(model))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, grams = forward(idx, idx.roll(-1, 1), names)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss.detach(), *grams, *gradients]


def counted(monkeypatch):
    """The list to which each launch of the kernel adds whether it was a forward pass."""
    launches = []
    launch = fused_mlp.launch

    def counting(*args, forward):
        launches.append(forward)
        launch(*args, forward=forward)
    monkeypatch.setattr(fused_mlp, "launch", counting)
    return launches


def test_the_model_is_the_trainers(bf16, fused, monkeypatch):
    """Same initial weights; loss, gradients and grams as near fp32 as the trainer's own in bf16."""
    launches = counted(monkeypatch)
    model, idx = small("models.fused_mlp:GPT")
    mine = results(model, model, idx, torch.bfloat16)
    assert launches == [True, False]
    own, _ = small("gpt")
    rounded = results(own, own, idx, torch.bfloat16)
    exact = results(own, own, idx, torch.float32)
    for x, y, expected in zip(mine, rounded, exact, strict=True):
        assert error(x, expected.double()) < 1.2 * error(y, expected.double()) + 1e-4


@pytest.mark.parametrize("what", ["fp32", "a CPU", "no kernels"])
def test_elsewhere_it_is_the_trainers_bit_for_bit(what, fused, monkeypatch):
    launches = counted(monkeypatch)
    dtype = torch.float32 if what == "fp32" else torch.bfloat16
    if what == "a CPU":
        monkeypatch.setattr(fused_mlp, "on_gpu", lambda x: False)
    pair = []
    for name in ("models.fused_mlp:GPT", "gpt"):
        model, idx = small(name)
        model.fused_loss = what != "no kernels"
        pair.append(results(model, model, idx, dtype))
    assert launches == []
    for a, b in zip(*pair, strict=True):
        assert torch.equal(a, b)


def test_operations_pass_opcheck(bf16):
    inputs, d_out = tensors(9, 16, torch.bfloat16)
    torch.library.opcheck(fused_mlp.mlp, tuple(inputs))
    down = inputs[2].detach()
    slope = fused_mlp.mlp(*inputs)[2].detach()
    torch.library.opcheck(fused_mlp.before_gelu, (d_out, down, slope),
                          test_utils=("test_schema", "test_faketensor"))


def test_the_compiled_model_is_the_same_in_ddps_parts(bf16, fused):
    """DDP splits the graph at its buckets of gradients, here of 8 KiB."""
    model, idx = small("models.fused_mlp:GPT")
    expected = results(model, model, idx, torch.bfloat16)
    splitter = DDPOptimizer(8192, lookup_backend("aot_eager"), first_bucket_cap=8192)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=splitter.compile_fn, dynamic=False, fullgraph=True)
    for x, y in zip(results(model, compiled, idx, torch.bfloat16), expected, strict=True):
        assert error(x, y.double()) < 1e-3
    assert len(splitter.buckets) > 3


COMPILE = """
import json, re, subprocess
import triton
from models import fused_mlp

tile = dict(fused_mlp.TILE)
m, n, k = tile.pop("BLOCK_M"), tile.pop("BLOCK_N"), tile.pop("BLOCK_K")

def compiled(capability, forward):
    blocks = dict(a=(m, k), b=(n, k) if forward else (k, n), out=(m, n // 2), slope=(m, n // 2))
    types = {name: f"tensordesc<bf16[{rows}, {columns}]>" for name, (rows, columns) in blocks.items()}
    constants = dict(columns=3072, K=768, FORWARD=forward, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k)
    types.update(dict.fromkeys(constants, "constexpr"))
    sizes = {(4 + i,): value for i, value in enumerate(constants.values())}
    source = triton.compiler.ASTSource(fn=fused_mlp.mlp_gemm, signature=types, constexprs=sizes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options=tile)
    open("kernel.cubin", "wb").write(kernel.asm["cubin"])
    tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "kernel.cubin"]
    usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(name + r":(\\d+)", usage)[1]) for name in ("REG", "STACK")}
    return dict(found, capability=capability, ptx=kernel.asm["ptx"], shared=kernel.metadata.shared)

kinds = ((80, True), (89, False), (90, True), (90, False))
print(json.dumps([compiled(*kind) for kind in kinds]))
"""


def test_the_kernel_compiles(tmp_path):
    """For three generations. On Hopper with its own instructions and without spilled registers; two programs
    fit a multiprocessor, which has 65,536 registers and 227 KiB of shared memory."""
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = run(sys.executable, "-c", COMPILE, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout):
        assert f".target sm_{found['capability']}" in found["ptx"]
        if found["capability"] == 90:
            assert "wgmma.mma_async" in found["ptx"] and "cp.async.bulk.tensor" in found["ptx"]
            assert found["STACK"] == 0
            assert 2 * 32 * fused_mlp.TILE["num_warps"] * found["REG"] <= 65536
            assert 2 * (found["shared"] + 1024) <= 227 * 1024
