"""The rules of the optimizers that differ from Muon in their geometry or in what they orthogonalize, each against plain linear algebra."""
import itertools
import math

import pytest
import torch

from optimizers.dion import Dion, OrthDion
from optimizers.dp_muon import DPMuon
from optimizers.ef_muon import EFMuon
from optimizers.low_rank_muon import LowRankMuon
from optimizers.muon_igt import MuonIGT
from optimizers.polar_muon import POLAR_EXPRESS, PolarMuon, msgn, polar_express
from optimizers.scion import Scion
from optimizers.stiefel_muon import StiefelMuon, descent
from train_gpt2 import Muon, newton_schulz

TALL, WIDE, SQUARE = (16, 8), (8, 32), (8, 8)
shapes = pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
svdvals = torch.linalg.svdvals


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_values(values, m, n, seed=0):
    """A matrix (m, n) of these singular values."""
    U, V = (torch.linalg.qr(normal(size, len(values), seed=seed + i))[0] for i, size in enumerate((m, n)))
    return U * torch.as_tensor(values, dtype=torch.float64) @ V.T


def changes(optimizer, gradients):
    """What each step with one of the gradients adds to the optimizer's only matrix."""
    W, = optimizer.param_groups[0]["params"]
    for G in gradients:
        before, W.grad = W.detach().clone(), G.clone()
        optimizer.step()
        yield W.detach() - before


def last_change(kind, gradients, **settings):
    W = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    *_, change = changes(kind([W], **settings), gradients)
    return change


def polar(X):
    """The orthogonal polar factor by the eigenvalues of X^T X or X X^T."""
    if X.size(-2) < X.size(-1):
        return polar(X.mT).mT
    values, V = torch.linalg.eigh(X.mT @ X)
    return X @ (V * values.rsqrt().unsqueeze(-2)) @ V.mT


# polar_muon


def test_the_coefficients_equioscillate():
    """Each polynomial is the best for the values that the one before leaves: the largest and the smallest are equally far from 1."""
    s = torch.logspace(-3, 0, 100_001, dtype=torch.float64)
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        s = a * s + b * s ** 3 + c * s ** 5
        assert abs(s.min() + s.max() - 2) < 1e-6, i
    assert s.max() < 1 + 1e-9


@pytest.mark.parametrize("steps, error", [(1, 1.0), (5, 0.13), (6, 0.01), (8, 1e-6), (10, 1e-6)])
@shapes
def test_polar_express_is_its_polynomials(shape, steps, error):
    U = with_values(torch.logspace(0, -2, 8), *shape)  # the smallest is 0.004 of the norm
    left, s, right = torch.linalg.svd(U, full_matrices=False)
    s = s / (1.01 * U.norm() + 1e-7)
    for i in range(steps):
        x, (a, b, c) = s / 1.01 if i < steps - 1 else s, POLAR_EXPRESS[min(i, 7)]
        s = a * x + b * x ** 3 + c * x ** 5
    O = polar_express(U, steps)
    torch.testing.assert_close(O, left @ torch.diag(s) @ right, rtol=0, atol=1e-6)
    assert (svdvals(O) - 1).abs().max() < error


def test_polar_muon_follows_its_equations():
    gradients = [normal(*TALL, seed=i) for i in range(3)]
    settings = dict(lr=0.1, momentum=0.8, ns_steps=8)
    U = gradients[2] + 0.8 * (gradients[2] + 0.8 * gradients[1] + 0.64 * gradients[0])
    for exact in (True, False):
        change = last_change(PolarMuon, gradients, **settings, exact=exact)
        torch.testing.assert_close(change, -0.1 * 4 * polar(U), rtol=0, atol=1e-5 if not exact else 1e-12)


def test_msgn_of_what_is_not_finite():
    X = torch.stack([normal(4, 3), normal(4, 3)])
    X[0, 1, 1] = math.inf
    O = msgn(X)
    assert O[0].isnan().all() and torch.allclose(O[1].mT @ O[1], torch.eye(3, dtype=torch.float64))


