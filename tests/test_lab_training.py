import numpy as np
import pytest
import torch

from lab import batch_size, layers, newton, polar, sharpness, step_size, training
from optimizers.polar_muon import msgn
from shards import write_shard
from train_gpt2 import UserError


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    """Shards of learnable bytes in the place of Shakespeare's."""
    (tmp_path / "data/shakespeare").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("train_000001", "val_000000"):
        write_shard(tmp_path / f"data/shakespeare/shakespeare_{name}.bin", np.cumsum(rng.integers(1, 4, 40000)) % 256)
    monkeypatch.setattr(training, "DATA", tmp_path)
    return tmp_path / "data/shakespeare"


@pytest.mark.parametrize("module", [step_size, newton, polar, batch_size, sharpness])
def test_small_size(module):
    result = module.run("small")
    assert all(isinstance(prediction, str) and isinstance(measured, str) and holds in (True, False, None) for prediction, measured, holds in result.rows)
    assert len(result.figure.axes) >= 3 and result.summary and "arXiv" in result.source


def test_missing_shards(text):
    for path in text.glob("*.bin"):
        path.unlink()
    with pytest.raises(UserError, match="^no file matches .*; make these shards with: python data/shakespeare.py$"):
        training.open_shards(training.cpu_config())


def test_steps_take_every_batch_once(text):
    config = training.cpu_config(**training.SMALL, num_iterations=3)
    shards, model = training.open_shards(config), training.new_model(config)
    losses = list(training.training_steps(config, *model, shards))
    with torch.no_grad():  # the first loss is that of the initial weights on the first batch
        assert losses[0] == pytest.approx(float(training.new_model(config)[0](*shards.batch(range(16)))[0]), rel=1e-5)
    assert len(losses) == 3 and losses[2] < losses[0]


def test_sign_flips_at_the_predicted_step():
    """f = lambda |W|^2 / 2: a step 2 mean(sigma) / lambda along msgn of the gradient leaves f as it is."""
    W, scale = torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 3.0
    G = scale * W
    step = 2 * torch.linalg.svdvals(G).mean() / scale
    assert (W - 0.999 * step * msgn(G)).norm() < W.norm() < (W - 1.001 * step * msgn(G)).norm()
    eye = torch.eye(7, dtype=torch.float64)
    assert step_size.largest_stable_step(msgn, 1, scale * eye, eye, W) == pytest.approx(float(step), rel=1e-9)
    assert step_size.largest_stable_step(lambda G: G, 100, scale * eye, eye, W) == pytest.approx(2 / scale, rel=1e-9)


def test_problem_has_the_prescribed_spectrum():
    G, B, A, D, largest = step_size.problem(1.0, "random bases", 10, 6, torch.Generator().manual_seed(0))
    assert torch.allclose(B @ D @ A, G)
    assert torch.allclose(torch.linalg.svdvals(G), 1 / torch.arange(1, 7, dtype=torch.float64))
    assert torch.linalg.eigvalsh(torch.kron(B, A)).max() == pytest.approx(largest)


def test_one_muon_step_in_closed_form():
    """H = I, square: f falls by |G|_*^2 / (2 tr K) at the best rate, and no preconditioned step can do better."""
    k = newton.spectrum(torch.tensor([100.0]), 6)
    D = torch.randn(1, 1, 1, 6, 6, generator=torch.Generator().manual_seed(5))[0, 0, 0]
    before, fall = float((D.square() * k).sum() / 2), float(torch.linalg.svdvals(D * k).sum() ** 2 / (2 * k.sum()))
    rates = torch.linspace(0.1, 4, 2000)
    muon, inverse = (newton.decreases(torch.tensor([100.0]), torch.zeros(1), torch.ones(6), 6, ridge, 1, rates, 1, 5) for ridge in (None, 0.0))
    assert float(muon) == pytest.approx(np.log(before / (before - fall)), rel=1e-3)
    assert inverse < muon


