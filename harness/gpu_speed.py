"""Times of what a training step consists of, each printed as soon as it is known.

    python -m harness.gpu_speed products     torch.mm at the shapes of the speedrun's model
    python -m harness.gpu_speed attention    cuDNN's and flash attention
    python -m harness.gpu_speed mlp          the kernel of models/fused_mlp.py against product and gelu
    --cpu                                    at toy size on the CPU, by Triton's interpreter

For 65,536 tokens, 64 sequences of 1024. gpu_faster.py runs all three. Times are medians.
"""
import argparse
import os
import statistics
import sys
import time

if "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from train_gpt2 import CHUNK, fast_dtype
from models import fused_mlp
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LAYERS = 12
HEADS = 12
# the default first, which two programs of a multiprocessor share; four warps; larger, alone on one
TILES = ((128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3),
         (128, 256, 64, 8, 4))
TILE_NAMES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")


def milliseconds(functions, device, rounds):
    """Median times of calls of these functions, which take turns, in an order that is reversed each time."""
    times = [[] for _ in functions]
    order = list(range(len(functions)))
    for i in range(rounds + 2):
        marks = []
        functions[order[0]]()  # keeps the GPU busy until the calls that are timed have been queued
        for j in order:
            marks.append(mark(device))
            functions[j]()
        marks.append(mark(device))
        if device.type == "cuda":
            torch.cuda.synchronize()
        for j, start, end in zip(order, marks, marks[1:]):
            times[j].append(start.elapsed_time(end) if device.type == "cuda" else 1000 * (end - start))
        order.reverse()
    return [statistics.median(values[2:]) for values in times]  # the first two warm up


def mark(device):
    """This moment: an event in the GPU's stream, or the time on a CPU."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def randn(*shape, device, scale=1.0):
    return (scale * torch.randn(shape, device=device)).to(fast_dtype(device))


def products(device, rounds, B, T, C):
    """Forward pass and both gradients of each layer and of a chunk of the head, as the model has them."""
    M = B * T
    chunk = min(CHUNK, M)
    rows = 50304 if device.type == "cuda" else 256
    fp32_sums = {} if device.type == "cpu" else dict(out_dtype=torch.float32)
    print(f"{'product':12}{'tokens':>8}{'inputs':>8}{'outputs':>8}"
          + "".join(f"{name:>12} ms  TFLOP/s" for name in ("forward", "d input", "d weight")), flush=True)
    total = 0.0
    layers = (("c_attn", M, C, 3 * C, LAYERS), ("attn_proj", M, C, C, LAYERS), ("c_fc", M, C, 4 * C, LAYERS),
              ("mlp_proj", M, 4 * C, C, LAYERS), ("head", chunk, C, rows, M // chunk))
    for name, tokens, inputs, outputs, launches in layers:
        x = randn(tokens, inputs, device=device)
        w = randn(outputs, inputs, device=device, scale=inputs ** -0.5)
        d = randn(tokens, outputs, device=device)
        line = f"{name:12}{tokens:8}{inputs:8}{outputs:8}"
        functions = [lambda: torch.mm(x, w.mT), lambda: torch.mm(d, w), lambda: torch.mm(d.mT, x)]
        if name == "head":
            dw = torch.zeros(outputs, inputs, device=device)
            functions[2] = lambda: torch.addmm(dw, d.mT, x, out=dw, **fp32_sums)
        for function in functions:
            ms, = milliseconds([function], device, rounds)
            line += f"{ms:15.3f}{rate(2 * tokens * inputs * outputs, ms):9.0f}"
            total += launches * ms
        print(line, flush=True)
    print(f"all products of a step of {LAYERS} layers and {M} tokens: {total:.2f} ms", flush=True)


def rate(flops, ms):
    """TFLOP/s"""
    return flops / ms / 1e9


def attention(device, rounds, B, T, C):
    """The tensors are strided as the model has them: v is a part of the product's result."""
    D = C // HEADS
    q, k, v = (x.transpose(1, 2) for x in randn(B, T, 3, HEADS, D, device=device).unbind(2))
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    for x in (q, k, v):
        x.requires_grad_()
    d = torch.randn_like(q)
    flops = 2 * B * HEADS * T * T * D  # of two causal products
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if device.type == "cpu":
        backends = [SDPBackend.FLASH_ATTENTION]
    for backend in backends:
        name = backend.name.lower()
        try:
            with sdpa_kernel(backend):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                functions = [lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                             lambda: torch.autograd.grad(y, (q, k, v), d, retain_graph=True)]
                there, back = milliseconds(functions, device, rounds)
        except RuntimeError as error:
            print(f"{name}: does not run here ({' '.join(str(error).split())[:200]})", flush=True)
            continue
        print(f"{name}, {B} x {HEADS} x {T} x {D}: forward {there:.3f} ms, {rate(flops, there):.0f} TFLOP/s; "
              f"backward {back:.3f} ms, {rate(2.5 * flops, back):.0f} TFLOP/s; "
              f"{LAYERS} layers {LAYERS * (there + back):.2f} ms", flush=True)


