"""What every optimizer of scripts/zoo.py has in common; the rule of each is tested in test_rules_*.py."""
import importlib
import inspect
import io
import json
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from test_distributed import ENV, logged, torchrun, write_config
from train_gpt2 import load_config, build_optimizers
from zoo import ZOO

OURS = [name for name, entry in ZOO.items() if entry.optimizer.startswith("optimizers.")]


def make(name, matrices, **settings):
    module, kind = ZOO[name].optimizer.split(":")
    return getattr(importlib.import_module(module), kind)(matrices, **{**ZOO[name].arguments, "lr": ZOO[name].rates[1], **settings})


def matrices(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) / 4) for shape in shapes]


def steps(optimizer, parameters, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        if hasattr(optimizer, "refresh") and number % 2:
            optimizer.refresh([torch.eye(min(p.shape)).repeat(p.size(1) // min(p.shape), 1, 1) * number for p in parameters], 1)
        optimizer.step()


@pytest.mark.parametrize("name", OURS)
def test_state_continues_bit_for_bit(name):
    shapes = (24, 8), (8, 8), (32, 8), (8, 32)
    whole, parts = matrices(*shapes), matrices(*shapes)
    steps(make(name, whole), whole, range(7))
    first = make(name, parts)
    steps(first, parts, range(4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(name, parts)
    second.load_state_dict(torch.load(file, weights_only=True))
    steps(second, parts, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("name", OURS)
def test_a_vector_is_refused(name):
    with pytest.raises(ValueError, match="a parameter of shape .3,.: .* updates matrices only"):
        make(name, [torch.nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("name", OURS)
def test_settings_out_of_range_are_named(name):
    module, kind = ZOO[name].optimizer.split(":")
    settings = inspect.signature(getattr(importlib.import_module(module), kind).__init__).parameters
    for setting, value in {"lr": -1.0, **{s: 1.0 for s in settings if s.startswith(("beta", "momentum"))}}.items():
        with pytest.raises(ValueError, match=rf"\b{setting} = {value}"):
            make(name, matrices((4, 4)), **{setting: value})


@pytest.mark.parametrize("name", OURS)
def test_the_loss_of_a_quadratic_falls(name):
    W, = matrices((8, 8))
    target, optimizer = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) / 4, make(name, [W], lr=min(0.1, ZOO[name].rates[1]))
    before = (W - target).square().sum().item()
    for _ in range(30):
        W.grad = (W - target).detach()
        optimizer.step()
    assert (W - target).square().sum() < 0.9 * before


def test_processes_agree(shards, tmp_path):
    """Two processes log the losses of one, with each optimizer."""
    logs = {}
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        config = write_config(tmp_path / str(processes) / "config.toml", shards, num_iterations=8, refresh_interval=4, val_loss_every=4)
        runs = [[str(config), "--optimizer", entry.optimizer, "--optimizer_args", json.dumps(entry.arguments), "--run_name", name,
                 "--hidden_learning_rate", str(entry.rates[1])] for name, entry in ZOO.items()]
        command = [ROOT / "tests" / "sequence.py", json.dumps(runs)]
        done = subprocess.run(torchrun(2, *command) if processes > 1 else [sys.executable, *command], env=ENV, capture_output=True, text=True,
                              timeout=240)
        assert done.returncode == 0, done.stderr
        logs[processes] = {name: logged(tmp_path / str(processes) / "logs" / name) for name in ZOO}
    for name, one in logs[1].items():
        two = logs[2][name]
        assert one.keys() == two.keys() and max(abs(two[key] - one[key]) / one[key] for key in one) < 2e-4, name
