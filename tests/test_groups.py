"""Settings of some parameters by their names, and optimizers that treat some matrices differently."""
import json

import pytest
import torch

from conftest import checkpoint, refused, same_weights

MLP_ONLY = '{"h.*.mlp_proj.weight": {"power": 1}}'


def test_groups_have_settings_of_their_own(start, tmp_path):
    groups = json.dumps({"h.1.*": {"lr": 0.004, "weight_decay": 0.5}, "h.*.c_fc.weight": {"lr": 0},
                         "wte.*": {"lr": 0.02}})
    assert start(run_name="a", save_every=9, groups=groups).returncode == 0
    table, hidden = checkpoint(tmp_path / "logs/a", 9)["optimizers"]  # the ninth step: scaled by 2 / 4
    assert [group["lr"] for group in table["param_groups"]] == [0.01]
    found = [(group["lr"], group["weight_decay"], len(group["params"])) for group in hidden["param_groups"]]
    assert found == [(0.001, 0.0, 3), (0.0, 0.0, 1), (0.002, 0.5, 4)]  # the first pattern that fits decides
    frozen = {}
    for step in (9, 10):
        frozen[step] = checkpoint(tmp_path / "logs/a", step)["model"]["h.0.c_fc.weight"]
    assert torch.equal(frozen[9], frozen[10])


@pytest.mark.parametrize("groups, word", [
    ('{"h.*.c_proj.*": {"lr": 1}}', "no parameter is named 'h.*.c_proj.*'"),
    ('{"h.*": {"rate": 1}}', "Muon has no setting 'rate'"),
    ('{"wte.weight": {"momentum": 0.9}}', "AdamW has no setting 'momentum'"),
    ('{"h.*": {"momentum": 1.5}}', "momentum = 1.5"),
    ('{"h.*": 3}', "TypeError"),
    ("{", "JSONDecodeError"),
])
def test_bad_groups_are_refused(start, groups, word):
    refused(start(groups=groups), word)


@pytest.mark.parametrize("optimizer", ["torch.optim:SGD", "optimizers.signum:Signum"])
def test_groups_of_any_optimizer(start, tmp_path, optimizer):
    done = start(run_name="a", optimizer=optimizer, groups='{"h.0.*": {"momentum": 0.25}}')
    assert done.returncode == 0, done.stderr
    _, hidden = checkpoint(tmp_path / "logs/a", 10)["optimizers"]
    assert hidden["param_groups"][0]["momentum"] == 0.25


def test_bad_group_of_an_own_optimizer(start):
    groups = '{"h.0.*": {"momentum": -0.25}}'
    refused(start(optimizer="optimizers.signum:Signum", groups=groups), "momentum = -0.25")


def test_preconditioner_on_some_matrices(start, tmp_path):
    """The others take Muon's steps, keep no K, and nothing is summed for them."""
    settings = dict(optimizer="optimizers.power_newton_muon:PowerNewtonMuon", save_every=9,
                    optimizer_args='{"power": 0, "refresh_interval": 2}')
    assert start(run_name="some", groups=MLP_ONLY, **settings).returncode == 0
    assert start(run_name="none", **settings).returncode == 0
    assert start(run_name="muon", save_every=9).returncode == 0
    assert same_weights(tmp_path / "logs/none", tmp_path / "logs/muon")
    assert not same_weights(tmp_path / "logs/some", tmp_path / "logs/muon")
    _, hidden = checkpoint(tmp_path / "logs/some", 10)["optimizers"]
    kept = {}
    for group in hidden["param_groups"]:
        kept[group["power"]] = {"K" in hidden["state"][i] for i in group["params"]}
    assert kept == {0: {False}, 1: {True}}