# low_rank_muon


@pytest.mark.parametrize("kind, settings", [(LowRankMuon, dict(rank_fraction=1.0)), (DPMuon, dict(noise_multiplier=0.0, clip=math.inf))])
@shapes
def test_special_cases_are_muon(kind, settings, shape):
    gradients = [normal(*shape, seed=i) for i in range(3)]
    assert torch.equal(last_change(kind, gradients, **settings), last_change(Muon, gradients))


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (32, 32)])
def test_low_rank_muon_orthogonalizes_k_directions(shape):
    """As Muon does, of G's part in a range of rank 4, nearly that of its largest values, since the power step triples their logarithms."""
    G = with_values(0.7 ** torch.arange(32), *shape)
    change = last_change(LowRankMuon, [G], rank_fraction=0.125, lr=0.1)
    part = change @ torch.linalg.pinv(change) @ G
    assert torch.linalg.matrix_rank(change) == 4 and part.square().sum() > 0.95 * svdvals(G)[:4].square().sum()
    torch.testing.assert_close(change, math.sqrt(32 / 4) * last_change(Muon, [part], lr=0.1), rtol=0, atol=1e-9)


def test_low_rank_muon_takes_large_gradients():
    """In fp32, which has no number for their cube, of which the sketch is."""
    G = normal(*SQUARE).float()
    one, other = (last_change(LowRankMuon, [G * s], rank_fraction=0.5, lr=0.1) for s in (1.0, 1e15))
    torch.testing.assert_close(other, one, rtol=0, atol=1e-3)


