"""What others published: is the page up to date, and do its figures and words follow from the CSV files?"""
import sys

import numpy as np
import pytest

from conftest import ROOT
from scripts import published


@pytest.fixture(scope="module")
def rows():
    return published.all_rows()


def find(rows, source, start):
    return next(row for row in rows if row.source == source and row.setting.startswith(start))


def test_page_is_up_to_date():
    assert (published.FOLDER / "README.md").read_text() == published.page(), "run python scripts/published.py"


def track3_finals():
    """{result: final losses} on the optimizer track."""
    finals = {}
    for line in published.read("track3_muon_newton_muon.csv"):
        if line["step"] == line["num_iterations"]:
            finals.setdefault(line["result"], []).append(float(line["val_loss"]))
    return finals


def check(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["published.py", "--check"])
    published.main.__wrapped__()


def test_check_says_that_the_page_is_up_to_date(monkeypatch, capsys):
    check(monkeypatch)
    assert "README.md is up to date" in capsys.readouterr().out


def test_check_says_when_the_page_is_stale(tmp_path, monkeypatch):
    for path in published.FOLDER.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table = tmp_path / "replications.csv"
    table.write_text(table.read_text().replace("-0.0149", "-0.0150"))
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="out of date; run python scripts/published.py"):
        check(monkeypatch)


def test_slope_of_record_4_is_that_of_its_curve():
    # 3.2932 at step 5875, 3.2785 at step 6200
    assert published.record4_slope() == pytest.approx(0.0147 / 325)


def test_replication_is_converted_with_that_slope(rows):
    row = find(rows, published.REPLICATION, "124 M, record 4")
    assert row.gain == (0.0149, 0.0126, 0.0172)
    expected = [gain / (0.0147 / 325) / 6200 for gain in row.gain]
    assert row.saved == pytest.approx(expected)


def test_optimizer_track_by_hand(rows):
    """Against the first baseline: 75 steps of 3375 fewer, and 0.00093 of loss at the slope of 100 steps."""
    finals = track3_finals()
    earlier = [float(line["val_loss"]) for line in published.read("track3_muon_newton_muon.csv")
               if line["result"] == "15" and line["step"] == "3200"]
    muon = np.mean(finals["6"])
    newton_muon = np.mean(finals["15"])
    before = np.mean(earlier)
    steps = 100 * (muon - newton_muon) / (before - newton_muon)
    row = find(rows, published.TRACK3, "124 M, first Muon")
    assert row.saved[0] == pytest.approx((3375 - 3300 + steps) / 3375)
    assert row.saved[1] < row.saved[0] < row.saved[2]


def test_both_tables_of_the_optimizer_track_agree():
    finals = track3_finals()
    others = {}
    for line in published.read("modded_nanogpt_track3_finals.csv"):
        result = line["optimizer"].partition("#")[2].rstrip(")")
        others.setdefault(result, []).append(float(line["final_val_loss"]))
    for result in ("15", "18", "36"):
        assert sorted(finals[result]) == sorted(others[result])


def test_our_rows_are_those_of_the_records(rows):
    readme = (ROOT / "records/cpu/2026-11-25_width_study/README.md").read_text()
    for setting in ("0.06 M, width 32", "0.2 M, width 64", "0.8 M, width 128", "0.2 M, momentum 0.9"):
        row = next(row for row in rows if row.setting == setting)
        assert published.percent(row) in readme


def test_sentences_say_what_the_intervals_say(rows):
    """The words are fixed, so the figures must bear them out."""
    replication = find(rows, published.REPLICATION, "124 M, record 4")
    assert replication.saved[1] > 0
    assert find(rows, published.TRACK3, "124 M, first Muon").saved[1] > 0
    assert find(rows, published.TRACK3, "124 M, auxiliary AdamW tuned").saved[2] < 0
    assert find(rows, published.OURS, "0.2 M, optimizer track").saved[2] < 0
    assert find(rows, published.REPLICATION, "LLaMA/SwiGLU 1B").gain[2] < 0
    alone = find(rows, published.OURS, "0.2 M, mlp_proj alone")
    assert alone.gain[0] > find(rows, published.OURS, "0.2 M, all but mlp_proj").gain[0]


def page_of_study(row):
    """The steps saved as the pages of the studies write them."""
    return "{:z.1%} ({:z.1%} to {:z.1%})".format(*row.saved)


def test_the_row_of_the_optimizer_tracks_model_is_that_of_its_study(rows):
    row = find(rows, published.OURS, "0.2 M, optimizer track")
    results = (ROOT / "records/cpu/2026-11-30_optimizer_track/results.md").read_text()
    mean, high, low = (-gain for gain in row.gain)  # Newton-Muon minus Muon
    assert f"{mean:+.4f} (95 %: {low:+.4f} to {high:+.4f}); steps saved: {page_of_study(row)}." in results


@pytest.mark.parametrize("matrices, arm", [("all matrices", "newton_muon"),
                                           ("mlp_proj alone", "mlp_proj_alone"),
                                           ("all but mlp_proj", "all_but_mlp_proj")])
def test_the_rows_of_some_matrices_are_those_of_their_study(rows, matrices, arm):
    row = find(rows, published.OURS, f"0.2 M, {matrices}")
    mean, high, low = (-gain for gain in row.gain)
    results = (ROOT / "records/cpu/2026-11-30_where_the_gain_comes_from/results.md").read_text()
    line = next(line for line in results.splitlines() if line.startswith(f"| {arm} |"))
    assert f"| {mean:+.4f} ({low:+.4f} to {high:+.4f}) | {page_of_study(row)} |" in line


@pytest.mark.parametrize("path, form", [
    ("README.md", "{:.1f} % fewer (95 % interval: {:.1f} to {:.1f} %)"),
    ("records/cpu/2026-11-30_fine_tuning/README.md", "{:.1f} % ({:.1f} to {:.1f})")])
def test_the_finely_tuned_difference_is_quoted_as_its_study_has_it(rows, path, form):
    saved = find(rows, published.OURS, "0.2 M, tuned finely").saved
    assert form.format(*(100 * share for share in saved)) in (ROOT / path).read_text()


def test_overheads_are_ratios_of_the_published_times():
    found = {(who, how.partition(",")[0]): ratio for who, how, ratio in published.overheads()}
    assert found == pytest.approx({(published.PAPER, "1xH100"): 7443.3 / 7314.1 - 1,
                                   (published.PAPER, "1xL40S"): 4342.4 / 4305.9 - 1,
                                   (published.REPLICATION, "1xH100"): 445563 / 436682 - 1})


def test_picture_has_a_row_for_each_setting(rows, tmp_path):
    published.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
