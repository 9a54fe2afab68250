"""Reading runs and logs: what others published, what our trainer writes, and what is damaged or hostile.

published_logs.tar.xz has the evaluation lines of published runs (github.com/KellerJordan/modded-nanogpt, MIT
licence; all other lines are replaced by a count and a hash), and expected.csv, which says what must be
found in them.
"""
import csv
import json
import os
import shutil
import tarfile
import time
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts import compare
from scripts import records
from harness import runs
from conftest import ROOT, refused
from harness.runs import find_runs, make_groups, read_curve, read_log, refresh_times, without_copies
from sample_runs import RULER, SHARD, TRAIN_SHARD, facts, lines, run_of, write
from train_gpt2 import UserError

RECORD = ROOT / "records/cpu/2026-11-22_adamw_muon_newton_muon/muon_seed-0"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    with tarfile.open(ROOT / "tests/published_logs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "published_logs"


# logs of others


def test_published_groups(published):
    with open(published / "expected.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        loss = "val_ema_loss" if "val_ema_loss" in row["note"] else "val_loss"
        found, _ = find_runs(published / row["folder"], loss)
        [group] = make_groups(without_copies(found), at_step={None: int(row["published_steps"])})
        # all that stays of this one when the copies are gone lies in a folder of it
        inner = "code_logs" if "soda" in row["folder"] else ""
        assert group.label == (inner or row["folder"])
        assert (len(group.runs), group.fault) == (int(row["n"]), "")
        expected = float(row["mean_loss_at_those_steps"] or 3.27779)  # without one: added up by hand
        assert np.mean([run.losses[-1] for run in group.runs]) == pytest.approx(expected, abs=6e-6), row
        assert {run.untimed for run in group.runs} == {10 if "10 steps" in row["note"] else 0}

    found, left_out = find_runs(published)  # all at once
    groups = {group.label: group for group in make_groups(without_copies(found))}
    sizes = {label: str(len(group.runs)) for label, group in groups.items()}
    expected = {row["folder"]: row["n"] for row in rows}
    expected["20260518_soda_fade_3000_n9/code_logs"] = expected.pop("20260518_soda_fade_3000_n9")
    assert sizes == expected
    assert len(rows) == 8
    assert "2 (20260518_soda_fade_3000_n9/remote_manifest.txt, expected.csv)" in left_out[0]
    stopped = groups["20260611_tailema_2720_submission"]
    assert "judged at step 2720 of 2900" in stopped.remark
    assert not stopped.fault
    broken_off = groups["20260619_cwd_rowfloor_tailema"]
    assert "A40_seed7" in broken_off.fault
    assert "ends at step 2765 of 2900" in broken_off.fault


def test_published_newton_muon_is_not_better(published, call):
    paths = [published / name for name in ("20260505_newton_muon", "20260610_tuned_baseline_3250")]
    done = call(compare, *paths, "--at_step", f"{paths[0].name}=3275", "--baseline", paths[1].name)
    assert done.returncode == 0
    # ((3.27866 - 3.27852) - 25 x 0.000045) / sqrt(1/15 + 1/10)
    assert "-0.0024, not better" in done.stdout
    assert "0.0042" in done.stdout  # (3.28 - 3.278659) sqrt(10)


@pytest.mark.parametrize(
    "group_by, sizes", [("folder", [5]), ("code", [1, 1, 1, 2]), ("file", [1] * 5)]
)
def test_group_by(tmp_path, group_by, sizes):
    for i, code in enumerate(("lr = 1", "lr = 1", "lr = 2", "", "")):  # without code nothing tells
        losses = lines([0, 100], [2.0, 0.9 + i / 100], [0, 10])
        (tmp_path / f"{i}.txt").write_text(f"{code}\n{RULER}\nmachine {i}\n{RULER}\n{losses}")
    groups = make_groups(find_runs(tmp_path)[0], group_by)
    assert sorted(len(group.runs) for group in groups) == sizes


def write_log(path, final, code="lr = 1"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{code}\n{RULER}\nmachine\n{RULER}\n" + lines([0, 100], [2.0, final], [0, 10]))


def grouped(folder):
    found, _ = find_runs(folder)
    return {group.label: group for group in make_groups(without_copies(found))}


def test_a_stray_log_joins_no_folders(tmp_path):
    for i in range(3):
        write_log(tmp_path / f"results/a/{i}.txt", 0.9 + i / 100)
        write_log(tmp_path / f"results/b/deep/{i}.txt", 0.8 + i / 100)
    write_log(tmp_path / "results/stray.txt", 0.7)
    found = grouped(tmp_path / "results")
    assert {label: len(group.runs) for label, group in found.items()} == {"results": 1, "b/deep": 3, "a": 3}


@pytest.mark.parametrize("folder", ["results", "results/other", "elsewhere", "results/a/old"])
def test_a_stray_copy_takes_no_run_away(tmp_path, folder):
    for i in range(3):
        write_log(tmp_path / f"results/a/{i}.txt", 0.9 + i / 100)
    write_log(tmp_path / folder / "copy.txt", 0.91)
    [group] = grouped(tmp_path).values()
    assert (group.label, len(group.runs)) == ("results/a", 3)


def test_a_capture_of_all_runs_joins_no_folders(tmp_path):
    for i in range(3):
        write_log(tmp_path / f"a/{i}.txt", 0.9 + i / 100)
        write_log(tmp_path / f"b/{i}.txt", 0.8 + i / 100)
    logs = sorted(tmp_path.glob("*/*.txt"))
    (tmp_path / "stdout.txt").write_text("".join(log.read_text() for log in logs))
    assert {label: len(group.runs) for label, group in grouped(tmp_path).items()} == {"a": 3, "b": 3}


def test_two_versions_of_the_code_in_a_folder_are_said(tmp_path):
    for i in range(4):
        write_log(tmp_path / f"a/{i}.txt", 0.9 + i / 100, code=f"lr = {i // 2}")
        write_log(tmp_path / f"b/{i}.txt", 0.8 + i / 100, code=f"seed = {i}")
        write_log(tmp_path / f"c/{i}.txt", 0.7 + i / 100)
    found = grouped(tmp_path)
    assert "the logs of a hold 2 versions of the code" in found["a"].remark
    assert found["b"].remark == found["c"].remark == ""


def runs_in(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    return read_log(tmp_path / "a.txt")


def test_numbers(tmp_path):
    [run] = runs_in(
        tmp_path,
        "step:0/9 val_loss:1.5e1 train_time:nanms step_avg:nanms\n"
        "step:5/9 val_loss:3e-1 lr:0.1 train_time:2s\n"
        "step:9/9 val_loss:NaN train_time:3s\n",
    )
    assert run.losses[:2] == [15, 0.3]
    assert np.isnan(run.losses[2])
    assert run.seconds == [0, 2, 3]
    assert "nan at step 9" in run.diverged
    finite = lines([0, 50], [2.0, 1.5], [0, 5], total=100)
    [run] = runs_in(tmp_path, finite + "step:60/100 train_loss:nan train_time:6000ms\n")
    assert "nan at step 60" in run.diverged


@pytest.mark.parametrize(
    "capture",
    [
        lambda line: f"[default0]:{line}",  # torchrun --tee
        lambda line: f"[trainer3|rank 11]: {line}",  # with a template of one's own
        lambda line: f"0: {line}",  # srun --label
        lambda line: f"\r\x1b[K{line}\r",  # script
        lambda line: f"\x1b[?2004l\r\x1b]0;a title\x07\x1b[1;32m{line}\x1b[0m\r",
        lambda line: f"[default0]:\r\x1b[K{line}",  # a terminal under torchrun
    ],
)
def test_captures_of_a_terminal(tmp_path, capture):
    text = lines([0, 50, 100], [2.0, 1.5, 0.9], [0, 5, 10])
    captured = "".join(capture(line) + "\n" for line in text.splitlines())
    (tmp_path / "a.txt").write_bytes(f"Script started on 2026-11-30\n{captured}".encode())
    [run] = read_log(tmp_path / "a.txt")
    assert (run.steps, run.losses, run.seconds) == ([0, 50, 100], [2.0, 1.5, 0.9], [0, 5, 10])
    [found], _ = find_runs(tmp_path)
    assert found.losses == run.losses


@pytest.mark.parametrize("before", ["    ", "# ", "print ", "[a] [b]:", "x0: ", "[default0] said "])
def test_other_text_before_a_line_makes_it_none(tmp_path, before):
    text = before + "step:50/100 val_loss:0.1 train_time:1ms\n" + lines([0, 100], [2.0, 0.9], [0, 10])
    [run] = runs_in(tmp_path, text)
    assert run.losses == [2.0, 0.9]


def test_several_runs_in_a_file(tmp_path):
    again = lines([50, 100], [1.5, 1.2], [5, 11])
    other = lines([0, 100], [2, 1], [0, 9])
    first, second = runs_in(tmp_path, lines([0, 50, 100], [2.0, 1.5, 1.4], [0, 5, 10]) + again + other)
    assert (first.steps, first.losses, first.seconds) == ([0, 50, 100], [2.0, 1.5, 1.2], [0, 5, 11])
    assert (second.name, second.losses) == ("a 2", [2.0, 1.0])
    in_the_code = "step:50/100 val_loss:0.1000 train_time:1ms\n"
    [run] = runs_in(tmp_path, in_the_code + lines([0, 100], [2.0, 0.9], [0, 10]))
    assert run.losses == [2.0, 0.9]


@pytest.mark.parametrize("unit", ["ms", "s"])
def test_crossing_of_record_4(tmp_path, unit):
    steps, losses, seconds = zip(*read_curve())
    [run] = runs_in(tmp_path, f"code\n{RULER}\n" + lines(steps, losses, seconds, unit))
    assert tuple(map(round, run.first_crossing(3.28))) == (6134, 1325)
    assert run.first_crossing(3.27) is None
    assert len(run.steps) == 51
    assert run.losses[-1] == 3.2785
    assert run.planned == 6200


def test_copies(tmp_path):
    run = write(tmp_path / "runs/a")
    text = (run / "log.txt").read_text()
    (tmp_path / "terminal.log").write_text(text)
    (tmp_path / "tail.out").write_text(text.splitlines()[-1] + "\n")
    write(tmp_path / "runs/b", seed=1)  # as good, but another run
    kept = without_copies(find_runs(tmp_path)[0])
    assert sorted(run.name for run in kept) == ["a", "b"]
    assert all(run.facts for run in kept)


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a")
    (write(tmp_path / "broken") / "run.json").write_text("{")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "other.txt").write_text("step:1/1 val_loss_2:3 train_time:1s\n")
    (tmp_path / "loop").symlink_to(tmp_path)
    write(tmp_path / "shut")
    scandir = os.scandir

    def scandir_but_shut(path):
        return scandir(f"{path}/log.txt" if str(path).endswith("shut") else path)

    monkeypatch.setattr(os, "scandir", scandir_but_shut)
    found, left_out = find_runs(tmp_path)
    assert [run.name for run in found] == ["a"]
    assert len(left_out) == 4
    for words in (
        "pipe.txt cannot be read: it is not a regular",
        "run.json cannot be read: it is not valid JSON",
        "other.txt has no line",
    ):
        assert any(words in sentence for sentence in left_out)
    assert any(sentence.startswith(f"{tmp_path / 'shut'}") for sentence in left_out)
    for path in ("/dev/zero", tmp_path / "pipe.txt"):
        with pytest.raises(UserError, match="not a regular file"):
            find_runs(path)


@pytest.mark.parametrize(
    "word", ["x", "a:", ":", "train_time:", "1", "\x1b[", "\x1b]0;", "[", "val_loss:1", "é"]
)
def test_long_word(tmp_path, word):
    long = word * 200_000
    text = f"{long}\nstep:1/9 {long} train_time:1s\nstep:2/9 val_loss:{long} train_time:{long}s\n"
    (tmp_path / "a.txt").write_text(text + lines([0, 9], [2.0, 0.9], [0, 10]))
    start = time.process_time()
    found, _ = find_runs(tmp_path)
    assert found[-1].losses == [2.0, 0.9]
    assert time.process_time() - start < 10  # a search that goes back takes minutes


def test_many_runs_in_a_file(tmp_path):
    text = "".join(lines([0, 100], [2.0, 1 + i / 1e6], [0, 10]) for i in range(10_000))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(text)
    start = time.process_time()
    found, _ = find_runs(tmp_path)
    assert len(found) == 20_000
    [group] = make_groups(without_copies(found))
    assert len(group.runs) == 10_000
    assert time.process_time() - start < 30  # each with each takes minutes


def test_links_are_bounded(tmp_path, monkeypatch):
    write_log(tmp_path / "far/runs/a.txt", 0.9)
    for i in range(20):
        write_log(tmp_path / f"many/{i:02}/a.txt", 0.8 + i / 100)
    mine = tmp_path / "mine"
    write_log(mine / "b.txt", 0.7)
    write_log(mine / "z/c.txt", 0.6)
    (mine / "good").symlink_to(tmp_path / "far")
    (mine / "up").symlink_to("/")
    (mine / "above").symlink_to(tmp_path)
    (mine / "zero.txt").symlink_to("/dev/zero")
    found, left_out = find_runs(mine)
    assert sorted(run.name for run in found) == ["a", "b", "c"]
    assert len(left_out) == 3
    for words in (f"up is a link to /, which holds {mine}", f"above is a link to {tmp_path}", "zero.txt"):
        assert any(words in sentence for sentence in left_out)

    monkeypatch.setattr(runs, "MOST_LINKED", 13)
    (mine / "many").symlink_to(tmp_path / "many")
    found, left_out = find_runs(mine)
    # 3 folders and a file lie behind `good` and `many`, and then 4 more pairs of a folder and its file
    assert len([run for run in found if "many" in run.origin["folder"]]) == 4
    assert {"b", "c"} < {run.name for run in found}  # what is no link is read all the same
    assert sum("links lead to more than 13 files" in sentence for sentence in left_out) == 1


def test_many_sentences_are_cut_short(tmp_path):
    write_log(tmp_path / "a.txt", 0.9)
    for i in range(30):
        (tmp_path / f"{i}.txt").symlink_to("/dev/zero")
    _, left_out = find_runs(tmp_path)
    assert left_out[20:] == ["10 more files or folders are left out for such reasons"]


# groups


def test_settings_make_groups_and_seeds_do_not():
    same = [
        run_of(),
        run_of(seed=1, data_seed=1, run_name="b", log_dir="x"),
        run_of(device="cpu", device_batch_size=4, log_every=3),
    ]
    assert [(group.label, len(group.runs)) for group in make_groups(same)] == [("muon", 3)]
    others = [
        run_of(),
        run_of(0.8, hidden_learning_rate=0.02),
        run_of(0.95, optimizer="adamw", momentum=0.5),
    ]
    assert [group.label for group in make_groups(others)] == [
        "muon hidden_learning_rate=0.02",
        "muon hidden_learning_rate=0.01",
        "adamw",
    ]


def test_runs_that_end_early():
    early = [run_of(0.9, planned=200), run_of(0.8, planned=200, seed=1)]
    [group] = make_groups(early)
    assert "r ends at step 100 of 200" in group.fault
    assert not make_groups(early, at_step={None: 100})[0].fault
    assert "no evaluation at step 50" in make_groups(early, at_step={"muon": 50})[0].fault
    logs = [run_of(final, planned=200, without_json=True) for final in (0.9, 0.8)]
    [published] = make_groups(logs)
    assert not published.fault
    assert "judged at step 100 of 200" in published.remark
    assert make_groups(logs[:1])[0].fault  # alone it may have been broken off
    with pytest.raises(UserError, match="no group 'x'; the groups are muon"):
        make_groups(early, at_step={"x": 100})


@pytest.mark.parametrize(
    "other, words",
    [
        (dict(n_layer=3), "n_layer (r: 2, o: 3)"),
        (dict(val_tokens=128), "val_tokens (r: 64, o: 128)"),
        (
            dict(val={**SHARD, "tokens": 10**5}),
            "val shard 1 (r: val_0.bin 1,000,000 cc, o: val_0.bin 100,000 cc)",
        ),
        (
            dict(val={**SHARD, "sha256_of_first_mebibyte": "dd"}),
            "val shard 1 (r: val_0.bin 1,000,000 cc, o: val_0.bin 1,000,000 dd)",
        ),
    ],
)
def test_other_tracks_are_refused(other, words):
    with pytest.raises(UserError) as error:
        make_groups([run_of(), run_of(name="o", **other)])
    assert words in str(error.value)


WITHOUT_HASHES = dict(name="train_1.bin", tokens=10**6)


@pytest.mark.parametrize(
    "val, same",
    [
        (TRAIN_SHARD, True),
        ({**TRAIN_SHARD, "name": "val_0.bin"}, True),  # a copy under another name
        ({**TRAIN_SHARD, "sha256_of_first_mebibyte": "dd"}, False),  # the name and the size only
        (SHARD, False),
        (WITHOUT_HASHES, True),  # then the name must do
        ({**WITHOUT_HASHES, "name": "val_0.bin"}, False),
        ({**WITHOUT_HASHES, "tokens": 10**5}, False),
    ],
)
def test_validation_shard_in_training(tmp_path, call, val, same):
    write(tmp_path / "a", val=val)
    done = call(compare, tmp_path)
    if same:
        refused(done, f"a: the validation shard {val['name']} is among the training shards")
    else:
        assert done.returncode == 0


def test_unread_shards():
    same = [run_of(seed=seed) for seed in range(3)]
    for run, name in zip(same[1:], ("train_2.bin", "train_3.bin")):
        run.facts["train_shards"] = [TRAIN_SHARD, {**TRAIN_SHARD, "name": name}]
    assert len(make_groups(same)) == 1
    for run in same:
        run.config["data_seed"] = run.config["seed"]  # 1 and 2 order the sequences of all shards
    assert len(make_groups(same[:2])) == 1
    with pytest.raises(UserError, match="train shard 2 .*train_2.bin.*train_3.bin"):
        make_groups(same)
    same[2].facts["train_shards"].pop()
    with pytest.raises(UserError, match="train shard 2 .*train_2.bin.*none"):
        make_groups(same)


# damage


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change, words",
    [
        ("[]", "it is a list, not an object"),
        ({"config": 5}, "it.config is 5, not an object"),
        ({"machine": None}, "it.machine is None"),
        ({"resumed": 5}, "it.resumed is 5, not a list"),
        ({"end": 5}, "it.end is 5, not a string"),
        ({"parameters": 10**400}, "it.parameters is 1000"),
        (
            {"train_shards": [{"tokens": -1}]},
            "it.train_shards[0].tokens is -1, not a non-negative integer",
        ),
        ("[" * 10**5, "not valid JSON"),
        ({"more": nested(60)}, "it is nested more than 50 deep"),
        ({"resumed": [{"more": {"a": nested(900)}}]}, "it is nested more than 50 deep"),
    ],
)
def test_wrong_types_in_run_json(tmp_path, change, words):
    run = write(tmp_path / "a")
    text = change if isinstance(change, str) else json.dumps({**facts(), **change})
    (run / "run.json").write_text(text)
    with pytest.raises(UserError) as error:
        runs.read_facts(run)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_run_json_without_resumed(tmp_path, call):
    assert "resumed" not in facts()
    done = call(compare, write(tmp_path / "a"))
    assert done.returncode == 0
    run = tmp_path / "filed"
    shutil.copytree(RECORD, run)
    without = json.loads((run / "run.json").read_text())
    del without["resumed"]
    (run / "run.json").write_text(json.dumps(without))
    with pytest.raises(UserError, match="run.json cannot be read: it lacks resumed"):
        records.check_run(run, records.read_track("cpu"))


NUMBERS = [0, -1, 5, 10**400, 1e308, float("nan"), float("inf")]
VALUES = st.sampled_from([None, True, *NUMBERS, "", "x|<b>\n", [], [[]], {}, {"a": None}])
EDIT = st.tuples(st.sampled_from(records.FILES), st.integers(0, 2**32).map(Random), VALUES)
EDITS = st.lists(EDIT, min_size=1, max_size=3)


def mutate(value, random, new):
    """`value` with one part of it, at random, replaced by `new` or removed."""
    if not isinstance(value, (dict, list)) or not value or random.random() < 0.1:
        return new
    key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if random.random() < 0.2:
        del value[key]
    else:
        value[key] = mutate(value[key], random, new)
    return value


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(edits=EDITS)
def test_any_damage(tmp_path_factory, edits):
    folder = tmp_path_factory.mktemp("damaged", numbered=True)
    texts = {name: (RECORD / name).read_text() for name in records.FILES}
    for name, random, new in edits:
        if name == "run.json" and texts[name].startswith("{"):
            texts[name] = json.dumps(mutate(json.loads(texts[name]), random, new))
        else:
            rows = texts[name].splitlines(True) or [""]
            i = random.randrange(max(0, len(rows) - 80), len(rows))
            words = rows[i].split(":")
            words[random.randrange(len(words))] = str(new)
            rows[i] = random.choice(["", ":".join(words), rows[i] * 2, rows[i][:9]])
            texts[name] = "".join(rows)
    for name, text in texts.items():
        (folder / name).write_text(text)
    for work in (
        lambda: records.check_run(folder, records.read_track("cpu")),
        lambda: compare.report(make_groups(find_runs(folder)[0]), None, 1.75),
    ):
        try:
            work()
        except UserError as error:
            assert len(str(error)) > 20


# the time of a refresh


def timed_run(folder, refresh_ms, **config):
    """A run of 100 steps of 20 ms, with a refresh every 8 steps, that logged every 5th."""
    folder = write(folder, **config)
    steps = range(5, 101, 5)
    seconds = [0.02 * step + 0.001 * refresh_ms * (step // 8) for step in steps]
    (folder / "log.txt").write_text(lines(steps, [1.0] * len(steps), seconds))
    run, = read_log(folder)
    return run


@pytest.mark.parametrize("config", [
    dict(optimizer="newton_muon", refresh_interval=8),
    dict(optimizer="a:B", refresh_interval=32, optimizer_args='{"refresh_interval": 8}'),
])
def test_time_of_a_refresh(tmp_path, config):
    step, more, half = refresh_times(timed_run(tmp_path / "a", 7.0, **config))
    assert step == pytest.approx(20, abs=0.2)  # log.txt has whole milliseconds
    assert more == pytest.approx(7, abs=0.5)
    assert half < 0.5


def test_the_interval_of_a_refresh_holds_the_truth_in_95_percent(tmp_path, monkeypatch):
    run = timed_run(tmp_path / "a", 7.0, optimizer="newton_muon", refresh_interval=8)
    steps = np.arange(5, 101, 5)
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        between = 0.1 + 0.007 * np.diff([0, *steps // 8]) + rng.normal(0, 0.002, len(steps))
        logged = run_of()
        logged.steps, logged.seconds = list(steps), list(np.cumsum(between))
        monkeypatch.setattr(runs, "read_log", lambda path, loss: [logged])
        step, more, half = refresh_times(run)
        held += abs(more - 7) < half
    assert 930 <= held <= 968


@pytest.mark.parametrize("config", [
    dict(optimizer="muon", refresh_interval=8),
    dict(optimizer="newton_muon", refresh_interval=5),  # one in each interval: not to be told from five steps
    dict(optimizer="newton_muon", refresh_interval=1000),
    dict(optimizer="a:B", optimizer_args="no JSON"),
    dict(optimizer="a:B", optimizer_args="[1]"),
])
def test_runs_that_do_not_tell_the_time_of_a_refresh(tmp_path, config):
    assert refresh_times(timed_run(tmp_path / "a", 7.0, **config)) is None
