"""What torch finds on this machine, and whether attention and the loss's kernel work.

    python -m harness.gpu_facts
    --cpu         the same at toy size on the CPU, where Triton's interpreter runs the kernel
    --attention   attention alone

Each line is printed as soon as it is known. gpu_check.py runs it first.
"""
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CPU = "--cpu" in sys.argv
if CPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import train_gpt2
from train_gpt2 import head_loss, synchronized_time
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = torch.device("cpu" if CPU else "cuda")


def software():
    triton = train_gpt2.triton and train_gpt2.triton.__version__
    print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
          f"cuDNN {torch.backends.cudnn.version()}, Triton {triton}")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    print(f"C compiler {compiler or 'MISSING'}, Python's headers {'found' if headers else 'MISSING'} "
          "(torch.compile and Triton need both)")


def hardware():
    if CPU:
        print(f"CPU with {torch.get_num_threads()} threads")
        return
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        print(f"GPU {i}: {gpu.name}, {gpu.total_memory / 2 ** 30:.1f} GiB, "
              f"capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors")
    query = "--query-gpu=driver_version,power.limit,clocks.max.sm,temperature.gpu"
    try:
        command = ["nvidia-smi", query, "--format=csv"]
        print(subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip())
    except (OSError, subprocess.TimeoutExpired):
        print("nvidia-smi does not answer")


def attention():
    """Which one torch takes for the speedrun's shapes, its time, and its error against plain fp32."""
    B, H, T, D = (2, 2, 64, 16) if CPU else (32, 12, 1024, 64)
    dtype = train_gpt2.fast_dtype(DEVICE)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, H, T, D, device=DEVICE, dtype=dtype).unbind()
    for x in (q, k, v):
        x.requires_grad_()
    choice = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True)).name.lower()
    rounds = 10
    for i in range(rounds + 2):
        if i == 2:  # the first ones warm up
            start = synchronized_time(DEVICE)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        grads = torch.autograd.grad(y, (q, k, v), y)
    ms = 1000 * (synchronized_time(DEVICE) - start) / rounds
    finite = all(x.isfinite().all() for x in (y, *grads))
    with sdpa_kernel(SDPBackend.MATH):
        few = [x[:1].detach().float() for x in (q, k, v)]
        exact = F.scaled_dot_product_attention(*few, is_causal=True)
    error = (y[:1].float() - exact).norm() / exact.norm()
    print(f"attention: torch takes {choice}; {B} x {H} x {T} x {D} in {dtype}, "
          f"forward and backward {ms:.3f} ms, relative error {error:.1e}, "
          f"{'all finite' if finite else 'NOT FINITE'}")


def loss_kernel():
    """Launches the Triton kernel of the loss, and compares it with torch's. Whether it launches."""
    if not train_gpt2.triton:
        print("the loss's kernel: no Triton here, so the trainer uses torch's cross-entropy")
        return False
    tokens, width, vocab_size = (8, 16, 100) if CPU else (4096, 768, 50257)
    rows = -(-vocab_size // 128) * 128
    torch.manual_seed(0)
    x = torch.randn(tokens, width, device=DEVICE, dtype=train_gpt2.fast_dtype(DEVICE))
    weight = torch.randn(rows, width, device=DEVICE) / width ** 0.5
    targets = torch.randint(vocab_size, (tokens,), device=DEVICE)
    try:
        loss = head_loss(x, weight, targets, vocab_size)[0].item()
    except Exception as error:  # whatever a launch can raise: no compiler, no headers, an old card
        reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        print(f"the loss's kernel: DOES NOT LAUNCH ({reason})")
        return False
    expected = F.cross_entropy((x @ weight.to(x.dtype).mT)[:, :vocab_size].float(), targets).item()
    print(f"the loss's kernel launches: loss {loss:.5f}, torch's cross-entropy {expected:.5f}")
    return True


def kernel_warps():
    """Time of the loss's kernel on a chunk of logits: with 8 warps, as the trainer has it, and with 16.

    With 16, three programs of a row on each multiprocessor keep 40 MB in flight, and the L2 cache has 50.
    """
    tokens, vocab_size, stride, block = (8, 100, 128, 128) if CPU else (train_gpt2.CHUNK, 50257, 50304, 4096)
    logits = torch.randn(tokens, stride, device=DEVICE, dtype=train_gpt2.fast_dtype(DEVICE))
    targets = torch.randint(vocab_size, (tokens,), device=DEVICE)
    losses = torch.empty(tokens, device=DEVICE)
    scale = torch.ones((), device=DEVICE)
    rounds = 20
    for warps in (8, 16):
        for i in range(rounds + 2):
            if i == 2:  # the first ones compile and warm up
                start = synchronized_time(DEVICE)
            train_gpt2.cross_entropy_kernel[(tokens,)](
                logits, targets, losses, scale, vocab_size, stride, cap=0.0, BLOCK=block, num_warps=warps)
        ms = 1000 * (synchronized_time(DEVICE) - start) / rounds
        print(f"the loss's kernel with {warps} warps: {ms:.3f} ms for {tokens} tokens")


def main():
    torch.set_float32_matmul_precision("high")
    if "--attention" not in sys.argv:
        software()
        hardware()
    attention()
    if "--attention" not in sys.argv:
        if loss_kernel():
            kernel_warps()


if __name__ == "__main__":
    main()
