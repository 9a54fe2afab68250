"""The same on a GPU, where there is one: scripts/test.sh tests/test_cuda.py

Needs nothing but torch, numpy and pytest. The most important tests come first, because GPU time is scarce.
"""
import re
import sys

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, arguments, logged, run, torchrun
from train_gpt2 import GPT, Config, Muon, NewtonMuon, gram, newton_schulz

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTIMIZERS = ("adamw", "muon", "newton_muon")

# bf16 keeps 8 bits. Five Newton-Schulz steps in it, simulated on a CPU for 20 random inputs of each shape,
# end up to 1.5 % (64 x 256) and 2.6 % (32 x 32) away from those in float64.
NEWTON_SCHULZ = 0.03


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch.compiler.reset()  # each configuration adds a graph, and the compiler stops after a few


@pytest.fixture
def precision():
    """Sets the precision of fp32 products on a GPU, for one test: "high" is TF32, as in the trainer."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def micro_batch(done):
    return int(re.search(r"with (\d+) of \d+ sequences at a time", done.stdout).group(1))


def milliseconds(function, repeats=10):
    """Time of a call on the GPU: the least of `repeats`."""
    times = []
    for _ in range(repeats + 2):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times[2:])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_the_compiled_loss_is_the_plain_one(precision, dtype, tolerance):
    """Value, and gradient of the table. 5000 columns are more than one block of the kernel, and no multiple
    of 128. Targets of -1 do not count."""
    precision("highest")
    torch.manual_seed(0)
    model = GPT(Config(n_layer=1, n_head=2, n_embd=64, vocab_size=5000)).cuda()
    idx = torch.randint(5000, (4, 128), device="cuda")
    targets = torch.randint(5000, (4, 128), device="cuda")
    targets[0, :9] = -1
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16)

    with autocast:
        loss, _ = torch.compile(model, dynamic=False)(idx, targets)
    loss.backward()
    grad = model.lm_head.weight.grad
    model.zero_grad(set_to_none=True)

    with autocast:
        logits = model.logits(idx).float()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    expected.backward()
    expected_grad = model.lm_head.weight.grad
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert (grad - expected_grad).norm() < tolerance * expected_grad.norm()
    assert grad[5000:].count_nonzero() == 0  # of the rows that pad the table


def test_compiled_steps_are_near_plain_ones(start, tmp_path):
    """Newton-Muon has both graphs, with and without its statistics. The largest micro-batch that divides 12
    sequences is 4."""
    for compiled in ("false", "true"):
        done = start(run_name=compiled, device="cuda", compile=compiled, optimizer="newton_muon",
                     refresh_interval=2)
        assert done.returncode == 0, done.stderr
        assert micro_batch(done) == 4
    assert logged(tmp_path / "logs/true") == pytest.approx(logged(tmp_path / "logs/false"), rel=0.005)


TWO_ON_ONE_GPU = """
import os
import torch.distributed as dist
import train_gpt2

os.environ["LOCAL_RANK"] = "0"
init = dist.init_process_group
dist.init_process_group = lambda backend, **more: init("gloo", **more)
train_gpt2.main()
"""


def test_two_processes_on_one_gpu(start, tmp_path):
    """NCCL refuses it. gloo copies through the CPU's memory, so that the collectives of CUDA tensors can be
    tested where there is only one GPU."""
    fields = dict(device="cuda", optimizer="newton_muon", refresh_interval=2)
    assert start(run_name="1", **fields).returncode == 0
    script = tmp_path / "two.py"
    script.write_text(TWO_ON_ONE_GPU)
    words = [tmp_path / "config.toml", "--run_name", "2", *arguments(fields)]
    done = run(sys.executable, *torchrun(2), script, *words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "logs/2") == pytest.approx(logged(tmp_path / "logs/1"), rel=0.002)


def second_moments(blocks, n, device):
    """Like those of a model's inputs: eigenvalues that fall as 1 / i from n, in a random basis, and a ridge
    of 0.2 of their mean. (blocks, n, n) float64"""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(blocks, n, n, generator=generator, dtype=torch.float64))
    values = n / torch.arange(1, n + 1, dtype=torch.float64)
    K = basis * values @ basis.mT
    return (K + 0.2 * values.mean() * torch.eye(n)).to(device)


def inverse_error(device):
    """Error of NewtonMuon.invert() in fp32, relative to the inverse in float64."""
    A = second_moments(3, 768, device)
    optimizer = NewtonMuon([torch.nn.Parameter(torch.zeros(2, 2, device=device))])
    inverse, good = optimizer.invert(A.float())
    assert good.all()
    expected = torch.linalg.inv(A)
    return ((inverse.double() - expected).norm() / expected.norm()).item()


def test_inverse_of_newton_muon_is_near_float64(precision, capsys):
    """Where the trainer allows TF32, which may reach the triangular solves. On a CPU the error is 3e-6 in
    fp32, and 5e-4 with a Cholesky factor rounded to TF32. Either is small beside bf16's in Newton-Schulz."""
    precision("high")
    error = inverse_error("cuda")
    with capsys.disabled():
        print(f"\nerror of the inverse: {error:.1e} (fp32: about 3e-6; TF32: about 5e-4)")
    assert error < 0.002


