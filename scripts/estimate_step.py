"""Estimate a training step on an H100 without one, from the code that torch's compiler generates for it.

    python scripts/estimate_step.py                 the speedrun's model, 64 sequences of 1024 tokens
    python scripts/estimate_step.py --ddp           as DDP compiles it on several GPUs: cut into graphs
    python scripts/estimate_step.py --collect       with the sums Z Z^T for Newton-Muon's refresh
    python scripts/estimate_step.py --model models.faster:GPT --n_layer 2     another model; quicker
    python scripts/estimate_step.py --peers         beside the models of other trainers, a line each

torch.compile generates the forward and backward pass for an H100, Triton and its assembler compile the
kernels, and the code around them runs on fake tensors. Nothing runs on a GPU, and none is needed; torch
may be a CPU build.

Counted, so facts about the code:
  GB      that each generated kernel must read and write: each address once, however often it is loaded
  instr.  machine instructions of each generated kernel, for an element of its launch, with the first of the
          settings among which a GPU would choose; a kernel that loops is not counted
  FLOPs   of matrix products and of attention; causal attention skips half of the scores
  saved   bytes kept for the backward pass; a view keeps the whole buffer behind it

Assumed: the rates below, as ranges, so every time is a range too. A kernel takes the longer of its memory
traffic and its instructions. Launches, and gaps between kernels, take no time here. Attention has the
published rates of heads of 64, though GPUs are faster with larger ones. Against the published times of other
trainers, a model of this kind has been 3 to 10 % optimistic.

--peers prints the milliseconds of the whole, and the middle of that range against the trainer's. Models in
models/peers.py are compiled with torch's own options, the others with those of the trainer.
"""
import argparse
import functools
import math
import os
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TRITON_INTERPRET"] = "0"  # the tests set 1, but this compiles
GENERATED = tempfile.TemporaryDirectory(prefix="estimate_step_")  # goes when the process ends
os.environ["TORCHINDUCTOR_CACHE_DIR"] = GENERATED.name
from harness.command import command
from train_gpt2 import Config, UserError, make_model, matmul_dtype

try:
    import triton
    from triton.backends.compiler import GPUTarget
except ImportError:
    sys.exit("error: triton is not installed, and it compiles the kernels; there are versions for Linux only")
import torch
import torch.nn.functional as F
from torch._dynamo import device_interface
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.codegen.simd import SIMDKernel
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_map
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import train_gpt2

GPU = torch.device("cuda", 0)
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, gcnArchName="",
    total_memory=85_000_000_000, L2_cache_size=50 * 2**20,
    multi_processor_count=132, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, warp_size=32, shared_memory_per_block_optin=232448)
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at a time
PEAK_INSTRUCTIONS = 132 * 128 * 1.755e9  # a second, of one thread: multiprocessors x lanes x clock
# (slow, fast), a second
MEMORY = (2.5e12, 2.9e12)  # bytes, of 3.35e12 on paper
INSTRUCTIONS = (0.7 * PEAK_INSTRUCTIONS, 0.9 * PEAK_INSTRUCTIONS)
PRODUCTS = (560e12, 660e12)  # FLOPs in bf16, of 989e12 on paper
STATISTICS = (300e12, 620e12)  # Z Z^T is a small result of a long sum
ATTENTION = {"": (229e12, 288e12), "_backward": (238e12, 363e12)}  # published, for heads of 64
OPTIONS = {"max_pointwise_cat_inputs": 2, "max_complex_pointwise_cat_inputs": 2}  # the trainer's, wrapped()
WARNING = ("An estimate from assumed rates, not a measurement; such estimates have been 3 to 10 % optimistic "
           "against published times.")
PEERS = {  # model: its fields of the configuration
    "gpt": {},
    "models.optimizer_track:GPT": dict(n_head=6, vocab_size=50304),
    "models.peers:Record4": {},
    "models.peers:Record7": {},
    "models.peers:Nanochat": {},
    "models.peers:NanoGPT": {},
}


@dataclass
class Kernel:
    """A generated kernel, and how often it was launched."""
    name: str
    source: str
    launches: int = 0
    bytes: float = 0.0  # of a launch
    instructions: float = None  # of all threads of a launch; None if the kernel loops
    sizes: list = field(default_factory=list)  # elements of a launch, along each of its directions

    def run(self, *args, stream):
        """What generated code calls to launch the kernel."""
        self.launches += 1
        self.sizes = [arg for arg in args if isinstance(arg, int)]

    def seconds(self, i):
        """Of all launches, at rates of index i: 0 for the slow ones, 1 for the fast ones."""
        longest = max(self.bytes / MEMORY[i], (self.instructions or 0) / INSTRUCTIONS[i])
        return self.launches * longest


