"""How scripts/zoo.py --refine goes on tuning.

Nothing is trained: the losses are a known function of the settings.
"""
import json
import math

import pytest

from conftest import ROOT, refused
from harness.tuning import RATES, open_sides
from harness.zoo import page
from harness.zoo.optimizers import ZOO
from harness.zoo.table import SEEDS, TUNING_SEEDS, Point, Table
from harness.zoo.training import HOPELESS, MORE_POINTS, Track
from scripts import zoo


def bowl(centre, noise=0.001):
    """{Point: loss}: a bowl in the logarithms, whose lowest point is `centre`, with noise of each run."""
    def loss(point):
        entry = ZOO[point.optimizer]
        value = entry.value(point.setting)
        if entry.setting.startswith(("beta", "momentum")):
            value = 1 - value
        at = (point.learning_rate, point.hidden_learning_rate, value)
        distance = sum(math.log2(x / middle) ** 2 for x, middle in zip(at, centre))
        chance = math.sin(hash(point[2:4]) % 1000 + 7 * point.seed + point.steps)
        return 2 + 0.01 * distance - point.steps / 1e4 + noise * chance
    return loss


@pytest.fixture
def new_track(monkeypatch, tmp_path):
    """new_track(loss) is a Track on tmp_path/cpu/runs.csv whose runs end at loss(point); .ran has them."""
    monkeypatch.chdir(ROOT)

    def new_track(loss):
        def run(self, point):
            track.ran.append(point)
            return loss(point), {}

        monkeypatch.setattr(Track, "run", run)
        track = Track("cpu", 1, tmp_path, [], Table(tmp_path / "cpu/runs.csv"))
        track.ran = []
        return track
    return new_track


def sides_by_hand(table, best):
    """{(name, side)} where no tuned point lies that differs from `best` in `name` alone."""
    entry = ZOO[best[0]]

    def at(point):
        return dict(zip(RATES, point[2:4]), setting=entry.value(point[4]))

    missing = set()
    for name in (*RATES, "setting"):
        for side in (1, -1):
            def lies_there(point):
                mine, own = at(point), at(best)
                others = all(mine[other] == own[other] for other in mine if other != name)
                return others and side * (mine[name] - own[name]) > 0
            if not any(lies_there(point) for point in table.tried(*best[:2])):
                missing.add((name, side))
    return missing


def test_sides_of_a_point():
    best = (2, 4, 0.5)
    assert open_sides(best, [best, (1, 4, 0.5), (8, 4, 0.5), (2, 8, 0.5), (2, 4, 0.9), (2, 2, 0.9)]) == [
        (1, -1), (2, -1)]  # (2, 2, 0.9) differs on two axes
    # what has one side comes before what has neither
    assert open_sides(best, [(2, 4, 0.7)]) == [(2, -1), (0, 1), (0, -1), (1, 1), (1, -1)]


@pytest.mark.parametrize("name, value, larger, smaller", [
    ("muon", 0.9, 0.95, 0.8), ("muon", 0.6, 0.8, 0.2), ("muon", 0.2, 0.6, 0.0), ("muon", 0.0, 0.5, None),
    ("adopt", 0.999, 0.9995, 0.998), ("sf_normuon", 0.8, 0.9, 0.6),
    ("power_newton_muon", 0.75, 1.0, 0.375), ("power_newton_muon", 1.0, None, 0.5),
    ("pmuon", 0.4, 0.5, 0.2), ("pmuon", 0.5, None, 0.25), ("dion", 0.5, 1.0, 0.25), ("dion", 1.0, None, 0.5),
    ("dp_muon", 0.003, 0.006, 0.0015), ("scion", 50.0, 100.0, 25.0)])
def test_the_next_value_of_a_setting(name, value, larger, smaller):
    assert ZOO[name].next_value(value, 1) == larger
    assert ZOO[name].next_value(value, -1) == smaller


@pytest.mark.parametrize("name, default", [
    ("muon", 0.95), ("torch_muon", 0.95), ("adamw", 0.95), ("scion", 50.0), ("power_newton_muon", 0.5),
    ("adopt", 0.99)])
def test_a_default_is_written_as_none(name, default):
    entry = ZOO[name]
    assert entry.default == default == entry.value("")
    point = (name, 600, 0.1, 0.01, json.dumps(entry.next_value(default, 1)))
    found = {(what, side): other[4] for what, side, other in entry.neighbours(point, [])}
    assert found[entry.setting, -1] == ""


