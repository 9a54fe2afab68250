"""A training step as on a GPU, where there is none.

    python scripts/dry_run.py             in an environment with a CUDA build of torch
    scripts/dry_run.sh                    makes such environments in logs/, with torch 2.13 and 2.11

Under torch's FakeTensorMode every operation checks its shapes, types, keywords and overloads as on a GPU, but
computes nothing: the forward pass in bfloat16 with the statistics of Newton-Muon, the body of the loss, two
steps of AdamW, SGD, Muon and Newton-Muon with a refresh, evaluation; the same for the optimizer track. The
backward pass is left out: it asks the driver for its GPU; the tests run it on the CPU. Values, speed and the
Triton kernel only a GPU can show.
"""
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import MagicMock, patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command
import train_gpt2  # before torch: it says how CPU threads wait
from train_gpt2 import (
    OPTIMIZERS, Config, UserError, autocast, build_optimizers, head_loss, make_model, set_learning_rates,
    with_grams)
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = torch.device("cuda", 0)


def addmm(total, a, b, *, out, out_dtype):
    """torch.addmm with an out_dtype: whether it exists. Fake tensors of torch 2.11 cannot follow it."""
    assert "out_dtype" in str(torch.ops.aten.addmm.dtype_out._schema)
    assert a.dtype == b.dtype == torch.bfloat16 and total.dtype == out.dtype == out_dtype == torch.float32
    assert (a @ b).shape == total.shape == out.shape


def check_loss(config):
    """The body of head_loss, its kernel aside: the operator's own fake says only what comes out."""
    x = torch.zeros(64, config.n_embd, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(512, config.n_embd, device=DEVICE)
    targets = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    kernel = patch.object(train_gpt2, "cross_entropy_kernel", MagicMock(), create=True)
    with kernel, patch.object(torch, "addmm", addmm):
        loss, dx, dweight = head_loss._init_fn(x, weight, targets, config.vocab_size)
    return {"loss": loss.dtype, "its gradient by x": dx.dtype, "by the weight": dweight.dtype}


def check_step(config):
    """Two steps of the configuration's optimizers, on gradients of the right form, and an evaluation."""
    with DEVICE:
        model = make_model(config)
    optimizers = build_optimizers(model, config)
    hidden = optimizers[1]
    idx = torch.zeros(4, config.sequence_length, dtype=torch.int64, device=DEVICE)
    for step in range(2):  # the second has state
        collect = with_grams(model, hidden) if hasattr(hidden, "refresh") else ()
        with autocast(DEVICE, torch.bfloat16):
            loss, grams = model(idx, idx, collect)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if collect:
            hidden.refresh(grams, idx.numel())
        set_learning_rates(optimizers, 0.5)
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad(), autocast(DEVICE, torch.bfloat16):
        evaluated, _ = model(idx, idx)
    return {"loss": loss.dtype, "evaluation": evaluated.dtype, "grams": {gram.dtype for gram in grams}}


@command(interrupted="interrupted")
def main():
    if torch.version.cuda is None:
        raise UserError(f"torch {torch.__version__} is no CUDA build; scripts/dry_run.sh installs one")
    fields = dict(n_layer=2, n_head=2, n_embd=64, sequence_length=64, vocab_size=500)
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, no GPU needed")
    with ExitStack() as stack:
        stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda **options: True))
        stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(FakeTensorMode())
        print(f"loss: {check_loss(Config(**fields))}")
        for name in OPTIMIZERS:
            print(f"{name}: {check_step(Config(**fields, optimizer=name))}")
        track = dict(model="models.optimizer_track:GPT", optimizer="optimizers.track_muon:TrackNewtonMuon")
        print(f"the optimizer track: {check_step(Config(**fields, **track))}")
    print("all operations accept what the trainer gives them")


if __name__ == "__main__":
    main()
