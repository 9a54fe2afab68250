"""The lab: what its script prints, files and refuses, and the predictions that are exact.

Each experiment runs at its smallest size.
"""
import functools
import importlib
import json
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from scipy import stats

from harness.estimates import Estimate
from lab import (decoupling, descent, exponent, factorisation, heavy_tails, in_context, interval, judge,
                 newton, sign_noise)
from optimizers.polar_muon import msgn
from scripts import lab as script
from train_gpt2 import UserError

MINE = ("factorisation", "in_context", "decoupling", "sign_noise", "convex", "heavy_tails")


@pytest.fixture(scope="module")
def result():
    """result(name): (module, numbers) of the experiment at its smallest size, measured once."""
    @functools.cache
    def measured(name):
        module = importlib.import_module(f"lab.{name}")
        return module, json.loads(json.dumps(module.measure("small")))  # as they come out of the file
    return measured


# the experiments


@pytest.mark.parametrize("name", MINE)
def test_result_is_complete(result, name):
    module, numbers = result(name)
    assert "arXiv:2" in module.SOURCE
    axes = [ax for ax in module.figure(numbers).axes if ax.has_data()]
    assert axes and all(ax.get_xlabel() and ax.get_ylabel() and ax.get_title() for ax in axes)
    assert module.summary(numbers).endswith(".")
    for prediction, measured, verdict in module.rows(numbers):
        assert isinstance(prediction, str) and prediction and isinstance(measured, str) and measured
        assert verdict in (True, False, None)


@pytest.mark.parametrize("name, words, count", [
    ("decoupling", "aligned start: exact", 1), ("decoupling", "10 iterations", 2), ("convex", "conserved", 4),
    ("convex", "error feedback: f comes", 1), ("factorisation", "Muon: ", 1),
    ("factorisation", "gradient descent", 1)])
def test_exact_predictions_hold(result, name, words, count):
    module, numbers = result(name)
    verdicts = [verdict for prediction, _, verdict in module.rows(numbers) if words in prediction]
    assert verdicts == [True] * count


def test_sign_noise_grows_like_the_dimension(result):
    _, numbers = result("sign_noise")
    sparse, _ = sign_noise.fitted(numbers["cases"]["sparse"])
    dense, _ = sign_noise.fitted(numbers["cases"]["dense"])
    assert abs(sparse - 1) < 0.1 and abs(dense) < 0.1


# their parts, against something independent


def test_verdict_needs_the_whole_interval():
    assert [judge(x, 0.1, low=1) for x in (1.11, 1.09, 0.91, 0.89)] == [True, None, None, False]
    assert [judge(x, 0.1, 0.9, 1.1) for x in (1.0, 1.05, 1.21)] == [True, None, False]
    assert judge(5, float("inf"), high=9) is None


def test_interval_of_three_repetitions():
    mean, width = interval(np.array([1.0, 2.0, 3.0]))
    assert mean == 2 and width == pytest.approx(4.303 / 3 ** 0.5, rel=1e-3)  # 4.3 standard errors, not 2


def test_one_repetition_has_no_interval():
    assert interval([3.0]) == (3.0, float("inf"))