def test_sketches_come_from_seed_and_step():
    G = normal(*SQUARE)  # the same in both steps, without momentum: only the sketch can differ
    start = torch.zeros_like(G)
    first, again, other = (list(changes(LowRankMuon([torch.nn.Parameter(start.clone())], momentum=0.0, seed=seed), [G, G]))
                           for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    for a, b in itertools.combinations([*first, *other], 2):
        assert (a - b).norm() > 0.1 * a.norm()


# dion


@pytest.mark.parametrize("kind", [Dion, OrthDion])
@shapes
def test_dion_follows_its_equations(kind, shape):
    m, n = shape
    W = torch.nn.Parameter(normal(m, n))
    optimizer = kind([W], lr=0.1, momentum=0.8, rank_fraction=0.5, weight_decay=0.2, seed=3)
    M, Q = 0.0, torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for step in range(4):
        G, expected = normal(m, n, seed=step), W.detach().clone()
        B = M + G
        P = B @ Q @ torch.linalg.inv(torch.linalg.cholesky((B @ Q).T @ (B @ Q))).T  # QR, of a positive diagonal
        S = B.T @ P
        if kind is Dion:
            M, Q = B - 0.2 * P @ P.T @ B, S / S.square().sum(0).sqrt()
        else:
            M, Q = 0.8 * (B - P @ P.T @ B), S @ torch.linalg.inv(torch.linalg.cholesky(S.T @ S)).T
        change, = changes(optimizer, [G])
        torch.testing.assert_close(change, -0.02 * expected - 0.1 * math.sqrt(m * n / 4) * P @ Q.T)


@pytest.mark.parametrize("kind", [Dion, OrthDion, StiefelMuon])
@shapes
def test_rate_is_the_updates_root_mean_square(kind, shape):
    """So small a rate that StiefelMuon's path is straight."""
    optimizer = kind([torch.nn.Parameter(with_values([1.0] * 8, *shape))], lr=1e-5)
    for change in changes(optimizer, [normal(*shape, seed=i) for i in range(3)]):
        assert abs(change.square().mean().sqrt() / 1e-5 - 1) < 1e-6


@pytest.mark.parametrize("kind", [Dion, OrthDion])
@shapes
def test_dion_at_full_rank(kind, shape):
    """Of a gradient that stays: the power iteration turns Q into its singular vectors. Without momentum, B is the gradient."""
    G = with_values(0.7 ** torch.arange(8), *shape)
    change = last_change(kind, [G] * 60, lr=0.1, momentum=0.0, rank_fraction=1.0)  # 0.7 ** (2 * 60) is 3e-19
    torch.testing.assert_close(change, -0.1 * math.sqrt(max(shape)) * polar(G), rtol=0, atol=1e-9)


# scion


@pytest.mark.parametrize("constrained", [True, False])
@shapes
def test_scion_follows_the_papers_equation(shape, constrained):
    """With its average of gradients, and its rate eta, which is lr times the square root of the width, over the radius."""
    m, n = shape
    W = torch.nn.Parameter(normal(m, n))
    d, expected, eta, gradients = 0.0, W.detach().clone(), 0.05 * math.sqrt(8) / 3.0, [normal(m, n, seed=i) for i in range(4)]
    list(changes(Scion([W], lr=0.05, momentum=0.8, radius=3.0, constrained=constrained), gradients))
    for G in gradients:
        d = 0.8 * d + 0.2 * G
        expected = (1 - eta * constrained) * expected - eta * 3.0 * math.sqrt(m / n) * newton_schulz(d)
    torch.testing.assert_close(W.detach(), expected, rtol=1e-5, atol=1e-6)


@shapes
def test_scion_comes_into_its_ball_and_stays(shape):
    ball = 2.0 * math.sqrt(shape[0] / shape[1])
    W = torch.nn.Parameter(with_values([5 * ball], *shape))
    always_that_way = [with_values([2.0] * 8, *shape) + 0.1 * normal(*shape, seed=step) for step in range(200)]
    norms = [svdvals(W.detach())[0] / ball for _ in changes(Scion([W], lr=0.05, radius=2.0), always_that_way)]  # eta = 0.07
    assert norms[0] > 4 and max(norms[100:]) < 1.21 and min(norms[100:]) > 0.6


# muon_igt


def test_muon_igt_follows_its_equations():
    W, H, T = torch.nn.Parameter(normal(*TALL)), normal(16, 16, seed=1), normal(*TALL, seed=2)
    V = X = W.detach().clone()
    M, optimizer = 0.0, MuonIGT([W], lr=0.1, momentum=0.75, weight_decay=0.2)
    for _ in range(5):
        list(changes(optimizer, [(H @ W - T).detach()]))
        M = 0.75 * M + 0.25 * (H @ (X + 3 * (X - V)) - T)
        V, X = X, X - 0.02 * X - 0.1 * 4 * newton_schulz(M)
    torch.testing.assert_close(W.detach(), X + 3 * (X - V), rtol=1e-5, atol=1e-5)
    optimizer.eval()
    torch.testing.assert_close(W.detach(), X, rtol=1e-5, atol=1e-5)


def test_transported_average_is_current():
    """Where the gradient is linear and all steps are equal: f = <D, W>^2 / 2 far from its minimum, with D orthogonal."""
    D = polar(normal(*SQUARE))
    W = torch.nn.Parameter(100 * D)
    optimizer = MuonIGT([W], lr=0.1, momentum=0.8)
    for _ in range(60):  # 0.8 ** 60 is 2e-6
        optimizer.eval()
        now = ((D * W).sum() * D).detach()
        optimizer.train()
        W.grad = there = ((D * W).sum() * D).detach()
        optimizer.step()
    M = optimizer.state[W]["momentum_buffer"][0]
    torch.testing.assert_close(M, now, rtol=1e-4, atol=0)
    assert (M - there).norm() > 1e-3 * M.norm()


# dp_muon


def private(G, **settings):
    """The gradient that DPMuon hands to Muon."""
    W = torch.nn.Parameter(torch.zeros_like(G))
    optimizer = DPMuon([W], momentum=0.0, **settings)
    list(changes(optimizer, [G]))
    return optimizer.state[W]["momentum_buffer"]


def test_dp_muon_clips():
    G = torch.cat([0.01 * normal(8, 8), normal(8, 8, seed=1), 2 * normal(8, 8, seed=2)])  # q, k, v
    expected = torch.cat([G[:8], 0.5 * G[8:16] / G[8:16].norm(), 0.5 * G[16:] / G[16:].norm()])
    torch.testing.assert_close(private(G, noise_multiplier=0.0, clip=0.5), expected)


def test_each_group_has_its_own_clip():
    matrices, G = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(2)], normal(8, 8).float()
    optimizer = DPMuon([dict(params=[p], clip=clip) for p, clip in zip(matrices, (0.1, 0.2))], momentum=0.0, noise_multiplier=0.0)
    for p in matrices:
        p.grad = G.clone()
    optimizer.step()
    assert [optimizer.state[p]["momentum_buffer"].norm().item() for p in matrices] == pytest.approx([0.1, 0.2])


