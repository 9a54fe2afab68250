"""Muon and Newton-Muon of train_gpt2.py, and what the optimizers refuse."""
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import golden
import train_gpt2
from optimizers.adopt import ADOPT
from optimizers.dion import Dion
from optimizers.dp_muon import DPMuon
from optimizers.polar_muon import PolarMuon
from optimizers.power_newton_muon import PowerNewtonMuon
from optimizers.scion import Scion
from optimizers.signum import Signum
from optimizers.stiefel_muon import StiefelMuon
from train_gpt2 import GPT, Config, Muon, NewtonMuon, newton_schulz


@pytest.mark.parametrize("name", ["muon_d16.npz", "newton_muon_d16.npz"])
def test_golden_vectors(name):
    errors = golden.replay(Path(__file__).parent / name)
    assert max(errors.values()) < golden.TOLERANCE


def test_golden_replay_notices_another_rule(monkeypatch):
    monkeypatch.setattr("train_gpt2.NewtonMuon.precondition", lambda self, p, G: G)
    errors = golden.replay(Path(__file__).parent / "newton_muon_d16.npz")
    assert min(errors.values()) > 0.1


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24), (3, 16, 40)])
def test_newton_schulz_is_its_polynomial(shape):
    U = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(U, full_matrices=False)
    values = values / U.norm(dim=(-2, -1), keepdim=True).squeeze(-1)
    for _ in range(5):  # the odd polynomial acts on each singular value alone
        values = 3.4445 * values - 4.7750 * values ** 3 + 2.0315 * values ** 5
    expected = left @ torch.diag_embed(values) @ right
    torch.testing.assert_close(newton_schulz(U), expected, rtol=0, atol=1e-5)


def test_newton_schulz_is_near_the_orthogonal_factor():
    U = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(U)
    O = newton_schulz(U)
    values = torch.linalg.svdvals(O)
    assert values.max() < 1.3 and values.median() > 0.65
    factor = (left @ right).flatten()
    assert torch.nn.functional.cosine_similarity(O.flatten(), factor, dim=0) > 0.95


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(32, 32), (64, 32), (32, 128)])
def test_muon_against_torch_optim(shape, nesterov):
    generator = torch.Generator().manual_seed(2)
    ours = torch.nn.Parameter(torch.ones(shape))
    theirs = torch.nn.Parameter(torch.ones(shape))
    settings = dict(momentum=0.9, nesterov=nesterov)
    a = Muon([ours], lr=0.02, weight_decay=0.1, **settings)
    b = torch.optim.Muon([theirs], lr=0.02 / 0.2, weight_decay=0.02, adjust_lr_fn="match_rms_adamw",
                         **settings)
    for _ in range(4):
        before = ours.detach().clone()
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
        error = (ours - theirs).norm() / (ours - before).norm()
        assert error < 0.03  # bf16 keeps 8 bits, and the iteration magnifies small singular values
        theirs.data.copy_(ours.data)


@pytest.mark.parametrize("quarters", [1, 2, 3, 4])
def test_newton_muon_preconditioner(quarters):
    """With the power quarters / 4: P^4 is the inverse to the power `quarters`."""
    generator = torch.Generator().manual_seed(4)
    wide = torch.nn.Parameter(torch.zeros(6, 24))
    if quarters < 4:
        optimizer = PowerNewtonMuon([wide], power=quarters / 4, ewma=0.5, ridge=0.3)
    else:
        optimizer = NewtonMuon([wide], ewma=0.5, ridge=0.3)
    eye = torch.eye(6, dtype=torch.float64)
    K = [1e-3 * eye] * 4
    for _ in range(3):
        Z = torch.randn(4, 100, 6, generator=generator)
        optimizer.refresh([Z.mT @ Z], 100)
        K = [0.5 * k + 0.5 * z.T.double() @ z.double() / 100 for k, z in zip(K, Z)]
    for P, k in zip(optimizer.state[wide]["P"], K):
        inverse = torch.linalg.inv(k + (0.3 * k.trace() / 6 + 1e-8) * eye)
        expected = torch.linalg.matrix_power(inverse, quarters)
        fourth = torch.linalg.matrix_power(P.double(), 4)
        torch.testing.assert_close(fourth, expected, rtol=1e-4, atol=1e-5 * fourth.max().item())
    G = torch.randn(6, 24, generator=generator)
    products = [g @ P for g, P in zip(G.split(6, 1), optimizer.state[wide]["P"])]
    torch.testing.assert_close(optimizer.precondition(wide, G), torch.cat(products, 1))


