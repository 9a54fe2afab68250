"""scripts/gpu_faster.py, on a CPU."""
import json
import re
import sys

import pytest

from conftest import ROOT, fork, refused
from harness import parts
from scripts import bench, gpu_faster
from train_gpt2 import Shards, load_config, sequences_per_process


def faster(*arguments, **env):
    return fork(ROOT / "scripts/gpu_faster.py", *arguments, cwd="/", env={"CUDA_VISIBLE_DEVICES": "", **env})


def test_wrong_commands_are_refused(tmp_path):
    refused(faster("--out", tmp_path / "out"), "finds no GPU on this machine")
    refused(faster("--cpu", "--parts", "mlp,atention"), "--parts mlp,atention", "there is no atention")
    assert not (tmp_path / "out").exists()


def test_parts_of_a_step(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed; there are versions for Linux only")
    done = faster("--cpu", "--seconds", 8000, "--parts", "mlp,products,attention", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report.txt").read_text()
    assert re.findall(r"^== (.*): done, \d+ s$", report, re.MULTILINE) == ["products", "attention", "mlp"]
    rows = re.findall(r"^(\w+) +\d+ +\d+ +\d+(?: +\d+\.\d{3} +\d+){3}$", report, re.MULTILINE)
    assert rows == ["c_attn", "attn_proj", "c_fc", "mlp_proj", "head"]
    assert re.search(r"^flash_attention, .* forward \d+\.\d+ ms, .* backward \d", report, re.MULTILINE)
    assert len(re.findall(r"^tile .*; right, differences", report, re.MULTILINE)) == 5
    assert "the whole MLP, forward and backward: torch" in report and "WRONG" not in report
    assert {path.name for path in tmp_path.iterdir()} == {"report.txt", "runs.tar.gz"}


def test_models_side_by_side(tmp_path):
    done = faster("--cpu", "--seconds", 8000, "--parts", "layers,steps,training", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report.txt").read_text()
    assert report.count(": done, ") == 2 + len(gpu_faster.MODELS)
    losses = re.findall(r"^ +4((?: +\d\.\d{4}){4})$", report, re.MULTILINE)
    assert len(losses) == 1
    sides = json.loads((tmp_path / "steps.json").read_text())["sides"]
    assert len(sides) == len(gpu_faster.MODELS) and all(side["mean_step_ms"] > 0 for side in sides.values())
    assert report.count("the longest kernels of a step") == 3 and "aten::mm" in report


class Recorder(parts.Report):
    """Keeps the commands instead of running them."""

    def __init__(self, folder):
        super().__init__(folder, folder, deadline=0, scale=1)
        self.commands = []

    def part(self, name, limit, arguments, **options):
        self.commands.append([str(argument) for argument in arguments][1:])
        return ""


def test_the_commands_for_a_gpu_are_valid(tmp_path, monkeypatch):
    """Their configurations can be read, and the tokens that are made suffice for them."""
    monkeypatch.chdir(ROOT)
    size = dict(gpu_faster.GPU, shards="data/none/none")
    shards, _ = parts.find_shards(None, size, tmp_path)
    report = Recorder(tmp_path)
    for part in (gpu_faster.layers, gpu_faster.steps, gpu_faster.training):
        part(report, size, shards)
    assert [command[0] for command in report.commands] == ["scripts/bench.py"] * 2 + ["train_gpt2.py"] * 4
    for command, layers, models in zip(report.commands, (2, 12), (3, 4)):
        monkeypatch.setattr(sys, "argv", command)
        _, configs = bench.parse_arguments()
        assert [config.model for config in configs.values()] == list(gpu_faster.MODELS[:models])
        for config in configs.values():
            assert (config.n_layer, config.batch_size, config.device) == (layers, 64, "cuda")
            assert config.compile
    for (_, *arguments), model in zip(report.commands[2:], gpu_faster.MODELS, strict=True):
        config = load_config(arguments)
        assert config.model == model and sequences_per_process(config, world=1) == config.device_batch_size
        training = Shards(config.input_bin, config.sequence_length, config.vocab_size, config.allow_repeat)
        training.require(config.num_iterations * config.batch_size, "training", less="steps")
