"""The step on eight GPUs on paper, against sums by hand."""
import pytest

from conftest import ROOT, fork
from scripts.eight_gpus import INPUTS, overlapped, parts, total

BEST, WORST = ({name: limits[i] for name, limits in INPUTS.items()} for i in (0, 1))
TABLE = 50304 * 768
HIDDEN = 12 * 12 * 768 ** 2


def test_a_step_by_hand():
    given = dict(compute=120.0, statistics=16.0, factorisation=4.0, backward=0.5, contention=0.0, memory=2.5,
                 bucket=200.0, bus=400.0, latency=0.0, newton_schulz=300.0, tf32=300.0, launch=1.0)
    found = parts(8, given, 32)
    # the owners share evenly: five iterations of 90 n^3 FLOPs
    assert found["Newton-Schulz of the busiest owner"] == pytest.approx(5 * 90 * 768 ** 3 / 300e12 * 1e3)
    assert found["the tied table's gradient, sent last"] == pytest.approx(7 / 4 * 4 * TABLE / 400e9 * 1e3)
    # 13 buckets in 60 ms: each is sent before the next is full, so only the last remains
    left = found["hidden matrices' gradients, sent after the backward pass"]
    assert left == pytest.approx(7 / 4 * 4 * HIDDEN / 13 / 200e9 * 1e3)
    # a row of the all-gather is as long as that of the owner with most elements
    assert 7 / 8 * 2 * HIDDEN <= found["all-gather of updates in bf16"] * 400e6 <= 1.4 * 7 / 8 * 2 * HIDDEN
    assert found["AdamW of the table"] == pytest.approx(28 * TABLE / 2.5e12 * 1e3)
    assert found["Newton-Muon: Z Z^T"] == 16 / 32
    assert found["Newton-Muon: its sums to the owners"] == pytest.approx(84 * 4 * 768 ** 2 / 200e9 * 1e3 / 32)
    assert found["Newton-Muon: factorisation"] == 4 / 32
    assert 120 < total(found, newton_muon=False) < total(found) < 125


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_no_part_is_negative_and_worse_inputs_take_longer(gpus):
    best = parts(gpus, BEST, 32)
    worst = parts(gpus, WORST, 32)
    assert all(0 <= best[name] <= worst[name] for name in best)


def test_one_process_sends_nothing():
    found = parts(1, WORST, 32)
    words = ("sent", "sums", "gather", "DDP", "reduce")
    sending = [name for name in found if any(word in name for word in words)]
    assert len(sending) == 6
    assert all(found[name] == 0 for name in sending)


@pytest.mark.parametrize("sending", [[], [1.0], [1.0] * 10, [50.0] * 10, [0.0, 200.0, 0.0]])
def test_overlapped_time_is_never_below_the_longer_part(sending):
    assert max(100.0, sum(sending)) <= overlapped(100.0, sending) <= 100.0 + sum(sending)


def test_sending_that_outlasts_the_backward_pass():
    """The first bucket is full after 10; then sending never stops."""
    assert overlapped(100.0, [50.0] * 10) == 510.0


def test_measured_inputs_take_the_place_of_assumed_ones():
    done = fork(ROOT / "scripts/eight_gpus.py", "--compute", 128, "--bus", 300, 450)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "  128.00 to  128.00  forward and backward passes" in lines
    assert [line.split()[0] for line in lines if " --compute " in line] == ["given"]


@pytest.mark.parametrize("arguments, error", [
    (("--bus", 0), "--bus 0.0: must be one number or two, above 0"),
    (("--launch", -1), "--launch -1.0: must be one number or two, 0 or more"),
    (("--interval", 0), "--interval 0: must be at least 1"),
])
def test_usage_errors(arguments, error):
    done = fork(ROOT / "scripts/eight_gpus.py", *arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {error}"
