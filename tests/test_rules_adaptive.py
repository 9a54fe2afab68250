"""The rules of optimizers/ that average squares or covariances, against the same equations written plainly in float64."""
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

SHAPES = pytest.mark.parametrize("shape", [(6, 10), (10, 10), (10, 6)])


@pytest.mark.parametrize("optimizer", [Muon, NorMuon, SFNorMuon, SOAP, SOAPMuon, Shampoo, PMuon])
def test_blocks_of_qkv_count_as_matrices(optimizer):
    start, grads = normal(24, 8), gradients(4, 24, 8)
    parts = [trained(optimizer, start[i:i + 8], [G[i:i + 8] for G in grads], lr=0.1) for i in (0, 8, 16)]
    torch.testing.assert_close(trained(optimizer, start, grads, lr=0.1), torch.cat(parts), **CLOSE)


# NorMuon


@pytest.mark.parametrize("shape, eps, settings", [((6, 10), 0.01, dict(eps=0.01)), ((10, 6), 1e-8, {}), ((10, 10), 1e-8, {})])
def test_normuon_follows_its_equations(shape, eps, settings):
    W, grads, v = normal(*shape), gradients(4, *shape), torch.zeros(shape[0], dtype=torch.float64)
    result = trained(NorMuon, W, grads, lr=0.1, beta2=0.7, momentum=0.9, weight_decay=0.5, **settings)
    for U in momenta(grads, 0.9):
        O = 10 ** 0.5 * newton_schulz(U)
        v = 0.7 * v + 0.3 * (O ** 2).mean(1)
        D = O / (v ** 0.5 + eps)[:, None]
        W = (1 - 0.1 * 0.5) * W - 0.1 * D * torch.linalg.norm(O) / torch.linalg.norm(D)
    torch.testing.assert_close(result, W, **CLOSE)


def test_first_normuon_step_equalizes_rows():
    start, grads = torch.zeros(6, 10, dtype=torch.float64), gradients(1, 6, 10)
    step = trained(NorMuon, start, grads, lr=1.0, beta2=0.0)
    rows = step.norm(dim=1)
    assert rows.max() / rows.min() < 1 + 1e-7
    torch.testing.assert_close(step.norm(), trained(Muon, start, grads, lr=1.0).norm())


@pytest.mark.parametrize("beta2", [0.0, 0.95])
def test_normuon_is_muon_for_equal_rows(beta2):
    grads = [rotation(8, seed) for seed in range(3)]  # Newton-Schulz scales an orthogonal matrix
    settings = dict(lr=0.1, momentum=0.0)
    muon = trained(Muon, normal(8, 8), grads, **settings)
    torch.testing.assert_close(trained(NorMuon, normal(8, 8), grads, beta2=beta2, **settings), muon, rtol=0, atol=1e-7)  # eps = 1e-8


# SOAP and SOAP-Muon


def refreshed(Q, A):
    """(new basis, order of the old one's columns)."""
    order = torch.argsort(torch.diag(Q.T @ A @ Q), descending=True)
    return torch.linalg.qr((A + 1e-4 * torch.trace(A) / len(A) * torch.eye(len(A)).double()) @ Q[:, order])[0], order


@pytest.mark.parametrize("shape, left, right", [((6, 10), True, True), ((10, 6), True, True),
                                                ((6, 10), True, False), ((10, 6), False, True), ((10, 10), True, False)])
