"""The model against its equations, written plainly in float64."""
import copy
import dataclasses
import math
import sys

import pytest
import torch

from conftest import ROOT, checkpoint, refused, run
from train_gpt2 import GPT, Config, accumulate, build_optimizers


def norm64(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def rotate64(row, t):
    """Rotary embedding of one head's vector (d,) at position t."""
    half = len(row) // 2
    out = row.clone()
    for i in range(half):
        angle = t * 10000.0 ** (-i / half)
        a = row[i].item()
        b = row[i + half].item()
        out[i] = a * math.cos(angle) + b * math.sin(angle)
        out[i + half] = b * math.cos(angle) - a * math.sin(angle)
    return out


def attention64(q, k, v):
    """Causal attention of one head, position by position: (T, d)."""
    T, d = q.shape
    q = torch.stack([rotate64(row, t) for t, row in enumerate(q)])
    k = torch.stack([rotate64(row, t) for t, row in enumerate(k)])
    y = torch.zeros_like(v)
    for t in range(T):
        weights = torch.softmax(k[:t + 1] @ q[t] / math.sqrt(d), 0)
        y[t] = weights @ v[:t + 1]
    return y


def block64(block, x, n_head, n_layer):
    """(output of a block, inputs of its four matrices) for one sequence x (T, C)."""
    T, C = x.shape
    d = C // n_head
    weights = {name: p.detach().double() for name, p in block.named_parameters()}
    z = norm64(x)
    q, k, v = (z @ weights["c_attn.weight"].T).split(C, dim=1)
    y = torch.zeros_like(x)
    for head in range(n_head):
        part = slice(head * d, head * d + d)
        y[:, part] = attention64(q[:, part], k[:, part], v[:, part])
    x = x + y @ weights["attn_proj.weight"].T / math.sqrt(2 * n_layer)
    u = norm64(x)
    h = u @ weights["c_fc.weight"].T
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return x + h @ weights["mlp_proj.weight"].T, [z, y, u, h]


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    return GPT(tiny)


def test_model_agrees_with_its_equations_in_float64(model, tiny):
    idx = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(1))
    targets = idx.roll(-1, 1)
    loss, grams = model(idx, targets, collect=list(model.hidden_matrices()))
    x = model.wte.weight.detach().double()[idx[0]]
    inputs = []
    for block in model.h:
        x, z = block64(block, x, tiny.n_head, tiny.n_layer)
        inputs += z
    logits = norm64(x) @ model.lm_head.weight.detach().double()[:64].T
    torch.testing.assert_close(model.logits(idx)[0].double(), logits, rtol=1e-4, atol=1e-5)
    expected = torch.logsumexp(logits, 1) - logits[torch.arange(16), targets[0]]
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    for gram, z, p in zip(grams, inputs, model.hidden_matrices().values(), strict=True):
        assert gram.shape == (p.shape[1] // 16, 16, 16)
        for block, part in zip(gram, z.split(16, dim=1), strict=True):
            torch.testing.assert_close(block.double(), part.T @ part, rtol=1e-4, atol=1e-4)


def test_padding_rows_stay(model, tiny):
    assert model.lm_head.weight.shape == (128, 16)
    assert model.logits(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 64)
    before = model.lm_head.weight[64:].clone()
    idx = torch.randint(64, (4, 16))
    accumulate(model, [(idx, idx)], (), torch.float32)
    for optimizer in build_optimizers(model, tiny):
        optimizer.step()
    assert torch.equal(model.lm_head.weight[64:], before)


def test_the_speedrun_model_has_123532032_parameters():
    with torch.device("meta"):
        assert GPT(Config()).num_parameters() == 123_532_032


def test_first_loss():
    # The table is initialised as the head is, within 1 / sqrt(n_embd). So the logits of a normed vector
    # have a variance of 1/3, which adds 1/6 to the loss of equal logits.
    config = Config(n_layer=2, n_head=4, n_embd=128, vocab_size=5000, sequence_length=64)
    torch.manual_seed(0)
    idx = torch.randint(5000, (8, 65))
    with torch.no_grad():
        loss, _ = GPT(config)(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(math.log(5000) + 1 / 6, abs=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "newton_muon"])
def test_accumulation_equals_the_whole_batch(tiny, optimizer):
    config = dataclasses.replace(tiny, optimizer=optimizer)
    torch.manual_seed(0)
    whole = GPT(config)
    parts = copy.deepcopy(whole)
    rows = torch.randint(64, (12, 17), generator=torch.Generator().manual_seed(3))
    idx = rows[:, :-1]
    targets = rows[:, 1:]
    for model, size in ((whole, 12), (parts, 3)):
        optimizers = build_optimizers(model, config)
        micro_batches = list(zip(idx.split(size), targets.split(size)))
        _, grams = accumulate(model, micro_batches, list(model.hidden_matrices()), torch.float32)
        if optimizer == "newton_muon":
            optimizers[1].refresh(grams, idx.numel())
        for o in optimizers:
            o.step()
    for (name, a), b in zip(whole.named_parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_importing_the_trainer_has_no_side_effects(tmp_path):
    code = """
import sys, os, threading
sys.argv = ["x", "--nonsense"]
before = set(os.listdir("."))
import torch
seed, threads = torch.initial_seed(), threading.active_count()
import train_gpt2
assert torch.initial_seed() == seed
assert threading.active_count() == threads
assert set(os.listdir(".")) == before
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
assert "wandb" not in sys.modules
assert "tiktoken" not in sys.modules
"""
    run("env", "-i", f"PYTHONPATH={ROOT}", "PATH=", sys.executable, "-c", code, cwd=tmp_path, check=True)


# a model of one's own


@pytest.mark.parametrize("model, word", [
    ("gpt2", "No module named 'gpt2'"),
    ("torch.nn", "TypeError"),
    ("train_gpt2:Nothing", "AttributeError"),
    ("nowhere:GPT", "ModuleNotFoundError"),
    ("no module", "ValueError"),
    ("", "ValueError"),
])
def test_unknown_model(start, model, word):
    refused(start(model=model), f"model = '{model}' cannot be made", word, "gpt or module:Class")


OWN = """
import torch
import train_gpt2

class GPT(train_gpt2.GPT):
    def __init__(self, config):
        super().__init__(config)
        self.gains = torch.nn.Parameter(torch.ones(config.n_embd))

    def features(self, idx, collect=()):
        x, grams = super().features(idx, collect)
        return x * self.gains, grams
"""


def test_a_model_of_ones_own(start, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    groups = '{"gains": {"lr": 0.1}}'
    done = start(run_name="a", model="own:GPT", optimizer="newton_muon", refresh_interval=2, groups=groups)
    assert done.returncode == 0, done.stderr
    state = checkpoint(tmp_path / "logs/a", 10)
    assert (state["model"]["gains"] - 1).abs().min() > 0.01
    assert [len(group["params"]) for group in state["optimizers"][1]["param_groups"]] == [4 * 2]
