"""The rules of optimizers/ that average squares or covariances, against the same equations written plainly
in float64."""
import shutil

import pytest
import torch
from scipy.linalg import fractional_matrix_power

from conftest import same_weights
from optimizers.adopt import ADOPT
from optimizers.lion import Lion
from optimizers.muon_igt import MuonIGT
from optimizers.normuon import NorMuon
from optimizers.pmuon import PMuon
from optimizers.sf_normuon import SFNorMuon
from optimizers.shampoo import Shampoo
from optimizers.signum import Signum
from optimizers.soap import SOAP
from optimizers.soap_muon import SOAPMuon
from plain import CLOSE, gradients, momenta, normal, rotation, trained
from train_gpt2 import Muon, newton_schulz

shapes = pytest.mark.parametrize("shape", [(6, 10), (10, 10), (10, 6)])


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


@pytest.mark.parametrize("optimizer", [Muon, NorMuon, SFNorMuon, SOAP, SOAPMuon, Shampoo, PMuon])
def test_blocks_of_qkv_count_as_matrices(optimizer):
    start = normal(24, 8)
    grads = gradients(4, 24, 8)
    parts = []
    for rows in (slice(0, 8), slice(8, 16), slice(16, 24)):
        parts.append(trained(optimizer, start[rows], [G[rows] for G in grads], lr=0.1))
    whole = trained(optimizer, start, grads, lr=0.1)
    torch.testing.assert_close(whole, torch.cat(parts), **CLOSE)


# NorMuon


@pytest.mark.parametrize("shape, eps, settings", [
    ((6, 10), 0.01, dict(eps=0.01)), ((10, 6), 1e-8, {}), ((10, 10), 1e-8, {})])
def test_normuon_follows_its_equations(shape, eps, settings):
    W = normal(*shape)
    grads = gradients(4, *shape)
    result = trained(NorMuon, W, grads, lr=0.1, beta2=0.7, momentum=0.9, weight_decay=0.5, **settings)
    v = zeros(shape[0])
    for U in momenta(grads, 0.9):
        O = 10 ** 0.5 * newton_schulz(U)
        v = 0.7 * v + 0.3 * (O ** 2).mean(1)
        D = O / (v ** 0.5 + eps)[:, None]
        D = D * torch.linalg.norm(O) / torch.linalg.norm(D)
        W = (1 - 0.1 * 0.5) * W - 0.1 * D
    torch.testing.assert_close(result, W, **CLOSE)


def test_first_normuon_step_equalizes_rows():
    start = zeros(6, 10)
    grads = gradients(1, 6, 10)
    step = trained(NorMuon, start, grads, lr=1.0, beta2=0.0)
    rows = step.norm(dim=1)
    assert rows.max() / rows.min() < 1 + 1e-7
    torch.testing.assert_close(step.norm(), trained(Muon, start, grads, lr=1.0).norm())


@pytest.mark.parametrize("beta2", [0.0, 0.95])
def test_normuon_is_muon_for_equal_rows(beta2):
    grads = [rotation(8, seed) for seed in range(3)]  # Newton-Schulz scales an orthogonal matrix
    muon = trained(Muon, normal(8, 8), grads, lr=0.1, momentum=0.0)
    normuon = trained(NorMuon, normal(8, 8), grads, lr=0.1, momentum=0.0, beta2=beta2)
    torch.testing.assert_close(normuon, muon, rtol=0, atol=1e-7)  # eps = 1e-8


# SOAP and SOAP-Muon


def refreshed(Q, A):
    """(new basis, order of the old one's columns)"""
    order = torch.argsort(torch.diag(Q.T @ A @ Q), descending=True)
    ridged = A + 1e-4 * torch.trace(A) / len(A) * eye(len(A))
    return torch.linalg.qr(ridged @ Q[:, order])[0], order


@pytest.mark.parametrize("shape, left, right", [
    ((6, 10), True, True), ((10, 6), True, True),
    ((6, 10), True, False), ((10, 6), False, True), ((10, 10), True, False)])