def test_soap_follows_its_equations(shape, left, right):
    """Written as in the authors' code: with a momentum in the basis, which a refresh takes to the new basis."""
    W, (first, *grads) = normal(*shape), gradients(8, *shape)
    eps, settings = (0.01, dict(eps=0.01)) if left and right else (1e-8, dict(one_sided=True))
    result = trained(SOAP, W, [first, *grads], lr=0.1, beta1=0.8, beta2=0.7, weight_decay=0.5, refresh_interval=2, **settings)
    L, R = 0.3 * first @ first.T, 0.3 * first.T @ first
    QL = torch.linalg.svd(first)[0] if left else torch.eye(shape[0]).double()
    QR = torch.linalg.svd(first.T)[0] if right else torch.eye(shape[1]).double()
    m = v = torch.zeros(shape, dtype=torch.float64)
    for t, G in enumerate(grads, start=1):
        rotated = QL.T @ G @ QR
        m, v = 0.8 * m + 0.2 * rotated, 0.7 * v + 0.3 * rotated ** 2
        N = m / (1 - 0.8 ** t) / ((v / (1 - 0.7 ** t)) ** 0.5 + eps)
        W = (1 - 0.1 * 0.5) * W - 0.1 * QL @ N @ QR.T
        L, R = 0.7 * L + 0.3 * G @ G.T, 0.7 * R + 0.3 * G.T @ G
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
    start, grads = normal(8, 8), gradients(6, 8, 8)
    first = torch.diag(torch.arange(8, 0, -1, dtype=torch.float64))  # its singular vectors are unit vectors
    soap = trained(SOAP, start, [first, *grads], lr=0.1, beta1=0.8, beta2=0.9, refresh_interval=100, one_sided=one_sided)
    torch.testing.assert_close(soap, trained(torch.optim.Adam, start, grads, lr=0.1, betas=(0.8, 0.9)), **CLOSE)


@pytest.mark.parametrize("optimizer, settings", [(SOAP, dict(refresh_interval=1)), (SOAPMuon, {}), (Shampoo, {}), (PMuon, {})])
def test_rotated_problems_have_rotated_solutions(optimizer, settings):
    start, grads, U, V = normal(8, 8), gradients(5, 8, 8), rotation(8, 1), rotation(8, 2)
    rotated = trained(optimizer, U @ start @ V.T, [U @ G @ V.T for G in grads], lr=0.1, **settings)
    torch.testing.assert_close(rotated, U @ trained(optimizer, start, grads, lr=0.1, **settings) @ V.T, rtol=0, atol=1e-7)


@SHAPES
def test_soap_muon_follows_its_equations(shape):
    W, grads, L, R, v = normal(*shape), gradients(6, *shape), 0.0, 0.0, 0.0
    result = trained(SOAPMuon, W, grads, lr=0.1, beta2=0.7, eps=0.2, momentum=0.9)
    QL, QR = torch.linalg.svd(grads[0])[0], torch.linalg.svd(grads[0].T)[0]
    for t, (G, U) in enumerate(zip(grads, momenta(grads, 0.9))):
        L, R = 0.7 * L + 0.3 * G @ G.T, 0.7 * R + 0.3 * G.T @ G
        if t > 0:
            V = QL.T @ U @ QR
            v = 0.7 * v + 0.3 * V ** 2
            U = QL @ (V / (v ** 0.5).clamp(min=0.2 * v.mean() ** 0.5)) @ QR.T
            (QL, rows), (QR, columns) = refreshed(QL, L), refreshed(QR, R)
            v = v[rows][:, columns]
        W = W - 0.1 * 10 ** 0.5 * newton_schulz(U)
    torch.testing.assert_close(result, W, **CLOSE)


# Shampoo and PMuon


@pytest.mark.parametrize("interval, shape", [(1, (6, 10)), (3, (10, 6)), (1, (10, 10))])
def test_shampoo_follows_its_equations(interval, shape):
    W, grads = normal(*shape), gradients(7, *shape)
    result = trained(Shampoo, W, grads, lr=0.1, momentum=0.8, beta2=0.7, eps=0.01, weight_decay=0.5, refresh_interval=interval)
    M = L = R = 0.0
    ridged = lambda A: A + 0.01 * torch.trace(A) / len(A) * torch.eye(len(A)).double()
    for t, G in enumerate(grads, start=1):
        M, L, R = 0.8 * M + 0.2 * G, 0.7 * L + 0.3 * G @ G.T, 0.7 * R + 0.3 * G.T @ G
        if t % interval == 1 % interval:
            left, right = (fractional_matrix_power(ridged(A / (1 - 0.7 ** t)), -0.25).real for A in (L, R))
        W = (1 - 0.1 * 0.5) * W - 0.1 * 10 ** 0.5 * torch.from_numpy(left) @ M @ torch.from_numpy(right)
    torch.testing.assert_close(result, W, **CLOSE)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_first_shampoo_step_is_orthogonal(shape):
    G, = gradients(1, *shape)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    step = -trained(Shampoo, torch.zeros_like(G), [G], lr=1.0, momentum=0.0, beta2=0.0, eps=1e-9)
    torch.testing.assert_close(step, 10 ** 0.5 * U @ Vh, rtol=0, atol=1e-5)


