"""The rules of the optimizers that differ from Muon in their geometry or in what they orthogonalize, each
against plain linear algebra."""
import itertools
import math

import pytest
import torch
from torch.linalg import svdvals

from optimizers.dion import Dion, OrthDion
from optimizers.dp_muon import DPMuon
from optimizers.ef_muon import EFMuon
from optimizers.low_rank_muon import LowRankMuon
from optimizers.muon_igt import MuonIGT
from optimizers.polar_muon import POLAR_EXPRESS, PolarMuon, msgn, polar_express
from optimizers.scion import Scion
from optimizers.stiefel_muon import StiefelMuon, descent
from plain import CLOSE, gradients, momenta, normal, trained
from train_gpt2 import Muon, NewtonMuon, newton_schulz

TALL = (16, 8)
WIDE = (8, 32)
SQUARE = (8, 8)
shapes = pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])


def with_values(values, m, n, seed=0):
    """A matrix (m, n) with these singular values."""
    U, _ = torch.linalg.qr(normal(m, len(values), seed=seed))
    V, _ = torch.linalg.qr(normal(n, len(values), seed=seed + 1))
    return U * torch.as_tensor(values, dtype=torch.float64) @ V.T


def changes(optimizer, grads):
    """What each step with one of the gradients adds to the optimizer's only matrix."""
    W, = optimizer.param_groups[0]["params"]
    for G in grads:
        before = W.detach().clone()
        W.grad = G.clone()
        optimizer.step()
        yield W.detach() - before


def first_change(kind, G, **settings):
    return trained(kind, torch.zeros_like(G), [G], **settings)


def polar(X):
    """The orthogonal polar factor by the eigenvalues of X^T X or X X^T."""
    if X.size(-2) < X.size(-1):
        return polar(X.mT).mT
    values, V = torch.linalg.eigh(X.mT @ X)
    return X @ (V * values.rsqrt().unsqueeze(-2)) @ V.mT


def root_mean_square(X):
    return X.square().mean().sqrt()


# polar_muon


def test_the_coefficients_equioscillate():
    """Each polynomial is the best for the values that the one before leaves: the largest and the smallest
    value are equally far from 1."""
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
        a, b, c = POLAR_EXPRESS[min(i, 7)]
        x = s / 1.01 if i < steps - 1 else s
        s = a * x + b * x ** 3 + c * x ** 5
    O = polar_express(U, steps)
    torch.testing.assert_close(O, left @ torch.diag(s) @ right, rtol=0, atol=1e-6)
    assert (svdvals(O) - 1).abs().max() < error


@pytest.mark.parametrize("exact, error", [(True, 1e-12), (False, 1e-5)])
def test_polar_muon_follows_its_equations(exact, error):
    W = normal(*TALL)
    grads = gradients(3, *TALL)
    result = trained(PolarMuon, W, grads, lr=0.1, momentum=0.8, ns_steps=8, exact=exact)
    for U in momenta(grads, 0.8):
        W = W - 0.1 * 4 * polar(U)
    torch.testing.assert_close(result, W, rtol=0, atol=error)


def test_msgn_is_the_polar_factor_or_nan():
    X = normal(3, 5, 4)
    X[0, 1, 1] = math.inf
    O = msgn(X)
    assert O[0].isnan().all()
    torch.testing.assert_close(O[1:], polar(X[1:]))


# low_rank_muon, and other rules with Muon as a special case


@pytest.mark.parametrize("kind, settings", [
    (LowRankMuon, dict(rank_fraction=1.0)),
    (DPMuon, dict(noise_multiplier=0.0, clip=math.inf)),
    (NewtonMuon, {}),  # before its first refresh
])
@shapes
def test_special_cases_are_muon(kind, settings, shape):
    start = normal(*shape)
    grads = gradients(3, *shape)
    result = trained(kind, start, grads, lr=0.1, **settings)
    assert torch.equal(result, trained(Muon, start, grads, lr=0.1))


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (32, 32)])
def test_low_rank_muon_orthogonalizes_k_directions(shape):
    """As Muon does, of G's part in a range of rank 4. That is nearly the range of its 4 largest values,
    because the power step triples their logarithms."""
    values = 0.7 ** torch.arange(32)
    G = with_values(values, *shape)
    change = first_change(LowRankMuon, G, rank_fraction=0.125, lr=0.1)
    assert torch.linalg.matrix_rank(change) == 4
    part = change @ torch.linalg.pinv(change) @ G
    assert part.square().sum() > 0.95 * values[:4].square().sum()
    expected = math.sqrt(32 / 4) * first_change(Muon, part, lr=0.1)
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-9)