def test_soap_follows_its_equations(shape, left, right):
    """Written as in the authors' code: with a momentum in the basis, which a refresh takes to the new one.
    `left` and `right` are the sides that have a basis."""
    W = normal(*shape)
    first, *grads = gradients(8, *shape)
    eps = 0.01 if left and right else 1e-8
    settings = dict(eps=eps) if left and right else dict(one_sided=True)
    result = trained(SOAP, W, [first, *grads], lr=0.1, beta1=0.8, beta2=0.7, weight_decay=0.5,
                     refresh_interval=2, **settings)
    L = 0.3 * first @ first.T
    R = 0.3 * first.T @ first
    QL = torch.linalg.svd(first)[0] if left else eye(shape[0])
    QR = torch.linalg.svd(first.T)[0] if right else eye(shape[1])
    m = zeros(*shape)
    v = zeros(*shape)
    for t, G in enumerate(grads, start=1):
        rotated = QL.T @ G @ QR
        m = 0.8 * m + 0.2 * rotated
        v = 0.7 * v + 0.3 * rotated ** 2
        N = m / (1 - 0.8 ** t) / ((v / (1 - 0.7 ** t)) ** 0.5 + eps)
        W = (1 - 0.1 * 0.5) * W - 0.1 * QL @ N @ QR.T
        L = 0.7 * L + 0.3 * G @ G.T
        R = 0.7 * R + 0.3 * G.T @ G
        if t % 2 == 0:
            M = QL @ m @ QR.T
            if left:
                QL, order = refreshed(QL, L)
                v = v[order]
            if right:
                QR, order = refreshed(QR, R)
                v = v[:, order]
            m = QL.T @ M @ QR
    torch.testing.assert_close(result, W, **CLOSE)


@pytest.mark.parametrize("one_sided", [False, True])
def test_soap_in_the_identity_basis_is_adam(one_sided):
    start = normal(8, 8)
    grads = gradients(6, 8, 8)
    first = torch.diag(torch.arange(8, 0, -1, dtype=torch.float64))  # its singular vectors are unit vectors
    soap = trained(SOAP, start, [first, *grads], lr=0.1, beta1=0.8, beta2=0.9, refresh_interval=100,
                   one_sided=one_sided)
    adam = trained(torch.optim.Adam, start, grads, lr=0.1, betas=(0.8, 0.9))
    torch.testing.assert_close(soap, adam, **CLOSE)


@pytest.mark.parametrize("optimizer, settings", [
    (SOAP, dict(refresh_interval=1)), (SOAPMuon, {}), (Shampoo, {}), (PMuon, {})])
def test_rotated_problems_have_rotated_solutions(optimizer, settings):
    start = normal(8, 8)
    grads = gradients(5, 8, 8)
    U = rotation(8, 1)
    V = rotation(8, 2)
    plain = trained(optimizer, start, grads, lr=0.1, **settings)
    rotated = trained(optimizer, U @ start @ V.T, [U @ G @ V.T for G in grads], lr=0.1, **settings)
    torch.testing.assert_close(rotated, U @ plain @ V.T, rtol=0, atol=1e-7)


@shapes
def test_soap_muon_follows_its_equations(shape):
    W = normal(*shape)
    grads = gradients(6, *shape)
    result = trained(SOAPMuon, W, grads, lr=0.1, beta2=0.7, eps=0.2, momentum=0.9)
    QL = torch.linalg.svd(grads[0])[0]
    QR = torch.linalg.svd(grads[0].T)[0]
    L = R = v = 0.0
    for t, (G, U) in enumerate(zip(grads, momenta(grads, 0.9))):
        L = 0.7 * L + 0.3 * G @ G.T
        R = 0.7 * R + 0.3 * G.T @ G
        if t > 0:
            V = QL.T @ U @ QR
            v = 0.7 * v + 0.3 * V ** 2
            U = QL @ (V / (v ** 0.5).clamp(min=0.2 * v.mean() ** 0.5)) @ QR.T
            QL, rows = refreshed(QL, L)
            QR, columns = refreshed(QR, R)
            v = v[rows][:, columns]
        W = W - 0.1 * 10 ** 0.5 * newton_schulz(U)
    torch.testing.assert_close(result, W, **CLOSE)


# Shampoo and PMuon


def inverse_fourth_root(A):
    ridged = A + 0.01 * torch.trace(A) / len(A) * eye(len(A))
    return torch.from_numpy(fractional_matrix_power(ridged, -0.25).real)


@pytest.mark.parametrize("interval, shape", [(1, (6, 10)), (3, (10, 6)), (1, (10, 10))])
def test_shampoo_follows_its_equations(interval, shape):
    W = normal(*shape)
    grads = gradients(7, *shape)
    result = trained(Shampoo, W, grads, lr=0.1, momentum=0.8, beta2=0.7, eps=0.01, weight_decay=0.5,
                     refresh_interval=interval)
    M = L = R = 0.0
    for t, G in enumerate(grads, start=1):
        M = 0.8 * M + 0.2 * G
        L = 0.7 * L + 0.3 * G @ G.T
        R = 0.7 * R + 0.3 * G.T @ G
        if t % interval == 1 % interval:
            left = inverse_fourth_root(L / (1 - 0.7 ** t))
            right = inverse_fourth_root(R / (1 - 0.7 ** t))
        W = (1 - 0.1 * 0.5) * W - 0.1 * 10 ** 0.5 * left @ M @ right
    torch.testing.assert_close(result, W, **CLOSE)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_first_shampoo_step_is_orthogonal(shape):
    G, = gradients(1, *shape)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    step = -trained(Shampoo, torch.zeros_like(G), [G], lr=1.0, momentum=0.0, beta2=0.0, eps=1e-9)
    torch.testing.assert_close(step, 10 ** 0.5 * U @ Vh, rtol=0, atol=1e-5)