@SHAPES
def test_pmuon_follows_its_equations(shape):
    W, grads, A, Q = normal(*shape), gradients(6, *shape), [0.0, 0.0], []
    result = trained(PMuon, W, grads, lr=0.1, beta=0.8, power=0.3, eps=0.3, momentum=0.9)
    for U in momenta(grads, 0.9):
        L = []
        for i, C in enumerate((U @ U.T, U.T @ U)):
            A[i] = 0.8 * A[i] + 0.2 * C
            L.append(0.8 * A[i] + 0.2 * C)
        Q = [torch.linalg.qr(l @ q)[0] for l, q in zip(L, Q)] or [torch.linalg.svd(U)[0], torch.linalg.svd(U.T)[0]]
        P = []
        for l, q in zip(L, Q):
            e = torch.diag(q.T @ l @ q).clamp(min=0.3 * torch.trace(l) / len(l))
            P.append(q @ torch.diag(e ** -0.3) @ q.T)
        W = W - 0.1 * 10 ** 0.5 * newton_schulz(P[0] @ U @ P[1])
    torch.testing.assert_close(result, W, **CLOSE)


# SF-NorMuon, and what it shares with MuonIGT: gradients and losses at two points


def test_sf_normuon_follows_its_equations():
    """Gradients are a function of y, and x is the mean of all z with weights lr^2."""
    target, W, rates = normal(6, 10, seed=1), torch.nn.Parameter(normal(6, 10)), [0.01, 0.02, 0.02, 0.01, 0.005]
    optimizer = SFNorMuon([W], momentum=0.8, beta1=0.9, beta2=0.7, weight_decay=0.5, eps=0.0)
    z = y = W.detach().clone()
    M, v, zs = torch.zeros(6, 10).double(), torch.zeros(6).double(), []
    for lr in rates:
        optimizer.param_groups[0]["lr"] = lr
        W.grad = (W - target).detach() ** 3
        optimizer.step()
        M = 0.8 * M + 0.2 * (y - target) ** 3
        O = newton_schulz(M)
        v = 0.7 * v + 0.3 * (O ** 2).mean(1)
        D = O / (v ** 0.5)[:, None]
        z = (1 - lr * 0.5) * z - lr * 10 ** 0.5 * D * torch.linalg.norm(O) / torch.linalg.norm(D)
        zs.append(z)
        x = sum(r ** 2 * z for r, z in zip(rates, zs)) / sum(r ** 2 for r in rates[:len(zs)])
        y = 0.1 * z + 0.9 * x
    torch.testing.assert_close(W.detach(), y, **CLOSE)
    optimizer.eval()
    torch.testing.assert_close(W.detach(), x, **CLOSE)


two_points = pytest.mark.parametrize("optimizer", [SFNorMuon, MuonIGT])


def descend(optimizer, W, numbers):
    for number in numbers:
        W.grad = (W - normal(24, 8, seed=number).float()).detach()
        optimizer.step()