@pytest.mark.parametrize("kind", [NewtonMuon, PowerNewtonMuon])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_newton_muon_in_other_types(kind, dtype):
    generator = torch.Generator().manual_seed(6)
    Z = torch.randn(2, 50, 4, generator=generator)
    G = torch.randn(4, 8, generator=generator).to(torch.bfloat16)
    updates = []
    for weights in (dtype, torch.float32):
        w = torch.nn.Parameter(torch.zeros(4, 8, dtype=weights))
        w.grad = G.to(weights)
        optimizer = kind([w], lr=0.1)
        optimizer.refresh([Z.mT @ Z], 50)
        optimizer.step()
        updates.append(w.detach().float())
    torch.testing.assert_close(*updates, rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("kind", [NewtonMuon, PowerNewtonMuon])
def test_failed_factorisation(kind):
    w = torch.nn.Parameter(torch.zeros(4, 8))
    eye = torch.eye(4)
    optimizer = kind([w])
    optimizer.refresh([eye.repeat(2, 1, 1)], 1)
    second_is_negative = [eye, -100 * eye]  # which no second moment is
    first_is_nan = [math.nan * eye, 200 * eye]
    for failures, bad, grams in ((1, 1, second_is_negative), (2, 0, first_is_nan)):
        before = optimizer.state[w]["P"].clone()
        optimizer.refresh([torch.stack(grams)], 1)
        changed = (optimizer.state[w]["P"] != before).any(-1).any(-1)
        assert optimizer.failures == failures
        assert not changed[bad]
        assert changed[1 - bad]


@pytest.mark.parametrize("kind, setting, value", [
    (Muon, "lr", -1),
    (Muon, "lr", math.inf),
    (Muon, "ns_steps", 0),
    (Muon, "momentum", 1.0),
    (Muon, "weight_decay", -0.1),
    (NewtonMuon, "refresh_interval", 0),
    (NewtonMuon, "ewma", 1.0),
    (NewtonMuon, "ridge", 0.0),
    (NewtonMuon, "ridge", math.nan),
    (PowerNewtonMuon, "power", -0.5),
    (Signum, "nesterov", "false"),
    (Dion, "seed", True),
    (PolarMuon, "exact", "no"),
    (Scion, "constrained", "false"),
    (ADOPT, "clip", "false"),
    (DPMuon, "noise_multiplier", -1.0),
    (DPMuon, "noise_multiplier", math.inf),
    (DPMuon, "clip", 0.0),
    (DPMuon, "clip", math.inf),
])
def test_settings_out_of_range_are_refused(kind, setting, value):
    with pytest.raises(ValueError, match=rf"\b{setting} = .*: must be"):
        kind([torch.nn.Parameter(torch.zeros(2, 2))], **{setting: value})


@pytest.mark.parametrize("kind, matrix, words", [
    (NewtonMuon, torch.zeros(4, 6), r"shape \(4, 6\): must be .* whole number"),
    (StiefelMuon, torch.ones(8, 4), r"shape \(8, 4\) does not have full rank"),
])
def test_unsuitable_matrices_are_refused(kind, matrix, words):
    with pytest.raises(ValueError, match=f"a matrix of {words}"):
        kind([torch.nn.Parameter(matrix)])


@pytest.mark.parametrize("processes, loads", [(1, [54]), (3, [18, 18, 18])])
def test_owners_share_the_work_evenly(processes, loads, monkeypatch):
    matrices = [torch.zeros(1, size) for size in (9, 9, 9, 3, 3, 3, 3, 3, 3, 3, 3, 3)]
    monkeypatch.setattr(train_gpt2, "world_size", lambda: processes)
    monkeypatch.setattr(Muon, "cost", lambda self, p: p.numel())
    found = [0] * processes
    for p, owner in Muon(matrices).owner.items():
        found[owner] += p.numel()
    assert found == loads


class CountLaunches(TorchDispatchMode):
    """Counts the operations that start a kernel on a GPU: all but views and allocations."""
    launches = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in operation._schema.returns]
        view = any(alias and not alias.is_write for alias in aliases)
        allocation = "empty" in operation.name() or "unsafe_view" in operation.name()
        if not view and not allocation:
            self.launches += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind, most", [(Muon, 90), (NewtonMuon, 150)])
def test_launches_of_a_step(kind, most):
    # 12 layers: 48 matrices, as in the speedrun's model
    model = GPT(Config(n_embd=24, vocab_size=128, sequence_length=8))
    matrices = list(model.hidden_matrices().values())
    optimizer = kind(matrices)
    if kind is NewtonMuon:
        grams = [torch.eye(24).repeat(p.size(1) // min(p.shape), 1, 1) for p in matrices]
        optimizer.refresh(grams, 1)
    for p in matrices:
        p.grad = torch.randn_like(p)
    optimizer.step()  # makes the buffers
    with CountLaunches() as count:
        optimizer.step()
    assert count.launches <= most