@pytest.mark.parametrize("ridge", [None, 0.3])
def test_one_noisy_step_in_closed_form(ridge):
    """Along O the best rate lowers f = tr(H D K D^T) / 2 by <G, O>^2 / (2 tr(H O K O^T))."""
    generator, h, share = torch.Generator().manual_seed(5), newton.spectrum(torch.tensor(30.0), 4), 2.0
    D, E = (torch.randn(1, 1, 1, 4, 6, generator=generator)[0, 0, 0] for _ in range(2))
    H, K = torch.diag(h), torch.diag(newton.spectrum(torch.tensor(100.0), 6))
    G, noise = H @ D @ K, H.sqrt() @ E @ K.sqrt()
    noisy = G + noise * (share * G.square().sum() / (H.trace() * K.trace())).sqrt()
    O = msgn(noisy if ridge is None else noisy @ torch.linalg.inv(K + ridge * torch.eye(6)))
    before, fall = float((D * G).sum() / 2), float((G * O).sum() ** 2 / (2 * (O * (H @ O @ K)).sum()))
    found = newton.decreases(torch.tensor([100.0]), torch.tensor([share]), h, 6, ridge, 1, torch.linspace(0.01, 4, 2000), 1, 5)
    assert float(found) == pytest.approx(np.log(before / (before - fall)), rel=1e-3)


@pytest.mark.parametrize("shape", [(8, 32), (16, 16), (32, 8)])
@pytest.mark.parametrize("ridge", [None, 0.0])
def test_best_rate_is_inside_the_grid(shape, ridge):
    """Otherwise the map would compare the rules at the largest rate, not at the best."""
    cells, m, n = torch.tensor([[1.0, 0.01], [100.0, 0.01], [100.0, 10.0]]).T, *shape
    for steps, rates in newton.RATES.items():
        all_rates, ends = (newton.decreases(*cells, torch.ones(m), n, ridge, steps, r, 2, 0).mean(1) for r in (rates, rates[[0, -1]]))
        assert (all_rates > ends).all()


def test_no_condition_no_difference():
    cell = dict(conditions=torch.ones(1), noises=torch.ones(1), h=torch.ones(4), n=4, steps=3, rates=torch.tensor([0.1, 0.3]), repeats=2, seed=0)
    assert torch.allclose(newton.decreases(ridge=0.0, **cell), newton.decreases(ridge=None, **cell), atol=1e-5)


def test_layers_leave_the_weights(text):
    found = layers.measure_layers(0, 1, 1, **training.SMALL)
    assert [name for name, *_ in found] == list(training.new_model(training.cpu_config(**training.SMALL))[0].hidden_matrices())
    assert all(condition >= 1 and noise > 0 for _, condition, noise, _ in found)


def test_noise_of_layers_and_their_two_directions(text, monkeypatch):
    directions = []
    monkeypatch.setattr(layers, "msgn", lambda U: directions.append(U.clone()) or U)
    small = training.SMALL | dict(n_layer=1)
    noise = np.array([found[2] for found in layers.measure_layers(0, 0, 6, **small)])
    preconditioned, plain = directions[0][0], directions[1][0]  # of the q block of the first matrix
    config = training.cpu_config(**small, num_iterations=0, seed=0, data_seed=1)
    (model, _), shards, gradients = training.new_model(config), training.open_shards(config), []
    for i in range(24):
        _, grams = layers.accumulate(model, [shards.batch(range(16 * i, 16 * i + 16))], True, torch.float32)
        gradients.append([p.grad.clone() for p in model.hidden_matrices().values()])
        model.zero_grad(set_to_none=True)
        if i == 0:
            K = grams[0][0] / (16 * config.sequence_length)
            assert torch.allclose(plain, gradients[0][0][:32], atol=1e-6)
            assert torch.allclose(preconditioned @ (K + 0.2 * K.diagonal().mean() * torch.eye(32)), plain, atol=1e-5)
    stacked = [torch.stack(g) for g in zip(*gradients)]  # the same share from whole batches
    share = [float(g.var(0).sum() / (g.mean(0).square().sum() - g.var(0).sum() / 24)) for g in stacked]
    assert np.median(noise / share) == pytest.approx(1, rel=0.3)


