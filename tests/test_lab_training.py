import json
import os
import pickle

import numpy as np
import pytest
import torch

import forks
from harness.zoo.table import Point, Table
from lab import batch_size, convex, layers, newton, polar, sharpness, step_size, training
from optimizers.polar_muon import msgn
from data.shards import write_shard
from train_gpt2 import UserError


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    """Shards of learnable bytes in the place of Shakespeare's."""
    (tmp_path / "data/shakespeare").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("train_000001", "val_000000"):
        tokens = np.cumsum(rng.integers(1, 4, 40000)) % 256
        write_shard(tmp_path / f"data/shakespeare/shakespeare_{name}.bin", tokens)
    monkeypatch.setattr(training, "DATA", tmp_path)
    return tmp_path / "data/shakespeare"


def test_parallel(monkeypatch):
    """Results in the order of the items, from other processes with one thread each."""
    monkeypatch.setattr(training, "get_context", lambda method: forks.CONTEXT)  # which has torch imported
    code = "({}, __import__('os').getpid(), __import__('torch').get_num_threads())"
    numbers, processes, threads = zip(*training.parallel(eval, [code.format(i) for i in range(5)]))
    assert numbers == (0, 1, 2, 3, 4) and set(threads) == {1}
    assert len(set(processes)) <= 2 and os.getpid() not in processes


def in_this_process(function, items):
    """parallel() without its processes, which take seconds to import torch."""
    function, items = pickle.loads(pickle.dumps((function, items)))
    return [function(item) for item in items]


@pytest.mark.parametrize("module", [step_size, newton, polar, batch_size, sharpness])
def test_small_size(module, monkeypatch):
    if hasattr(module, "parallel"):
        monkeypatch.setattr(module, "parallel", in_this_process)
    numbers = json.loads(json.dumps(module.measure("small")))  # as they come out of the file
    for prediction, measured, verdict in module.rows(numbers):
        assert isinstance(prediction, str) and isinstance(measured, str) and verdict in (True, False, None)
    assert len(module.figure(numbers).axes) >= 3 and module.summary(numbers) and "arXiv" in module.SOURCE


def test_missing_shards(text):
    for path in text.glob("*.bin"):
        path.unlink()
    words = "^no file matches .*; make these shards with: python data/shakespeare.py$"
    with pytest.raises(UserError, match=words):
        training.open_shards(training.cpu_config())


def test_steps_take_every_batch_once(text):
    config = training.cpu_config(**training.SMALL, num_iterations=3)
    shards = training.open_shards(config)
    losses = list(training.training_steps(config, *training.new_model(config), shards))
    model, _ = training.new_model(config)
    with torch.no_grad():  # the first loss is that of the initial weights on the first batch
        first = float(model(*shards.batch(range(16)))[0])
    assert losses[0] == pytest.approx(first, rel=1e-5)
    assert len(losses) == 3 and losses[2] < losses[0]


def test_sign_flips_at_the_predicted_step():
    """f = lambda |W|^2 / 2: a step 2 mean(sigma) / lambda along msgn of the gradient leaves f as it is."""
    W = torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale = 3.0
    G = scale * W
    step = 2 * torch.linalg.svdvals(G).mean() / scale
    assert (W - 0.999 * step * msgn(G)).norm() < W.norm() < (W - 1.001 * step * msgn(G)).norm()
    eye = torch.eye(7, dtype=torch.float64)
    muon = step_size.largest_stable_step(msgn, 1, scale * eye, eye, W)
    assert muon == pytest.approx(float(step), rel=1e-9)
    descent = step_size.largest_stable_step(lambda G: G, 100, scale * eye, eye, W)
    assert descent == pytest.approx(2 / scale, rel=1e-9)


def test_problem_has_the_prescribed_spectrum():
    G, B, A, D, largest = step_size.problem(1.0, "random bases", 10, 6, torch.Generator().manual_seed(0))
    assert torch.allclose(B @ D @ A, G)
    assert torch.allclose(torch.linalg.svdvals(G), 1 / torch.arange(1, 7, dtype=torch.float64))
    assert torch.linalg.eigvalsh(torch.kron(B, A)).max() == pytest.approx(largest)


