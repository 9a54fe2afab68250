"""scripts/bench.py, and where a step goes (harness/kernels.py), on a CPU."""
import json
import re
import signal
import statistics
import sys

import pytest
from scipy import stats

from conftest import ROOT, TINY, fork, refused, toml
from harness import kernels
from harness.kernels import GROUPS, group, where_it_goes
from models.faster import GPT
from scripts import bench


@pytest.fixture
def config(tmp_path):
    lines = [f"{key} = {toml(value)}\n" for key, value in TINY.items()]
    (tmp_path / "tiny.toml").write_text("".join(lines))
    return tmp_path / "tiny.toml"


@pytest.fixture
def measure(call, config, tmp_path):
    """measure(*arguments): bench.main() on the tiny model. Returns how it ended and its JSON."""
    def measure(*arguments):
        done = call(bench, config, "--json", tmp_path / "bench.json", *arguments)
        return done, json.loads((tmp_path / "bench.json").read_text())
    return measure


def test_mean_steps_and_ratios(measure):
    sides = "plain,muon,newton_muon,torch.optim:SGD,train_gpt2:NewtonMuon"
    done, result = measure("--sides", sides, "--rounds", 6, "--steps", 3, "--refresh_interval", 4)
    assert done.returncode == 0, done.stderr
    intervals = {"newton_muon": 4, "train_gpt2:NewtonMuon": 32}  # the second has its default
    means = {}
    for name, side in result["sides"].items():
        assert [len(steps) for steps in side["rounds_ms"]] == [3] * 6
        assert len(side["refreshes_ms"]) == (6 if name in intervals else 0)
        means[name] = [sum(steps) / 3 for steps in side["rounds_ms"]]
        if name in intervals:
            share = 1 / intervals[name]
            pairs = zip(means[name], side["refreshes_ms"])
            means[name] = [(1 - share) * ms + share * refresh for ms, refresh in pairs]
        assert side["mean_step_ms"] == pytest.approx(statistics.median(means[name]))
        assert side["tokens_per_second"] == pytest.approx(12 * 16 / (side["mean_step_ms"] / 1000))
        assert re.search(rf"^{re.escape(name)} .* {side['mean_step_ms']:.2f} ", done.stdout, re.MULTILINE)
        assert side["micro_batch"] == (12 if name == "plain" else 4)
        assert side["mfu"] is None and side["peak_memory_gib"] is None

    assert set(result["ratios"]) == {*(f"{name}/plain" for name in list(means)[1:]), "newton_muon/muon"}
    ratio = result["ratios"]["newton_muon/muon"]
    assert ratio["rounds"] == pytest.approx([a / b for a, b in zip(means["newton_muon"], means["muon"])])
    assert ratio["mean_step"] == pytest.approx(statistics.median(ratio["rounds"]))
    assert (ratio["low"], ratio["high"]) == (min(ratio["rounds"]), max(ratio["rounds"]))  # of six values
    assert (f"newton_muon/muon: mean step {ratio['mean_step']:.4f} "
            f"(95 %: {ratio['low']:.4f} to {ratio['high']:.4f})") in done.stdout
    parameters = 2 * 12 * 16 ** 2 + 64 * 16
    assert result["parameters"] == parameters
    assert result["flops_per_token"] == 6 * parameters + 12 * 2 * 16 * 16


@pytest.mark.parametrize("n", [1, 5, 6, 9, 15, 40])
def test_interval_holds_the_median_in_95_percent(n):
    found = bench.interval([float(i) for i in range(n, 0, -1)])
    k = found["low"] or 0  # below 6 values not even the smallest and the largest do
    assert found == (dict(low=k, high=n + 1 - k) if k else dict(low=None, high=None))
    missed = [2 * stats.binom.cdf(i - 1, n, 0.5) for i in (k, k + 1)]
    assert missed[0] <= 0.05 < missed[1]


@pytest.mark.parametrize("arguments, words", [
    (["--rounds", 0], "--rounds 0"),
    (["--roundz", 3], "--roundz"),
    (["--json", "no/such/folder.json"], "--json no/such"),
    (["--json", "/"], "--json /: must be a file"),
])
def test_a_wrong_option_is_named(call, arguments, words):
    done = call(bench, *arguments)
    assert done.returncode and words in done.stderr