@dataclass
class Step:
    """What was counted of a step."""
    kernels: list = field(default_factory=list)
    loss: list = field(default_factory=list)  # kernels of head_loss, which are not generated
    flops: Counter = field(default_factory=Counter)  # by operation
    graphs: int = 0
    saved: int = 0  # bytes
    unknown: set = field(default_factory=set)  # operators whose own kernels are not counted


# ---- An H100 that is not there

class Interface(device_interface.CudaInterface):
    """What the compiler asks about the GPU."""

    class Worker(device_interface.CudaInterface.Worker):
        get_device_properties = staticmethod(lambda device=None: H100)
        current_device = staticmethod(lambda: 0)

    get_device_properties = staticmethod(lambda device=None: H100)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_available = staticmethod(lambda: True)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    synchronize = staticmethod(lambda device=None: None)


class Driver:
    """What Triton asks about the GPU."""
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: GPU)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)


def pretend():
    """Makes torch's compiler and Triton believe in an H100, for the rest of this process.

    Written for torch 2.13 and Triton 3.9: it replaces private parts of both.
    """
    list(device_interface.get_registered_device_interfaces())  # registers the real ones first
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, Interface)
    answers = dict(get_device_properties=H100, get_device_capability=(9, 0), is_bf16_supported=True,
                   current_device=0, set_device=None, _exchange_device=0, _maybe_exchange_device=0,
                   _lazy_init=None)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    triton.runtime.driver._active = triton.runtime.driver._default = Driver
    # of the embedding's gradient; only its shape is wanted, and the real decomposition asks for a GPU
    scatter = torch.ops.aten._unsafe_masked_index_put_accumulate.default
    torch._decomp.decomposition_table[scatter] = lambda x, *_: torch.empty_like(x)
    torch._functorch.config.force_non_lazy_backward_lowering = True  # nothing runs backward here
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.fx_graph_cache = False
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.use_static_triton_launcher = False  # it would keep only the name of a kernel
    torch._inductor.config.profile_bandwidth = True  # writes kernel_bytes() of each kernel into its code
    torch.set_float32_matmul_precision("high")
    F.scaled_dot_product_attention = flash_attention
    train_gpt2.on_gpu = lambda x: True
    SIMDKernel.estimate_kernel_num_bytes = kernel_bytes
    extern_kernels.addmm = addmm


def empty_on_gpu(size, stride, dtype):
    return torch.empty_strided(size, stride, dtype=dtype, device=GPU)


def addmm(*args, out, **kwargs):
    """Without `out`, into which a fake result would be copied, and a copy asks for a GPU."""
    return torch.addmm(*args, **kwargs)


def leading(tensor, part):
    """tensor[part], with a slice `part`; torch's own indexing asks for a GPU."""
    return torch.ops.aten.slice(tensor, 0, part.start, part.stop)


def flash_attention(q, k, v, is_causal, scale=None):
    q, k, v = (x.to(matmul_dtype(x)) for x in (q, k, v))  # as autocast does it
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    return attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]


def on_gpu(value):
    """A fake tensor like `value` on the GPU; the GPU for a device; anything else as it is."""
    if isinstance(value, FakeTensor):
        with torch.no_grad(), value.fake_mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
    return GPU if isinstance(value, torch.device) else value


def move_to_gpu(graph):
    """Moves a graph that was traced on the CPU, as a CPU build of torch cannot trace backward on a GPU."""
    for node in graph.nodes:
        node.args = tree_map(on_gpu, node.args)
        node.kwargs = tree_map(on_gpu, node.kwargs)
        if "val" in node.meta:
            node.meta["val"] = tree_map(on_gpu, node.meta["val"])


# ---- Counting

def kernel_bytes(kernel):
    """Bytes that a generated kernel reads and writes.

    Of each buffer the regions that differ in their ends or their size. A flip within a row loads one region
    twice, in two orders: it counts once.
    """
    nodes = list(kernel.features.scheduler_nodes())
    written = {dep.name for node in nodes for dep in node.read_writes.writes}
    # these stay in registers
    gone = kernel.removed_buffers | kernel.inplaced_to_remove | V.graph.removed_buffers
    total = 0
    for kind in ("reads", "writes"):
        regions = {}  # of each buffer
        for node in nodes:
            for dep in getattr(node.read_writes, kind):
                stays = dep.name in gone or (kind == "reads" and dep.name in written)
                if isinstance(dep, MemoryDep) and not stays:
                    regions.setdefault(dep.name, set()).add(region(dep))
        for name, found in regions.items():
            numel = min(sum(size for *_, size in found), int(V.graph.get_numel(name)))
            total += numel * V.graph.get_dtype(name).itemsize
    return total


