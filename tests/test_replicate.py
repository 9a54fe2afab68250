"""scripts/replicate.py: the arms that it trains, and what it makes of them."""
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt2
from conftest import ROOT, refused
from harness import jobs
from harness.command import locked
from harness.estimates import Estimate
from scripts import bench, replicate
from train_gpt2 import UserError, load_config

TINY = ["--n_layer", "1", "--n_embd", "16", "--batch_size", "2", "--sequence_length", "32",
        "--num_iterations", "10", "--warmdown_iters", "3", "--val_loss_every", "5", "--val_tokens", "64",
        "--target_val_loss", "5", "--log_every", "1"]


def losses(*gains, n=5):
    """Final losses {seed: loss} of an arm for each of `gains`, with the speedrun's spread."""
    rng = np.random.default_rng(0)
    return [dict(enumerate(3.28 - gain + rng.normal(0, 0.0013, n))) for gain in gains]


# the arms


@pytest.mark.parametrize("track, steps, warmdown, first", [
    ("cpu", {600, 564}, 169, 1),
    ("speedrun", {6200, 5828}, 1692, 0)])
def test_arms(track, steps, warmdown, first, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    plan = replicate.plan_runs(track, Path("configs"), ["newton_muon", "adamw", "muon"], 3, tmp_path, [])
    N = max(steps)
    short = min(steps)
    assert set(plan) == {("muon", N), ("newton_muon", N), ("newton_muon", short), ("adamw", N)}
    for (optimizer, length), seeds in plan.items():
        assert list(seeds) == [first, first + 1, first + 2]
        for seed, (folder, arguments, config) in seeds.items():
            asked = vars(load_config([f"configs/{track}_{optimizer}.toml"]))
            assert (config.seed, config.data_seed) == (seed, seed)
            assert (config.num_iterations, config.run_name) == (length, folder.name)
            changed = {"run_name", "log_dir", "resume", "save_every"}
            if seed:
                changed |= {"seed", "data_seed"}
            if length == short:
                changed |= {"num_iterations", "warmdown_iters"}
            assert {name for name, value in vars(config).items() if value != asked[name]} == changed
    assert plan["newton_muon", short][2][2].warmdown_iters == warmdown
    assert len({folder for seeds in plan.values() for folder, _, _ in seeds.values()}) == 12


def test_without_muon_there_is_no_shorter_arm(tmp_path):
    fields = ["--num_iterations", "450"]
    plan = replicate.plan_runs("cpu", ROOT / "configs", ["newton_muon"], 1, tmp_path, fields)
    assert set(plan) == {("newton_muon", 450)}


def test_configurations_of_ones_own(tmp_path):
    for name, rate in (("muon", 0.5), ("newton_muon", 0.25)):
        (tmp_path / f"cpu_{name}.toml").write_text(f'optimizer = "{name}"\nlearning_rate = {rate}\n')
    plan = replicate.plan_runs("cpu", tmp_path, ["muon", "newton_muon"], 2, tmp_path, [])
    rates = {}
    for (name, _), seeds in plan.items():
        for run in seeds.values():
            rates[name] = run.config.learning_rate
    assert rates == {"muon": 0.5, "newton_muon": 0.25}


@pytest.mark.parametrize("arguments, words", [
    ("--seed 3", "--seed: every run here has its own"),
    ("--optimizer=adamw", "--seeds and --optimizers say"),
    ("--data_seed 3", "--data_seed: every run"),
    ("--stop_at_target true", "to its end"),
    ("--seeds 0", "seeds must be at least 1"),
    ("--optimizers muon,muon", "each optimizer named once"),
    ("--optimizers muon,lion", "cpu_lion.toml"),
    ("--seeds 5 --planned_seeds 3", "--planned_seeds 3: must be 2 or more, and at least --seeds 5"),
    ("--gpus 0", "--gpus 0"),
    ("--png plot.xyz", "must end in .png"),
    ("--val_tokens 100", "val_tokens = 100"),
    ("--track mini", "needs a GPU and torch finds none; --track cpu does"),
    ("--configs nowhere", "nowhere/cpu_muon.toml"),
    ("--num_iterations 8 --warmdown_iters 2", "num_iterations = 8 of Newton-Muon"),
    ("--overhead nowhere.json", "/nowhere.json cannot be read (No such file or directory)"),
    ("--overhead empty.json", "/empty.json is not what bench.py"),
])
def test_refused_before_the_first_run(call, tmp_path, arguments, words, monkeypatch):
    if torch.cuda.is_available() and "mini" in arguments:
        pytest.skip("there is a GPU")
    monkeypatch.setattr(jobs, "launch", lambda *_: pytest.fail("starts"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").touch()
    refused(call(replicate, "--log_dir", tmp_path / "runs", *arguments.split()), words)
    assert not (tmp_path / "runs").exists()


# running them


@pytest.fixture
def replicated(call, tmp_path, monkeypatch):
    """replicated(*arguments) runs it with a tiny model, its commands in this process.

    .started lists them, those of one time as a list.
    """
    def launch(commands, published=None):
        replicated.started.append([arguments[0] for arguments in commands.values()])
        return [run(arguments) for arguments in commands.values()]

    def run(arguments):
        if arguments[0] == "scripts/bench.py":
            ratios = {"newton_muon/muon": dict(mean_step=1.02, low=1.01, high=1.03)}
            facts = dict(parameters=12 * 16 ** 2 + 256 * 16, batch_size=2, sequence_length=32, processes=1,
                         code_sha256=train_gpt2.code_sha256(), ratios=ratios)
            (tmp_path / "runs/overhead.tmp").write_text(json.dumps(facts))
        elif arguments[0] == "train_gpt2.py":
            try:
                train_gpt2.run(load_config(arguments[1:]))
            except UserError:
                return 1
        return 0

    def replicated(*arguments):
        replicated.started = []
        replicated.done = call(replicate, "--log_dir", tmp_path / "runs",
                               "--optimizers", "muon,newton_muon", *TINY, *arguments)
        return replicated.done.stdout
    monkeypatch.setattr(jobs, "launch", launch)
    monkeypatch.chdir(ROOT)
    return replicated


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(replicate.compare, "plot", lambda *_: None)


def test_trains_judges_and_repeats_nothing(replicated, tmp_path):
    text = replicated()
    assert replicated.started == [["data/shakespeare.py"], ["train_gpt2.py"] * 2]  # two at once
    assert "one seed gives no verdict" in text and "not known for this configuration" in text
    assert (tmp_path / "runs.png").exists()
    assert "overhead" not in text and "verdict:" not in text
    text = replicated("--seeds", 2)
    trained = [["train_gpt2.py"], ["train_gpt2.py"] * 3]
    assert replicated.started == [["data/shakespeare.py"], ["scripts/bench.py"], *trained]
    assert "2 of 6 runs" in text
    assert "overhead of Newton-Muon's step: +2.0% (95 %: +1.0% to +3.0%)" in text
    assert text.splitlines()[-1].startswith("verdict: ")
    finals = []
    for seed in (1, 2):
        facts = json.loads((tmp_path / f"runs/newton_muon_9_seed-{seed}/run.json").read_text())
        finals.append(facts["final_val_loss"])
    assert f"final loss of newton_muon after 9 steps: {np.mean(finals):.4f}" in text
    text = replicated("--seeds", 2, "--target_val_loss", "5.2")
    assert replicated.started == [] and "first 5.2: step" in text  # another target needs no other runs


def test_the_number_of_seeds_is_planned(replicated, no_picture, tmp_path):
    replicated("--seeds", 2, "--planned_seeds", 3)
    plan = tmp_path / "runs/plan.json"
    assert json.loads(plan.read_text()) == {"planned_seeds": 3, "looks": [2]}
    replicated("--seeds", 4)
    refused(replicated.done, "--seeds 4, but 3 were planned", "another --log_dir")
    replicated("--seeds", 3, "--planned_seeds", 5)
    refused(replicated.done, "--planned_seeds 5, but", "plan.json says 3")
    assert replicated.started == []
    text = replicated("--seeds", 3)
    assert json.loads(plan.read_text())["looks"] == [2, 3]
    assert "look at 3 of 3 planned seeds" in text


def test_paths_are_those_of_the_caller(replicated, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ratio = dict(mean_step=1.5, low=None, high=None)
    Path("mine.json").write_text(json.dumps(dict(ratios={"newton_muon/muon": ratio})))
    text = replicated("--png", "mine.png", "--overhead", "mine.json")
    assert "overhead of Newton-Muon's step: +50.0%" in text and (tmp_path / "elsewhere/mine.png").exists()


def test_one_process_at_a_time(replicated, tmp_path):
    with locked(tmp_path / "runs"):
        replicated()
    refused(replicated.done, "another process is using", "runs; let it end, or choose another")
    assert replicated.started == []


def test_overhead_of_another_model_is_measured_again(replicated, no_picture, tmp_path):
    replicated("--seeds", 2)
    file = tmp_path / "runs/overhead.json"
    measured = json.loads(file.read_text())
    again = [["scripts/bench.py"]]
    for changed, started in (({}, []), ({"parameters": 1}, again), ({"processes": 2}, again)):
        file.write_text(json.dumps({**measured, **changed}))
        replicated("--seeds", 2)
        assert replicated.started == started and json.loads(file.read_text()) == measured


def test_diverged_run_is_not_repeated(replicated, no_picture):
    text = replicated("--seeds", 2, "--hidden_learning_rate", "1e30")
    assert sum(replicated.started, []).count("train_gpt2.py") == 6
    assert "muon_10_seed-1 diverged: its arm has no result" in text
    assert "6 of 6 runs diverged" in text and text.splitlines()[-1] == "verdict: undecided"
    replicated("--seeds", 2, "--hidden_learning_rate", "1e30")
    assert replicated.started == []


def test_the_overhead_is_what_bench_writes(tmp_path, call, monkeypatch):
    file = tmp_path / "overhead.json"
    monkeypatch.chdir(ROOT)
    done = call(bench, "configs/cpu_newton_muon.toml", "--sides", "muon,newton_muon", "--rounds", 6,
                "--steps", 1, "--n_layer", 1, "--n_embd", 16, "--batch_size", 2, "--json", file)
    assert done.returncode == 0, done.stderr
    ratio = json.loads(file.read_text())["ratios"]["newton_muon/muon"]
    rounds = np.array(ratio["rounds"]) - 1
    found = replicate.read_overhead(file)
    assert found[:3] == pytest.approx((np.median(rounds), rounds.min(), rounds.max()))
    file.write_text("[]")
    with pytest.raises(UserError, match="is not what bench.py"):
        replicate.read_overhead(file)


# judging them


def test_the_verdict_in_words():
    saving = 0.03
    slope = 0.0045 * 62
    arms = losses(0, saving * slope, (saving - 0.06) * slope)
    lines = replicate.conclude(*arms, 0.06, Estimate(0.01, 0.01, 0.01))
    steps, time = (float(line.split()[2].rstrip("%")) / 100 for line in lines[:2])
    assert steps == pytest.approx(saving, abs=0.007)
    assert time == pytest.approx(1 - (1 - steps) * 1.01, abs=0.001)
    assert lines[2:] == ["Does Newton-Muon need fewer steps than Muon? yes",
                         "Does it save 6% of the steps, as claimed? no", "verdict: partly"]


def test_an_early_look_is_more_careful():
    arms = losses(0, 0.0040, 0.0040 - 0.06 * 0.279, n=3)
    overhead = Estimate(0.01)
    only = replicate.conclude(*arms, 0.06, overhead, None, 0.95, 3)
    early = replicate.conclude(*arms, 0.06, overhead, None, 0.995, 30)
    assert early[0].startswith("look at 3 of 30 planned seeds: its intervals are of 99.5%")
    assert not any("look at" in line for line in only)

    def width(line):
        low, high = re.search(r"95 %: (\S+)% to (\S+)%", line).groups()
        return float(high) - float(low)

    assert width(early[1]) > 1.5 * width(only[0])


def test_undecided_names_a_number_of_runs():
    arms = {0: 3.281, 1: 3.279}, {0: 3.275, 1: 3.277}, {0: 3.281, 1: 3.283}  # 4 %, on two seeds
    lines = replicate.conclude(*arms, 0.06, Estimate(0.01))
    assert lines[0].startswith("steps saved: 4.0% (95 %: ")
    assert "time saved: unknown" in lines[1]  # without an interval for the overhead
    assert lines[3].startswith("Does it save 6% of the steps, as claimed? undecided: about ")
    assert lines[-1] == "verdict: undecided"


def test_one_seed_says_what_difference_means_nothing():
    arms = losses(0, 0.01, 0.02, n=1)
    text = "\n".join(replicate.conclude(*arms, 0.06, Estimate(0.01), (0.0013, math.inf)))
    assert "verdict:" not in text and "saved" not in text
    assert ("two runs of Muon, or of Newton-Muon, that differ only in the seed have final losses "
            "within 0.0036 of each other") in text


def test_spread_of_filed_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(replicate.runs, "ROOT", tmp_path)
    monkeypatch.chdir(ROOT)
    config = load_config(["configs/cpu_muon.toml"])
    other = {"learning_rate": 0.1}
    filed = [(1.60, {}), (1.64, {"device": "cuda"}), (1.62, {}), (9.0, other), (8.0, other)]
    for i, (loss, changed) in enumerate(filed):
        folder = tmp_path / f"records/cpu/{'.adding' if changed == other else 'first'}/run_{i}"
        folder.mkdir(parents=True)
        facts = dict(config={**vars(config), **changed, "seed": i}, final_val_loss=loss)
        (folder / "run.json").write_text(json.dumps(facts))
    assert replicate.filed_spread("cpu", [config]) == (pytest.approx(np.std([1.60, 1.64, 1.62], ddof=1)), 2)
    assert replicate.filed_spread("mini", [config]) is None


def test_arms_of_the_optimizer_track(monkeypatch, tmp_path):
    """Both arms have the AdamW of result 36, on the track's model."""
    monkeypatch.chdir(ROOT)
    plan = replicate.plan_runs("optimizer", Path("configs"), ["newton_muon", "muon"], 2, tmp_path, [])
    assert set(plan) == {("muon", 3250), ("newton_muon", 3250), ("newton_muon", 3055)}
    configs = [seeds[0].config for seeds in plan.values()]
    assert {config.model for config in configs} == {"models.optimizer_track:GPT"}
    assert {config.optimizer.split(":")[0] for config in configs} == {"optimizers.track_muon"}
    table = [json.loads(config.groups)["embed.weight"] for config in configs]
    assert table[0] == table[1] == table[2]
    assert plan["newton_muon", 3055][1].config.warmdown_iters == round(0.94 * 2275)


def test_the_optimizer_track_counts_steps_only(replicated, no_picture, tmp_path):
    data = ROOT / "data/shakespeare"
    text = replicated("--track", "optimizer", "--gpus", 1, "--seeds", 2, "--vocab_size", 256, "--n_head", 1,
                      "--device", "cpu", "--compile", "false",
                      "--input_bin", data / "shakespeare_train_*.bin",
                      "--input_val_bin", data / "shakespeare_val_*.bin")
    assert replicated.started == [["train_gpt2.py"]] * 6
    assert "result 36 of the optimizer track" in text
    assert "steps saved:" in text and "time saved" not in text and "overhead of" not in text
    assert "Against optimizers.track_muon:TrackMuon" in text
