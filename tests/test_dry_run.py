"""scripts/dry_run.py: a training step on a GPU that is not there.

Its checks run here on fake tensors of the CPU, with any build of torch.
"""
import sys
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt2
from conftest import refused
from scripts import dry_run
from train_gpt2 import Config, NewtonMuon, UserError, head_loss, rotate

# the GPU is there if a test runs under on_stub()
DEVICE = dry_run.GPU if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def check(monkeypatch):
    """check(optimizer) checks loss operator and step of a small model. Returns what it says of the step."""
    fields = dict(n_layer=1, n_head=2, n_embd=64, sequence_length=64, vocab_size=500)

    def check(optimizer):
        config = Config(optimizer=optimizer, **fields)
        with FakeTensorMode():
            dry_run.check_loss(config, DEVICE, MagicMock())
            return dry_run.check_step(config, DEVICE)

    monkeypatch.setattr(train_gpt2, "on_gpu", lambda x: True)
    return check


@pytest.mark.parametrize("optimizer", train_gpt2.OPTIMIZERS)
def test_a_step_is_accepted(check, optimizer):
    text = check(optimizer)
    linear = 2 * 4  # micro-batches, layers
    matrices = 4 if optimizer == "newton_muon" else 0  # with a gram in each micro-batch
    assert f"({3 * linear + 2 * matrices} bfloat16 products, " in text  # output and two gradients
    assert f" {matrices} grams, " in text


# faults, which a GPU would show in its first step, or would not show at all


def products_in_fp32(monkeypatch):
    without = torch.autocast(DEVICE.type, enabled=False)
    monkeypatch.setattr(train_gpt2, "autocast", lambda device, dtype: without)


def grams_in_bf16(monkeypatch):
    def gram(z, n):
        z = z.detach().reshape(-1, z.size(-1) // n, n).transpose(0, 1).bfloat16()
        return torch.bmm(z.mT, z)
    monkeypatch.setattr(train_gpt2, "gram", gram)


def grams_untransposed(monkeypatch):
    def gram(z, n):
        z = z.detach().reshape(-1, z.size(-1) // n, n).transpose(0, 1).bfloat16()
        return torch.bmm(z, z, out_dtype=torch.float32)
    monkeypatch.setattr(train_gpt2, "gram", gram)


def preconditioner_in_bf16(monkeypatch):
    def precondition(self, p, G):
        P = self.state[p]["P"].bfloat16()
        return torch.einsum("mbi,bij->mbj", G.view(len(G), len(P), -1), P).flatten(1)
    monkeypatch.setattr(NewtonMuon, "precondition", precondition)


def rotary_backward_of_mixed_types(monkeypatch):
    class Rotate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, cos, sin):
            ctx.save_for_backward(cos, sin)
            return rotate(x, cos, sin)

        @staticmethod
        def backward(ctx, gradient):
            cos, sin = ctx.saved_tensors
            turn = torch.eye(gradient.size(-1), device=gradient.device)  # in fp32
            return gradient @ turn, None, None
    monkeypatch.setattr(train_gpt2, "rotate", Rotate.apply)


def loss_gradient_in_fp32(monkeypatch):
    def scale_gradients(ctx, gradient, *_):
        dx, dweight = ctx.saved_tensors
        return gradient * dx.float(), gradient * dweight, None, None
    monkeypatch.setattr(head_loss, "_backward_fn", scale_gradients)


def loss_gradients_of_each_other(monkeypatch):
    def scale_gradients(ctx, gradient, *_):
        dx, dweight = ctx.saved_tensors
        return gradient * dweight, gradient * dx, None, None
    monkeypatch.setattr(head_loss, "_backward_fn", scale_gradients)


@pytest.mark.parametrize("fault, words", [
    (products_in_fp32, "matrix products: 32 float32"),
    (grams_in_bf16, "loss, evaluation or grams"),
    (grams_untransposed, "batch2"),
    (preconditioner_in_bf16, "bmm.default of"),
    (rotary_backward_of_mixed_types, "mm.default of"),
    (loss_gradient_in_fp32, "torch.float32"),
    (loss_gradients_of_each_other, "for"),
])
def test_a_fault_is_found(check, monkeypatch, fault, words):
    fault(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError), match=words):
        check("newton_muon")


# the script


without_gpu = pytest.mark.skipif(torch.version.cuda is None or torch.cuda.is_available(),
                                 reason="needs a CUDA build of torch, and no GPU")


@without_gpu
def test_the_same_on_the_stub_of_a_gpu():
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-o", "addopts=", __file__,
               "-k", "step_is_accepted or fault"]
    assert dry_run.on_stub(command) == 0


@without_gpu
@pytest.mark.slow
def test_a_cuda_build_accepts_the_step_and_compiles_it(call):
    done = call(dry_run)
    assert done.returncode == 0, done.stderr
    assert "2 backward, 3 forward graphs" in done.stdout
    assert done.stdout.splitlines()[-1] == "all operations accept what the trainer gives them"


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch is installed")
def test_a_cpu_build_is_refused(call):
    refused(call(dry_run), "is no CUDA build", "scripts/dry_run.sh installs one")


def test_no_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UserError, match="no C compiler 'no-such-compiler'; install gcc, or set CC"):
        dry_run.on_stub(["true"])