def inverse_power(L, Q):
    """P_L of PMuon's equations, for eps = power = 0.3."""
    e = torch.diag(Q.T @ L @ Q).clamp(min=0.3 * torch.trace(L) / len(L))
    return Q @ torch.diag(e ** -0.3) @ Q.T


@shapes
def test_pmuon_follows_its_equations(shape):
    W = normal(*shape)
    grads = gradients(6, *shape)
    result = trained(PMuon, W, grads, lr=0.1, beta=0.8, power=0.3, eps=0.3, momentum=0.9)
    left = right = 0.0  # A of each side
    QL = QR = None
    for U in momenta(grads, 0.9):
        left = 0.8 * left + 0.2 * U @ U.T
        right = 0.8 * right + 0.2 * U.T @ U
        L = 0.8 * left + 0.2 * U @ U.T
        R = 0.8 * right + 0.2 * U.T @ U
        if QL is None:
            QL = torch.linalg.svd(U)[0]
            QR = torch.linalg.svd(U.T)[0]
        else:
            QL = torch.linalg.qr(L @ QL)[0]
            QR = torch.linalg.qr(R @ QR)[0]
        product = inverse_power(L, QL) @ U @ inverse_power(R, QR)
        W = W - 0.1 * 10 ** 0.5 * newton_schulz(product)
    torch.testing.assert_close(result, W, **CLOSE)


# SF-NorMuon, and what it shares with MuonIGT: gradients and losses at two points


def test_sf_normuon_follows_its_equations():
    """Gradients are a function of y, and x is the mean of all z with weights lr^2."""
    target = normal(6, 10, seed=1)
    W = torch.nn.Parameter(normal(6, 10))
    optimizer = SFNorMuon([W], momentum=0.8, beta1=0.9, beta2=0.7, weight_decay=0.5, eps=0.0)
    z = y = W.detach().clone()
    M = zeros(6, 10)
    v = zeros(6)
    weighted_sum = 0.0
    weights = 0.0
    for lr in (0.01, 0.02, 0.02, 0.01, 0.005):
        optimizer.param_groups[0]["lr"] = lr
        W.grad = (W - target).detach() ** 3
        optimizer.step()
        M = 0.8 * M + 0.2 * (y - target) ** 3
        O = newton_schulz(M)
        v = 0.7 * v + 0.3 * (O ** 2).mean(1)
        D = O / (v ** 0.5)[:, None]
        z = (1 - lr * 0.5) * z - lr * 10 ** 0.5 * D * torch.linalg.norm(O) / torch.linalg.norm(D)
        weighted_sum = weighted_sum + lr ** 2 * z
        weights = weights + lr ** 2
        x = weighted_sum / weights
        y = 0.1 * z + 0.9 * x
    torch.testing.assert_close(W.detach(), y, **CLOSE)
    optimizer.eval()
    torch.testing.assert_close(W.detach(), x, **CLOSE)


two_points = pytest.mark.parametrize("optimizer", [SFNorMuon, MuonIGT])


def descend(optimizer, W, numbers):
    """A step on the way to a random matrix, for each of these numbers."""
    for number in numbers:
        W.grad = (W - normal(24, 8, seed=number).float()).detach()
        optimizer.step()


@two_points
def test_evaluations_change_nothing(optimizer):
    plain = torch.nn.Parameter(normal(24, 8).float())
    evaluated = torch.nn.Parameter(normal(24, 8).float())
    a = optimizer([plain], lr=0.02)
    b = optimizer([evaluated], lr=0.02)
    b.eval()
    b.train()  # nothing to load before the first step
    for number in range(6):
        descend(a, plain, [number])
        descend(b, evaluated, [number])
        b.eval()
        seen = evaluated.detach().clone()
        b.eval()
        assert torch.equal(evaluated, seen)
        assert number == 0 or not torch.allclose(seen, plain)
        b.train()
        assert torch.equal(evaluated, plain)
        b.train()
        assert torch.equal(evaluated, plain)
    b.eval()
    with pytest.raises(RuntimeError, match=r"step\(\) after eval\(\): call train\(\) first"):
        b.step()


