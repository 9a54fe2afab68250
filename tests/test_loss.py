"""The loss on a GPU. Without a GPU: its kernel by Triton's interpreter, and compiled for three generations
of GPUs."""
import sys

import pytest
import torch
import torch.nn.functional as F

import train_gpt2
from conftest import ROOT, run
from train_gpt2 import Config, head_loss, make_model

pytest.importorskip("triton", reason="triton is not installed; there are versions for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU by Triton's interpreter (conftest.py)


@pytest.fixture
def fused(monkeypatch):
    """The GPU's code path, on the CPU, too. Without TF32, which an earlier run in this process leaves on."""
    monkeypatch.setattr(train_gpt2, "on_gpu", lambda x: True)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("cap", [0.0, 2.5])
@pytest.mark.parametrize("vocab_size, rows", [(5000, 5120), (4096, 4096), (100, 128)])
def test_head_loss_is_cross_entropy(fused, monkeypatch, vocab_size, rows, cap):
    monkeypatch.setattr(train_gpt2, "CHUNK", 7)  # of 20 tokens
    torch.manual_seed(0)
    x = torch.randn(20, 16).to(DEVICE).requires_grad_()
    weight = torch.randn(rows, 16).to(DEVICE).requires_grad_()
    targets = torch.randint(vocab_size, (20,))
    targets[[3, 19]] = -1
    targets[[0, 1]] = torch.tensor([0, vocab_size - 1])
    targets = targets.to(DEVICE)
    loss = head_loss(x, weight, targets, vocab_size, cap)[0]
    (3 * loss).backward()

    x64 = x.detach().double().requires_grad_()
    weight64 = weight.detach().double().requires_grad_()
    logits = (x64 @ weight64.T)[:, :vocab_size]
    if cap:
        logits = cap * logits / (logits ** 2 + cap ** 2).sqrt()
    expected = F.cross_entropy(logits, targets, ignore_index=-1)
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (x.grad - x64.grad).norm() < 1e-5 * x64.grad.norm()
    assert (weight.grad - weight64.grad).norm() < 1e-5 * weight64.grad.norm()
    assert weight.grad[vocab_size:].count_nonzero() == 0


@pytest.mark.filterwarnings("ignore:overflow")  # of the padding, which is masked afterwards
@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_kernel_with_huge_logits(fused, cap):
    logits = torch.tensor([[1e4, -1e4, 0.0, 9e3], [5.0, 5.0, 5.0, 9e3]], device=DEVICE).bfloat16()
    targets = torch.tensor([1, 2], device=DEVICE)
    losses = torch.empty(2, device=DEVICE)
    scale = torch.tensor(0.5, device=DEVICE)
    x = logits[:, :3].double().requires_grad_()
    expected = F.cross_entropy(cap * x / (x ** 2 + cap ** 2).sqrt() if cap else x, targets, reduction="none")
    gradient, = torch.autograd.grad(0.5 * expected.sum(), x)
    train_gpt2.cross_entropy_kernel[(2,)](logits, targets, losses, scale, 3, 4, cap, BLOCK=4)
    torch.testing.assert_close(losses, expected.detach().float())
    # the interpreter truncates to bf16, GPUs round
    torch.testing.assert_close(logits[:, :3].double(), gradient, rtol=2 ** -7, atol=0)
    assert logits[:, 3].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["gpt", "models.optimizer_track:GPT"])
def test_both_losses_agree_in_the_model(fused, monkeypatch, name):
    config = Config(n_layer=1, n_head=2, n_embd=32, vocab_size=300, sequence_length=16, model=name)
    torch.manual_seed(0)
    model = make_model(config).to(DEVICE)
    with torch.no_grad():
        for p in model.parameters():  # the track's model has zeros at first
            p += 0.05 * torch.randn_like(p)
    idx = torch.randint(300, (2, 16), device=DEVICE)

    def results():
        """The loss, the gradients and the grams."""
        loss, grams = model(idx, idx.roll(-1, 1), list(model.hidden_matrices()))
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return [loss.detach(), *gradients, *grams]

    fused_results = results()
    monkeypatch.setattr(train_gpt2, "on_gpu", lambda x: False)
    for a, b in zip(fused_results, results(), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_head_loss_passes_opcheck(fused):
    x = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(128, 16, device=DEVICE, requires_grad=True)
    targets = torch.randint(100, (5,), device=DEVICE)
    torch.library.opcheck(head_loss, (x, weight, targets, 100))
    torch.library.opcheck(head_loss, (x, weight, targets, 100, 15.0))


COMPILE = """
import sys, train_gpt2, triton
types = dict(logits="*bf16", targets="*i64", losses="*fp32", scale="*fp32",
             vocab_size="constexpr", stride="constexpr", cap="constexpr", BLOCK="constexpr")
sizes = {(4,): 50257, (5,): 50304, (6,): float(sys.argv[2]), (7,): 4096}
aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
source = triton.compiler.ASTSource(fn=train_gpt2.cross_entropy_kernel, signature=types, constexprs=sizes,
                                   attrs=aligned)
target = triton.backends.compiler.GPUTarget("cuda", int(sys.argv[1]), 32)
code = triton.compile(source, target=target, options=dict(num_warps=8)).asm
print(len(code["cubin"]), code["ptx"])
"""


@pytest.mark.parametrize("cap", [0.0, 15.0])
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernel_compiles(capability, cap, tmp_path):
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = run(sys.executable, "-c", COMPILE, capability, cap, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f".target sm_{capability}" in done.stdout
    assert "ld.global.v4" in done.stdout  # 16 bytes at a time; single elements would double the instructions