def test_one_muon_step_in_closed_form():
    """H = I, square: f falls by |G|_*^2 / (2 tr K) at the best rate; no preconditioned step does better."""
    k = newton.spectrum(torch.tensor([100.0]), 6)
    D = torch.randn(1, 1, 1, 6, 6, generator=torch.Generator().manual_seed(5))[0, 0, 0]
    before = float((D.square() * k).sum() / 2)
    fall = float(torch.linalg.svdvals(D * k).sum() ** 2 / (2 * k.sum()))
    rates = torch.linspace(0.1, 4, 2000)
    cell = torch.tensor([100.0]), torch.zeros(1), torch.ones(6), 6
    muon, inverse = (newton.decreases(*cell, ridge, 1, rates, 1, 5) for ridge in (None, 0.0))
    assert float(muon) == pytest.approx(np.log(before / (before - fall)), rel=1e-3)
    assert inverse < muon


@pytest.mark.parametrize("ridge", [None, 0.3])
def test_one_noisy_step_in_closed_form(ridge):
    """Along O the best rate lowers f = tr(H D K D^T) / 2 by <G, O>^2 / (2 tr(H O K O^T))."""
    generator = torch.Generator().manual_seed(5)
    share = 2.0
    D, E = (torch.randn(1, 1, 1, 4, 6, generator=generator)[0, 0, 0] for _ in range(2))
    h = newton.spectrum(torch.tensor(30.0), 4)
    H = torch.diag(h)
    K = torch.diag(newton.spectrum(torch.tensor(100.0), 6))
    G = H @ D @ K
    noise = H.sqrt() @ E @ K.sqrt()
    noisy = G + noise * (share * G.square().sum() / (H.trace() * K.trace())).sqrt()
    O = msgn(noisy if ridge is None else noisy @ torch.linalg.inv(K + ridge * torch.eye(6)))
    before = float((D * G).sum() / 2)
    fall = float((G * O).sum() ** 2 / (2 * (O * (H @ O @ K)).sum()))
    rates = torch.linspace(0.01, 4, 2000)
    found = newton.decreases(torch.tensor([100.0]), torch.tensor([share]), h, 6, ridge, 1, rates, 1, 5)
    assert float(found) == pytest.approx(np.log(before / (before - fall)), rel=1e-3)


@pytest.mark.parametrize("shape", [(8, 32), (16, 16), (32, 8)])
@pytest.mark.parametrize("ridge", [None, 0.0])
def test_best_rate_is_inside_the_grid(shape, ridge):
    """Otherwise the map would compare the rules at the largest rate, not at the best."""
    conditions = torch.tensor([1.0, 100.0, 100.0])
    noises = torch.tensor([0.01, 0.01, 10.0])
    m, n = shape

    def best(steps, rates):
        return newton.decreases(conditions, noises, torch.ones(m), n, ridge, steps, rates, 2, 0).mean(1)

    for steps, rates in newton.RATES.items():
        assert (best(steps, rates) > best(steps, rates[[0, -1]])).all()


def test_no_condition_no_difference():
    cell = dict(conditions=torch.ones(1), noises=torch.ones(1), h=torch.ones(4), n=4, steps=3,
                rates=torch.tensor([0.1, 0.3]), repeats=2, seed=0)
    preconditioned = newton.decreases(ridge=0.0, **cell)
    assert torch.allclose(preconditioned, newton.decreases(ridge=None, **cell), atol=1e-5)


def test_layers_leave_the_weights(text):
    found = layers.measure_layers(0, 1, 1, **training.SMALL)
    model, _ = training.new_model(training.cpu_config(**training.SMALL))
    assert [name for name, *_ in found] == list(model.hidden_matrices())
    assert all(condition >= 1 and noise > 0 for _, condition, noise, _ in found)


