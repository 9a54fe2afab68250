"""The trainer's model with gelu and its derivative in the epilogues of two Triton products.

    python train_gpt2.py configs/speedrun_muon.toml --model models.fused_mlp:GPT

An experiment: no GPU has seen it. It computes what the trainer's model does, from the same initial weights,
with a rounding less: that of gelu's input to bf16. On a CPU, in fp32 and where kernels do not compile it is
the trainer's model itself. For M tokens of width C, out = gelu(u up^T) down^T:

    forward    h, slope = gelu(u up^T), gelu'(u up^T)      the kernel below
               out = h down^T                              torch's product
    backward   d_pre = (d_out down) * slope                the kernel below
               d_u, d_up, d_down                           torch's products

Traffic decides what is kept. A tensor (M, 4 C) in bf16, of 65,536 tokens of width 768, is 0.40 GB:

    torch      pre written and read, h written; d_h written and read, pre read, d_pre written     2.8 GB
    here       h and slope written; slope read, d_pre written                                     1.6 GB

14.5 GB less in twelve layers: 4.3 to 5.8 ms at 2.5 to 3.35 TB/s. slope takes as much memory as pre does in
torch, and leaves a multiplication to the second epilogue. To keep pre alone and redo gelu would save 4.5 GiB,
but write h a second time: 4.8 GB, 1.5 to 1.9 ms.

It pays only if the two products, epilogues included, keep 420 TFLOP/s: scripts/gpu_faster.py measures it.
What is assumed of an H100: two tiles of 128 x 128 fit a multiprocessor, by registers and shared memory (the
compiler says so), and one's epilogue (26 instructions an element forward, 4 backward) runs beside the other's
products. Larger tiles read less from the L2 cache, but stand alone. Tiles of the same rows follow each other:
u is then read once from memory, and the weight (4.7 MB) stays in the cache. Tensor descriptors are TMA on
Hopper; for older GPUs Triton makes slow pointers of them, and registers are spilled.
"""
import torch
import torch.nn.functional as F

import train_gpt2
from train_gpt2 import gram, matmul_dtype, norm, on_gpu, rotate