def region(dep):
    """(lowest index, highest index, number of elements) of an access."""
    if dep.is_indirect():
        return None, None, int(dep.get_numel())
    ends = bound_sympy(dep.index, {name: ValueRanges(0, size - 1) for name, size in dep.ranges.items()})
    return int(ends.lower), int(ends.upper), int(dep.get_numel())


@functools.cache
def compiled(source):
    """(settings, names of arguments, instructions of a thread) of a generated kernel with the name `kernel`;
    None if it loops. Rare paths lie behind its end."""
    tuner = PyCodeCache.load(source).kernel
    settings = tuner.configs[0]
    if "R0_BLOCK" in settings.kwargs:
        return None
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(tuner._precompile_config(settings).kernel.asm["cubin"])
        file.flush()
        command = [disassembler, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.+?) *;", text, re.MULTILINE)
    count = 1 + next(i for i, code in enumerate(found) if code.startswith("EXIT"))  # not @P0 EXIT
    return settings, tuner.fn.arg_names, count


def instructions(kernel):
    """Instructions of all threads of a launch; None if the kernel loops. Graphs share kernels."""
    code = compiled(kernel.source.replace(kernel.name, "kernel"))
    if code is None:
        return None
    settings, names, count = code
    programs = 1
    for name, size in zip((name for name in names if name.endswith("numel")), kernel.sizes):
        block = settings.kwargs.get(f"{name[0].upper()}BLOCK")
        if block:
            programs *= math.ceil(size / block)
    return count * programs * settings.num_warps * H100.warp_size


@register_flop_formula(torch.ops.train_gpt2.head_loss)
def head_loss_flops(x, weight, *_, **__):
    """Logits, and the gradients of both factors."""
    return 6 * x[0] * x[1] * weight[0]


def bmm_flops(x, y, *_, **__):
    """torch's own formula does not know the sums in fp32 that gram() asks for."""
    return 2 * x[0] * x[1] * x[2] * y[2]


def storage(tensor):
    """What identifies the buffer behind a tensor."""
    return tensor.untyped_storage()._cdata


def saved_bytes(tensors):
    """Bytes of the buffers behind these tensors, each counted once."""
    buffers = {storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(buffers.values())


class Stop(Exception):
    """All has been generated and counted."""


def stop(*args):
    raise Stop


stop._boxed_call = True  # as the compiler calls what it has generated


class Counting:
    """Stands in for Inductor: generates code as it does, and counts instead of running it."""

    def __init__(self):
        self.step = Step()
        self.module = None  # generated last
        self.forward = {}  # what the last forward graph has computed, by name

    def load(self, code):
        """Makes a module of generated code. Its kernels count themselves, and its tensors are fake."""
        self.module = types.ModuleType("generated")
        self.module.__file__ = "generated"
        exec(code.value, self.module.__dict__)
        self.step.kernels += [value for value in vars(self.module).values() if isinstance(value, Kernel)]
        for name in ("assert_size_stride", "assert_alignment", "copy_if_misaligned"):
            setattr(self.module, name, lambda tensor, *_: tensor)
        self.module.empty_strided_cuda = empty_on_gpu
        self.module.reinterpret_tensor = torch.as_strided
        return self.module

    def compile(self, graph, inputs, is_backward=False, **options):
        """Generates the code of a graph, forward or backward, and runs it on fake tensors."""
        move_to_gpu(graph.graph)
        graph.recompile()
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        fakes = [node.meta["val"] for node in placeholders]
        mode = next(fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor))
        with V.set_fake_mode(mode), torch.no_grad():
            compile_fx_inner(graph, fakes, is_backward=is_backward, **options)
        formulas = {torch.ops.aten.bmm: bmm_flops}
        with mode, torch.no_grad(), patch.object(FakeTensor, "__getitem__", leading):
            with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
                outputs = self.module.call(list(fakes))
        counts = counter.get_flop_counts().get("Global", {})  # nothing in a graph without products
        self.step.flops.update({str(name): flops for name, flops in counts.items()})
        for node in graph.graph.nodes:
            if node.target == torch.ops.train_gpt2.head_loss.default:
                x, weight = (arg.meta["val"] for arg in node.args[:2])
                self.step.loss += head_kernels(len(x), *weight.shape)
            elif getattr(node.target, "namespace", "aten") not in ("aten", "prims"):
                self.step.unknown.add(str(node.target))
        if is_backward:
            kept = {node.name for node in placeholders}
            self.step.saved += saved_bytes(t for name, t in self.forward.items() if name in kept)
        else:
            self.step.graphs += 1
            names = [getattr(node, "name", None) for node in graph.graph.output_node().args[0]]
            given = {storage(fake) for fake in fakes if isinstance(fake, FakeTensor)}
            self.forward = {name: t for name, t in zip(names, outputs)
                            if isinstance(t, FakeTensor) and storage(t) not in given}
        return stop

    def backend(self, graph, inputs):
        return compile_fx(graph, inputs, inner_compile=self.compile)