def test_an_unknown_side_is_named(config):
    done = fork(ROOT / "scripts/bench.py", config, "--sides", "muon,mun")
    refused(done, "error: optimizer = 'mun'")


# what is there at any moment


def test_the_table_is_shown_after_every_warm_up_and_every_round(measure):
    done, result = measure("--sides", "adamw,muon", "--rounds", 3, "--steps", 1)
    assert re.findall(r"^after (\d+) rounds of 1 steps", done.stdout, re.MULTILINE) == list("00123")
    assert result["rounds"] == 3


def test_a_side_with_a_model_of_its_own(measure, monkeypatch):
    used = []
    residual = GPT.residual
    monkeypatch.setattr(GPT, "residual", lambda self, x: used.append(x.size(0)) or residual(self, x))
    done, result = measure("--sides", "muon,muon@models.faster:GPT", "--rounds", 1, "--steps", 1)
    assert done.returncode == 0, done.stderr
    assert list(result["ratios"]) == ["muon@models.faster:GPT/muon"]
    assert set(used) == {4}  # sequences at a time


def test_an_interruption_of_a_warm_up_leaves_the_sides_before_it(measure, monkeypatch):
    build = bench.build

    def interrupted(name, *arguments):
        if name == "muon":
            raise KeyboardInterrupt
        return build(name, *arguments)
    monkeypatch.setattr(bench, "build", interrupted)
    done, result = measure("--sides", "adamw,muon")
    assert done.returncode == 130 and "interrupted before the first round was complete" in done.stderr
    adamw = result["sides"]["adamw"]
    assert list(result["sides"]) == ["adamw"] and result["rounds"] == 0 and adamw["mean_step_ms"] is None
    assert re.search(rf"^adamw .* {adamw['first_step_ms']:.2f} +- ", done.stdout, re.MULTILINE)


def test_an_interruption_of_a_round_leaves_the_rounds_before_it(launch, config, tmp_path):
    process = launch(sys.executable, ROOT / "scripts/bench.py", config, "--sides", "adamw,muon",
                     "--rounds", 10 ** 6, "--steps", 1, "--json", tmp_path / "bench.json")
    while not process.stdout.readline().startswith("after 2 rounds"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.stderr.read() == "interrupted: the table has all complete rounds\n"
    assert process.wait() == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["rounds"] >= 2
    assert {len(side["rounds_ms"]) for side in result["sides"].values()} == {result["rounds"]}


def test_an_interruption_of_the_profile_leaves_what_was_profiled(measure, monkeypatch):
    profiled = kernels.profiled

    def interrupted(step, device):
        monkeypatch.setattr(kernels, "profiled", stop)
        return profiled(step, device, steps=1)

    def stop(step, device):
        raise KeyboardInterrupt
    monkeypatch.setattr(kernels, "profiled", interrupted)
    done, result = measure("--sides", "adamw,muon", "--rounds", 1, "--steps", 1, "--profile")
    assert done.returncode == 0 and result["rounds"] == 1
    assert result["sides"]["adamw"]["profile"].keys() == {"step"} and result["sides"]["muon"]["profile"] == {}
    assert "where a step goes" in done.stdout and "adamw step" in done.stdout


# where a step goes


def test_profile_groups_add_up(measure):
    done, result = measure("--sides", "adamw,newton_muon", "--rounds", 1, "--steps", 1, "--profile")
    assert done.returncode == 0, done.stderr
    step = result["sides"]["newton_muon"]["profile"]["step"]
    refresh = result["sides"]["newton_muon"]["profile"]["refresh"]
    for profile in (step, refresh, result["sides"]["adamw"]["profile"]["step"]):
        groups = profile["groups"]
        wall = groups["wall"]
        assert sum(ms for name, ms in groups.items() if name != "wall") == pytest.approx(wall, rel=0.02)
        busy = sum(kernel["ms"] for kernel in profile["kernels"])
        assert busy == pytest.approx(wall - groups["idle"], rel=0.02)
        for name in ("matrix products", "attention", "loss", "norms and elementwise", "optimizer"):
            assert groups[name] > 0, name
    assert step["groups"]["statistics"] == 0 < refresh["groups"]["statistics"]
    # 4 products a layer and the head: one forward, two backward each, in each of three micro-batches;
    # Newton-Schulz counts with the optimizer
    products = [kernel for kernel in step["kernels"] if kernel["group"] == "matrix products"]
    assert {kernel["launches"] for kernel in products} == {3 * 3 * (4 * 2 + 1)}
    assert "where a step goes" in done.stdout and "newton_muon refresh" in done.stdout


FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4> >(Flash_fwd_params)"
CUDNN = "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0"


@pytest.mark.parametrize("name, operations, phase, expected", [
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "aten::mm", "", "matrix products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas", "aten::mm", "", "matrix products"),
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "aten::baddbmm", "optimizer", "optimizer"),
    ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "", "optimizer", "communication"),
    (FLASH, "", "", "attention"),
    (CUDNN, "", "", "attention"),
    ("void at::native::elementwise_kernel<128, 4>",
     "aten::_scaled_dot_product_cudnn_attention aten::copy_", "", "attention"),
    ("triton_poi_fused__scaled_dot_product_flash_attention_cat_3", "", "", "norms and elementwise"),
    ("triton_per_fused_add_mm_mean_mul_rsqrt_5", "", "", "norms and elementwise"),
    ("triton_red_fused__log_softmax__to_copy_nll_loss_forward_9", "", "", "loss"),
    ("void (anonymous namespace)::softMaxBackward<float>",
     "NllLossBackward0 aten::_log_softmax_backward_data", "", "loss"),
    ("potrf_batched_cta_64x32", "aten::linalg_cholesky_ex", "statistics", "statistics"),
    ("Memcpy DtoD (Device -> Device)", "aten::copy_", "", "norms and elementwise"),
])
def test_kernels_are_told_apart(name, operations, phase, expected):
    assert group(name, operations, phase) == expected