def error(x, expected):
    """The difference, relative to `expected`."""
    return ((x.float() - expected.float()).norm() / expected.float().norm()).item()


def mlp(device, rounds, B, T, C):
    """First each tile against product and gelu, then all of the MLP, forward and backward."""
    M = B * T
    u = randn(M, C, device=device)
    up = randn(4 * C, C, device=device, scale=C ** -0.5)
    down = randn(C, 4 * C, device=device, scale=C ** -0.5)
    d_out = randn(M, C, device=device)
    h, slope, d_pre = (torch.empty(M, 4 * C, device=device, dtype=u.dtype) for _ in range(3))
    pre = u @ up.mT

    def gelu():
        return F.gelu(u @ up.mT)

    def gelu_backward():
        return torch.ops.aten.gelu_backward(d_out @ down, pre)

    flops = 2 * M * C * 4 * C
    for numbers in TILES:
        tile = dict(zip(TILE_NAMES, numbers))

        def forward():
            fused_mlp.launch(u, up, h, slope, forward=True, tile=tile)

        def backward():
            fused_mlp.launch(d_out, down, d_pre, slope, forward=False, tile=tile)

        name = " x ".join(map(str, numbers[:3])) + ", {} warps, {} stages".format(*numbers[3:])
        try:
            forward()
            backward()
            errors = error(h, gelu()), error(d_pre, gelu_backward())
            torch_there, there, torch_back, back = milliseconds(
                [gelu, forward, gelu_backward, backward], device, rounds)
        except Exception as failure:  # whatever a launch can raise, as too little shared memory
            reason = " ".join(str(failure).split())[:200]
            print(f"tile {name}: DOES NOT RUN ({type(failure).__name__}: {reason})", flush=True)
            continue
        right = "right" if max(errors) < 0.01 else "WRONG"
        print(f"tile {name}: forward {there:.3f} ms, {rate(flops, there):.0f} TFLOP/s (product and gelu "
              f"{torch_there:.3f} ms); backward {back:.3f} ms, {rate(flops, back):.0f} TFLOP/s "
              f"({torch_back:.3f} ms); {right}, differences {errors[0]:.1e} and {errors[1]:.1e}", flush=True)
    inputs = [x.requires_grad_() for x in (u, up, down)]

    def torchs():
        return torch.autograd.grad(F.linear(F.gelu(F.linear(u, up)), down), inputs, d_out)

    def fused():
        return torch.autograd.grad(fused_mlp.mlp(*inputs)[0], inputs, d_out)

    ms, fused_ms = milliseconds([torchs, fused], device, rounds)
    errors = [error(x, y) for x, y in zip(fused(), torchs())]
    print(f"the whole MLP, forward and backward: torch {ms:.3f} ms, fused {fused_ms:.3f} ms: "
          f"{LAYERS * (ms - fused_ms):.2f} ms less in {LAYERS} layers; differences of the gradients of u, up "
          "and down: " + ", ".join(f"{x:.1e}" for x in errors), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {function.__name__: function for function in (products, attention, mlp)}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    if args.cpu:
        parts[args.part](torch.device("cpu"), 2, 2, 64, 96)
    else:
        parts[args.part](torch.device("cuda"), 20, 64, 1024, 768)


if __name__ == "__main__":
    main()
