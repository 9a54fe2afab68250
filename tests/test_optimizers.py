import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import golden
from optimizers.adopt import ADOPT
from optimizers.dion import Dion
from optimizers.dp_muon import DPMuon
from optimizers.polar_muon import PolarMuon
from optimizers.power_newton_muon import PowerNewtonMuon
from optimizers.scion import Scion
from optimizers.signum import Signum
from optimizers.stiefel_muon import StiefelMuon
from train_gpt2 import GPT, Config, Muon, NewtonMuon, assign_owners, newton_schulz


@pytest.mark.parametrize("name", ["muon_d16.npz", "newton_muon_d16.npz"])
def test_golden_vectors(name):
    assert max(golden.replay(Path(__file__).parent / name).values()) < golden.TOLERANCE


def test_golden_replay_notices_another_rule(monkeypatch):
    monkeypatch.setattr("train_gpt2.NewtonMuon.precondition", lambda self, p, G: G)
    assert min(golden.replay(Path(__file__).parent / "newton_muon_d16.npz").values()) > 0.1


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
    values = torch.linalg.svdvals(newton_schulz(U))
    assert values.max() < 1.3 and values.median() > 0.65
    assert torch.nn.functional.cosine_similarity(newton_schulz(U).flatten(), (left @ right).flatten(), dim=0) > 0.95


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(32, 32), (64, 32), (32, 128)])
def test_muon_against_torch_optim(shape, nesterov):
    generator = torch.Generator().manual_seed(2)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    settings = dict(momentum=0.9, nesterov=nesterov)
    a = Muon([ours], lr=0.02, weight_decay=0.1, **settings)
    b = torch.optim.Muon([theirs], lr=0.02 / 0.2, weight_decay=0.02, adjust_lr_fn="match_rms_adamw", **settings)
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
    generator = torch.Generator().manual_seed(4)
    wide = torch.nn.Parameter(torch.zeros(6, 24))
    optimizer = PowerNewtonMuon([wide], power=quarters / 4, ewma=0.5, ridge=0.3) if quarters < 4 else NewtonMuon([wide], ewma=0.5, ridge=0.3)
    expected = [torch.eye(6, dtype=torch.float64) * 1e-3] * 4
    for _ in range(3):
        Z = torch.randn(4, 100, 6, generator=generator)
        optimizer.refresh([Z.mT @ Z], 100)
        expected = [0.5 * K + 0.5 * z.T.double() @ z.double() / 100 for K, z in zip(expected, Z)]
    for P, K in zip(optimizer.state[wide]["P"], expected):
        inverse = torch.linalg.inv(K + (0.3 * K.trace() / 6 + 1e-8) * torch.eye(6, dtype=torch.float64))
        fourth = torch.linalg.matrix_power(P.double(), 4)
        torch.testing.assert_close(fourth, torch.linalg.matrix_power(inverse, quarters), rtol=1e-4, atol=1e-5 * fourth.max().item())
    G = torch.randn(6, 24, generator=generator)
    torch.testing.assert_close(optimizer.precondition(wide, G), torch.cat([g @ P for g, P in zip(G.split(6, 1), optimizer.state[wide]["P"])], 1))


@pytest.mark.parametrize("kind", [NewtonMuon, PowerNewtonMuon])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_newton_muon_in_other_types(kind, dtype):
    generator = torch.Generator().manual_seed(6)
    updates = []
    Z, G = torch.randn(2, 50, 4, generator=generator), torch.randn(4, 8, generator=generator).to(torch.bfloat16)
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
    w, eye = torch.nn.Parameter(torch.zeros(4, 8)), torch.eye(4)
    optimizer = kind([w])
    optimizer.refresh([eye.repeat(2, 1, 1)], 1)
    for failures, bad, grams in ((1, 1, [eye, -100 * eye]), (2, 0, [math.nan * eye, 200 * eye])):  # no second moment is negative
        before = optimizer.state[w]["P"].clone()
        optimizer.refresh([torch.stack(grams)], 1)
        changed = (optimizer.state[w]["P"] != before).any(-1).any(-1)
        assert optimizer.failures == failures and not changed[bad] and changed[1 - bad]


@pytest.mark.parametrize("kind, settings", [
    (Muon, dict(lr=-1)), (Muon, dict(lr=math.inf)), (Muon, dict(ns_steps=0)), (NewtonMuon, dict(refresh_interval=0)),
    (Muon, dict(momentum=1.0)), (Muon, dict(weight_decay=-0.1)), (NewtonMuon, dict(ewma=1.0)),
    (NewtonMuon, dict(ridge=0.0)), (NewtonMuon, dict(ridge=math.nan)), (PowerNewtonMuon, dict(power=0.0)), (Signum, dict(nesterov="false")),
    (Dion, dict(seed=True)), (PolarMuon, dict(exact="no")), (Scion, dict(constrained="false")), (ADOPT, dict(clip="false")),
    *((DPMuon, wrong) for wrong in (dict(noise_multiplier=-1.0), dict(noise_multiplier=math.inf), dict(clip=0.0), dict(clip=math.inf)))])
def test_settings_out_of_range_are_refused(kind, settings):
    sentence = "ewma must be" if kind is NewtonMuon else "must be"  # which names both of its settings
    with pytest.raises(ValueError, match=rf"\b{next(iter(settings))} = .*: {sentence}"):
        kind([torch.nn.Parameter(torch.zeros(2, 2))], **settings)


@pytest.mark.parametrize("kind, matrix, words", [(NewtonMuon, torch.zeros(4, 6), r"shape \(4, 6\): must be .* whole number"),
                                                 (StiefelMuon, torch.ones(8, 4), r"shape \(8, 4\) does not have full rank")])
def test_unsuitable_matrices_are_refused(kind, matrix, words):
    with pytest.raises(ValueError, match=f"a matrix of {words}"):
        kind([torch.nn.Parameter(matrix)])


def test_owners_share_the_work_evenly():
    costs = [9, 9, 9, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    owners = assign_owners(costs, 3)
    loads = [sum(cost for cost, owner in zip(costs, owners) if owner == r) for r in range(3)]
    assert loads == [18, 18, 18]
    assert assign_owners(costs, 1) == [0] * 12


class CountLaunches(TorchDispatchMode):
    """Counts the operations that start a kernel on a GPU: all but views and allocations."""
    launches = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        schema = operation._schema
        view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        self.launches += not view and "empty" not in operation.name() and "unsafe_view" not in operation.name()
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind, most", [(Muon, 90), (NewtonMuon, 150)])
def test_launches_of_a_step(kind, most):
    model = GPT(Config(n_embd=24, vocab_size=128, sequence_length=8))  # 12 layers: 48 matrices, as in the speedrun's model
    matrices = list(model.hidden_matrices().values())
    optimizer = kind(matrices)
    if kind is NewtonMuon:
        optimizer.refresh([torch.eye(24).repeat(p.size(1) // min(p.shape), 1, 1) for p in matrices], 1)
    for p in matrices:
        p.grad = torch.randn_like(p)
    optimizer.step()  # makes the buffers
    with CountLaunches() as count:
        optimizer.step()
    assert count.launches <= most