def count(function, inputs, ddp=False, options=OPTIONS):
    """The Step of function(*inputs), forward and backward. Call pretend() first.

    `ddp`: cut into graphs as DDP does it, so that gradients can be sent while others are computed.
    `options`: of torch.compile.
    """
    counting = Counting()
    AsyncCompile.triton = lambda self, name, source, device_str="cuda": Kernel(name, source)
    GraphLowering._compile_to_module_lines = lambda self, code: counting.load(code)
    backend = counting.backend
    if ddp:
        backend = DDPOptimizer(BUCKET, backend).compile_fn
    torch._dynamo.reset()
    try:
        with torch.autocast("cpu", torch.bfloat16), torch._inductor.config.patch(options):
            torch.compile(function, dynamic=False, backend=backend)(*inputs)
    except Stop:
        pass
    for kernel in counting.step.kernels:
        gigabytes = re.search(r"'kernel_num_gb': ([0-9.e-]+)", kernel.source).group(1)
        kernel.bytes = 1e9 * float(gigabytes)
        kernel.instructions = instructions(kernel)
    return counting.step


# ---- Time

def head_kernels(tokens, rows, width):
    """What head_loss does besides its products: its own kernel, and sums over chunks of tokens."""
    logits = 2 * tokens * rows  # bytes in bf16
    gradient = 4 * rows * width  # in fp32
    chunks = math.ceil(tokens / train_gpt2.CHUNK)
    return [Kernel("loss: cross_entropy_kernel, logits read and written once", "", 1, 2 * logits),
            Kernel("loss: the head's gradient added up in fp32", "", chunks, 2 * gradient)]


def times(step):
    """{part: (slow, fast) seconds} of what was counted."""
    parts = {"generated kernels": [sum(kernel.seconds(i) for kernel in step.kernels) for i in (0, 1)]}
    if step.loss:
        parts["loss, without its products"] = [sum(kernel.seconds(i) for kernel in step.loss) for i in (0, 1)]
    for name, flops in step.flops.items():
        part, rates = "matrix products", PRODUCTS
        if "bmm" in name:
            part, rates = "statistics", STATISTICS
        elif "attention" in name:
            part, rates = "attention", ATTENTION["_backward" if "backward" in name else ""]
            flops /= 2  # causal
        before = parts.get(part, (0, 0))
        parts[part] = [seconds + flops / rate for seconds, rate in zip(before, rates)]
    return parts


def merged(kernels):
    """The kernels, with one entry for those of one name and size in several graphs; the longest first."""
    entries = {}
    for kernel in kernels:
        entry = entries.setdefault((kernel.name, kernel.bytes), replace(kernel, launches=0))
        entry.launches += kernel.launches
    return sorted(entries.values(), key=lambda kernel: -kernel.seconds(0))


def milliseconds(slow_fast):
    slow, fast = slow_fast
    return f"{1000 * fast:.2f} to {1000 * slow:.2f}"


def totals(step):
    """(launches of generated kernels, their bytes, (slow, fast) seconds of all)."""
    launches = sum(kernel.launches for kernel in step.kernels)
    traffic = sum(kernel.launches * kernel.bytes for kernel in step.kernels)
    return launches, traffic, [sum(seconds) for seconds in zip(*times(step).values())]


