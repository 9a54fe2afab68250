"""scripts/bench.py, where a step goes (harness/kernels.py), and scripts/gpu_check.sh, on a CPU."""
import json
import math
import os
import re
import signal
import statistics
import sys
import tarfile

import pytest
from scipy import stats

from scripts import bench, gpu_check
from conftest import ROOT, TINY, refused, run, toml
from harness.kernels import GROUPS, group, where_it_goes


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tiny.toml").write_text("".join(f"{key} = {toml(value)}\n" for key, value in TINY.items()))
    return tmp_path / "tiny.toml"


def test_mean_steps_and_ratios(call, config, tmp_path):
    done = call(bench, config, "--sides", "plain,muon,newton_muon,torch.optim:SGD,train_gpt2:NewtonMuon", "--rounds", 6, "--steps", 3,
                "--refresh_interval", 4, "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bench.json").read_text())
    means, intervals = {}, {"newton_muon": 4, "train_gpt2:NewtonMuon": 32}  # the second has its default
    for name, side in result["sides"].items():
        assert [len(steps) for steps in side["rounds_ms"]] == [3] * 6 and len(side["refreshes_ms"]) == (6 if name in intervals else 0)
        means[name] = [sum(steps) / 3 for steps in side["rounds_ms"]]
        if name in intervals:
            share = 1 / intervals[name]
            means[name] = [(1 - share) * ms + share * refresh for ms, refresh in zip(means[name], side["refreshes_ms"])]
        assert side["mean_step_ms"] == pytest.approx(statistics.median(means[name]))
        assert side["tokens_per_second"] == pytest.approx(12 * 16 / (side["mean_step_ms"] / 1000))
        assert re.search(rf"^{re.escape(name)} .* {side['mean_step_ms']:.2f} ", done.stdout, re.MULTILINE)
        assert side["micro_batch"] == (12 if name == "plain" else 4) and side["mfu"] is None and side["peak_memory_gib"] is None
    assert set(result["ratios"]) == {*(f"{name}/plain" for name in list(means)[1:]), "newton_muon/muon"}
    ratio = result["ratios"]["newton_muon/muon"]
    assert ratio["rounds"] == pytest.approx([a / b for a, b in zip(means["newton_muon"], means["muon"])])
    assert ratio["mean_step"] == pytest.approx(statistics.median(ratio["rounds"]))
    assert (ratio["low"], ratio["high"]) == (min(ratio["rounds"]), max(ratio["rounds"]))  # of six values
    assert result["parameters"] == 2 * 12 * 16 ** 2 + 64 * 16 and result["flops_per_token"] == 6 * result["parameters"] + 12 * 2 * 16 * 16
    assert f"newton_muon/muon: mean step {ratio['mean_step']:.4f} (95 %: {ratio['low']:.4f} to {ratio['high']:.4f})" in done.stdout


@pytest.mark.parametrize("n", [1, 5, 6, 9, 15, 40])
def test_interval_holds_the_median_in_95_percent(n):
    found = bench.interval([float(i) for i in range(n, 0, -1)])
    k = found["low"] or 0  # below 6 values not even the smallest and the largest do
    assert found == (dict(low=k, high=n + 1 - k) if k else dict(low=None, high=None))
    missed = [2 * stats.binom.cdf(i - 1, n, 0.5) for i in (k, k + 1)]
    assert missed[0] <= 0.05 < missed[1]


@pytest.mark.parametrize("arguments, words", [(["--rounds", 0], "--rounds 0"), (["--roundz", 3], "--roundz"),
                                              (["--json", "no/such/folder.json"], "--json no/such"),
                                              (["--json", "/"], "--json /: must be a file")])
def test_a_wrong_option_is_named(call, arguments, words):
    done = call(bench, *arguments)
    assert done.returncode and words in done.stderr


def test_an_unknown_side_is_named(config):
    done = run(sys.executable, ROOT / "scripts/bench.py", config, "--sides", "muon,mun")
    assert done.returncode == 1 and done.stderr.startswith("error: optimizer = 'mun'") and done.stderr.count("\n") == 1


# where a step goes