def test_noise_of_layers_and_their_two_directions(text, monkeypatch):
    directions = []
    monkeypatch.setattr(layers, "msgn", lambda U: directions.append(U.clone()) or U)
    small = training.SMALL | dict(n_layer=1)
    noise = np.array([found[2] for found in layers.measure_layers(0, 0, 6, **small)])
    preconditioned = directions[0][0]  # of the q block of the first matrix
    plain = directions[1][0]
    config = training.cpu_config(**small, num_iterations=0, seed=0, data_seed=1)
    model, _ = training.new_model(config)
    shards = training.open_shards(config)
    gradients = []
    for i in range(24):
        batch = shards.batch(range(16 * i, 16 * i + 16))
        _, grams = layers.accumulate(model, [batch], list(model.hidden_matrices()), torch.float32)
        gradients.append([p.grad.clone() for p in model.hidden_matrices().values()])
        model.zero_grad(set_to_none=True)
        if i == 0:
            K = grams[0][0] / (16 * config.sequence_length)
            assert torch.allclose(plain, gradients[0][0][:32], atol=1e-6)
            ridge = 0.2 * K.diagonal().mean() * torch.eye(32)
            assert torch.allclose(preconditioned @ (K + ridge), plain, atol=1e-5)
    share = []  # the same from whole batches
    for one in zip(*gradients):
        g = torch.stack(one)
        variance = g.var(0).sum()
        share.append(float(variance / (g.mean(0).square().sum() - variance / 24)))
    assert np.median(noise / share) == pytest.approx(1, rel=0.3)


def test_first_update_has_the_step_size(monkeypatch):
    models = []

    def new_model(config):
        models.append(training.new_model(config))
        return models[-1]

    monkeypatch.setattr(step_size, "new_model", new_model)
    config = training.cpu_config(**training.SMALL, num_iterations=1, warmdown_iters=0, momentum=0.0,
                                 nesterov=False)
    start = training.new_model(config)[0].hidden_matrices()
    for optimizer, error in (("sgd", 1e-3), ("muon", 0.2)):
        step_size.losses_at(optimizer, 0.01, config, training.open_shards(config))
        end = models[-1][0].hidden_matrices()
        moved = torch.cat([(p - start[name]).flatten() for name, p in end.items()])
        assert float(moved.detach().square().mean().sqrt()) == pytest.approx(0.01, rel=error)


def test_critical_batch_size(monkeypatch):
    """Steps 10 (1 + b_c / b), give or take 1 % between seeds."""
    critical = {"Nesterov 0.95": 20, "momentum 0.95": 30, "Nesterov 0.95, decay": 20,
                "momentum 0.95, decay": 25, "Nesterov 0.5": 40}
    names = list(critical)
    wobble = [0.99, 1.0, 1.01]
    tasks = []

    def parallel(function, items):
        if items == names:
            assert function.keywords["seed"] == 100
            return [[0.01, 0.02, 0.04, 0.08]] * len(items)
        tasks.extend(items)
        steps = []
        for name, batch, _, seed, _ in items:
            b_c = critical[name] * wobble[(seed - names.index(name)) % 3]
            steps.append(10 * (1 + b_c / batch))
        return steps

    monkeypatch.setattr(batch_size, "parallel", parallel)
    monkeypatch.setattr(batch_size, "norms", lambda *_: np.ones((2, 400)))
    rows = batch_size.rows(batch_size.measure())
    found = {prediction: (measured, holds) for prediction, measured, holds in rows}
    measured, holds = found["more momentum lowers the critical batch size (b_c)"]
    assert measured.startswith("Nesterov 0.5 40, Nesterov 0.95 20; difference +20") and holds is True
    assert found["weight decay raises it, with Nesterov momentum"][1] is None
    assert found["weight decay raises it, with plain momentum"][1] is False
    pairs = {(batch, rate) for _, batch, rate, _, _ in tasks}
    assert pairs == {(8, 0.01), (32, 0.02), (128, 0.04), (512, 0.08)}
    assert {seed for *_, seed, _ in tasks} == set(range(6))


def test_rate_that_needs_the_fewest_steps(monkeypatch):
    for best in (0.04, 0.00125):
        def steps_to_target(variant, batch, rate, seed, most, best=best):
            return 10 + abs(np.log2(rate / best))

        monkeypatch.setattr(batch_size, "steps_to_target", steps_to_target)
        assert batch_size.tuned("Nesterov 0.95", 8, 0, 0.005, 600) == (10, best)