@pytest.mark.parametrize("name, centre", [
    ("soap", (0.02, 0.004, 0.05)),  # in the middle
    ("soap", (0.008, 0.013, 0.2)),  # beyond all three ends
    ("pmuon", (0.02, 0.002, 2.0)),  # beyond the largest power, 0.5
    ("muon", (0.02, 0.002, 1.2))])  # shorter than no momentum
def test_the_best_ends_inside_on_every_axis(name, centre, new_track):
    track = new_track(bowl(centre))
    points = track.tune(name)
    more = track.refine(name, points)
    assert len(points) == 12 and more[:12] == points and len(more) <= 12 + MORE_POINTS
    assert set(more) == set(track.table.tried(name, 600))
    best = track.best(more)
    ends = {("setting", 1)} if name == "pmuon" else {("setting", -1)} if name == "muon" else set()
    assert sides_by_hand(track.table, best) == ends
    value = ZOO[name].value(best[4])
    assert value == {"pmuon": 0.5, "muon": 0.0}.get(name, value)
    # each was a neighbour of the best so far, at a factor of 2 where that is a rate
    means = {point: track.table.mean(*point, TUNING_SEEDS) for point in more}
    for number, point in enumerate(more[12:], 12):
        before = min(more[:number], key=means.get)
        changed = [i for i in (2, 3, 4) if point[i] != before[i]]
        assert len(changed) == 1
        if changed != [4]:
            assert max(point[changed[0]], before[changed[0]]) == pytest.approx(
                2 * min(point[changed[0]], before[changed[0]]), rel=0.01)
    # the second seed is left out where the first is hopeless, never of the best
    seeds = {}
    for *point, seed in track.table.losses:
        seeds.setdefault(tuple(point), []).append(seed)
    assert len(seeds[best]) == 2
    for point, found in seeds.items():
        assert len(found) == 2 or track.table.losses[Point(*point, 100)] > means[best] + HOPELESS - 0.01


def test_it_ends_after_so_many_points(new_track, tmp_path):
    track = new_track(bowl((0.02, 4e3, 0.05)))  # a million times the hidden rate
    points = track.tune("soap")
    more = track.refine("soap", points)
    assert len(more) == 12 + MORE_POINTS
    marked = page.marked_values(track.table, track.best(more))
    assert marked.split(", ")[1].endswith(("↑", "↕"))


