"""A training step as on a GPU, where there is none.

    python scripts/dry_run.py             in an environment with a CUDA build of torch; needs a C compiler
    scripts/dry_run.sh                    makes such environments in logs/, with torch 2.13 and 2.11

scripts/cuda_stub.c takes the place of the driver: it reports an H100, on which nothing runs. Two layers of
the speedrun's model, and of the optimizer track's, then go through the trainer's own functions, in a minute
or two:

- under torch's FakeTensorMode, where every operation checks its shapes, types, keywords and overloads as on a
  GPU but computes nothing: the loss operator, forward and backward pass, refresh, all optimizers, evaluation
- torch.compile: TorchInductor and Triton compile every kernel of the two graphs

Values and speed only a GPU can show, and whether cuBLAS, cuDNN and NCCL take what they are given.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import ROOT, command
import train_gpt2  # before torch: it says how CPU threads wait
from train_gpt2 import (
    CHUNK, GPT, OPTIMIZERS, Config, UserError, accumulate, autocast, build_optimizers, choose_micro_batch,
    head_loss, make_model, read_toml, set_learning_rates, with_grams, wrapped)
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)


class Operations(TorchDispatchMode):
    """Counts matrix products by the type of their operands, and attention operators by name.

    AssertionError for operands of several types, which fake tensors let pass, but a GPU does not.
    """

    def __init__(self):
        super().__init__()
        self.products = Counter()
        self.attention = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        product = name in ("mm", "bmm", "addmm", "baddbmm")
        if product or "attention" in name:
            tensors = [t for t in (*args[:3], kwargs.get("out")) if isinstance(t, torch.Tensor)]
            types = {str(t.dtype)[6:] for t in tensors}
            assert len(types) == 1, f"{operation} of {types}"
            if product:
                self.products.update(types)
            else:
                self.attention[name.removeprefix("_scaled_dot_product_")] += 1
        return operation(*args, **kwargs)


def counted(counts):
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "none"


class Compiled:
    """A Triton kernel that is compiled where it would be launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            args = [a.dtype if isinstance(a, torch.Tensor) else a for a in args]
            self.kernel.warmup(*args, grid=grid, **options)
        return launch


def addmm(total, a, b, *, out, out_dtype):
    """torch.addmm with an out_dtype: whether it exists. Fake tensors of torch 2.11 cannot follow it."""
    assert "out_dtype" in str(torch.ops.aten.addmm.dtype_out._schema)
    assert a.dtype == b.dtype == torch.bfloat16 and total.dtype == out.dtype == out_dtype == torch.float32
    assert (a @ b).shape == total.shape == out.shape


def forms(tensors):
    """Shape, strides and type of each."""
    return [(tuple(t.shape), t.stride(), t.dtype) for t in tensors]


def check_loss(config, device, kernel):
    """The body of the loss operator and its backward. In a graph only their forms are seen."""
    with device:
        weight = GPT(config).lm_head.weight.detach()
    x = torch.zeros(CHUNK + 128, config.n_embd, dtype=torch.bfloat16, device=device)
    targets = torch.zeros(len(x), dtype=torch.int64, device=device)
    no_launch = patch.object(train_gpt2, "cross_entropy_kernel", kernel, create=True)
    with no_launch, patch.object(torch, "addmm", addmm), Operations():
        outputs = head_loss._init_fn(x, weight, targets, config.vocab_size)
    assert forms(outputs) == forms(head_loss(x, weight, targets, config.vocab_size))
    gradients = head_loss._backward_fn(SimpleNamespace(saved_tensors=outputs[1:]), outputs[0])
    assert forms(gradients[:2]) == forms([x, weight]), f"{forms(gradients[:2])} for {forms([x, weight])}"
    return "body, kernel, gradients"


def check_step(config, device):
    """Two training steps, of which the second finds the state of the first, and an evaluation."""
    with device:
        model = make_model(config)
    model.fused_loss = True
    optimizers = build_optimizers(model, config)
    hidden = optimizers[1]
    collect = with_grams(model, hidden)
    idx = torch.zeros(2, config.sequence_length, dtype=torch.int64, device=device)
    for step in range(2):
        with Operations() as passes:
            loss, grams = accumulate(model, [(idx, idx)] * 2, collect, torch.bfloat16)
        with Operations() as update:
            if collect:
                hidden.refresh(grams, 2 * idx.numel())
            set_learning_rates(optimizers, 0.5)
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad()
    with torch.no_grad(), autocast(device, torch.bfloat16):
        evaluated, _ = model(idx, idx)
    assert {t.dtype for t in (loss, evaluated, *grams)} == {torch.float32}, "loss, evaluation or grams"
    assert list(passes.products) == ["bfloat16"], f"matrix products: {counted(passes.products)}"
    return (f"forward and backward ({counted(passes.products)} products, {counted(passes.attention)}), "
            f"{len(grams)} grams, update ({counted(update.products)} products), evaluation")