def test_steps_to_the_target(text, monkeypatch):
    config = batch_size.config_of("Nesterov 0.95", 8, 0.01, 0, 6)
    model, optimizers = training.new_model(config)
    losses = []
    test = training.open_shards(config, "input_val_bin").batch(range(256))
    for _ in training.training_steps(config, model, optimizers, training.open_shards(config)):
        losses.append(float(model(*test)[0].detach()))
    assert losses == sorted(losses, reverse=True)
    monkeypatch.setattr(batch_size, "TARGET", (losses[3] + losses[4]) / 2)
    assert batch_size.steps_to_target("Nesterov 0.95", 8, 0.01, 0, 6) == 4
    monkeypatch.setattr(batch_size, "TARGET", losses[-1] / 2)
    assert batch_size.steps_to_target("Nesterov 0.95", 8, 0.01, 0, 6) == 6


def test_matrices_come_with_their_polar_factors():
    X, Q, _ = polar.with_condition(100.0, 16, 2, torch.Generator().manual_seed(0))
    assert torch.allclose(polar.polar_express(X, 8), Q, atol=1e-3)


def test_sharpness_of_msgn_is_the_mean_curvature():
    generator = torch.Generator().manual_seed(0)
    h = torch.tensor([100.0, 10.0, 1.0, 0.1])
    for rotated in (False, True):
        H = sharpness.curvature(h, rotated, generator)
        found = sharpness.first_directions(H, torch.randn(4, 4, generator=generator))
        assert found["msgn"] == pytest.approx(float(h.mean()), rel=1e-4)
        assert found["msgn"] < found["gradient descent"]


def test_sharpness_by_double_backward():
    """The same second derivative by differences of the loss along the update."""
    loss, value, length, fall = sharpness.gpt_run("muon", 0.01, 0, 2, 2)[0]
    config = training.cpu_config(**training.SMALL, seed=0, data_seed=1, num_iterations=3, warmdown_iters=0,
                                 optimizer="muon", hidden_learning_rate=0.01)
    model, optimizers = training.new_model(config)
    shards = training.open_shards(config)
    steps = training.training_steps(config, model, optimizers, shards)
    next(steps)
    next(steps)
    matrices = list(model.hidden_matrices().values())
    start = sharpness.copies(model.parameters())
    before = sharpness.copies(matrices)
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
    decayed, _ = batch_size.norms("Nesterov 0.95, decay", 0.1, 60, 0)
    free, _ = batch_size.norms("Nesterov 0.95", 0.1, 60, 0)
    assert decayed.max() <= 1.21 / batch_size.DECAY < free.max()


def test_seeds_wrap_around():
    config = training.cpu_config(seed=2 ** 32 + 1, data_seed=2 ** 32)
    assert (config.seed, config.data_seed) == (1, 0)


def test_largest_fall_of_a_layer(text):
    """Of the loss on the next half batch, at the best of the rates."""
    small = training.SMALL | dict(n_layer=1)
    config = training.cpu_config(**small, num_iterations=20, warmdown_iters=0, seed=0, data_seed=1)
    model, optimizers = training.new_model(config)
    shards = training.open_shards(config)
    list(training.training_steps(config, model, optimizers, shards))
    batch = shards.batch(range(320, 336))
    _, grams = layers.accumulate(model, [batch], list(model.hidden_matrices()), torch.float32)
    W = model.hidden_matrices()["h.0.attn_proj.weight"]
    G = W.grad.clone()
    start = W.detach().clone()
    K = grams[1][0] / (16 * config.sequence_length)
    test = shards.batch(range(336, 344))
    ridge = 0.2 * K.diagonal().mean() * torch.eye(32)
    falls = []
    for U in (G @ torch.linalg.inv(K + ridge), G):
        losses = []
        for rate in (0.0, *0.01 * 2.0 ** np.arange(10)):
            with torch.no_grad():
                left, _, right = torch.linalg.svd(U)
                W.copy_(start - rate * left @ right)
                losses.append(float(model(*test)[0]))
        assert 1 < np.argmin(losses) < 10
        falls.append(losses[0] - min(losses))
    found = {name: ratio for name, _, _, ratio in layers.measure_layers(0, 20, 1, **small)}
    assert found["h.0.attn_proj.weight"] == pytest.approx(falls[0] / falls[1], rel=1e-2)