def test_variance_of_dp_muons_noise():
    """0.3 times the clip, Gaussian, in every element, beside the clipped gradient."""
    G = 5 * normal(200, 200)
    Z = (private(G, noise_multiplier=0.3, clip=2.0) - G * 2.0 / G.norm()) / 0.6
    assert abs(Z.mean()) < 4 / 200 and abs(Z.var() - 1) < 4 * math.sqrt(2) / 200  # 4 standard errors
    assert abs((Z.abs() < 1).double().mean() - 0.6827) < 4 * 0.4655 / 200


def test_seeds_of_dp_muons_noise():
    drawn = []
    for seed in (0, 1, 0):
        matrices = [torch.nn.Parameter(torch.zeros(50, 50)) for _ in range(2)]
        optimizer = DPMuon(matrices, momentum=0.0, seed=seed)
        for _ in range(2):
            for p in matrices:
                p.grad = torch.zeros(50, 50)
            optimizer.step()
            drawn += [optimizer.state[p]["momentum_buffer"].flatten().clone() for p in matrices]
    assert torch.equal(torch.stack(drawn[:4]), torch.stack(drawn[8:]))
    correlations = torch.corrcoef(torch.stack(drawn[:8])) - torch.eye(8)
    assert correlations.abs().max() < 5 / 50


@pytest.mark.parametrize("settings", [dict(noise_multiplier=-1.0), dict(noise_multiplier=math.inf), dict(clip=0.0), dict(clip=math.inf)])
def test_dp_muon_refuses(settings):
    with pytest.raises(ValueError, match=rf"{next(iter(settings))} = .*: must be"):
        DPMuon([torch.nn.Parameter(torch.zeros(2, 2))], **settings)


# stiefel_muon


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (16, 16), (12, 8), (24, 8), (7, 5), (5, 7), (5, 5), (1, 6)])
@pytest.mark.parametrize("lr", [0.003, 0.1])
def test_stiefel_muon_keeps_its_constraint(shape, lr):
    W = torch.nn.Parameter((2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1) / math.sqrt(shape[1]))  # as GPT's
    start, blocks = W.detach().clone(), (3, 8, 8) if shape == (24, 8) else (1, *shape)  # a fused q, k, v
    radius = start.double().view(blocks).norm(dim=(-2, -1), keepdim=True) / math.sqrt(min(blocks[1:]))
    for _ in changes(StiefelMuon([W], lr=lr), [normal(*shape, seed=step).float() for step in range(50)]):
        X = W.detach().double().view(blocks) / radius
        X = X.mT if shape[0] < shape[1] else X
        assert (X.mT @ X - torch.eye(X.size(-1))).abs().max() < 1e-5
    assert (W - start).norm() > 0.01 * start.norm()


