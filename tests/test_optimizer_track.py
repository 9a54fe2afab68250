"""The optimizer track: its model, its Muon and its configurations."""
import json
import math
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import golden
from conftest import (
    PATHS, ROOT, TINY, arguments, fork, logged, refused, same_weights, sequence, toml, torchrun,
    write_config)
from harness.zoo.training import state_bytes
from models.optimizer_track import GPT
from optimizers.track_muon import TrackMuon, TrackNewtonMuon, TrackPowerNewtonMuon, orthogonal
from plain import gradients, normal, trained
from scripts import bench, sample
from train_gpt2 import Config, Muon, build_optimizers, learning_rate_scale, load_config, make_model

MODEL = "models.optimizer_track:GPT"
GOLDEN = "OPTIMIZER_TRACK_GOLDEN"  # the environment variable that names a file
SHAPES = [(16, 16), (64, 16), (16, 64), (48, 16)]  # the last is a fused q, k, v


@pytest.fixture
def track(tiny):
    """The configuration of a tiny model of the track."""
    return replace(tiny, model=MODEL)


def trained_a_little(config):
    """A model without the zeros of the first step."""
    torch.manual_seed(0)
    model = make_model(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


# the model


def norm64(x, gains=1.0):
    return gains * x / (x.pow(2).mean(-1, keepdim=True) + 2.0 ** -23).sqrt()


def rotate64(row, t):
    """One head's vector (d,) at position t. The second half of the pairs does not turn."""
    half = len(row) // 2
    turning = half // 2
    out = row.clone()
    for i in range(turning):
        angle = t * 1024.0 ** -(i / (turning - 1))
        a = row[i]
        b = row[i + half]
        out[i] = a * math.cos(angle) + b * math.sin(angle)
        out[i + half] = b * math.cos(angle) - a * math.sin(angle)
    return out


def attention64(q, k, v):
    """Causal attention of one head, position by position: (T, d)."""
    q = torch.stack([rotate64(norm64(row), t) for t, row in enumerate(q)])
    k = torch.stack([rotate64(norm64(row), t) for t, row in enumerate(k)])
    y = torch.zeros_like(v)
    for t in range(len(q)):
        y[t] = torch.softmax(0.12 * k[:t + 1] @ q[t], 0) @ v[:t + 1]
    return y


def logits64(weights, idx, n_layer, n_head):
    """(logits (T, V) of the tokens idx (T,), {name: inputs of that layer})"""
    inputs = {}

    def linear(name, z):
        inputs[f"{name}.weight"] = z
        return z @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = norm64(weights["embed.weight"][idx], weights["norm1.gains"])
    for i in range(n_layer):
        z = norm64(x, weights[f"blocks.{i}.norm1.gains"])
        heads = [linear(f"blocks.{i}.attn.{name}", z).chunk(n_head, 1) for name in "qkv"]
        y = torch.cat([attention64(*head) for head in zip(*heads)], 1)
        x = x + linear(f"blocks.{i}.attn.proj", y)
        h = linear(f"blocks.{i}.mlp.fc", norm64(x, weights[f"blocks.{i}.norm2.gains"]))
        x = x + linear(f"blocks.{i}.mlp.proj", h.clamp(min=0) ** 2)
    logits = linear("proj", norm64(x, weights["norm2.gains"]))
    return 15 * logits / (logits ** 2 + 225).sqrt(), inputs


def test_model_agrees_with_its_equations_in_float64(track):
    model = trained_a_little(track)
    with torch.no_grad():
        model.proj.weight *= 20  # so that the soft cap matters
    names = list(model.hidden_matrices())
    assert len(names) == 6 * 2
    idx = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(1))
    targets = idx.roll(-1, 1)
    loss, grams = model(idx, targets, names)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    logits, inputs = logits64(weights, idx[0], 2, 2)
    assert 10 < logits.abs().max() < 15
    torch.testing.assert_close(model.logits(idx)[0].double(), logits, rtol=1e-4, atol=1e-4)
    expected = (torch.logsumexp(logits, 1) - logits[torch.arange(16), targets[0]]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gram in zip(names, grams, strict=True):
        for block, part in zip(gram, inputs[name].split(16, dim=1), strict=True):
            torch.testing.assert_close(block.double(), part.T @ part, rtol=1e-4, atol=1e-3)
    loss.backward()
    expected.backward()
    for name, p in model.named_parameters():
        assert (p.grad - weights[name].grad).norm() < 1e-4 * weights[name].grad.norm(), name


def test_initial_values():
    torch.manual_seed(0)
    model = GPT(Config(n_layer=2, n_head=2, n_embd=128, vocab_size=1000, sequence_length=8))
    for name, p in model.named_parameters():
        if name.endswith("gains"):
            assert (p == 1).all()
        elif name.endswith("bias") or "proj" in name:
            assert (p == 0).all(), name
        else:
            variance = 1 if name == "embed.weight" else 0.33 / p.size(1)
            assert p.var().item() == pytest.approx(variance, rel=0.05), name
    idx = torch.randint(1000, (2, 8))
    assert model(idx, idx)[0].item() == pytest.approx(math.log(1000), rel=1e-6)


def test_number_of_parameters():
    config = load_config([str(ROOT / "configs/track3_muon.toml")])
    with torch.device("meta"):
        model = make_model(config)
    matrices = 12 * 12 * 768 ** 2
    assert sum(p.numel() for p in model.hidden_matrices().values()) == matrices
    biases = 12 * (4 + 4 + 1) * 768 + 50304
    gains = (12 * 2 + 2) * 768
    assert model.num_parameters() == matrices + 2 * 50304 * 768 + biases + gains


@pytest.mark.skipif(GOLDEN not in os.environ, reason=f"{GOLDEN} names no file (2 MB, so not in git)")
def test_golden_vectors():
    errors = golden.errors_of(os.environ[GOLDEN])
    assert golden.within_tolerance(errors), errors


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """A file of the golden vectors' form, by the equations in float64."""
    model = trained_a_little(Config(n_layer=1, n_head=1, n_embd=128, vocab_size=64, sequence_length=96,
                                    model=MODEL))
    rows = torch.randint(64, (2, 97), generator=torch.Generator().manual_seed(1))
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    losses = []
    for row in rows:
        logits, _ = logits64(weights, row[:-1], 1, 1)
        losses.append(F.cross_entropy(logits, row[1:]))
    loss = sum(losses) / 2
    loss.backward()
    arrays = {"idx": rows.numpy(), "loss": loss.detach().numpy()}
    for name, p in weights.items():
        arrays[f"weight/{name}"] = p.detach().float().numpy()
        arrays[f"grad/{name}"] = p.grad.float().numpy()
    for name in ("blocks.0.attn.q.weight", "blocks.0.mlp.fc.weight", "blocks.0.mlp.proj.weight"):
        W = weights[name].detach()
        step = 0.025 * math.sqrt(max(1, W.size(0) / W.size(1))) * iterated(weights[name].grad)
        for _ in range(2):  # the average of equal gradients has their direction
            W = (1 - 0.025 * 0.05) * W - step
        arrays[f"after_two_muon_steps/{name}"] = W.float().numpy()
    path = tmp_path_factory.mktemp("vectors") / "optimizer_track_1x128.npz"
    np.savez(path, **arrays)
    return path


def iterated(U, steps=12):
    """U (m, n), divided by its norm, with the iteration's polynomial of its singular values."""
    left, values, right = torch.linalg.svd(U, full_matrices=False)
    values = values / values.norm()
    for _ in range(steps):
        values = 2 * values - 1.5 * values ** 3 + 0.5 * values ** 5
    return left @ torch.diag(values) @ right


def test_replay(vectors):
    assert golden.within_tolerance(golden.errors_of(vectors))


@pytest.mark.parametrize("name, value, wrong", [
    ("models.optimizer_track.ATTENTION_SCALE", 0.125, "loss"),
    ("models.optimizer_track.SOFT_CAP", 16.0, "loss"),
    ("models.optimizer_track.ROTARY_BASE", 1000, "gradient of blocks.0.attn.q.weight"),
    ("optimizers.track_muon.orthogonal", lambda U, _: orthogonal(U, 9),
     "two steps of blocks.0.attn.q.weight"),
])
def test_replay_notices_another_rule(vectors, monkeypatch, name, value, wrong):
    monkeypatch.setattr(name, value)
    errors = golden.errors_of(vectors)
    assert not golden.within_tolerance({wrong: errors[wrong]})


# its Muon


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_iteration_is_its_polynomial(shape):
    U = normal(2, *shape)
    expected = torch.stack([iterated(u, 12) for u in U])
    torch.testing.assert_close(orthogonal(U), expected, rtol=0, atol=1e-9)
    assert torch.linalg.svdvals(orthogonal(U)).sub(1).abs().max() < 1e-6


def test_directions_down_to_a_thousandth_count_in_full():
    values = torch.logspace(0, -3, 16, dtype=torch.float64)
    Q, _ = torch.linalg.qr(normal(16, 16))
    found = torch.linalg.svdvals(orthogonal(Q * values))
    assert found.sub(1).abs().max() < 1e-3


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_track_muon_follows_its_equations(shape, nesterov):
    lr, decay, momentum = 0.025, 0.05, 0.9
    m, n = shape
    W = normal(m, n, seed=1)
    grads = gradients(4, m, n)
    found = trained(TrackMuon, W, grads, lr=lr, weight_decay=decay, momentum=momentum, nesterov=nesterov)
    M = torch.zeros(m, n, dtype=torch.float64)
    for G in grads:
        M = momentum * M + (1 - momentum) * G
        U = momentum * M + (1 - momentum) * G if nesterov else M
        blocks = U.split(n) if m == 3 * n else [U]  # a fused q, k, v
        scale = 1.0 if m == 3 * n else math.sqrt(max(1, m / n))
        X = torch.cat([iterated(block) for block in blocks])
        W = (1 - lr * decay) * W - lr * scale * X
    torch.testing.assert_close(found, W, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_rates_convert_to_those_of_muon(shape, monkeypatch):
    """With the same iteration, Muon takes the same steps at lr / sqrt(n) and weight_decay sqrt(n)."""
    m, n = shape
    W = normal(m, n, seed=1)
    grads = gradients(3, m, n)
    found = trained(TrackMuon, W, grads, lr=0.02, weight_decay=0.1)
    monkeypatch.setattr("train_gpt2.newton_schulz", lambda U, steps: orthogonal(U))
    muon = trained(Muon, W, grads, lr=0.02 / math.sqrt(n), weight_decay=0.1 * math.sqrt(n))
    torch.testing.assert_close(found, muon, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind, settings, power", [
    (TrackNewtonMuon, {}, 1.0),
    (TrackPowerNewtonMuon, {}, 0.5),
    (TrackPowerNewtonMuon, {"power": 0.25}, 0.25),
])
def test_preconditioned_step(kind, settings, power):
    W = torch.nn.Parameter(normal(16, 64, seed=1))
    before = W.detach().clone()
    optimizer = kind([W], lr=0.03, ridge=0.2, ewma=0.95, **settings)
    Z = normal(4, 50, 16, seed=2)  # of each quarter of the inputs
    gram = (Z.mT @ Z).float()
    optimizer.refresh([gram.clone()], 50)
    W.grad = normal(16, 64, seed=3)
    optimizer.step()
    parts = []
    for G, block in zip(W.grad.split(16, 1), gram.double()):
        K = 0.95e-3 * torch.eye(16) + 0.05 / 50 * block
        K += (0.2 * K.trace() / 16 + 1e-8) * torch.eye(16)
        values, V = torch.linalg.eigh(K)
        parts.append(G @ V @ torch.diag(values ** -power) @ V.T)
    expected = before - 0.03 * iterated(torch.cat(parts, 1))
    torch.testing.assert_close(W.detach(), expected, rtol=0, atol=1e-5)


# its configurations


def settings(name, *keys):
    """{kind of parameter: values of its settings `keys`}, of a small model with this configuration."""
    small = dict(n_layer=2, n_head=1, n_embd=32, vocab_size=256)
    config = load_config([str(ROOT / f"configs/{name}.toml"), *arguments(small)])
    model = make_model(config)
    kinds = {p: re.sub(r"blocks\.\d+\.|\.weight", "", name) for name, p in model.named_parameters()}
    found = {}
    for optimizer in build_optimizers(model, config):
        for group in optimizer.param_groups:
            values = tuple(group.get(key) for key in keys)
            for p in group["params"]:
                assert found.setdefault(kinds[p], values) == values
    return found


RESULT_36 = {"embed": (0.7, 0.001), "proj": (0.004, 0.001), "gains": (0.015, 0.001), "bias": (0.015, 0.001)}
RESULT_15 = {"embed": (0.3, 0), "proj": (1 / 320, 0), "gains": (0.01, 0), "bias": (0.01, 0)}
KINDS_15 = {"attn.q": (0.02, 0.025), "attn.k": (0.02, 0.025), "attn.v": (0.02, 0.025),
            "attn.proj": (0.025, 0.025), "mlp.fc": (0.03, 0.0375), "mlp.proj": (0.03, 0.025)}


@pytest.mark.parametrize("name, hidden, rest", [
    ("track3_muon", dict.fromkeys(KINDS_15, (0.025, 0.05)), RESULT_36),
    ("track3_newton_muon_result_15", KINDS_15, RESULT_15),
    ("track3_newton_muon", KINDS_15, RESULT_36),
    ("track3_power_newton_muon", KINDS_15, RESULT_36),
])
def test_rates_are_the_published_ones(name, hidden, rest):
    for kind, values in settings(name, "lr", "weight_decay").items():
        expected = hidden.get(kind) or rest[kind.rpartition(".")[2]]
        assert values == pytest.approx(expected), kind
    for kind, (betas, eps) in settings(name, "betas", "eps").items():
        if kind not in hidden:
            assert betas == (0.8, 0.95)
            assert eps * 524288 == pytest.approx(1e-10, rel=0.01)  # of sums
    others = settings(name, "momentum", "nesterov", "ns_steps", "power", "refresh_interval")
    for kind, values in others.items():
        if kind in hidden:
            power = 0.5 if "power" in name else None
            assert values == (0.95, True, 12, power, 64 if "newton" in name else None)


@pytest.mark.parametrize("name", ["track3_muon", "track3_newton_muon"])
def test_rates_fall_over_the_last_70_percent(name):
    config = load_config([str(ROOT / f"configs/{name}.toml")])
    N = config.num_iterations
    for step in range(N):
        expected = min(1.0, (1 - step / N) / 0.7)
        assert learning_rate_scale(config, step) == pytest.approx(expected)


# training


NEWTON = dict(model=MODEL, optimizer="optimizers.track_muon:TrackNewtonMuon", hidden_learning_rate=0.02,
              optimizer_args='{"refresh_interval": 3}')


def test_the_loss_falls_and_a_run_continues_bit_for_bit(start, tmp_path):
    fields = dict(NEWTON, num_iterations=30, save_every=20, vocab_size=256)
    groups = '{"embed.weight": {"lr": 0.1}, "*.bias": {"lr": 0.003}, "blocks.1.*": {"weight_decay": 0.1}}'
    assert start(run_name="whole", groups=groups, **fields).returncode == 0
    losses = logged(tmp_path / "logs/whole")
    assert losses[0, "val_loss"] == pytest.approx(math.log(256), rel=1e-5)
    assert losses[30, "val_loss"] < 3
    shutil.copytree(tmp_path / "logs/whole", tmp_path / "logs/part")
    (tmp_path / "logs/part/checkpoints/step_000030.pt").unlink()
    done = start(run_name="part", groups=groups, resume="auto", **fields)
    assert "resumed at step 20" in done.stdout
    assert same_weights(tmp_path / "logs/part", tmp_path / "logs/whole")
    assert logged(tmp_path / "logs/part") == losses


def test_losses_on_several_processes(shards, tmp_path):
    """Q, k and v have the same inputs, but each its own K, which another process may keep."""
    groups = []
    for processes in (1, 2, 3):
        config = write_config(tmp_path / f"{processes}.toml", shards, **NEWTON,
                              device_batch_size=4 if processes == 1 else 2)
        groups.append((processes, [[str(config), "--run_name", str(processes)]]))
    _, reports = sequence(*groups)
    one = logged(tmp_path / "logs/1")
    for processes in (2, 3):
        assert logged(tmp_path / f"logs/{processes}") == pytest.approx(one, rel=2e-4)
    grams = (1 + 3) * 2 * (5 + 4) * 4 * 16 ** 2  # bytes: refreshes with that of the warm-up, layers, blocks
    assert [report["reduce"] for report in reports[2, "2"]] == [grams, grams]


def test_one_graph_equals_the_plain_model(track):
    model = trained_a_little(track)
    idx = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))
    names = list(model.hidden_matrices())
    torch.compiler.reset()
    found = {}
    for name, function in (("plain", model),
                           ("compiled", torch.compile(model, backend="aot_eager", fullgraph=True))):
        loss, grams = function(idx, idx.roll(-1, 1), names)
        loss.backward()
        found[name] = [loss.detach(), *grams, *(p.grad for p in model.parameters())]
        model.zero_grad()
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    places = {gram.data_ptr() for gram in found["compiled"][1:1 + len(names)]}
    assert len(places) == len(names)  # q, k and v share no memory: grams are added up in place