@pytest.mark.parametrize("blocks", [1, 4])
def test_second_moments_of_many_tokens(blocks, capsys):
    """gram() of 131,072 tokens: right, and not much slower than a product with as many operations.

    A tensor core cuts its sums off to 24 bits. With 131,072 / 16 additions one after the other, all of
    positive numbers, this can lose 8192 2^-24 = 0.05 %.
    A result of 768 x 768 has too few tiles for a GPU, unless the sum over tokens is split.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    z = torch.randn(131072, blocks * 768, generator=generator, device="cuda").bfloat16()
    result = gram(z, 768)
    expected = torch.stack([part.T @ part for part in z.double().split(768, dim=1)])
    assert result.dtype == torch.float32
    assert result.shape == (blocks, 768, 768)
    assert (result.double() - expected).norm() < 0.002 * expected.norm()

    weight = torch.randn(768, blocks * 768, generator=generator, device="cuda").bfloat16()
    of_gram = milliseconds(lambda: gram(z, 768))
    of_product = milliseconds(lambda: z @ weight.T)
    with capsys.disabled():
        print(f"\nZ Z^T of 131,072 tokens, {blocks} blocks: {of_gram:.3f} ms; "
              f"a layer with as many operations: {of_product:.3f} ms")
    assert of_gram < 10 * of_product


def test_newton_schulz_in_bf16_is_near_float64():
    U = torch.randn(3, 64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = newton_schulz(U)
    result = newton_schulz(U.float().cuda()).double().cpu()
    assert (result - expected).norm() / expected.norm() < NEWTON_SCHULZ


@pytest.mark.parametrize("shape", [(96, 32), (32, 32), (128, 32), (32, 128)])
def test_a_muon_step_is_near_the_cpu(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weights = []
    for device in ("cpu", "cuda"):
        w = torch.nn.Parameter(torch.zeros(shape, device=device))
        w.grad = G.to(device)
        Muon([w], lr=0.1).step()
        weights.append(w.detach().cpu())
    on_cpu, on_gpu = weights
    assert (on_cpu - on_gpu).norm() / on_cpu.norm() < NEWTON_SCHULZ


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_20_steps_are_near_the_cpu(start, tmp_path, optimizer):
    fields = dict(optimizer=optimizer, refresh_interval=4, num_iterations=20)
    assert start(run_name="cpu", **fields).returncode == 0
    for size in (12, 3):
        done = start(run_name=f"gpu{size}", device="cuda", device_batch_size=size, **fields)
        assert done.returncode == 0, done.stderr
    cpu = logged(tmp_path / "logs/cpu")
    whole = logged(tmp_path / "logs/gpu12")
    parts = logged(tmp_path / "logs/gpu3")
    assert len(cpu) == 20 + 5
    assert parts == pytest.approx(whole, rel=0.002)  # simulated on a CPU: 0.0003
    assert whole == pytest.approx(cpu, rel=0.005)  # and 0.0005


def test_fp32_is_near_the_cpu(start, tmp_path):
    assert start(run_name="cpu", optimizer="adamw").returncode == 0
    assert start(run_name="gpu", optimizer="adamw", device="cuda", dtype="float32").returncode == 0
    gpu = logged(tmp_path / "logs/gpu")
    cpu = logged(tmp_path / "logs/cpu")
    assert gpu == pytest.approx(cpu, rel=0.002)  # TF32 keeps 11 bits


def test_a_killed_run_resumes(start, tmp_path):
    assert start(run_name="whole", device="cuda", optimizer="muon").returncode == 0
    env = dict(PYTHONPATH=str(ROOT / "tests"), FAULT_MARKER=str(tmp_path / "died"))
    fields = dict(run_name="killed", device="cuda", optimizer="faults:DiesOnce", save_every=2, resume="auto",
                  processes=1, env=env)
    assert start(**fields).returncode == -9  # in step 5
    done = start(**fields)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4" in done.stdout
    assert logged(tmp_path / "logs/killed") == pytest.approx(logged(tmp_path / "logs/whole"), rel=0.002)


def test_micro_batch_fits_little_memory(start, tmp_path):
    """65,536 tokens of 4 layers of width 512 keep more than 3 GiB for the backward pass, but the run has
    2 GiB."""
    fields = dict(device="cuda", compile="true", n_layer=4, n_head=8, n_embd=512, sequence_length=512,
                  batch_size=128, val_tokens=512, allow_repeat="true", num_iterations=2, warmdown_iters=0)
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
        done = start(run_name=str(processes), processes=processes, device="cuda", optimizer="newton_muon",
                     refresh_interval=2)
        assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "logs/2") == pytest.approx(logged(tmp_path / "logs/1"), rel=0.002)
