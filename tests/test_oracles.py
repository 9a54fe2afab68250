"""The rules of optimizers/ against the same rules in maintained packages: those of tests/oracles.txt, skipped where they are absent."""
import pytest
import torch

from optimizers.adopt import ADOPT
from optimizers.lion import Lion
from optimizers.normuon import NorMuon
from optimizers.scion import Scion
from optimizers.sf_normuon import SFNorMuon
from optimizers.signum import Signum
from optimizers.soap import SOAP
from plain import gradients, normal

WHERE = "pip install --no-deps -r tests/oracles.txt"
shapes = pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 32)])


@pytest.fixture
def package(monkeypatch):
    """pytorch_optimizer, with its Newton-Schulz iteration in float64 instead of bf16."""
    package = pytest.importorskip("pytorch_optimizer", reason=WHERE)
    from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5 as iteration
    assert iteration.__defaults__[-1] == torch.bfloat16
    monkeypatch.setattr(iteration, "__defaults__", (*iteration.__defaults__[:-1], torch.float64))
    return package


def difference(ours, theirs, shape=(12, 12)):
    """Largest distance of the weights in 8 steps of the optimizers ours(params) and theirs(params), relative to the step."""
    mine, other = (torch.nn.Parameter(normal(*shape)) for _ in range(2))
    optimizers, found = (ours([mine]), theirs([other])), []
    for G in gradients(8, *shape):
        before = mine.detach().clone()
        for p, optimizer in zip((mine, other), optimizers):
            p.grad = G.clone()
            optimizer.step()
        found.append(float((mine - other).detach().norm() / (mine.detach() - before).norm().clamp(min=1e-3)))
    return max(found)


@shapes
def test_first_order_rules(package, shape):
    same, decay = dict(lr=0.1, weight_decay=0.2), dict(weight_decouple=True)
    assert difference(lambda p: Lion(p, **same), lambda p: package.Lion(p, betas=(0.9, 0.99), **same, **decay), shape) < 1e-12
    assert difference(lambda p: Signum(p, momentum=0.8, nesterov=False, **same),
                      lambda p: package.SignSGD(p, momentum=0.8, **same, **decay), shape) < 1e-12
    # theirs counts the step that only sets v, and so clips more widely, and decays in it, too; the paper does neither
    assert difference(lambda p: ADOPT(p, lr=0.1, beta2=0.99), lambda p: package.ADOPT(
        p, lr=0.1, betas=(0.9, 0.99), clip_lambda=lambda step: (step - 1) ** 0.25), shape) < 1e-12


@pytest.mark.parametrize("refresh, most", [(100, 1e-9), (2, 1e-4)])
def test_soap(package, refresh, most, monkeypatch):
    """Without refreshes and with them, by QR decompositions that the package does in fp32."""
    monkeypatch.setattr("optimizers.soap.RIDGE", 0.0)
    assert difference(lambda p: SOAP(p, lr=0.1, beta1=0.9, beta2=0.95, eps=0, refresh_interval=refresh), lambda p: package.SOAP(
        p, lr=0.1, betas=(0.9, 0.95), eps=0, weight_decay=0, precondition_frequency=refresh)) < most


@shapes
def test_normuon(package, shape):
    root = shape[1] ** 0.5  # theirs scales an update by sqrt(max(1, m / n)), ours by sqrt(max(m, n))
    same = dict(momentum=0.9, beta2=0.8)
    assert difference(lambda p: NorMuon(p, lr=0.1, weight_decay=0.2, **same), lambda p: package.NorMuon(
        [dict(params=p, use_muon=True)], lr=0.1 * root, weight_decay=0.2 / root, foreach=False, **same), shape) < 1e-5


@shapes
@pytest.mark.parametrize("constrained", [False, True])
def test_scion(package, shape, constrained):
    spectral = pytest.importorskip("pytorch_optimizer.optimizer.scion", reason=WHERE).LMONorm.SPECTRAL
    rate = 0.1 * min(shape) ** 0.5 / 5
    assert difference(lambda p: Scion(p, lr=0.1, momentum=0.8, radius=5.0, constrained=constrained), lambda p: package.SCION(
        p, lr=rate, momentum=0.2, scale=5.0, constraint=constrained, norm_type=spectral, foreach=False), shape) < 1e-5


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_schedule_free_is_a_wrapped_normuon(mode):
    """At a constant rate, at which both average with 1 / t; in both modes."""
    schedulefree = pytest.importorskip("schedulefree", reason=WHERE)

    def switched(optimizer):
        def step(step=optimizer.step):
            optimizer.train()
            step()
            getattr(optimizer, mode)()
        optimizer.step = step
        return optimizer
    assert difference(lambda p: switched(SFNorMuon(p, lr=0.1)), lambda p: switched(schedulefree.ScheduleFreeWrapper(
        NorMuon(p, lr=0.1, momentum=0.8, nesterov=False), momentum=0.9))) < 1e-5