def show(step, tokens, rows):
    """The table of kernels, and the sums."""
    print(f"{'ms':>16} {'launches':>8} {'GB':>7} {'instr.':>6}  kernel")
    for kernel in merged(step.kernels + step.loss)[:rows]:
        each = "-"
        if kernel.instructions:
            elements = torch.Size(kernel.sizes).numel()
            each = f"{kernel.instructions / elements:.0f}"
        gigabytes = kernel.launches * kernel.bytes / 1e9
        time = milliseconds((kernel.seconds(0), kernel.seconds(1)))
        name = kernel.name.removeprefix("triton_")[:72]
        print(f"{time:>16} {kernel.launches:8} {gigabytes:7.2f} {each:>6}  {name}")
    launches, traffic, total = totals(step)
    print(f"generated: {launches} launches in {step.graphs} graphs, {traffic / 1e9:.1f} GB")
    for name, flops in sorted(step.flops.items()):
        print(f"{flops / 1e12:16.2f} TFLOP in {name}")
    if step.graphs == 1:  # else what crosses from graph to graph would be missing
        each = step.saved / tokens
        print(f"saved for the backward pass: {step.saved / 2**30:.2f} GiB, {each:,.0f} bytes a token")
    for name in sorted(step.unknown):
        print(f"not counted: what {name} does besides its products")
    for part, seconds in times(step).items():
        print(f"{milliseconds(seconds):>16} ms  {part}")
    slow, fast = (tokens / seconds for seconds in total)
    print(f"{milliseconds(total):>16} ms  for {tokens:,} tokens: {slow:,.0f} to {fast:,.0f} tokens/s")
    print(WARNING)


def estimate(model, args):
    """The Step of a model, with the batch and the form that the command line asks for."""
    idx = torch.zeros(args.sequences, Config.sequence_length, dtype=torch.long)
    names = list(model.hidden_matrices()) if args.collect else []
    options = {} if type(model).__module__ == "models.peers" else OPTIONS
    return count(model, [idx, idx, names], args.ddp, options)


def show_peers(models, args, tokens):
    """A line for each of `models`, {name: model}, the first of which is the trainer's own."""
    middle = None
    print(f"{'model':<28} {'launches':>8} {'GB':>6} {'TFLOP':>6} {'saved GiB':>9} {'ms':>16} {'ratio':>6}")
    for name, model in models.items():
        step = estimate(model, args)
        launches, traffic, total = totals(step)
        middle = middle or sum(total)
        products = sum(flops for name, flops in step.flops.items() if "attention" not in name)
        saved = f"{step.saved / 2**30:.2f}" if step.graphs == 1 else "-"
        print(f"{name:<28} {launches:8} {traffic / 1e9:6.1f} {products / 1e12:6.2f} {saved:>9} "
              f"{milliseconds(total):>16} {sum(total) / middle:6.3f}")
    print(f"launches and GB are of generated kernels; milliseconds are for {tokens:,} tokens\n{WARNING}")


@command(interrupted="interrupted")
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt", help="gpt or module:Class, as in a configuration")
    parser.add_argument("--peers", action="store_true", help="beside the models of others, in a table")
    parser.add_argument("--n_layer", type=int, default=12, help="(default: 12)")
    parser.add_argument("--n_head", type=int, default=12, help="(default: 12)")
    parser.add_argument("--vocab_size", type=int, default=50257, help="(default: 50257)")
    parser.add_argument("--sequences", type=int, default=64, help="of 1024 tokens, at a time (default: 64)")
    parser.add_argument("--ddp", action="store_true", help="as DDP compiles it: cut into graphs")
    parser.add_argument("--collect", action="store_true", help="with the sums Z Z^T for a refresh")
    parser.add_argument("--kernels", type=int, default=12, help="how many to show (default: 12)")
    args = parser.parse_args()
    for name in ("n_layer", "n_head", "vocab_size", "sequences"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.collect and (args.ddp or args.peers):
        raise UserError("--collect with --ddp or --peers: only one of the three at a time")
    given = Config(model=args.model, n_layer=args.n_layer, n_head=args.n_head, vocab_size=args.vocab_size)
    configs = {args.model: given}
    if args.peers:
        configs = {name: Config(model=name, n_layer=args.n_layer, **fields) for name, fields in PEERS.items()}
        configs.setdefault(args.model, given)
    tokens = args.sequences * given.sequence_length
    models = {name: make_model(config) for name, config in configs.items()}
    if args.collect and not hasattr(models[args.model], "hidden_matrices"):
        raise UserError(f"--collect: {args.model} has no hidden_matrices(); leave --collect out")
    pretend()
    form = "with DDP" if args.ddp else "on one GPU"
    collect = ", with statistics" if args.collect else ""
    name = "" if args.model == "gpt" else f"{args.model}, "
    print(f"{name}{args.n_layer} layers, {args.sequences} x {given.sequence_length} tokens, {form}{collect}; "
          f"torch {torch.__version__}, triton {triton.__version__}, trainer {train_gpt2.code_sha256()[:12]}")
    if args.peers:
        show_peers(models, args, tokens)
    else:
        show(estimate(models[args.model], args), tokens, args.kernels)


if __name__ == "__main__":
    main()
