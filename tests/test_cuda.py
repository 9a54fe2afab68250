"""The same on a GPU, where there is one: scripts/test.sh tests/test_cuda.py. Needs nothing but torch, numpy and pytest."""
import re

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, logged, run, torchrun
from train_gpt2 import GPT, Config, Muon, newton_schulz

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# bf16 keeps 8 bits. Five Newton-Schulz steps in it, simulated on a CPU for 20 random inputs of each shape, end up to 1.5 % (64 x 256) and
# 2.6 % (32 x 32) away from those in float64.
NEWTON_SCHULZ = 0.03
OPTIMIZERS = ("adamw", "muon", "newton_muon")


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch.compiler.reset()  # each configuration adds a graph, and the compiler stops after a few


def micro_batch(done):
    return int(re.search(r"with (\d+) of \d+ sequences at a time", done.stdout).group(1))


def test_newton_schulz_in_bf16_is_near_float64():
    U = torch.randn(3, 64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = newton_schulz(U.float().cuda()).double().cpu() - newton_schulz(U)
    assert error.norm() / newton_schulz(U).norm() < NEWTON_SCHULZ


@pytest.mark.parametrize("shape", [(96, 32), (32, 32), (128, 32), (32, 128)])
def test_a_muon_step_is_near_the_cpu(shape):
    weights = [torch.nn.Parameter(torch.zeros(shape, device=device)) for device in ("cpu", "cuda")]
    G = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for w in weights:
        w.grad = G.to(w.device)
        Muon([w], lr=0.1).step()
    assert (weights[0] - weights[1].cpu()).norm() / weights[0].norm() < NEWTON_SCHULZ


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_the_compiled_loss_is_the_plain_one(dtype, tolerance):
    """Value, and gradient of the table; 5000 columns are more than one block of a kernel, and no multiple of 128. -1 does not count."""
    config = Config(n_layer=1, n_head=2, n_embd=64, vocab_size=5000)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    model = GPT(config).cuda()
    idx, targets = torch.randint(5000, (2, 4, 128), device="cuda")
    targets[0, :9] = -1

    def compiled():
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return torch.compile(model, dynamic=False)(idx, targets)[0]

    def plain():
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model.logits(idx)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    results = []
    for loss in (compiled(), plain()):
        model.zero_grad(set_to_none=True)
        loss.backward()
        results.append((loss.detach(), model.lm_head.weight.grad))
    (loss, grad), (expected_loss, expected_grad) = results
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    assert (grad - expected_grad).norm() < tolerance * expected_grad.norm()
    assert grad[5000:].count_nonzero() == 0  # of the rows that pad the table


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_20_steps_are_near_the_cpu(start, tmp_path, optimizer):
    fields = dict(optimizer=optimizer, refresh_interval=4, num_iterations=20)
    assert start(run_name="cpu", **fields).returncode == 0
    for size in (12, 3):
        done = start(run_name=f"gpu{size}", device="cuda", device_batch_size=size, **fields)
        assert done.returncode == 0, done.stderr
    cpu, whole, parts = (logged(tmp_path / "logs" / name) for name in ("cpu", "gpu12", "gpu3"))
    assert len(cpu) == 20 + 5
    assert parts == pytest.approx(whole, rel=0.002)  # simulated on a CPU: 0.0003
    assert whole == pytest.approx(cpu, rel=0.005)  # and 0.0005


def test_fp32_is_near_the_cpu(start, tmp_path):
    assert start(run_name="cpu", optimizer="adamw").returncode == 0
    assert start(run_name="gpu", optimizer="adamw", device="cuda", dtype="float32").returncode == 0
    assert logged(tmp_path / "logs/gpu") == pytest.approx(logged(tmp_path / "logs/cpu"), rel=0.002)  # TF32 keeps 11 bits


def test_compiled_steps_are_near_plain_ones(start, tmp_path):
    """Newton-Muon has both graphs, with and without its statistics; the largest micro-batch that divides 12 sequences is 4."""
    for compiled in ("false", "true"):
        done = start(run_name=compiled, device="cuda", compile=compiled, optimizer="newton_muon", refresh_interval=2)
        assert done.returncode == 0 and micro_batch(done) == 4, done.stderr
    assert logged(tmp_path / "logs/true") == pytest.approx(logged(tmp_path / "logs/false"), rel=0.005)


def test_a_killed_run_resumes(start, tmp_path):
    assert start(run_name="whole", device="cuda", optimizer="muon").returncode == 0
    fields = dict(run_name="killed", device="cuda", optimizer="faults:DiesOnce", save_every=2, resume="auto", processes=1,
                  env=dict(PYTHONPATH=str(ROOT / "tests"), FAULT_MARKER=str(tmp_path / "died")))
    assert start(**fields).returncode == -9  # in step 5
    done = start(**fields)
    assert done.returncode == 0 and "resumed at step 4" in done.stdout, done.stderr
    assert logged(tmp_path / "logs/killed") == pytest.approx(logged(tmp_path / "logs/whole"), rel=0.002)


def test_micro_batch_fits_little_memory(start, tmp_path):
    """65,536 tokens of 4 layers of width 512 keep more than 3 GiB for the backward pass, but a run starts with 2 GiB."""
    fields = dict(device="cuda", compile="true", n_layer=4, n_head=8, n_embd=512, sequence_length=512, batch_size=128, val_tokens=512,
                  allow_repeat="true", num_iterations=2, warmdown_iters=0)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2 * 2 ** 30 / total)
    try:
        done = start(run_name="small", **fields)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert done.returncode == 0, done.stderr
    assert micro_batch(done) < 128


def test_two_processes_on_two_gpus(start, tmp_path):
    """DDP, owners and statistics over NCCL."""
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for each of two processes")
    for processes in (1, 2):
        done = start(run_name=str(processes), processes=processes, device="cuda", optimizer="newton_muon", refresh_interval=2)
        assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "logs/2") == pytest.approx(logged(tmp_path / "logs/1"), rel=0.002)


def test_two_processes_on_one_gpu(start, tmp_path):
    """NCCL refuses it, gloo copies through the CPU's memory: the collectives of CUDA tensors where there is only one GPU."""
    fields = dict(device="cuda", optimizer="newton_muon", refresh_interval=2)
    assert start(run_name="1", **fields).returncode == 0
    code = """
import os, sys, torch.distributed as dist, train_gpt2
os.environ["LOCAL_RANK"] = "0"
init = dist.init_process_group
dist.init_process_group = lambda backend, **more: init("gloo", **more)
train_gpt2.main()"""
    (tmp_path / "two.py").write_text(code)
    done = run(*torchrun(2), tmp_path / "two.py", tmp_path / "config.toml", "--run_name", "2",
               *(text for key, value in fields.items() for text in (f"--{key}", value)), cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
               timeout=120)
    assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "logs/2") == pytest.approx(logged(tmp_path / "logs/1"), rel=0.002)