def test_compiled_on_two_processes(start, tmp_path):
    fields = dict(NEWTON, num_iterations=4, warmdown_iters=2, val_loss_every=2, device_batch_size=2)
    assert start(run_name="eager", **fields).returncode == 0
    words = [tmp_path / "config.toml", "--run_name", "compiled", "--compile", "true", *arguments(fields)]
    done = fork(*torchrun(2), ROOT / "tests/compiled_ddp.py", *words, cwd=tmp_path,
                env={**PATHS, "BACKEND": "aot_eager"})
    assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "logs/compiled") == pytest.approx(logged(tmp_path / "logs/eager"), rel=1e-4)


# scripts


def test_sample(start, tmp_path, call):
    start(run_name="a", vocab_size=256, **NEWTON)
    done = call(sample, tmp_path / "logs/a", "--prompt", "Ay", "--tokens", 30, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Ay")


def test_padding_has_no_text(monkeypatch):
    class Encoding:  # tiktoken's needs a download
        encode_ordinary = staticmethod(lambda text: [])
        decode_single_token_bytes = staticmethod({50256: b"<end>"}.__getitem__)
        eot_token = 50256

    monkeypatch.setattr("data.shards.gpt2_encoding", Encoding)
    _, decode, start = sample.tokenizer(50304)
    assert [decode(token) for token in (start, 50257, 50303)] == [b"<end>", b"", b""]


@pytest.fixture
def config(tmp_path):
    """File of the tiny model's configuration."""
    lines = [f"{key} = {toml(value)}\n" for key, value in {**TINY, "model": MODEL}.items()]
    (tmp_path / "tiny.toml").write_text("".join(lines))
    return tmp_path / "tiny.toml"


def test_bench(call, config, tmp_path):
    sides = ["newton_muon", "optimizers.track_muon:TrackMuon", "optimizers.track_muon:TrackNewtonMuon"]
    done = call(bench, config, "--sides", ",".join(sides), "--rounds", 1, "--steps", 1,
                "--json", tmp_path / "a", "--device_batch_size", 6)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a").read_text())
    assert list(result["sides"]) == sides
    assert result["parameters"] == make_model(load_config([str(config)])).num_parameters()
    multiplied = result["parameters"] - 64 * 16  # not the embedding
    assert result["flops_per_token"] == 6 * multiplied + 12 * 2 * 16 * 16


def test_the_plain_loop_has_only_the_trainers_model(call, config):
    refused(call(bench, config), "--sides plain,adamw", f"model = '{MODEL}'", "leave it out")


def test_bytes_of_state(track):
    track = replace(track, optimizer="optimizers.track_muon:TrackNewtonMuon")
    blocks = 5 + 4  # of 16 x 16 inputs
    bytes_of_block = 4 * 16 ** 2
    matrices = 12 * 16 ** 2
    expected = (4 * matrices + 2 * blocks * bytes_of_block) / matrices
    assert state_bytes(track) == pytest.approx(expected)