def check_compiled(config, device, micro_batch):
    """TorchInductor and Triton compile the graphs of a step. None is run: unset tensors of the right form
    come out of it."""
    from torch._inductor import compile_fx, metrics
    from torch._inductor import config as options
    graphs = Counter()

    def compile_graph(graph, inputs, **more):
        outputs = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]
        compile_fx.compile_fx_inner(graph, inputs, **more)
        graphs["backward" if more.get("is_backward") else "forward"] += 1

        def run(args):
            args.clear()
            return [t if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
                    for t in outputs]
        run._boxed_call = True  # takes its arguments in a list, to free them
        return run

    with torch.device("meta"):  # nothing to initialise
        raw_model = GPT(config)
    raw_model.to_empty(device=device)
    raw_model.wte.weight = raw_model.lm_head.weight
    names = with_grams(raw_model, build_optimizers(raw_model, config)[1])
    idx = torch.empty(micro_batch, config.sequence_length, dtype=torch.int64, device=device)
    compiler = partial(compile_fx.compile_fx, inner_compile=compile_graph)
    with (
        patch.object(compile_fx, "compile_fx", compiler),
        options.patch(compile_threads=1, joint_graph_constant_folding=False),  # which reads from the GPU
    ):
        with patch.object(train_gpt2, "head_loss", Mock()):  # wrapped() would launch it
            model, note = wrapped(raw_model, config, device)
        assert not note, note
        for collect in ((), names):
            accumulate(model, [(idx, idx)] * 2, collect, torch.bfloat16)
    return f"{counted(graphs)} graphs (one to try the compiler), {metrics.generated_kernel_count} kernels"


def on_stub(command):
    """Runs `command` with scripts/cuda_stub.c in the place of the driver. Returns its exit code."""
    name = os.environ.get("CC", "cc")
    if not shutil.which(name):
        raise UserError(f"there is no C compiler '{name}'; install gcc, or set CC")
    packages = Path(torch.__file__).parents[1]
    headers = [*packages.glob("nvidia/*/include"), *packages.glob("triton/backends/nvidia/include")]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/libcuda.so.1"
        compiled = subprocess.run([name, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library,
                                   *(f"-I{path}" for path in headers), ROOT / "scripts/cuda_stub.c"])
        if compiled.returncode:
            raise UserError(f"{name} cannot compile scripts/cuda_stub.c (above); "
                            "install torch from its wheels, which bring the CUDA headers")
        # caches of its own: those of a GPU are for its driver
        places = dict.fromkeys(("TRITON_LIBCUDA_PATH", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), folder)
        environment = {**os.environ, **places, "LD_PRELOAD": library}
        return subprocess.run(command, env=environment).returncode


@command(interrupted="interrupted")
def main():
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if torch.version.cuda is None:
        raise UserError(f"torch {torch.__version__} is no CUDA build; scripts/dry_run.sh installs one")
    if not torch.cuda.is_available():
        if "libcuda.so.1" in os.environ.get("LD_PRELOAD", ""):
            raise UserError(f"torch {torch.__version__} does not take scripts/cuda_stub.c for a GPU")
        sys.exit(on_stub([sys.executable, __file__]))

    fields = read_toml(ROOT / "configs/speedrun_newton_muon.toml")
    config = Config(**fields)
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name(GPU)}")
    with torch.device("meta"):
        model = GPT(config)
    for sequences in (64, 512):
        micro_batch = choose_micro_batch(model, config, GPU, sequences, torch.bfloat16)
        print(f"micro-batch: {micro_batch} of {sequences} sequences")
    fields["n_layer"] = 2
    kernel = Compiled(train_gpt2.cross_entropy_kernel)
    with FakeTensorMode():
        print(f"loss operator: {check_loss(Config(**fields), GPU, kernel)}")
        for name in OPTIMIZERS:
            config = Config(**{**fields, "optimizer": name})
            print(f"{name}: {check_step(config, GPU)}")
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # as with TORCH_CUDNN_SDPA_DEPRIORITIZED=1
            print(f"{name} with another attention: {check_step(config, GPU)}")
        track = read_toml(ROOT / "configs/track3_newton_muon.toml") | {"n_layer": 2}
        print(f"optimizer track: {check_step(Config(**track), GPU)}")
        for name in ("faster:GPT", "faster:BF16GPT", "fused_mlp:GPT"):
            config = Config(**{**fields, "model": f"models.{name}"})
            print(f"models.{name}: {check_step(config, GPU)}")
    print(f"torch.compile: {check_compiled(Config(**fields), GPU, micro_batch)}")
    print("all operations accept what the trainer gives them")


if __name__ == "__main__":
    main()