def test_what_is_in_the_table_is_not_run_again(new_track):
    loss = bowl((0.008, 0.013, 0.2))
    whole = new_track(loss)
    wanted = whole.refine("soap", whole.tune("soap"))
    best = whole.best(wanted)
    ran = whole.ran
    lines = whole.table.path.read_text().splitlines(keepends=True)
    for number in (1, 13, len(lines) // 2, len(lines) - 1, len(lines)):  # where it was stopped
        whole.table.path.write_text("".join(lines[:number]))
        track = new_track(loss)
        points = track.refine("soap", track.tune("soap"))
        assert points == wanted and track.best(points) == best
        assert track.ran == ran[number - 1:]
        assert track.table.path.read_text() == "".join(lines)


def test_the_filed_tuning_is_complete(new_track):
    """Neither the 12 points of an optimizer nor a tuning that went on has runs left, nor their results."""
    filed = (ROOT / "records/zoo/cpu/runs.csv").read_text()
    track = new_track(None)
    track.table.path.parent.mkdir(parents=True)
    track.table.path.write_text(filed)
    track.table.read()
    for name in ZOO:
        points = track.tune(name)
        assert len(points) == 12 and not track.ran
        tried = track.table.tried(name, 600)
        if len(tried) > 12:  # its tuning went on, or AdamW, which is inside
            track.refine(name, points)
            assert not track.ran
        best = track.best(tried)
        assert best[2:] in page.complete_points(track.table, name, 600)


@pytest.fixture
def compare(call, monkeypatch, new_track, tmp_path):
    """compare(loss, *arguments) calls scripts/zoo.py."""
    def measure(self, name):
        costs = {"machine": "", "state_bytes": 4, "mean_step": 1.0, "low": 0.9, "high": 1.1}
        (tmp_path / "cpu/overhead.json").write_text(json.dumps(dict.fromkeys(ZOO, costs)))

    monkeypatch.setattr(Track, "measure", measure)
    monkeypatch.setattr(zoo, "fetch_data", lambda *arguments: None)
    (tmp_path / "cpu").mkdir()

    def compare(loss, *arguments):
        new_track(loss)
        return call(zoo, "--records", tmp_path, *arguments)
    return compare


def row_of(name, text):
    line, = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    return line.split(" | ")


def test_older_results_stay(compare, tmp_path):
    loss = bowl((0.06, 0.008, 0.1))
    assert compare(loss, "--optimizers", "soap").returncode == 0
    before = (tmp_path / "cpu/runs.csv").read_text()
    old = (tmp_path / "README.md").read_text()
    assert "before the tuning went on" not in old
    assert "↑" in row_of("soap", old)[7] and "↕" in row_of("muon", old)[7]
    done = compare(loss, "--optimizers", "soap", "--refine")
    assert done.returncode == 0, done.stderr
    after = (tmp_path / "cpu/runs.csv").read_text()
    assert after.startswith(before)
    text = (tmp_path / "README.md").read_text()
    table = Table(tmp_path / "cpu/runs.csv")
    for name, lengths in (("soap", 1), ("muon", 6)):
        tried = table.tried(name, 600)
        best = min(tried, key=tried.get)
        assert sides_by_hand(table, best) == set()
        row = row_of(name, text)
        assert not set("↑↓↕") & set(row[7])
        assert row[7].startswith(f"{best[2]:g}, {best[3]:g}")
        finals = [table.losses[Point(*best, seed)] for seed in SEEDS]
        assert row[1].startswith(f"{sum(finals) / 6:.4f} (")
        new = [point for point in table.losses if point.seed in SEEDS and point[2:5] == best[2:]]
        assert len([point for point in new if point.optimizer == name]) == 6 * lengths
        old_row = row_of(name, old)
        if row[7] != old_row[7].replace("↑", "").replace("↓", "").replace("↕", ""):
            assert f"`{name}` {old_row[1].split()[0]} (" in text
    assert "Final losses at the best points before the tuning went on: " in text
    # without --refine the same results stand, and nothing is run
    assert compare(None, "--optimizers", "soap").returncode == 0
    assert (tmp_path / "cpu/runs.csv").read_text() == after
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize("name, missing", [("soap", 1), ("soap", 6), ("muon", 1), ("muon", 36)])
def test_older_results_stand_until_the_new_are_complete(compare, tmp_path, name, missing):
    """A --refine that is stopped leaves the table as it was, and says so."""
    loss = bowl((0.12, 0.016, 0.05))
    runs = tmp_path / "cpu/runs.csv"
    readme = tmp_path / "README.md"
    assert compare(loss, "--optimizers", "soap").returncode == 0
    old = readme.read_text()
    assert compare(loss, "--optimizers", "soap", "--refine").returncode == 0
    tried = Table(runs).tried(name, 600)
    best = min(tried, key=tried.get)
    results = "".join(f"{value}," for value in best[2:])
    lines = runs.read_text().splitlines(keepends=True)
    new = [line for line in lines if line.startswith(f"{name},") and f",{results}" in line
           and int(line.split(",")[5]) in SEEDS]
    runs.write_text("".join(line for line in lines if line not in new[-missing:]))
    assert compare(None, "--page").returncode == 0
    text = readme.read_text()
    row, before = row_of(name, text), row_of(name, old)
    assert row[:2] == before[:2]
    assert [value.rstrip("↑↓↕") for value in row[7].split(", ")] == [
        value.rstrip("↑↓↕") for value in before[7].split(", ")]
    values = ", ".join(str(value) for value in best[2:] if value != "")
    assert "not yet run to the end at the new best point" in text and f"`{name}` ({values})." in text
    older = [line for line in text.splitlines() if "before the tuning went on" in line]
    assert not any(f"`{name}`" in line for line in older)


def test_incomplete_results_of_another_point_are_refused(compare, tmp_path):
    loss = bowl((0.02, 0.004, 0.05))
    assert compare(loss, "--optimizers", "soap").returncode == 0
    with open(tmp_path / "cpu/runs.csv", "a") as file:
        file.write("soap,600,0.02,0.001,,5,9.0,abc,\n")
    refused(compare(loss, "--page"), "has results of soap with several rates or settings")