if train_gpt2.triton:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def gelu_and_slope(x):
        """gelu(x) = x Phi(x) and its derivative Phi(x) + x phi(x), with the normal distribution and density.

        Both from one exponential: 1 - Phi(|x|) by Abramowitz and Stegun's 7.1.26, with an error below 1e-7.
        """
        a = tl.abs(x)
        t = 1.0 / (1.0 + 0.23164189 * a)
        p = -1.453152027 + t * 1.061405429
        p = 1.421413741 + t * p
        p = -0.284496736 + t * p
        p = 0.254829592 + t * p
        e = tl.exp2(x * x * -0.7213475204444817)  # exp(-x^2 / 2)
        tail = 0.5 * t * p * e
        y = tl.maximum(x, 0.0) - a * tail
        slope = tail - a * e * 0.3989422804014327  # of -|x|; the slopes of x and -x add up to 1
        return y, tl.where(x > 0, 1.0 - slope, slope)

    @triton.jit
    def mlp_gemm(a, b, out, slope, columns: tl.constexpr, K: tl.constexpr, FORWARD: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
        """One program per tile of `out`, from descriptors of a (M, K), b, and out and slope (M, columns):

            FORWARD    out, slope <- gelu(x), gelu'(x) of x = a b^T, b (columns, K)
            else       out <- (a b) * slope, b (K, columns)
        """
        tiles: tl.constexpr = (columns + BLOCK_N - 1) // BLOCK_N  # of a row
        i = tl.program_id(0) // tiles * BLOCK_M
        j = tl.program_id(0) % tiles * BLOCK_N
        x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            if FORWARD:
                x = tl.dot(a.load([i, k]), b.load([j, k]).T, x)
            else:
                x = tl.dot(a.load([i, k]), b.load([k, j]), x)
        # by halves, so that fewer registers are live at once
        halves = tl.split(x.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
        for half in tl.static_range(2):
            place = [i, j + half * (BLOCK_N // 2)]
            if FORWARD:
                y, derivative = gelu_and_slope(halves[half])
                slope.store(place, derivative.to(slope.dtype))
            else:
                y = halves[half] * slope.load(place).to(tl.float32)
            out.store(place, y.to(out.dtype))


TILE = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)


def launch(a, b, out, slope, forward, tile=None):
    """The kernel on matrices whose rows are whole multiples of 16 bytes. tile: see TILE, the default."""
    tile = tile or TILE
    M, N = out.shape
    m, n, k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    blocks = [m, k], [n, k] if forward else [k, n], [m, n // 2], [m, n // 2]
    descriptors = [TensorDescriptor.from_tensor(t.contiguous(), block)
                   for t, block in zip((a, b, out, slope), blocks)]
    grid = triton.cdiv(M, m) * triton.cdiv(N, n)
    mlp_gemm[(grid,)](*descriptors, N, a.size(1), forward, **tile)


@torch.library.custom_op("fused_mlp::mlp", mutates_args=())
def mlp(u: torch.Tensor, up: torch.Tensor, down: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(h down^T, h, gelu'(u up^T)) with h = gelu(u up^T); u (M, C), up (4 C, C), down (C, 4 C), one dtype."""
    h = u.new_empty(len(u), len(up))
    slope = torch.empty_like(h)
    launch(u, up, h, slope, forward=True)
    return h @ down.mT, h, slope


@mlp.register_fake
def mlp_shapes(u, up, down):
    h = u.new_empty(len(u), len(up))
    return u.new_empty(len(u), len(down)), h, torch.empty_like(h)


@torch.library.custom_op("fused_mlp::before_gelu", mutates_args=())
def before_gelu(d_out: torch.Tensor, down: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """(d_out down) * slope: the gradient of gelu's input."""
    d_pre = torch.empty_like(slope)
    launch(d_out, down, d_pre, slope, forward=False)
    return d_pre


@before_gelu.register_fake
def before_gelu_shape(d_out, down, slope):
    return torch.empty_like(slope)


def save_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros for the gradients of h and slope
    ctx.save_for_backward(*inputs, *output[1:])


def gradients(ctx, d_out, *_):
    u, up, down, h, slope = ctx.saved_tensors
    d_pre = before_gelu(d_out, down, slope)
    return d_pre @ up, d_pre.mT @ u, d_out.mT @ h


mlp.register_autograd(gradients, setup_context=save_for_backward)


def block_forward(block, x, cos, sin, grams):
    """train_gpt2.Block.forward() with the fused MLP."""
    B, T, C = x.size()
    z = norm(x)
    q, k, v = block.c_attn(z).view(B, T, 3, block.n_head, C // block.n_head).unbind(2)
    q = rotate(q, cos, sin).transpose(1, 2)
    k = rotate(k, cos, sin).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
    y = y.transpose(1, 2).reshape(B, T, C)
    x = x.add(block.attn_proj(y), alpha=block.attn_scale)
    u = norm(x).flatten(0, 1)
    weights = block.c_fc.weight.to(u.dtype), block.mlp_proj.weight.to(u.dtype)
    out, h, _ = mlp(u, *weights)
    for layer, inputs in dict(c_attn=z, attn_proj=y, c_fc=u, mlp_proj=h).items():
        name = f"{block.name}.{layer}.weight"
        if name in grams:
            grams[name] = gram(inputs, C)
    return x + out.view_as(x)


class GPT(train_gpt2.GPT):
    def features(self, idx, collect=()):
        C = self.wte.embedding_dim
        kernels = self.fused_loss and on_gpu(self.cos)  # fused_loss: kernels compile here
        if not kernels or matmul_dtype(self.cos) != torch.bfloat16 or C % 8:
            return super().features(idx, collect)
        T = idx.size(1)
        grams = dict.fromkeys(collect)
        x = self.wte(idx)
        for block in self.h:
            x = block_forward(block, x, self.cos[:T], self.sin[:T], grams)
        return norm(x), list(grams.values())