def test_low_rank_muon_takes_large_gradients():
    """In fp32, which has no number for their cube, from which the sketch is made."""
    G = normal(*SQUARE).float()
    small = first_change(LowRankMuon, G, rank_fraction=0.5, lr=0.1)
    large = first_change(LowRankMuon, 1e15 * G, rank_fraction=0.5, lr=0.1)
    torch.testing.assert_close(large, small, rtol=0, atol=1e-3)


def test_sketches_come_from_seed_and_step():
    G = normal(*SQUARE)

    def two_changes(seed):  # with the same gradient and no momentum: only the sketch can differ
        optimizer = LowRankMuon([torch.nn.Parameter(0 * G)], momentum=0.0, seed=seed)
        return list(changes(optimizer, [G, G]))

    first = two_changes(0)
    again = two_changes(0)
    other = two_changes(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    for a, b in itertools.combinations([*first, *other], 2):
        assert (a - b).norm() > 0.1 * a.norm()


# dion


def orthonormal(X):
    """Q of X = Q R, where R has a positive diagonal."""
    R = torch.linalg.cholesky(X.T @ X).T
    return X @ torch.linalg.inv(R)


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("kind", [Dion, OrthDion])
@shapes
def test_dion_follows_its_equations(kind, shape, rank):
    m, n = shape
    W, *grads = [normal(m, n, seed=seed) for seed in range(5)]
    result = trained(kind, W, grads, lr=0.1, momentum=0.8, rank_fraction=rank / 8, weight_decay=0.2, seed=3)
    M = 0.0
    Q = normal(n, rank, seed=3)
    for G in grads:
        B = M + G
        P = orthonormal(B @ Q)
        S = B.T @ P
        if kind is Dion:
            M = B - 0.2 * P @ P.T @ B
            Q = S / S.square().sum(0).sqrt()
        else:
            M = 0.8 * (B - P @ P.T @ B)
            Q = orthonormal(S)
        W = 0.98 * W - 0.1 * math.sqrt(m * n / rank) * P @ Q.T
    torch.testing.assert_close(result, W, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", [Dion, OrthDion, StiefelMuon])
@shapes
def test_rate_is_the_updates_root_mean_square(kind, shape):
    """At a rate so small that StiefelMuon's path is straight."""
    optimizer = kind([torch.nn.Parameter(with_values([1.0] * 8, *shape))], lr=1e-5)
    for change in changes(optimizer, [normal(*shape, seed=i) for i in range(3)]):
        assert abs(root_mean_square(change) / 1e-5 - 1) < 1e-6


@pytest.mark.parametrize("kind", [Dion, OrthDion])
@shapes
def test_dion_at_full_rank(kind, shape):
    """With the same gradient in each step: the power iteration turns Q into its singular vectors. Without
    momentum, B is the gradient."""
    G = with_values(0.7 ** torch.arange(8), *shape)
    optimizer = kind([torch.nn.Parameter(torch.zeros_like(G))], lr=0.1, momentum=0.0, rank_fraction=1.0)
    *_, change = changes(optimizer, [G] * 60)  # 0.7 ** (2 * 60) is 3e-19
    expected = -0.1 * math.sqrt(max(shape)) * polar(G)
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-9)


# scion


@pytest.mark.parametrize("constrained", [True, False])
@shapes
def test_scion_follows_the_papers_equation(shape, constrained):
    """With its average of gradients, and its rate eta: lr times the square root of the width, over the
    radius."""
    m, n = shape
    W = normal(m, n)
    grads = gradients(4, m, n)
    result = trained(Scion, W, grads, lr=0.05, momentum=0.8, radius=3.0, constrained=constrained)
    eta = 0.05 * math.sqrt(8) / 3.0
    d = 0.0
    for G in grads:
        d = 0.8 * d + 0.2 * G
        if constrained:
            W = (1 - eta) * W
        W = W - eta * 3.0 * math.sqrt(m / n) * newton_schulz(d)
    torch.testing.assert_close(result, W, rtol=1e-5, atol=1e-6)


@shapes
def test_scion_comes_into_its_ball_and_stays(shape):
    m, n = shape
    ball = 2.0 * math.sqrt(m / n)
    W = torch.nn.Parameter(with_values([5 * ball], m, n))
    always_that_way = with_values([2.0] * 8, m, n)
    grads = [always_that_way + 0.1 * normal(m, n, seed=step) for step in range(200)]
    norms = []
    for _ in changes(Scion([W], lr=0.05, radius=2.0), grads):  # eta = 0.07
        norms.append(svdvals(W.detach())[0] / ball)
    assert norms[0] > 4
    assert max(norms[100:]) < 1.21
    assert min(norms[100:]) > 0.6


# muon_igt


def test_muon_igt_follows_its_equations():
    W = torch.nn.Parameter(normal(*TALL))
    H = normal(16, 16, seed=1)
    T = normal(*TALL, seed=2)
    optimizer = MuonIGT([W], lr=0.1, momentum=0.75, weight_decay=0.2)
    V = X = W.detach().clone()
    M = 0.0
    for _ in range(5):
        W.grad = (H @ W - T).detach()
        optimizer.step()
        M = 0.75 * M + 0.25 * (H @ (X + 3 * (X - V)) - T)
        V, X = X, X - 0.02 * X - 0.1 * 4 * newton_schulz(M)
    torch.testing.assert_close(W.detach(), X + 3 * (X - V), **CLOSE)
    torch.testing.assert_close(optimizer.state[W]["momentum_buffer"][0], M, **CLOSE)
    optimizer.eval()
    torch.testing.assert_close(W.detach(), X, **CLOSE)


def test_transported_average_is_current():
    """Where the gradient is linear and all steps are equal: f = <D, W>^2 / 2, far from its minimum, with D
    orthogonal."""
    D = polar(normal(*SQUARE))
    W = torch.nn.Parameter(100 * D)
    optimizer = MuonIGT([W], lr=0.1, momentum=0.8)

    def gradient():
        return ((D * W).sum() * D).detach()

    for _ in range(60):  # 0.8 ** 60 is 2e-6
        optimizer.eval()
        now = gradient()
        optimizer.train()
        extrapolated = gradient()
        W.grad = extrapolated
        optimizer.step()
    M = optimizer.state[W]["momentum_buffer"][0]
    torch.testing.assert_close(M, now, rtol=1e-4, atol=0)
    assert (M - extrapolated).norm() > 1e-3 * M.norm()


# dp_muon


def private(G, *clips, matrices=1, steps=1, **settings):
    """The gradients that DPMuon hands to Muon in each step, if every matrix has the gradient G. There is a
    group of `matrices` matrices for each of the clips."""
    groups = []
    for clip in clips:
        params = [torch.nn.Parameter(torch.zeros_like(G)) for _ in range(matrices)]
        groups.append(dict(params=params, clip=clip))
    optimizer = DPMuon(groups, momentum=0.0, **settings)
    found = []
    for _ in range(steps):
        for p in optimizer.matrices:
            p.grad = G.clone()
        optimizer.step()
        found += [optimizer.state[p]["momentum_buffer"].clone() for p in optimizer.matrices]
    return found


def test_dp_muon_clips():
    q = 0.01 * normal(8, 8)
    k = normal(8, 8, seed=1)
    v = 2 * normal(8, 8, seed=2)
    H, = private(torch.cat([q, k, v]), 0.5, noise_multiplier=0.0)
    expected = torch.cat([q, 0.5 * k / k.norm(), 0.5 * v / v.norm()])
    torch.testing.assert_close(H, expected)


def test_each_group_has_its_own_clip():
    norms = [H.norm().item() for H in private(normal(8, 8), 0.1, 0.2, noise_multiplier=0.0)]
    assert norms == pytest.approx([0.1, 0.2])


def test_variance_of_dp_muons_noise():
    """0.3 times the clip, Gaussian, in every element, beside the clipped gradient. Within 4 standard
    errors."""
    G = 5 * normal(200, 200)
    H, = private(G, 2.0, noise_multiplier=0.3)
    Z = (H - G * 2.0 / G.norm()) / 0.6
    assert abs(Z.mean()) < 4 / 200
    assert abs(Z.var() - 1) < 4 * math.sqrt(2) / 200
    within_one = (Z.abs() < 1).double().mean()
    assert abs(within_one - 0.6827) < 4 * 0.4655 / 200


def test_seeds_of_dp_muons_noise():
    def noise(seed):
        return torch.stack(private(torch.zeros(50, 50), 0.1, matrices=2, steps=2, seed=seed))

    first = noise(0)
    assert torch.equal(first, noise(0))
    correlations = torch.corrcoef(torch.cat([first, noise(1)]).flatten(1)) - torch.eye(8)
    assert correlations.abs().max() < 5 / 50


# stiefel_muon


@pytest.mark.parametrize("shape", [
    (64, 16), (16, 64), (16, 16), (12, 8), (24, 8), (7, 5), (5, 7), (5, 5), (1, 6)])
@pytest.mark.parametrize("lr", [0.003, 0.1])
def test_stiefel_muon_keeps_its_constraint(shape, lr):
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    W = torch.nn.Parameter((2 * uniform - 1) / math.sqrt(shape[1]))  # as in GPT
    start = W.detach().clone()
    blocks = (3, 8, 8) if shape == (24, 8) else (1, *shape)  # a fused q, k, v
    norms = start.double().view(blocks).norm(dim=(-2, -1), keepdim=True)
    radius = norms / math.sqrt(min(blocks[1:]))
    grads = [normal(*shape, seed=step).float() for step in range(50)]
    for _ in changes(StiefelMuon([W], lr=lr), grads):
        X = W.detach().double().view(blocks) / radius
        if shape[0] < shape[1]:
            X = X.mT
        assert (X.mT @ X - torch.eye(X.size(-1))).abs().max() < 1e-5
    assert (W - start).norm() > 0.01 * start.norm()


@pytest.mark.parametrize("shape, gap", [
    ((12, 4), 1e-5), ((7, 4), 1e-5), ((6, 6), 1e-5), ((20, 5), 1e-5), ((8, 5), 1e-5), ((5, 5), 1e-3)])
def test_descent_is_the_best_tangent(shape, gap):
    """By weak duality, no tangent in the ball is better than the least ||G + X L||_* over symmetric L. For
    odd m = n this least value is at a kink, which is hard to reach."""
    X = polar(normal(*shape))
    G = normal(*shape, seed=1)
    D = descent(X, G)
    assert (X.T @ D + D.T @ X).abs().max() < 1e-12
    assert svdvals(D)[0] < 1 + 1e-12

    L = torch.zeros(shape[1], shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([L], max_iter=400, history_size=50, tolerance_grad=0, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def bound():
        optimizer.zero_grad()
        value = svdvals(G + X @ (L + L.T)).sum()
        value.backward()
        return value

    optimizer.step(bound)
    least = bound().item()
    assert (1 - gap) * least < (G * D).sum() < least * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(16, 4), (5, 5), (4, 16)])
def test_stiefel_muon_follows_its_equations(shape):
    def turned(X):
        return X.T if shape[0] < shape[1] else X

    grads = gradients(3, *shape)
    start = normal(*shape)
    result = trained(StiefelMuon, start, grads, lr=0.05, momentum=0.5)
    X = turned(start)
    radius = X.norm() / math.sqrt(min(shape))
    X = polar(X)
    M = 0.0
    for G in grads:
        M = 0.5 * M + 0.5 * turned(G)
        U, S, Vh = torch.linalg.svd(M @ X.T - X @ M.T)
        A = U @ torch.diag((S > 1e-10).double()) @ Vh  # the rank is 2 n, or even
        X = polar(X - 0.05 * math.sqrt(max(shape)) / radius * A @ X)
        M = M - X @ (X.T @ M + M.T @ X) / 2
    torch.testing.assert_close(result, radius * turned(X), **CLOSE)


def test_stiefel_muon_computes_without_tf32(monkeypatch):
    found = []

    def update(*_):
        found.append(torch.get_float32_matmul_precision())

    monkeypatch.setattr(StiefelMuon, "update", update)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # as in the trainer
        list(changes(StiefelMuon([torch.nn.Parameter(torch.eye(2))]), [torch.zeros(2, 2)]))
        assert found == ["highest"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# ef_muon


@pytest.mark.parametrize("values", [[5.0, 3.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1], [4.0, 1.0], [3.0]])
@shapes
def test_size_of_ef_muons_step(shape, values):
    """D = (||P||_* / rank P) msgn(P), with P = lr G at first."""
    G = with_values(values, *shape)
    change = first_change(EFMuon, G, lr=0.5, momentum=0.0, exact=True)
    mean = sum(values) / len(values)
    torch.testing.assert_close(change, -0.5 * with_values([mean] * len(values), *shape))


@pytest.mark.parametrize("exact", [True, False])
@shapes
def test_ef_muon_follows_its_equations(shape, exact):
    W = normal(*shape)
    grads = gradients(4, *shape)
    result = trained(EFMuon, W, grads, lr=0.5, momentum=0.8, exact=exact)
    M = E = 0.0
    for G in grads:
        M = 0.8 * M + 0.2 * G
        P = 0.5 * M + E
        if exact:
            D = svdvals(P).sum() / 8 * polar(P)
        else:
            O = newton_schulz(P)
            D = torch.trace(P.T @ O) / 8 * O
        W = W - D
        E = P - D
    torch.testing.assert_close(result, W, **CLOSE)
