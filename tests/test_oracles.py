"""The rules of optimizers/ against the same rules in maintained packages: those of tests/oracles.txt.
Skipped where they are not installed."""
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
    *others, dtype = iteration.__defaults__
    assert dtype == torch.bfloat16
    monkeypatch.setattr(iteration, "__defaults__", (*others, torch.float64))
    return package


def difference(make_ours, make_theirs, shape=(12, 12)):
    """Largest distance between the weights in 8 steps of two optimizers, relative to the step. Each
    argument makes an optimizer of a list of parameters."""
    ours = torch.nn.Parameter(normal(*shape))
    theirs = torch.nn.Parameter(normal(*shape))
    optimizers = [make_ours([ours]), make_theirs([theirs])]
    largest = 0.0
    for G in gradients(8, *shape):
        before = ours.detach().clone()
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = G.clone()
            optimizer.step()
        step = (ours.detach() - before).norm().clamp(min=1e-3)
        largest = max(largest, float((ours - theirs).detach().norm() / step))
    return largest


@shapes
def test_lion(package, shape):
    def ours(params):
        return Lion(params, lr=0.1, weight_decay=0.2)

    def theirs(params):
        return package.Lion(params, lr=0.1, betas=(0.9, 0.99), weight_decay=0.2, weight_decouple=True)

    assert difference(ours, theirs, shape) < 1e-12


@shapes
def test_signum(package, shape):
    def ours(params):
        return Signum(params, lr=0.1, momentum=0.8, nesterov=False, weight_decay=0.2)

    def theirs(params):
        return package.SignSGD(params, lr=0.1, momentum=0.8, weight_decay=0.2, weight_decouple=True)

    assert difference(ours, theirs, shape) < 1e-12


@shapes
def test_adopt(package, shape):
    """Theirs counts the step that only sets v, and so clips more widely, and decays in it, too. The paper
    does neither."""
    def ours(params):
        return ADOPT(params, lr=0.1, beta2=0.99)

    def theirs(params):
        return package.ADOPT(params, lr=0.1, betas=(0.9, 0.99), clip_lambda=lambda step: (step - 1) ** 0.25)

    assert difference(ours, theirs, shape) < 1e-12


@pytest.mark.parametrize("refresh, most", [(100, 1e-9), (2, 1e-4)])
def test_soap(package, refresh, most, monkeypatch):
    """Without refreshes and with them, by QR decompositions that the package does in fp32."""
    monkeypatch.setattr("optimizers.soap.RIDGE", 0.0)

    def ours(params):
        return SOAP(params, lr=0.1, beta1=0.9, beta2=0.95, eps=0, refresh_interval=refresh)

    def theirs(params):
        return package.SOAP(params, lr=0.1, betas=(0.9, 0.95), eps=0, weight_decay=0,
                            precondition_frequency=refresh)

    assert difference(ours, theirs) < most


@shapes
def test_normuon(package, shape):
    """Theirs scales an update by sqrt(max(1, m / n)), ours by sqrt(max(m, n))."""
    root = shape[1] ** 0.5

    def ours(params):
        return NorMuon(params, lr=0.1, momentum=0.9, beta2=0.8, weight_decay=0.2)

    def theirs(params):
        group = dict(params=params, use_muon=True)
        return package.NorMuon([group], lr=0.1 * root, momentum=0.9, beta2=0.8, weight_decay=0.2 / root,
                               foreach=False)

    assert difference(ours, theirs, shape) < 1e-5


@shapes
@pytest.mark.parametrize("constrained", [False, True])
def test_scion(package, shape, constrained):
    norms = pytest.importorskip("pytorch_optimizer.optimizer.scion", reason=WHERE).LMONorm

    def ours(params):
        return Scion(params, lr=0.1, momentum=0.8, radius=5.0, constrained=constrained)

    def theirs(params):
        rate = 0.1 * min(shape) ** 0.5 / 5
        return package.SCION(params, lr=rate, momentum=0.2, scale=5.0, constraint=constrained,
                             norm_type=norms.SPECTRAL, foreach=False)

    assert difference(ours, theirs, shape) < 1e-5


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_schedule_free_is_a_wrapped_normuon(mode):
    """At a constant rate, where both average with 1 / t. In both modes."""
    schedulefree = pytest.importorskip("schedulefree", reason=WHERE)

    def switched(optimizer):
        """The optimizer, whose step() leaves the weights of the mode."""
        step = optimizer.step

        def step_and_switch():
            optimizer.train()
            step()
            getattr(optimizer, mode)()
        optimizer.step = step_and_switch
        return optimizer

    def ours(params):
        return switched(SFNorMuon(params, lr=0.1))

    def theirs(params):
        inner = NorMuon(params, lr=0.1, momentum=0.8, nesterov=False)
        return switched(schedulefree.ScheduleFreeWrapper(inner, momentum=0.9))

    assert difference(ours, theirs) < 1e-5
