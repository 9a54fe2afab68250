"""What every optimizer of scripts/zoo.py has in common, and their comparison.

The rule of each is tested in test_rules_*.py.
"""
import csv
import dataclasses
import importlib
import inspect
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import ROOT, logged, refused, sequence, write_config
from faults import full_disk
from harness import jobs, runs
from harness.estimates import Estimate
from harness.zoo import page
from harness.zoo.optimizers import ZOO
from harness.zoo.page import RECORDS, lines_of_code
from harness.zoo.table import SEEDS, TUNING_SEEDS, Point, Table
from harness.zoo.training import Track, state_bytes
from scripts import zoo
from train_gpt2 import Config, UserError

OURS = [name for name, entry in ZOO.items() if entry.optimizer.startswith("optimizers.")]


def kind_of(name):
    module, kind = ZOO[name].optimizer.split(":")
    return getattr(importlib.import_module(module), kind)


def arguments_of(name):
    """As in the comparison, but what an optimizer does in every k-th step comes in every second."""
    arguments = dict(ZOO[name].arguments)
    if "refresh_interval" in inspect.signature(kind_of(name)).parameters:
        arguments["refresh_interval"] = 2
    return arguments


def make(name, matrices, **settings):
    return kind_of(name)(matrices, **{**arguments_of(name), "lr": ZOO[name].rates[1], **settings})


def matrices(*shapes):
    shapes = shapes or ((24, 8), (8, 8), (32, 8), (8, 32))
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) / 4) for shape in shapes]