def test_track_gain_is_paired(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "ROOT", tmp_path)

    def add(folder, optimizer, momentum, steps, losses):
        for seed, loss in losses.items():
            path = tmp_path / f"records/cpu/{folder}/{optimizer}_{steps}_{seed}/run.json"
            path.parent.mkdir(parents=True)
            config = dict(optimizer=optimizer, momentum=momentum, num_iterations=steps, seed=seed)
            path.write_text(json.dumps(dict(config=config, final_val_loss=loss)))

    for folder, gain in (("2026-01-01_old", 9), ("2026-01-02_new", 0.2)):
        add(folder, "muon", 0.95, 600, {1: 2.0, 2: 3.0, 3: 4.0, 4: 99.0})
        add(folder, "newton_muon", 0.95, 600, {1: 2.0 - gain, 2: 3.1 - gain, 3: 3.9 - gain})
        add(folder, "newton_muon", 0.95, 564, {1: 7.0, 2: 7.0, 3: 7.0})
    add("2026-01-03_other", "muon", 0.9, 600, {1: 2.0})
    found, folder = layers.track_gain(0.95)
    assert folder == "2026-01-02_new" and found.mean == pytest.approx(0.2)
    assert found.high - found.mean == pytest.approx(4.3027 * 0.1 / 3 ** 0.5, rel=1e-3)
    words = "no two seeds of both muon and newton_muon with momentum 0.9; restore it from git"
    with pytest.raises(UserError, match=words):
        layers.track_gain(0.9)


def test_arm_difference_is_paired_and_corrected_for_all_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "ROOT", tmp_path)
    table = Table(tmp_path / "records/cpu" / layers.ARMS / "runs.csv")
    arms = dict(muon={21: 2.0, 22: 3.0, 23: 4.0}, all_but_mlp_proj={21: 2.2, 22: 3.1, 23: 4.1},
                half={21: 0.0})
    for arm, finals in arms.items():
        for seed, loss in finals.items():
            table.add(Point(arm, 600, 0.02, 0.002, "", seed), loss, {})
        table.add(Point(arm, 600, 0.02, 0.002, "", 100), 9.0, {})
    mean, width = layers.arm_difference("all_but_mlp_proj", "muon")
    assert mean == pytest.approx(0.4 / 3)
    # three pairs of arms, so 1 - 0.05 / 6 = 0.9917, with two degrees of freedom; t from x / sqrt(2 (1 - x^2))
    x = 2 * (1 - 0.05 / 6) - 1
    assert width == pytest.approx((2 / (1 - x * x)) ** 0.5 * x * (0.01 / 3) ** 0.5 / 3 ** 0.5)
    with pytest.raises(UserError, match="no two seeds of both half and muon; restore it from git"):
        layers.arm_difference("half", "muon")


def test_map_is_read_at_each_layers_shape(monkeypatch):
    """A map on which only wide matrices gain, and layers of which only mlp_proj does."""
    def measure_layers(*_, **__):
        ratios = {"c_attn": 0.7, "attn_proj": 0.7, "c_fc": 0.7, "mlp_proj": 1.4}
        return [(f"h.0.{name}.weight", 1e3, 0.5, ratio) for name, ratio in ratios.items()]

    def decreases(conditions, noises, h, n, ridge, steps, rates, repeats, seed):
        value = 1.0
        if ridge is not None:
            value = 2.0 if n > len(h) else 0.5
        return torch.full((len(conditions), repeats), value)

    monkeypatch.setattr(newton, "measure_layers", measure_layers)
    monkeypatch.setattr(newton, "decreases", decreases)
    rows = [measured for prediction, measured, _ in newton.rows(newton.measure("small"))
            if "says for each layer" in prediction]
    falls = [(1 - np.exp(-x)) / (1 - np.exp(-1)) for x in (0.5, 0.5, 0.5, 2.0)]
    assert len(rows) == 3
    for row in rows:
        assert "right for 4 of 4" in row and f"mean ratio {np.mean(falls):.2f} on the map" in row


def test_polar_methods_and_what_they_leave(text):
    X = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(X)
    for name in ("Muon, exact SVD", "Newton-Muon, exact SVD", "Muon, Polar Express 8"):
        assert torch.allclose(polar.METHODS[name][1](X), left @ right, atol=1e-2)
    assert polar.train("Muon, exact SVD", 0.01, 0, 2, 1024)[1] == 0