@pytest.mark.parametrize("mode", ["train", "eval"])
@two_points
def test_either_mode_resumes(optimizer, mode):
    whole, parts, resumed = (torch.nn.Parameter(normal(24, 8).float()) for _ in range(3))
    uncut, first, second = (optimizer([W], lr=0.02) for W in (whole, parts, resumed))
    descend(uncut, whole, range(7))
    descend(first, parts, range(4))
    getattr(first, mode)()
    second.train()  # as the trainer does, before it loads the weights and the state
    resumed.data.copy_(parts)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["training"] == (mode == "train")
    getattr(second, mode)()
    assert torch.equal(resumed, parts)
    second.train()
    descend(second, resumed, range(4, 7))
    assert torch.equal(resumed, whole)
    uncut.eval()
    second.eval()
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("save_every", [5, 8])  # after an evaluation, and without one
def test_run_with_sf_normuon_resumes(start, tmp_path, save_every):
    fields = dict(optimizer="optimizers.sf_normuon:SFNorMuon", save_every=save_every)
    assert start(run_name="whole", **fields).returncode == 0
    whole = tmp_path / "logs/whole"
    parts = tmp_path / "logs/parts"
    saved = torch.load(whole / f"checkpoints/step_{save_every:06d}.pt", weights_only=True)
    _, hidden = saved["optimizers"]
    assert hidden["param_groups"][0]["training"] is (save_every == 8)
    shutil.copytree(whole, parts)
    (parts / "checkpoints/step_000010.pt").unlink()
    resumed = start(**fields, resume=str(parts))
    assert resumed.returncode == 0
    assert f"resumed at step {save_every}" in resumed.stdout
    assert same_weights(whole, parts)


# Lion, Signum and ADOPT


@pytest.mark.parametrize("optimizer, settings, beta1", [
    (Lion, dict(beta1=0.6, beta2=0.9), 0.6),
    (Signum, dict(momentum=0.9, nesterov=False), 0.9)])
def test_signs_follow_their_equations(optimizer, settings, beta1):
    W = normal(6, 10)
    grads = gradients(6, 6, 10)
    result = trained(optimizer, W, grads, lr=0.1, weight_decay=0.5, **settings)
    M = zeros(6, 10)
    for G in grads:
        W = (1 - 0.1 * 0.5) * W - 0.1 * torch.sign(beta1 * M + (1 - beta1) * G)
        M = 0.9 * M + 0.1 * G
    torch.testing.assert_close(result, W, **CLOSE)


@pytest.mark.parametrize("optimizer, settings, other, same", [
    (PMuon, dict(power=0.0), Muon, {}),
    (Lion, dict(beta1=0.9, beta2=0.9), Signum, dict(momentum=0.9, nesterov=False))])
def test_limits_are_other_optimizers(optimizer, settings, other, same):
    start = normal(6, 10)
    grads = gradients(6, 6, 10)
    limit = trained(optimizer, start, grads, lr=0.1, **settings)
    expected = trained(other, start, grads, lr=0.1, **same)
    torch.testing.assert_close(limit, expected, **CLOSE)


@pytest.mark.parametrize("optimizer", [Lion, Signum])
def test_a_gradient_that_is_not_a_number_shows(optimizer):
    G = torch.tensor([[float("nan"), 1.0]])
    assert trained(optimizer, torch.zeros(1, 2), [G], lr=0.1).isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("clip", [False, True])
def test_adopt_follows_its_equations(clip):
    W = normal(6, 10)
    first, *grads = gradients(8, 6, 10)
    result = trained(ADOPT, W, [first, *grads], lr=0.1, beta1=0.8, beta2=0.7, weight_decay=0.5, eps=0.1,
                     clip=clip)
    M = zeros(6, 10)
    v = first ** 2
    for t, G in enumerate(grads, start=1):
        N = G / torch.clip(v ** 0.5, 0.1)
        if clip:
            N = N.clip(-t ** 0.25, t ** 0.25)
        M = 0.8 * M + 0.2 * N
        W = (1 - 0.1 * 0.5) * W - 0.1 * M
        v = 0.7 * v + 0.3 * G ** 2
    torch.testing.assert_close(result, W, **CLOSE)


def test_adopt_goes_down_where_adam_goes_up():
    """Gradients 3, -1, -1, 3, ...: their mean is positive (Reddi, Kale, Kumar, "On the Convergence of
    Adam", 2018)."""
    start = torch.zeros(1, 1)
    grads = [torch.full((1, 1), g) for g in [3.0, -1.0, -1.0] * 300]
    adopt = trained(ADOPT, start, grads, lr=0.01, beta1=0.0, beta2=0.1, clip=False)
    adam = trained(torch.optim.Adam, start, grads, lr=0.01, betas=(0.0, 0.1))
    assert adopt < -0.9
    assert adam > 0.9