def test_exponent_and_its_interval():
    x = torch.logspace(0, 3, 50, dtype=torch.float64)
    noise = torch.randn(200, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = [exponent(x, 5 * x ** 0.7 * torch.exp(0.3 * e)) for e in noise]
    assert sum(abs(slope - 0.7) < width for slope, width in found) in range(180, 199)  # 95 % of 200


@pytest.mark.parametrize("module", [factorisation, in_context])
def test_gradient_is_that_of_the_error(module):
    gradient, error, start = module.problem(10, 2, torch.Generator().manual_seed(0))
    away = torch.randn(start.shape, dtype=start.dtype, generator=torch.Generator().manual_seed(1))
    X = (start + 0.1 * away).requires_grad_()
    measured = error(X) ** 2 if module is factorisation else error(X)  # both proportional to the loss
    slope, = torch.autograd.grad(measured.sum(), X)
    G = gradient(X.detach())
    assert torch.allclose(slope / slope.norm(), G / G.norm())


def test_in_context_loss_is_that_of_prompts():
    generator = torch.Generator().manual_seed(0)
    U, l, e = in_context.spectra(5, 1, generator, d=3, N=10)
    gamma = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    x = torch.randn(200_000, 11, 3, dtype=torch.float64, generator=generator)
    w = torch.randn(200_000, 3, dtype=torch.float64, generator=generator)
    x = x @ ((U[0] * l.sqrt()) @ U[0].mT)
    y = torch.einsum("pnd,pd->pn", x, w)
    answer = torch.einsum("pd,de,pne,pn->p", x[:, 10], gamma, x[:, :10], y[:, :10]) / 10
    L = (U[0] * l) @ U[0].mT
    E = (U[0] * e) @ U[0].mT
    exact = torch.trace(L @ gamma @ E @ gamma.mT - 2 * L @ gamma @ L + L)
    assert abs((answer - y[:, 10]).square().mean() / exact - 1) < 0.05


def test_adam_is_that_of_torch():
    gradient, error, start = factorisation.problem(3, 2, torch.Generator().manual_seed(0))
    W = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([W], lr=0.1, eps=1e-12)
    for _ in range(20):
        W.grad = gradient(W.detach())
        optimizer.step()
    errors = descent.descend("Adam", gradient, error, start, torch.tensor([0.1]), torch.tensor([1.0]), 0, 20)
    assert torch.allclose(errors[-1, 0], error(W.detach()), rtol=1e-6)


def test_heavy_tails_recursion():
    """Without noise or polar factor, in scalars: 1 - beta = T^-(3/5), eta = T^-(4/5) at tail index 1.5."""
    T = 50
    quiet = SimpleNamespace(standard_t=lambda df: np.zeros(df.shape))
    found = heavy_tails.mean_norms(lambda U: U, [1.5], T, 1, quiet)
    W = 2.0
    M = 0.0
    norms = []
    for _ in range(T):
        norms.append(W * 8 ** 0.5)
        M += T ** -0.6 * (W - M)
        W -= T ** -0.8 * (M + T ** -0.6 * (W - M))
    assert found.item() == pytest.approx(np.mean(norms))
    assert [heavy_tails.predicted(alpha) for alpha in (2.0, 1.5)] == pytest.approx([-1 / 4, -1 / 5])


def test_heavy_tails_noise_is_students_t():
    drawn = []
    rng = np.random.default_rng(0)

    def standard_t(df):
        drawn.append(rng.standard_t(df))
        return drawn[-1]

    heavy_tails.mean_norms(lambda U: U, [1.2, 2.0], 40, 40, SimpleNamespace(standard_t=standard_t))
    tails = [0.5, 0.1, 0.01]
    for i, df in enumerate((1.3, 2.1)):
        x = np.abs(np.stack(drawn)[:, i])
        beyond = [(x > stats.t.isf(tail / 2, df)).mean() for tail in tails]
        assert beyond == pytest.approx(tails, rel=0.05)


def test_heavy_tails_moments():
    assert heavy_tails.moment(2, 2.1) == pytest.approx(stats.t.var(2.1))
    assert heavy_tails.moment(1, 3) == pytest.approx(3 ** 0.5 * 2 / np.pi)


def test_heavy_tails_bound():
    """Against sums over explicit weights, at alpha = 2."""
    T, drop, eta = 10_000, 0.01, 0.001  # of the order T^-1/2 and T^-3/4
    w = np.array([drop * (2 - drop), *(drop * (1 - drop) ** np.arange(2, 5000))])  # of the gradients in U
    drift = eta * 8 ** 0.5 * (w * np.arange(len(w))).sum()
    start = 32 ** 0.5 * 0.99 ** 2 / 0.01 / T
    noise = 8 * (21 * (w * w).sum()) ** 0.5
    expected = 16 / (eta * T) + 4 * eta + 2 * 8 ** 0.5 * (drift + start + noise)
    assert heavy_tails.bound(2.0, T) == pytest.approx(expected, rel=1e-6)


def test_exact_muon_at_condition_1000():
    """The counts that the page shows; the best is inside the grid. Five Newton-Schulz steps need over 30."""
    for module, target, count in ((factorisation, 1e-5, 21), (in_context, 1e-6, 14)):
        problem = module.problem(1000, 5, torch.Generator().manual_seed(0))
        exact, errors, end = descent.fewest_iterations("Muon", problem, target, 100)
        assert abs(exact.median() - count) <= 1 and not end and (errors.amin(0) <= target).all()
        assert descent.fewest_iterations("Muon, Newton-Schulz", problem, target, 30)[0].isinf().all()


def test_best_at_an_end_leaves_the_verdict_open(monkeypatch):
    problems = [in_context.problem(c, 2, torch.Generator().manual_seed(0)) for c in (3, 10)]
    monkeypatch.setattr(descent, "judge", lambda *interval, high: True)
    text, within = descent.growth((3, 10), descent.measure_growth("Muon", problems, 1e-6, 100))
    assert "at an end" not in text and within is True
    monkeypatch.setattr(descent, "DECAYS", descent.DECAYS[:9])  # down to 0.7
    text, within = descent.growth((3, 10), descent.measure_growth("Muon", problems, 1e-6, 100))
    assert text.endswith("best at an end of the grid at condition 3, 10") and within is None


def test_sign_noise_without_momentum_is_a_known_process():
    """SGD's x_0 is an autoregression, Gaussian with variance sigma^2 rate / (2 - rate) in the end.

    T follows from it and the slopes.
    """
    rate = 2.0 ** -5
    d = 50
    x = 4.0
    total = 0.0
    found = sign_noise.steps("sparse", lambda g: g, d, np.full((1, 40), rate), np.random.default_rng(0))
    for t in range(1, 10 ** 5):
        sd = sign_noise.SIGMA * (rate / (2 - rate) * (1 - (1 - rate) ** (2 * t - 2))) ** 0.5
        total += (2 / np.pi) ** 0.5 * sd + 2 * min(x / 2, 1)
        if total <= t:
            break
        x -= rate * 2 / d * min(x / 2, 1)
    assert found.mean() == pytest.approx(t, rel=0.02)


def test_dense_noise_has_the_same_norm_in_every_dimension():
    """At x = 4 SGD is given the clipped slope 2 / d, and noise of standard deviation sigma / sqrt(d)."""
    seen = []

    def stay(g):
        seen.append(g)
        return 0 * g

    sign_noise.steps("dense", stay, 100, np.ones((1, 500)), np.random.default_rng(0), limit=3)
    assert np.stack(seen).std() == pytest.approx(0.5, rel=0.02)
    assert np.stack(seen).mean() == pytest.approx(0.02, abs=0.01)


def test_muon_is_sign_descent_on_singular_values():
    """Exact Muon's T on the matrices is SignSGD's in coordinates, at one rate.

    No whole number of its steps leads to exactly 0.
    """
    matrix = sign_noise.muon_steps(msgn, 6, np.random.default_rng(0), 40, 0.23)
    coordinates = sign_noise.steps("sparse", np.sign, 6, np.full((1, 200), 0.23), np.random.default_rng(1))
    a, x = interval(matrix)
    b, y = interval(coordinates[0])
    assert abs(a - b) < np.hypot(x, y) and max(x, y) < 0.2 * b


def test_interval_and_averaging_of_the_map(monkeypatch):
    """The jackknife of a ratio of means against its formula.

    The triangles are the circles times the share that momentum leaves.
    """
    layers = [("h.0.mlp_proj.weight", 100.0 * i, 5.0, 1 + i / 10) for i in (1, 2, 3, 4)]
    monkeypatch.setattr(newton, "measure_layers", lambda *args, **settings: layers)
    monkeypatch.setattr(newton, "track_gain", lambda momentum: (Estimate(0.0, -1.0, 1.0), "a record"))
    numbers = newton.measure("small")
    cell = torch.tensor([100.0]), torch.tensor([0.01]), torch.ones(8), 32
    a = newton.decreases(*cell, 0.0, 1, newton.RATES[1], 4, 0)[0].double().numpy()
    b = newton.decreases(*cell, None, 1, newton.RATES[1], 4, 0)[0].double().numpy()
    left_out = np.array([np.delete(a, i).mean() / np.delete(b, i).mean() for i in range(4)])
    error = (3 / 4 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5  # (n - 1) / n times the sum of squares
    row, = (measured for prediction, measured, _ in newton.rows(numbers)
            if prediction.startswith("1 step, H = I, wide"))
    ratio, width = (float(word.strip(",")) for word in row.split()[1:4:2])
    assert ratio == pytest.approx(a.mean() / b.mean(), abs=0.006)
    assert width == pytest.approx(stats.t.ppf(0.975, 3) * error, abs=0.006)
    w = np.array([1.95, *0.95 ** np.arange(2, 1000)])  # of the gradients in G + 0.95 M
    lines = [line for line in newton.figure(numbers).axes[0].lines if len(line.get_ydata()) == 4]
    marks = {line.get_marker(): line.get_ydata()[0] for line in lines}
    assert marks["^"] - marks["o"] == pytest.approx(np.log10((w * w).sum() / w.sum() ** 2), abs=1e-6)


# the script


def test_run_files_its_results(call, tmp_path):
    done = call(script, "decoupling", "--size", "small", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    filed = json.loads((tmp_path / "decoupling.json").read_text())
    rows = decoupling.rows(filed["numbers"])
    assert rows and filed["command"] == "python scripts/lab.py decoupling --size small"
    assert all(prediction in done.stdout for prediction, *_ in rows)
    assert matplotlib.image.imread(tmp_path / "decoupling.png").std() > 0
    assert decoupling.summary(filed["numbers"]) in (tmp_path / "README.md").read_text()
    again = call(script, "decoupling", "--size", "small", "--out", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again/decoupling.json").read_text())["numbers"] == filed["numbers"]


def test_pictures_and_page_are_made_again_without_measuring(call, tmp_path, monkeypatch):
    done = call(script, "decoupling", "--size", "small", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "decoupling.png").unlink()
    (tmp_path / "README.md").write_text("stale")

    def fail(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(decoupling, "measure", fail)
    done = call(script, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == made


@pytest.mark.parametrize("error, code, sentence", [
    (UserError("no shards"), 1, "error: no shards"),
    (KeyboardInterrupt(), 130, "\ninterrupted; what was complete")])
def test_page_has_what_ended_before_an_error(call, tmp_path, monkeypatch, error, code, sentence):
    def fail(*_):
        raise error

    monkeypatch.setattr(importlib.import_module("lab.convex"), "measure", fail)
    done = call(script, "decoupling", "convex", "--size", "small", "--out", tmp_path)
    assert done.returncode == code and done.stderr.startswith(sentence)
    assert (tmp_path / "README.md").read_text() == script.page(script.filed(tmp_path))


def test_page_shows_what_fails(tmp_path, monkeypatch):
    convex = importlib.import_module("lab.convex")
    monkeypatch.setattr(convex, "__doc__", "Why\n?\n\nBecause.")
    rows = [("a | b", "1", True), ("c", "2", False), ("d", "3", None)]
    monkeypatch.setattr(convex, "rows", lambda numbers: rows)
    monkeypatch.setattr(convex, "summary", lambda numbers: "So.")
    script.write_result(tmp_path / "convex.json", dict(command="python", seconds=1.0, torch="2", numbers={}))
    text = script.page(script.filed(tmp_path))
    for line in ("| Why ? | 1 | 1 | 1 |", "| a \\| b | 1 | holds |", "| c | 2 | **fails** |",
                 "| d | 3 | open |"):
        assert line in text


def test_numbers_are_filed_as_they_are(tmp_path):
    numbers = dict(a=[1.5, [float("inf"), 2]], b={"c": None}, d=0.1)
    script.write_result(tmp_path / "x.json", dict(command="python", seconds=1.0, torch="2", numbers=numbers))
    filed = json.loads((tmp_path / "x.json").read_text())
    assert filed == dict(command="python", seconds=1.0, torch="2", numbers=numbers)


@pytest.mark.parametrize("text, what", [
    ("{", "Expecting"), ("[]", "it lacks command"), ('{"rows": []}', "it lacks command"),
    ('{"command": "", "seconds": 0, "torch": "2", "numbers": {}}', "it lacks the number 'runs'")])
def test_damaged_result_is_named(call, tmp_path, text, what):
    (tmp_path / "convex.json").write_text(text)
    done = call(script, "--out", tmp_path)
    assert done.returncode == 1 and "from git" in done.stderr
    assert f"error: {tmp_path / 'convex.json'} cannot be read ({what}" in done.stderr


def test_page_is_up_to_date():
    page = script.page(script.filed(script.RESULTS))
    filed = (script.RESULTS / "README.md").read_text(encoding="utf-8")
    assert filed == page, "stale; run `python scripts/lab.py`"
    for path in script.RESULTS.glob("*.json"):
        assert path.with_suffix(".png").exists() and path.stem in script.EXPERIMENTS
        command = json.loads(path.read_text())["command"]
        assert command == f"python scripts/lab.py {path.stem}"  # a full run, seed 0


def test_every_experiment_is_listed():
    listed = {name for name in script.EXPERIMENTS if (script.ROOT / f"lab/{name}.py").exists()}
    paths = [path for path in script.ROOT.glob("lab/*.py") if "\ndef measure(" in path.read_text()]
    assert listed == {path.stem for path in paths}


@pytest.mark.parametrize("arguments, words", [
    (["nope"], "no experiment is called 'nope'; there are factorisation"),
    (["convex", "--seed", "-1"], "--seed -1: must be at least 0"),
    (["convex", "--out", "FILE"], "cannot be written: File exists; name another folder"),
    (["convex", "--out", "FILE/folder"], "cannot be written: Not a directory"),
    (["decoupling", "--seed", "1", "--out", "FILED"], "name another folder with --out"),
    (["decoupling", "--size", "small", "--out", "FILED"], "name another folder with --out")])
def test_refusals_write_nothing(call, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr(script, "RESULTS", tmp_path / "FILED")
    (tmp_path / "FILE").write_text("in the way")
    done = call(script, *(str(tmp_path / word) if word.startswith("FILE") else word for word in arguments))
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") <= 1 and not done.stdout
    assert [*tmp_path.iterdir()] == [tmp_path / "FILE"]