def largest(X, G, steps=400):
    """An upper bound on <G, D> over tangents D at X with ||D||_2 <= 1, near the least such: that of ||G + X L||_* over symmetric L."""
    L = torch.zeros(X.size(1), X.size(1), dtype=X.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([L], max_iter=steps, history_size=50, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")

    def bound():
        optimizer.zero_grad()
        value = svdvals(G + X @ (L + L.T)).sum()
        value.backward()
        return value
    optimizer.step(bound)
    return svdvals(G + X @ (L + L.T)).sum().item()


@pytest.mark.parametrize("shape, gap", [((12, 4), 1e-5), ((7, 4), 1e-5), ((6, 6), 1e-5), ((20, 5), 1e-5), ((8, 5), 1e-5), ((5, 5), 1e-3)])
def test_descent_is_the_best_tangent(shape, gap):
    """By weak duality no tangent in the ball is better than `largest`. For odd m = n the bound has a kink at its least, hard to reach."""
    X, G = polar(normal(*shape)), normal(*shape, seed=1)
    D = descent(X, G)
    assert (X.T @ D + D.T @ X).abs().max() < 1e-12 and svdvals(D)[0] < 1 + 1e-12
    bound = largest(X, G)
    assert (1 - gap) * bound < (G * D).sum() < bound * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(16, 4), (5, 5), (4, 16)])
def test_stiefel_muon_follows_its_equations(shape):
    transposed = shape[0] < shape[1]
    W = torch.nn.Parameter(normal(*shape))
    optimizer, X = StiefelMuon([W], lr=0.05, momentum=0.5), W.detach().T if transposed else W.detach()
    m, n = X.shape
    radius, M, X = X.norm() / math.sqrt(n), torch.zeros_like(X), polar(X)
    for step in range(3):
        G = normal(*shape, seed=step + 1)
        M = 0.5 * M + 0.5 * (G.T if transposed else G)
        A = M @ X.T - X @ M.T
        U, S, V = torch.linalg.svd(A)
        A = U @ torch.diag((S > 1e-10).double()) @ V  # of rank 2 n, or even
        X = polar(X - 0.05 * math.sqrt(m) / radius * A @ X)
        M = M - X @ (X.T @ M + M.T @ X) / 2
        list(changes(optimizer, [G]))
        torch.testing.assert_close(W.detach(), radius * (X.T if transposed else X), rtol=0, atol=1e-9)


def test_stiefel_muon_computes_without_tf32(monkeypatch):
    found = []
    monkeypatch.setattr(StiefelMuon, "update", lambda *_: found.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # as in the trainer
        list(changes(StiefelMuon([torch.nn.Parameter(torch.eye(2))]), [torch.zeros(2, 2)]))
        assert found == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_stiefel_muon_refuses_lower_rank():
    W = torch.nn.Parameter(with_values([1.0, 1.0, 1.0], 8, 4))
    with pytest.raises(ValueError, match=r"a matrix of shape \(8, 4\) does not have full rank"):
        StiefelMuon([W])


# ef_muon


@pytest.mark.parametrize("values", [[5.0, 3.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1], [4.0, 1.0], [3.0]])
@shapes
def test_size_of_ef_muons_step(shape, values):
    """D = (||P||_* / rank P) msgn(P), with P = lr G at first; the rest is the error."""
    optimizer = EFMuon([torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))], lr=0.5, momentum=0.0, exact=True)
    change, = changes(optimizer, [with_values(values, *shape)])
    mean, (state,) = sum(values) / len(values), optimizer.state.values()
    torch.testing.assert_close(change, -0.5 * with_values([mean] * len(values), *shape))
    torch.testing.assert_close(state["error"][0], 0.5 * with_values([v - mean for v in values], *shape))


@pytest.mark.parametrize("exact", [True, False])
@shapes
def test_ef_muon_follows_its_equations(shape, exact):
    W = torch.nn.Parameter(normal(*shape))
    optimizer, M, E, expected = EFMuon([W], lr=0.5, momentum=0.8, exact=exact), 0.0, 0.0, W.detach().clone()
    for step in range(4):
        G = normal(*shape, seed=step)
        M = 0.8 * M + 0.2 * G
        P = 0.5 * M + E
        if exact:
            D = svdvals(P).sum() / 8 * polar(P)
        else:
            O = newton_schulz(P)
            D = torch.trace(P.T @ O) / 8 * O
        expected, E = expected - D, P - D
        list(changes(optimizer, [G]))
    torch.testing.assert_close(W.detach(), expected, rtol=1e-9, atol=1e-9)