@two_points
def test_evaluations_change_nothing(optimizer):
    plain, evaluated = (torch.nn.Parameter(normal(24, 8).float()) for _ in range(2))
    a, b = optimizer([plain], lr=0.02), optimizer([evaluated], lr=0.02)
    b.eval()
    b.train()  # nothing to load before the first step
    for number in range(6):
        descend(a, plain, [number])
        descend(b, evaluated, [number])
        seen = []
        for switch in (b.eval, b.eval, b.train, b.train):
            switch()
            seen.append(evaluated.detach().clone())
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], plain) and torch.equal(seen[3], plain)
        assert number == 0 or not torch.allclose(seen[0], plain)
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
    whole, parts = tmp_path / "logs/whole", tmp_path / "logs/parts"
    saved = torch.load(whole / f"checkpoints/step_{save_every:06d}.pt", weights_only=True)["optimizers"][1]
    assert saved["param_groups"][0]["training"] is (save_every == 8)
    shutil.copytree(whole, parts)
    (parts / "checkpoints/step_000010.pt").unlink()
    resumed = start(**fields, resume=str(parts))
    assert resumed.returncode == 0 and f"resumed at step {save_every}" in resumed.stdout
    assert same_weights(whole, parts)


# Lion, Signum and ADOPT


@pytest.mark.parametrize("optimizer, settings, beta1", [(Lion, dict(beta1=0.6, beta2=0.9), 0.6),
                                                        (Signum, dict(momentum=0.9, nesterov=False), 0.9)])
def test_signs_follow_their_equations(optimizer, settings, beta1):
    W, grads, M = normal(6, 10), gradients(6, 6, 10), torch.zeros(6, 10).double()
    result = trained(optimizer, W, grads, lr=0.1, weight_decay=0.5, **settings)
    for G in grads:
        W = (1 - 0.1 * 0.5) * W - 0.1 * torch.sign(beta1 * M + (1 - beta1) * G)
        M = 0.9 * M + 0.1 * G
    torch.testing.assert_close(result, W, **CLOSE)


@pytest.mark.parametrize("optimizer, settings, other, same", [(PMuon, dict(power=0.0), Muon, {}),
                                                             (Lion, dict(beta1=0.9, beta2=0.9), Signum, dict(momentum=0.9, nesterov=False))])
def test_limits_are_other_optimizers(optimizer, settings, other, same):
    ends = [trained(kind, normal(6, 10), gradients(6, 6, 10), lr=0.1, **given) for kind, given in ((optimizer, settings), (other, same))]
    torch.testing.assert_close(*ends, **CLOSE)


@pytest.mark.parametrize("optimizer", [Lion, Signum])
def test_a_gradient_that_is_not_a_number_shows(optimizer):
    assert trained(optimizer, torch.zeros(1, 2), [torch.tensor([[float("nan"), 1.0]])], lr=0.1).isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("clip", [False, True])
def test_adopt_follows_its_equations(clip):
    W, (first, *grads) = normal(6, 10), gradients(8, 6, 10)
    result = trained(ADOPT, W, [first, *grads], lr=0.1, beta1=0.8, beta2=0.7, weight_decay=0.5, eps=0.1, clip=clip)
    M, v = torch.zeros(6, 10).double(), first ** 2
    for t, G in enumerate(grads, start=1):
        N = G / torch.clip(v ** 0.5, 0.1)
        M = 0.8 * M + 0.2 * (N.clip(-t ** 0.25, t ** 0.25) if clip else N)
        W = (1 - 0.1 * 0.5) * W - 0.1 * M
        v = 0.7 * v + 0.3 * G ** 2
    torch.testing.assert_close(result, W, **CLOSE)


def test_adopt_goes_down_where_adam_goes_up():
    """Gradients 3, -1, -1, 3, ...: their mean is positive (Reddi, Kale, Kumar, "On the Convergence of Adam", 2018)."""
    start, grads = torch.zeros(1, 1), [torch.full((1, 1), g) for g in [3.0, -1.0, -1.0] * 300]
    adopt = trained(ADOPT, start, grads, lr=0.01, beta1=0.0, beta2=0.1, clip=False)
    assert adopt < -0.9 and trained(torch.optim.Adam, start, grads, lr=0.01, betas=(0.0, 0.1)) > 0.9