def event(cat, name, ts, dur, tid=1, **args):
    """An event of a Chrome trace; times in microseconds."""
    return dict(ph="X", cat=cat, name=name, ts=ts, dur=dur, pid=0, tid=tid, args=args)


def launched_kernel(name, ts, dur, stream, launched_at, number):
    """A kernel, and the call that launched it."""
    return [event("cuda_runtime", "cudaLaunchKernel", launched_at, 10, correlation=number),
            event("kernel", name, ts, dur, tid=f"stream {stream}", correlation=number)]


def test_gpu_trace():
    """Two steps of 1000 us, and a kernel outside them.

    Each has a product, a reduction that overlaps half of it, and an update in the optimizer's phase.
    """
    events = [dict(ph="M", name="process_name", pid=0),
              *launched_kernel("gemm", 50, 20, stream=7, launched_at=40, number=99)]
    for i, start in enumerate((1000, 3000)):
        events += [
            event("user_annotation", "bench:step", start, 1000),
            event("user_annotation", "bench:optimizer", start + 300, 100),
            event("gpu_user_annotation", "bench:optimizer", start + 600, 300, tid="stream 7"),
            event("cpu_op", "aten::mm", start + 10, 50),
            *launched_kernel("nvjet_tst", start + 100, 200, stream=7, launched_at=start + 20, number=10 * i),
            event("cuda_driver", "cuLaunchKernelEx", start + 100, 10, correlation=10 * i + 1),
            event("kernel", "ncclDevKernel_AllReduce", start + 200, 200, tid="stream 20",
                  correlation=10 * i + 1),
            *launched_kernel("multi_tensor_apply_kernel", start + 600, 300, stream=7,
                             launched_at=start + 310, number=10 * i + 2)]
    profile = where_it_goes(events)
    expected = dict.fromkeys(GROUPS, 0)
    expected.update({"matrix products": 0.2, "communication": 0.2, "optimizer": 0.3})
    expected.update(idle=0.4, wall=1.0)
    assert profile["groups"] == pytest.approx(expected)
    first = profile["kernels"][0]
    assert (first["kernel"], first["launches"]) == ("multi_tensor_apply_kernel", 1)