def steps(optimizer, parameters, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        if hasattr(optimizer, "refresh") and number % 2:
            grams = []
            for p in parameters:
                n = min(p.shape)
                grams.append(number * torch.eye(n).repeat(p.size(1) // n, 1, 1))
            optimizer.refresh(grams, 1)
        optimizer.step()


@pytest.mark.parametrize("name", OURS)
def test_state_continues_bit_for_bit(name, tmp_path):
    whole = matrices()
    parts = matrices()
    steps(make(name, whole), whole, range(7))
    first = make(name, parts)
    steps(first, parts, range(4))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make(name, parts)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(second, parts, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("name", OURS)
def test_refusals_name_what_is_wrong(name):
    with pytest.raises(ValueError, match="a parameter of shape .3,.: .* updates matrices only"):
        make(name, matrices((3,)))
    with pytest.raises(TypeError, match="momentun"):
        make(name, matrices((4, 4)), momentun=0.9)
    settings = set(inspect.signature(kind_of(name)).parameters)
    if "settings" in settings:  # what else a Muon takes
        settings |= {"ns_steps", "momentum"}
    wrong = [("lr", -1.0), ("lr", math.nan)]
    for setting in settings:
        if setting.startswith(("beta", "momentum")):
            wrong.append((setting, 1.0))
        if setting in ("ns_steps", "refresh_interval", "seed"):
            wrong += [(setting, 2.5), (setting, -1)]
    for setting, value in wrong:
        with pytest.raises(ValueError, match=rf"\b{setting} = {value}"):
            make(name, matrices((4, 4)), **{setting: value})


@pytest.mark.parametrize("name", ZOO)
def test_defaults_lie_between_the_values_tried(name):
    entry = ZOO[name]
    own = {}
    if ":" in entry.optimizer:
        own = inspect.signature(kind_of(name)).parameters
    default = own[entry.setting].default if entry.setting in own else getattr(Config(), entry.setting)
    assert min(entry.values) < entry.arguments.get(entry.setting, default) < max(entry.values)


@pytest.mark.parametrize("name", OURS)
def test_gradients_of_zeros_come_first(name):
    """As those of all matrices before a projection that is initialised with zeros."""
    fresh = matrices()
    later = matrices()
    optimizer = make(name, later)
    for _ in range(3):
        for p in later:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    if name not in ("dp_muon", "scion", "stiefel_muon"):  # which add noise, shrink and retract
        assert all(torch.equal(a, b) for a, b in zip(fresh, later, strict=True))
    start = [[p.detach().clone() for p in group] for group in (fresh, later)]
    steps(make(name, fresh), fresh, range(4))
    steps(optimizer, later, range(4))
    for before, after, before_later, after_later in zip(start[0], fresh, start[1], later):
        assert (after_later - before_later).norm() < 10 * (after - before).norm()


@pytest.mark.parametrize("name", OURS)
def test_the_loss_of_a_quadratic_falls(name):
    W, = matrices((8, 8))
    target = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) / 4
    optimizer = make(name, [W], lr=min(0.1, ZOO[name].rates[1]))
    before = (W - target).square().sum().item()
    for _ in range(30):
        W.grad = (W - target).detach()
        optimizer.step()
    assert (W - target).square().sum() < 0.9 * before


def test_processes_agree(shards, tmp_path):
    """Two processes log the losses of one, with each optimizer."""
    groups = []
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        config = write_config(tmp_path / str(processes) / "config.toml", shards, n_layer=1, num_iterations=4,
                              warmdown_iters=2, refresh_interval=2, val_loss_every=0)
        commands = []
        for name, entry in ZOO.items():
            arguments = arguments_of(name) if name in OURS else entry.arguments
            commands.append([str(config), "--optimizer", entry.optimizer, "--run_name", name,
                             "--optimizer_args", json.dumps(arguments),
                             "--hidden_learning_rate", str(entry.rates[1])])
        groups.append((processes, commands))
    sequence(*groups)
    for name in ZOO:
        one, two = (logged(tmp_path / processes / "logs" / name) for processes in "12")
        assert two == pytest.approx(one, rel=2e-4), name


# the comparison, of runs whose losses are a known function of their settings


@pytest.fixture
def compare(call, monkeypatch, tmp_path):
    """compare(*arguments) calls the script.

    compare.runs counts what it trained, compare.loss(values of fields) is their final loss.
    """
    def train(self, arguments, folder):
        compare.runs += 1
        values = {}
        for name, value in zip(arguments[1::2], arguments[2::2]):
            values[name[2:]] = float(value) if re.fullmatch(r"[\d.e-]+", value) else value
        loss = compare.loss(values)
        return None if math.isnan(loss) else loss

    def launch(commands):
        arguments, = commands.values()
        if arguments[0] == "scripts/bench.py":
            side = arguments[arguments.index("--sides") + 1]
            pair = "/".join(reversed(side.split(",")))
            ratio = dict(mean_step=1.5, low=1.4, high=1.6)
            bench = dict(machine="a CPU", ratios={pair: ratio})
            (tmp_path / "logs/bench.json").write_text(json.dumps(bench))
        return [0]

    def compare(*arguments):
        compare.runs = 0
        return call(zoo, "--log_dir", tmp_path / "logs", "--records", tmp_path / "zoo", *arguments)

    def rows():
        with open(tmp_path / "zoo/cpu/runs.csv", newline="") as file:
            return list(csv.DictReader(file))

    monkeypatch.setattr(jobs.Jobs, "train", train)
    monkeypatch.setattr(jobs, "launch", launch)
    monkeypatch.setattr(runs, "diverged", lambda folder: True)
    compare.loss = bowl
    compare.rows = rows
    return compare


def bowl(values):
    """Best at twice the hidden rate of the centre, a small beta2, and an embedding's rate beyond the grid."""
    at = [math.log2(values["learning_rate"] / 0.08), math.log2(values["hidden_learning_rate"] / 0.004)]
    beta2 = json.loads(values.get("optimizer_args", "{}")).get("beta2", 0.95)
    noise = 0.001 * math.sin(values["seed"] * (1 + len(values["optimizer"])))
    other = beta2 / 100 + 0.05 * ("Signum" in values["optimizer"]) - values["num_iterations"] / 1e4
    return 3 + 0.01 * sum(x * x for x in at) + other + noise


@pytest.mark.parametrize("name, of_block", [
    ("muon", lambda m, n: 4 * m * n),
    ("adopt", lambda m, n: 8 * m * n),
    ("shampoo", lambda m, n: 4 * m * n + 8 * (m * m + n * n)),
    ("soap", lambda m, n: 8 * m * n + 8 * (m * m + n * n)),
    ("soap_one_sided", lambda m, n: 8 * m * n + 8 * min(m, n) ** 2)])
def test_bytes_of_state(name, of_block, tiny):
    entry = ZOO[name]
    config = dataclasses.replace(tiny, optimizer=entry.optimizer, optimizer_args=json.dumps(entry.arguments))
    blocks = [(16, 16)] * 4 + [(64, 16), (16, 64)]
    parameters = sum(m * n for m, n in blocks)
    assert state_bytes(config) == pytest.approx(sum(of_block(m, n) for m, n in blocks) / parameters)


def test_bytes_of_state_where_only_mlp_proj_is_preconditioned(tiny):
    config = dataclasses.replace(tiny, optimizer="optimizers.power_newton_muon:PowerNewtonMuon",
                                 optimizer_args='{"power": 0}',
                                 groups='{"h.*.mlp_proj.weight": {"power": 1}}')
    parameters = 12 * 16 * 16  # of a layer: 4 C^2 in attention, 2 times 4 C^2 after it, with C = 16
    kept = 4 * 2 * 16 * 16  # K and P of the four blocks of mlp_proj
    assert state_bytes(config) == pytest.approx(4 + 4 * kept / parameters)


def test_lines_of_code():
    code = inspect.getsource(importlib.import_module("optimizers.lion")).split('"""')[2]
    assert lines_of_code(ZOO["lion"]) == len([line for line in code.splitlines() if line])
    assert lines_of_code(ZOO["torch_muon"]) is None


def test_equal_tuning_then_fresh_seeds(compare, tmp_path):
    done = compare("--optimizers", "normuon")
    assert done.returncode == 0, done.stderr
    rows = compare.rows()
    assert compare.runs == len(rows)
    assert sum(int(row["seed"]) < 100 for row in rows) == (1 + 6) * 6  # Muon also at five other lengths
    losses = {}
    for row in rows:
        points = losses.setdefault((row["optimizer"], int(row["seed"]) >= 100), {})
        points.setdefault(tuple(row.values())[1:5], []).append(float(row["final_val_loss"]))
    for tuning in (losses["muon", True].values(), losses["normuon", True].values()):
        best = min(found[0] for found in tuning)
        assert len(tuning) == 12 and {len(found) for found in tuning} == {1, 2}
        assert all(len(found) == 2 or found[0] > best + 0.02 for found in tuning)
    grid = [found for (*_, setting), found in losses["normuon", True].items() if not setting]
    assert len(grid) == 9 and all(len(found) == 1 + (found[0] <= min(grid)[0] + 0.02) for found in grid)
    # twice the largest rate of the grid: the neighbour
    assert {*losses["normuon", False]} == {("600", "0.08", "0.004", "0.9")}
    assert compare("--optimizers", "normuon").returncode == 0 and compare.runs == 0


def test_page(compare, tmp_path):
    compare("--optimizers", "normuon,signum")
    (tmp_path / "zoo/mini").mkdir()
    # a comparison that was stopped before its first run ended
    (tmp_path / "zoo/mini/overhead.json").write_text("{}")
    text = (tmp_path / "zoo/README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["normuon", "muon", "signum"]  # by loss
    best = dict(num_iterations=600, learning_rate=0.08, hidden_learning_rate=0.004)
    losses = []
    for optimizer, arguments in (("optimizers.normuon:NorMuon", '{"beta2": 0.9}'), ("muon", "{}")):
        values = dict(best, optimizer=optimizer, optimizer_args=arguments)
        losses.append([bowl(dict(values, seed=seed)) for seed in SEEDS])
    gaps = np.subtract(*losses)
    half = stats.t.ppf(0.975, 5) * gaps.std(ddof=1) / math.sqrt(6)
    assert f"{gaps.mean():+.4f} ({gaps.mean() - half:+.4f} to {gaps.mean() + half:+.4f}) =" in lines[0]
    assert f"{np.mean(losses[0]):.4f} (" in lines[0] and "1.50 (1.40 to 1.60)" in lines[0]
    # Muon's steps to that loss, which falls by 150 / 1e4 from 600 steps to 750
    steps = 600 * (750 / 600) ** (-gaps.mean() * 1e4 / 150)
    assert f"| {1 - 600 / steps:.1%} (" in lines[0] and "| below -100% |" in lines[2]
    assert "| 0.08↑, 0.004↕, beta2 0.9↕ |" in lines[0]  # beyond the grid, and nothing was tried around it
    assert compare("--check").returncode == 0
    table = tmp_path / "zoo/cpu/runs.csv"
    *last, _, code, _ = table.read_text().splitlines()[-1].split(",")
    with open(table, "a") as file:
        # beyond the best, 0.9, which is open on one side only now
        file.write("normuon,600,0.08,0.004,0.8,100,9.0,abc,\n")
    compare("--page")
    assert "| 0.08↑, 0.004↕, beta2 0.9↑ |" in (tmp_path / "zoo/README.md").read_text()
    for line, sentence in ((",".join([*last, "9.0", code, ""]), "is stale"),
                           ("signum,600,0.02,0.002,,5,9.0,abc,", "has results of signum with several rates")):
        with open(table, "a") as file:
            file.write(line + "\n")
        refused(compare("--check"), sentence)
    overhead = tmp_path / "zoo/cpu/overhead.json"
    no_number = '{"signum": {"machine": "", "state_bytes": 4, "mean_step": "1"}}'
    for damaged in ("{", "[]", '{"muon": {}}', no_number):
        overhead.write_text(damaged)
        refused(compare("--check"), f"{overhead} cannot be read ", "; restore it from git")


def test_rates_follow_those_of_the_track(compare, tmp_path):
    done = compare("--optimizers", "adopt", "--learning_rate", 0.002, "--hidden_learning_rate", 0.0001)
    assert done.returncode == 0
    tried = set()
    for row in compare.rows():
        rates = float(row["learning_rate"]), float(row["hidden_learning_rate"])
        tried.add((row["optimizer"], *rates))
    # 1 / 10 and 1 / 20 of the CPU track's
    assert {("muon", 0.002, 0.0001), ("adopt", 0.002, 0.0002)} <= tried


def test_who_wins_has_had_all_tuning_seeds(compare, tmp_path):
    """The best of the first seed diverges with the second; what it had ruled out then gets its second too."""
    def loss(values):
        if values.get("optimizer_args", "{}") != "{}" or values["hidden_learning_rate"] != 0.002:
            return 3.1
        return {0.02: math.nan if values["seed"] == 101 else 2.8, 0.04: 3.0}.get(values["learning_rate"], 3.1)
    compare.loss = loss
    assert compare("--optimizers", "signum").returncode == 0
    seeds = {}
    for row in compare.rows():
        seeds.setdefault(tuple(row.values())[:5], set()).add(int(row["seed"]))
    won, = [found for point, found in seeds.items() if point[0] == "signum" and set(SEEDS) <= found]
    assert set(TUNING_SEEDS) <= won


def test_jobs_change_nothing(compare, tmp_path):
    tables = []
    for number in (1, 2):
        assert compare("--optimizers", "signum", "--jobs", number).returncode == 0
        tables.append(sorted((tmp_path / "zoo/cpu/runs.csv").read_text().splitlines()))
        shutil.rmtree(tmp_path / "zoo")
    assert tables[0] == tables[1]


def test_lines_name_the_code(tmp_path):
    facts = dict(code_sha256="a" * 64, optimizer_sha256=None)
    table = Table(tmp_path / "runs.csv")
    for name, found in (("muon", facts), ("signum", {**facts, "optimizer_sha256": "b" * 64})):
        table.add(Point(name, 600, 0.02, 0.002, "", 1), 1.5, found)
    lines = table.path.read_text().splitlines()
    assert lines[0].endswith(",final_val_loss,code_sha256,optimizer_sha256")
    assert [line.split(",")[-2:] for line in lines[1:]] == [["a" * 12, ""], ["a" * 12, "b" * 12]]
    assert Table(table.path).losses == table.losses


def test_a_full_disk_leaves_whole_files(tmp_path, monkeypatch):
    table = Table(tmp_path / "zoo/runs.csv")
    point = Point("muon", 600, 0.02, 0.002, "", 1)
    track = Track("cpu", 1, tmp_path, ["--n_embd", "16"], table)
    monkeypatch.chdir(ROOT)
    table.add(point, 1.5, {})
    track.measure("muon")
    monkeypatch.setitem(ZOO, "another", ZOO["muon"])
    before = {path: path.read_bytes() for path in (table.path, tmp_path / "zoo/overhead.json")}
    works = (lambda: table.add(point._replace(seed=2), 1.25, {}), lambda: track.measure("another"))
    untouched = "File too large; what was there before is untouched"
    for path, work in zip(before, works):
        with full_disk(len(before[path]) + 5), pytest.raises(UserError, match=untouched):
            work()
    assert {path: path.read_bytes() for path in table.path.parent.iterdir()} == before
    line = b"muon,600,0.02,0.002,,2,1.2"
    for damage, words in ((line, "its last line breaks off"), (line + b"\n", "too few")):
        table.path.write_bytes(before[table.path] + damage)
        with pytest.raises(UserError, match=f"runs.csv cannot be read .*{words}.*; restore it from git"):
            Table(table.path)


def test_the_folder_is_the_callers(compare, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert compare("--page", "--records", "mine").returncode == 0 and (tmp_path / "mine/README.md").exists()


def test_divergence_is_a_result(compare, tmp_path):
    def loss(values):
        return math.nan if values.get("optimizer", "").startswith("optimizers.signum") else bowl(values)

    compare.loss = loss
    assert compare("--optimizers", "signum").returncode == 0
    assert "| `signum` | nan |" in (tmp_path / "zoo/README.md").read_text()


def test_an_interrupted_run_is_not_a_result(compare, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "diverged", lambda folder: False)
    compare.loss = lambda values: math.nan
    done = compare("--optimizers", "signum")
    assert done.returncode == 1 and "did not end; the same command resumes it" in done.stderr
    assert not (tmp_path / "zoo/cpu/runs.csv").exists()


def test_runs_of_other_code_are_not_resumed(compare, tmp_path):
    folder = tmp_path / "logs/muon_600_0.02_0.002_100"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"code_sha256": "0"}')
    done = compare("--optimizers", "signum")
    assert done.returncode == 1
    assert f"not complete: muon: {folder} is from another version of train_gpt2.py" in done.stderr
    table = (tmp_path / "zoo/cpu/runs.csv").read_text()
    assert all(f",{seed},2.99" in table for seed in SEEDS)  # the others are run to the end


@pytest.mark.parametrize("arguments, sentence", [
    (["--optimizers", "muon,nobody"], "no optimizer 'nobody'"), (["--jobs", "0"], "--jobs 0"),
    (["--check", "--n_layer", "2", "--records", RECORDS], "--n_layer makes this a different comparison")])
def test_bad_arguments(compare, arguments, sentence):
    refused(compare(*arguments), sentence)


@pytest.mark.skipif(not RECORDS.exists(), reason="nothing is filed")
def test_the_filed_page_is_up_to_date(call):
    assert call(zoo, "--check").returncode == 0


# the picture


def picture(gaps):
    """(axes, labels) of the picture of differences to Muon, {name: (mean, low, high)}."""
    results = []
    for name, ends in gaps.items():
        results.append(page.Result(name, Estimate(1.5 + ends[0]), Estimate(*ends), ()))
    axes, = page.plot(results).axes
    return axes, [label.get_text() for label in axes.get_yticklabels()]


def test_the_picture_is_sorted_and_grouped():
    gaps = {"soap": (-0.02, -0.03, -0.01), "lion": (-0.01, -0.02, 0.001), "adopt": (0.01, 0.009, 0.02)}
    axes, labels = picture(gaps)
    assert labels == ["better than Muon", "SOAP", "cannot be told from Muon", "Lion",
                      "worse than Muon", "ADOPT"]
    assert axes.yaxis_inverted()  # the first is on top


def test_outliers_do_not_set_the_scale():
    axes, _ = picture({"soap": (0.01, 0.005, 0.015), "lion": (0.012, 0.01, 0.015), "adopt": (3.0, 2.9, 3.1)})
    right = axes.get_xlim()[1]
    assert right < 0.1
    arrows = [line for line in axes.lines if line.get_marker() == ">"]
    assert [line.get_xdata() for line in arrows] == [[right]]
    assert "+3.0000 (+2.9000 to +3.1000)" in [text.get_text() for text in axes.texts]


def test_a_diverged_optimizer_is_named():
    figure = page.plot([page.Result("signum", Estimate(math.nan), None, ())])
    assert "diverged" in [text.get_text() for text in figure.axes[0].texts]