def test_polar_tunes_on_another_seed(monkeypatch):
    def parallel(_, tasks):
        found = []
        for method, rate, seed, *_ in tasks:
            best = 0.01 if seed == 100 else 0.02
            found.append((abs(rate - best) + 0.1 * seed, len(method)))
        return found

    monkeypatch.setattr(polar, "parallel", parallel)
    found = polar.results(["Muon, 1 step", "Muon, 5 steps"], 0, 3, (1, 1))
    assert np.allclose(found["Muon, 5 steps"], [[0.01, 0.11, 0.21], [13, 13, 13]])
    assert np.allclose(found["Muon, 1 step"][1], 12)


def test_polar_differences(monkeypatch):
    losses = {"Muon, 5 steps": 2.0, "Muon, exact SVD": 1.9, "Newton-Muon, 5 steps": 1.7,
              "Newton-Muon, exact SVD": 1.8}
    wobble = np.array([0.001, -0.001, 0.0])

    def results(methods, *_):
        found = {}
        for i, name in enumerate(methods):
            found[name] = losses[name] + np.roll(wobble, i), np.full(3, i / 10)
        return found

    monkeypatch.setattr(polar, "results", results)
    exact, _, gain = polar.loss_rows(polar.measure("small"))
    prediction, measured, holds = exact
    assert prediction.startswith("an exact msgn gives")
    assert measured.startswith("five steps minus exact: +0.1000 ±") and holds is True
    prediction, measured, holds = gain
    assert prediction.startswith("its gain is that of a spectrum which five steps can flatten")
    assert measured.startswith("gain +0.3000 ±") and ", +0.1000 ±" in measured and holds is True


def test_sharpness_rates_and_ratios():
    def points(loss, length, nds=1.0):
        return np.array([[loss + 0.1 * i, nds, length, 0.5] for i in range(20)])

    tried = {"Adam": {0.01: points(2.0, 0.3), 0.02: points(3.0, 0.6)},
             "Muon": {0.0025: points(2.5, 0.33), 0.005: points(2.0, 0.7)}}
    tuned, matched = sharpness.choose_rates(tried)
    assert tuned == {"Adam": 0.01, "Muon": 0.005} and matched == {"Adam": 0.01, "Muon": 0.0025}
    low, high, found = sharpness.compare({"Adam": np.stack([points(2.0, 0.3, 4.0)] * 3),
                                          "Muon": np.stack([points(2.5, 0.6, 1.0)] * 3)})
    assert (low, high) == pytest.approx((2.5, 3.9))
    assert found["NDS"][:3] == pytest.approx((4.0, 1.0, np.log(1 / 4)))
    assert found["NDS"][3] == np.inf  # equal seeds do not say how far off another would be
    assert found["length"][2] == pytest.approx(np.log(2))
    assert found["penalty"][:3] == pytest.approx((0.18, 0.18, 0.0))


def test_mean_sharpness_of_a_run():
    H = torch.diag(torch.tensor([9.0, 4.0, 1.0]))
    start = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    W = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([W], lr=0.3, betas=(0.9, 0.95), weight_decay=0.0)
    values = []
    for rate in (0.3, 0.2, 0.1):
        before = W.detach().clone()
        W.grad = H @ before
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        u = W.detach() - before
        values.append(float((u * (H @ u)).sum() / (u * u).sum()))
    assert np.ptp(values) > 1e-3
    loss, mean = sharpness.quadratic_run("Adam", 0.3, H, start, 3)
    assert mean == pytest.approx(np.mean(values))
    assert loss == pytest.approx(float((W * (H @ W)).detach().sum() / 2))


def test_cost_of_error_feedback(monkeypatch):
    """At the best rates its loss is 0.3 higher, with a spread of 0.01 over the seeds."""
    def losses(config, *_):
        best = 0.004
        floor = 2.0
        if config.optimizer != "muon":
            best = 4.0
            floor = 2.3 + 0.01 * config.seed
        return [floor + abs(np.log(config.hidden_learning_rate / best))] * config.num_iterations

    monkeypatch.setattr(convex, "training_steps", losses)
    monkeypatch.setattr(convex, "new_model", lambda config: (None, None))
    cost = convex.measure_cost(0)
    _, measured, holds = convex.cost_row(cost)
    assert measured == "0.310 ± 0.025 above Muon's 2.000; rates 4 and 0.004" and holds is True
    numbers = convex.measure("small") | dict(cost=cost)
    assert "0.310 ± 0.025" in convex.summary(numbers) and len(convex.figure(numbers).axes) == 3
