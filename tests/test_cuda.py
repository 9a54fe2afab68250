"""The same on a GPU, where there is one: scripts/test.sh tests/test_cuda.py. bf16 keeps 8 bits, so the tolerances are 2 % where not said otherwise."""
import pytest
import torch

from test_run import losses
from train_gpt2 import Muon, newton_schulz

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_newton_schulz_in_bf16_is_near_the_one_in_float64():
    U = torch.randn(3, 64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = newton_schulz(U.float().cuda()).double().cpu() - newton_schulz(U)
    assert error.norm() / newton_schulz(U).norm() < 0.02


@pytest.mark.parametrize("shape", [(96, 32), (32, 32), (128, 32), (32, 128)])
def test_a_step_on_the_gpu_is_near_the_step_on_the_cpu(shape):
    weights = [torch.nn.Parameter(torch.zeros(shape, device=device)) for device in ("cpu", "cuda")]
    G = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for w in weights:
        w.grad = G.to(w.device)
        Muon([w], lr=0.1).step()
    assert (weights[0] - weights[1].cpu()).norm() / weights[0].norm() < 0.02


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "newton_muon"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_accumulation_compilation_and_the_cpu_give_the_same_losses(start, tmp_path, optimizer, compiled):
    fields = dict(optimizer=optimizer, refresh_interval=2)
    assert start(run_name="cpu", **fields).returncode == 0
    for size in (12, 3):
        done = start(run_name=f"gpu{size}", device="cuda", compile=compiled, device_batch_size=size, **fields)
        assert done.returncode == 0, done.stderr
    cpu, whole, parts = (dict(losses(tmp_path / f"logs/{name}")) for name in ("cpu", "gpu12", "gpu3"))
    assert parts == pytest.approx(whole, rel=0.005)
    assert whole == pytest.approx(cpu, rel=0.02)


def test_fp32_on_the_gpu_is_near_fp32_on_the_cpu(start, tmp_path):
    assert start(run_name="cpu", optimizer="adamw").returncode == 0
    assert start(run_name="gpu", optimizer="adamw", device="cuda", dtype="float32").returncode == 0
    assert dict(losses(tmp_path / "logs/gpu")) == pytest.approx(dict(losses(tmp_path / "logs/cpu")), rel=0.002)  # TF32 keeps 11 bits


def test_the_largest_micro_batch_is_found_and_resumed_runs_go_on(start, tmp_path):
    done = start(run_name="a", device="cuda", save_every=4, optimizer="newton_muon", refresh_interval=2)
    assert done.returncode == 0 and "on cuda with 4 of 12 sequences at a time" in done.stdout
    (tmp_path / "logs/a/checkpoints/step_000010.pt").unlink()
    before = losses(tmp_path / "logs/a")
    done = start(run_name="a", device="cuda", save_every=4, optimizer="newton_muon", refresh_interval=2, resume="auto")
    assert done.returncode == 0 and "resumed at step 8" in done.stdout
    assert dict(losses(tmp_path / "logs/a")) == pytest.approx(dict(before), rel=0.005)