def test_profile_groups_add_up(call, config, tmp_path):
    done = call(bench, config, "--sides", "adamw,newton_muon", "--rounds", 1, "--steps", 1, "--profile", "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    sides = json.loads((tmp_path / "bench.json").read_text())["sides"]
    step, refresh = (sides["newton_muon"]["profile"][kind] for kind in ("step", "refresh"))
    for profile in (step, refresh, sides["adamw"]["profile"]["step"]):
        groups = profile["groups"]
        assert sum(ms for name, ms in groups.items() if name != "wall") == pytest.approx(groups["wall"], rel=0.02)
        assert sum(kernel["ms"] for kernel in profile["kernels"]) == pytest.approx(groups["wall"] - groups["idle"], rel=0.02)
        assert all(groups[name] > 0 for name in ("matrix products", "attention", "loss", "norms and elementwise", "optimizer"))
    assert step["groups"]["statistics"] == 0 < refresh["groups"]["statistics"]
    # 4 products a layer and the head: one forward, two backward each; Newton-Schulz counts with the optimizer
    assert {k["launches"] for k in step["kernels"] if k["group"] == "matrix products"} == {3 * 3 * (4 * 2 + 1)}  # three micro-batches
    assert "where a step goes" in done.stdout and "newton_muon refresh" in done.stdout


@pytest.mark.parametrize("name, operations, phase, expected", [
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "aten::mm", "", "matrix products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas", "aten::mm", "", "matrix products"),
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "aten::baddbmm", "optimizer", "optimizer"),
    ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "", "optimizer", "communication"),
    ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4> >(Flash_fwd_params)", "", "", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0", "", "", "attention"),
    ("void at::native::elementwise_kernel<128, 4>", "aten::_scaled_dot_product_cudnn_attention aten::copy_", "", "attention"),
    ("triton_poi_fused__scaled_dot_product_flash_attention_cat_3", "", "", "norms and elementwise"),
    ("triton_per_fused_add_mm_mean_mul_rsqrt_5", "", "", "norms and elementwise"),
    ("triton_red_fused__log_softmax__to_copy_nll_loss_forward_9", "", "", "loss"),
    ("void (anonymous namespace)::softMaxBackward<float>", "NllLossBackward0 aten::_log_softmax_backward_data", "", "loss"),
    ("potrf_batched_cta_64x32", "aten::linalg_cholesky_ex", "statistics", "statistics"),
    ("Memcpy DtoD (Device -> Device)", "aten::copy_", "", "norms and elementwise"),
])
def test_kernels_are_told_apart(name, operations, phase, expected):
    assert group(name, operations, phase) == expected


def test_gpu_trace():
    """Two steps of 1000 us: a product, a reduction that overlaps half of it, an update of the optimizer's phase; and a kernel outside."""
    def event(cat, name, ts, dur, tid=1, **args):
        return dict(ph="X", cat=cat, name=name, ts=ts, dur=dur, pid=0, tid=tid, args=args)
    events = [dict(ph="M", name="process_name", pid=0), event("cuda_runtime", "cudaLaunchKernel", 40, 5, correlation=99),
              event("kernel", "gemm", 50, 20, tid="stream 7", correlation=99)]
    for i, start in enumerate((1000, 3000)):
        events += [
            event("user_annotation", "bench:step", start, 1000), event("user_annotation", "bench:optimizer", start + 300, 100),
            event("gpu_user_annotation", "bench:optimizer", start + 600, 300, tid="stream 7"),
            event("cpu_op", "aten::mm", start + 10, 50), event("cuda_runtime", "cudaLaunchKernel", start + 20, 10, correlation=10 * i),
            event("cuda_driver", "cuLaunchKernelEx", start + 100, 10, correlation=10 * i + 1),
            event("cuda_runtime", "cudaLaunchKernel", start + 310, 10, correlation=10 * i + 2),
            event("kernel", "nvjet_tst", start + 100, 200, tid="stream 7", correlation=10 * i),
            event("kernel", "ncclDevKernel_AllReduce", start + 200, 200, tid="stream 20", correlation=10 * i + 1),
            event("kernel", "multi_tensor_apply_kernel", start + 600, 300, tid="stream 7", correlation=10 * i + 2)]
    profile = where_it_goes(events)
    expected = dict.fromkeys(GROUPS, 0) | {"matrix products": 0.2, "communication": 0.2, "optimizer": 0.3, "idle": 0.4, "wall": 1.0}
    assert profile["groups"] == pytest.approx(expected)
    assert [(k["kernel"], k["launches"]) for k in profile["kernels"]][0] == ("multi_tensor_apply_kernel", 1)


# gpu_check.sh