def test_first_update_has_the_step_size(monkeypatch):
    models = []
    monkeypatch.setattr(step_size, "new_model", lambda config: models.append(training.new_model(config)) or models[-1])
    config = training.cpu_config(**training.SMALL, num_iterations=1, warmdown_iters=0, momentum=0.0, nesterov=False)
    start = training.new_model(config)[0].hidden_matrices()
    for optimizer, error in (("sgd", 1e-3), ("muon", 0.2)):
        step_size.losses_at(optimizer, 0.01, config, training.open_shards(config))
        moved = torch.cat([(p - start[name]).flatten() for name, p in models[-1][0].hidden_matrices().items()])
        assert float(moved.detach().square().mean().sqrt()) == pytest.approx(0.01, rel=error)


def test_critical_batch_size(monkeypatch):
    """Steps 10 (1 + b_c / b), give or take 1 % between seeds."""
    critical = {"Nesterov 0.95": 20, "momentum 0.95": 30, "Nesterov 0.95, decay": 20, "momentum 0.95, decay": 25, "Nesterov 0.5": 40}
    wobble = np.array([0.99, 1.0, 1.01])
    monkeypatch.setattr(batch_size, "parallel", lambda function, names: [
        10 * (1 + critical[name] * np.roll(wobble, i) / np.array([[8], [32], [128], [512]])) for i, name in enumerate(names)])
    monkeypatch.setattr(batch_size, "norms", lambda *_: np.ones((2, 400)))
    found = {prediction: (measured, holds) for prediction, measured, holds in batch_size.run().rows}
    measured, holds = found["more momentum lowers the critical batch size (b_c)"]
    assert measured.startswith("Nesterov 0.5 40, Nesterov 0.95 20; difference +20") and holds is True
    assert found["weight decay raises it, with Nesterov momentum"][1] is None
    assert found["weight decay raises it, with plain momentum"][1] is False


def test_matrices_come_with_their_polar_factors():
    X, Q, _ = polar.with_condition(100.0, 16, 2, torch.Generator().manual_seed(0))
    assert torch.allclose(polar.polar_express(X, 8), Q, atol=1e-3)


def test_sharpness_of_msgn_is_the_mean_curvature():
    generator, h = torch.Generator().manual_seed(0), torch.tensor([100.0, 10.0, 1.0, 0.1])
    for rotated in (False, True):
        found = sharpness.first_directions(sharpness.curvature(h, rotated, generator), torch.randn(4, 4, generator=generator))
        assert found["msgn"] == pytest.approx(float(h.mean()), rel=1e-4) and found["msgn"] < found["gradient descent"]


def test_sharpness_by_double_backward():
    """The same second derivative by differences of the loss along the update."""
    loss, value, length, fall = sharpness.gpt_run("muon", 0.01, 0, 2, 2)[0]
    config = training.cpu_config(**training.SMALL, seed=0, data_seed=1, num_iterations=3, warmdown_iters=0, optimizer="muon", hidden_learning_rate=0.01)
    (model, optimizers), shards = training.new_model(config), training.open_shards(config)
    steps = training.training_steps(config, model, optimizers, shards)
    next(steps), next(steps)
    matrices, start = list(model.hidden_matrices().values()), [p.detach().clone() for p in model.parameters()]
    before = [p.detach().clone() for p in matrices]
    next(steps)
    u = [p.detach() - b for p, b in zip(matrices, before)]
    losses = []
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), start)
        for t in (-0.2, 0.0, 0.2):
            torch._foreach_copy_(matrices, torch._foreach_add(before, u, alpha=t))
            losses.append(float(model.double()(*shards.batch(range(16, 32)))[0]))
    assert losses[1] == pytest.approx(loss, rel=1e-5)
    assert (losses[0] - losses[2]) / 0.4 == pytest.approx(fall, rel=0.05)
    assert (losses[0] - 2 * losses[1] + losses[2]) / 0.04 / length ** 2 == pytest.approx(value, rel=0.2)


def test_decay_bounds_the_weights():
    bound = 1.21 / batch_size.DECAY
    assert batch_size.norms("Nesterov 0.95, decay", 0.1, 60, 0)[0].max() <= bound < batch_size.norms("Nesterov 0.95", 0.1, 60, 0)[0].max()