def check(*arguments, **env):
    return run(ROOT / "scripts/gpu_check.sh", *arguments, cwd="/", timeout=1800,
               env={"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **env})


def test_gpu_check_without_a_gpu_says_so(tmp_path):
    done = check(OUT=str(tmp_path / "out"))
    refused(done, "finds no GPU on this machine")
    assert not (tmp_path / "out").exists()


def test_gpu_check_with_wrong_shards_says_so(tmp_path):
    done = check("--cpu", "--shards", tmp_path / "mine", OUT=str(tmp_path / "out"))
    refused(done, "mine_train_*.bin and ", "mine_val_*.bin")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The folder of gpu_check.sh --cpu, with limits that a busy machine does not reach."""
    folder = tmp_path_factory.mktemp("checked")
    done = check("--cpu", "--seconds", 8000, OUT=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_gpu_check_reports_all_its_parts(checked):
    report = (checked / "report.txt").read_text()
    assert re.findall(r"^== (.*): done, \d+ s$", report, re.MULTILINE) == [
        "facts", "attention without cuDNN", "20 steps muon", "20 steps newton muon", "bench", "tests",
        "20 steps of 4 sequences newton muon", "environment"]
    assert report.count("attention: torch takes") == 2 and "the loss's kernel launches" in report
    assert re.search(r"^     5       \d\.\d{4}       \d\.\d{4}   7.2 to 7.4$", report, re.MULTILINE)
    assert "not comparable" in report and "DIFFERS" not in report
    assert "newton_muon/muon: mean step" in report and "where a step goes" in report
    assert re.search(r"^\d+ SKIPPED$", report, re.MULTILINE)


def test_gpu_check_leaves_a_few_files(checked):
    names = {path.name for path in checked.iterdir()}
    assert names == {"report.txt", "bench.json", "tests.txt", "environment.txt", "runs.tar.gz"}
    with tarfile.open(checked / "runs.tar.gz") as archive:
        members = {member.name for member in archive}
        facts = json.load(archive.extractfile("runs/20_steps_newton_muon/run.json"))
    runs = ("20_steps_muon", "20_steps_newton_muon", "20_steps_of_4_sequences_newton_muon")
    logs = {f"runs/{run}/{name}" for run in runs for name in ("log.txt", "metrics.jsonl", "run.json")}
    assert {name for name in members if name.startswith("runs/")} == logs and "output/bench.txt" in members
    assert math.isfinite(facts["final_val_loss"]) and facts["steps"] == 20
    profile = json.loads((checked / "bench.json").read_text())["sides"]["newton_muon"]["profile"]
    assert profile["refresh"]["groups"]["statistics"] > 0


def test_gpu_check_without_time_begins_nothing(tmp_path):
    done = check("--cpu", "--seconds", 1, OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "== facts: not run, the time is used up" in (tmp_path / "report.txt").read_text()
    assert "done" not in done.stdout


def test_gpu_check_ends_what_it_runs_and_keeps_what_it_found(tmp_path, launch):
    """At SIGTERM, to the script alone."""
    script = launch(ROOT / "scripts/gpu_check.sh", "--cpu", "--seconds", 8000,
                    env={"PYTHON": sys.executable, "OUT": str(tmp_path / "out")})
    while not script.stdout.readline().startswith("-- 20 steps muon"):
        assert script.poll() is None
    while not (running := gpu_check.descendants(script.pid)):
        assert script.poll() is None
    script.terminate()
    script.stdout.read()
    assert script.wait() == 130
    assert "the loss's kernel launches" in (tmp_path / "out/report.txt").read_text()
    assert (tmp_path / "out/runs.tar.gz").exists()
    for pid in running:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
if sys.argv[1:]:
    print("ready", flush=True)
else:
    subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
signal.pause()
"""


def test_a_part_that_does_not_end_is_ended_with_all_its_processes(tmp_path, launch, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.1)
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    process = launch(sys.executable, tmp_path / "stubborn.py")
    assert process.stdout.readline() == "ready\n"
    gpu_check.end(process, signal.SIGINT)
    assert process.stdout.read() == "" and process.returncode == -signal.SIGKILL  # its child has the pipe, too


@pytest.mark.parametrize("code, result", [
    ("pass", "done"),
    ("raise SystemExit(3)", "FAILED with exit code 3"),
    ("import signal; signal.pause()", "stopped by its limit of 2 s"),
])
def test_how_a_part_ended(code, result, tmp_path):
    limit = 2 if "limit" in result else 600
    assert gpu_check.run_part([sys.executable, "-c", code], limit, tmp_path / "output.txt") == result


def test_a_test_that_was_stopped_has_not_failed():
    output = """
tests/test_cuda.py::test_a[dtype0-0.0001] PASSED                         [  6%]
tests/test_cuda.py::test_b FAILED                                        [ 12%]
tests/test_cuda.py::test_two SKIPPED (NCCL needs a GPU for each)         [ 18%]
tests/test_cuda.py::test_c """
    assert gpu_check.count_tests(output) == (
        "1 PASSED, 1 FAILED, 1 SKIPPED, 1 NOT FINISHED\nFAILED: test_b\nNOT FINISHED: test_c")


def test_losses_beside_the_published_ones():
    runs = {"muon": {0: 10.95, 5: 7.8}, "newton_muon": {0: 10.95}}
    expected = ["     0      10.9500      10.9500   10.93, Muon agrees",
                "     5       7.8000            -   7.2 to 7.4, MUON DIFFERS"]
    assert gpu_check.loss_table(runs, comparable=True)[2:] == expected
    other = gpu_check.loss_table(runs, comparable=False)
    assert "not comparable" in other[1]
    assert other[2:] == [line.rpartition(", ")[0] for line in expected]
