"""optimizers/input_moments.py: Newton-Muon in models other than the trainer's.

As a script, `torchrun ... test_input_moments.py FILE` trains ragged sequences on several processes and saves
the weights in FILE.
"""
import copy
import re
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from conftest import PATHS, ROOT, fork, run, torchrun
from optimizers.input_moments import InputMoments, Transposed
from optimizers.power_newton_muon import PowerNewtonMuon
from train_gpt2 import GPT, Muon, NewtonMuon, autocast


class VisionMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):  # (B, 4, 4)
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))

    @staticmethod
    def formulas(w, x):
        """(logits, {weight: inputs}) with the weights w, {name: tensor}."""
        x = x.flatten(1)
        y = (x @ w["fc1.weight"].mT + w["fc1.bias"]).relu()
        z = (y @ w["fc2.weight"].mT + w["fc2.bias"]).relu()
        return z @ w["head.weight"].mT + w["head.bias"], {"fc1.weight": x, "fc2.weight": y}


class Transformer(nn.Module):
    """A block with biases and layer norms, on 6 tokens."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(20, 8)
        self.ln_1 = nn.LayerNorm(8)
        self.c_attn = nn.Linear(8, 24)
        self.c_proj = nn.Linear(8, 8)
        self.ln_2 = nn.LayerNorm(8)
        self.c_fc = nn.Linear(8, 32)
        self.mlp_proj = nn.Linear(32, 8)
        self.head = nn.Linear(8, 20)

    def forward(self, idx):  # (B, 6)
        x = self.wte(idx)
        q, k, v = self.c_attn(self.ln_1(x)).chunk(3, -1)
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))
        return self.head(x).flatten(0, 1)

    @staticmethod
    def formulas(w, idx):
        def norm(x, name):
            centred = x - x.mean(-1, keepdim=True)
            variance = centred.square().mean(-1, keepdim=True)
            return centred / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

        def linear(z, name):
            inputs[f"{name}.weight"] = z.flatten(0, -2)
            return z @ w[f"{name}.weight"].mT + w[f"{name}.bias"]

        inputs = {}
        x = w["wte.weight"][idx]
        q, k, v = linear(norm(x, "ln_1"), "c_attn").split(8, -1)
        scores = q @ k.mT / 8 ** 0.5
        future = torch.ones(6, 6).triu(1).bool()
        x = x + linear(scores.masked_fill(future, -torch.inf).softmax(-1) @ v, "c_proj")
        h = linear(norm(x, "ln_2"), "c_fc")
        x = x + linear(h * (1 + torch.erf(h / 2 ** 0.5)) / 2, "mlp_proj")
        logits = linear(x, "head").flatten(0, 1)
        del inputs["head.weight"]
        return logits, inputs


def batch(kind, seed):
    """Inputs and targets that can be learned."""
    generator = torch.Generator().manual_seed(seed)
    if kind is VisionMLP:
        x = torch.randn(64, 4, 4, generator=generator)
        return x, 2 * (x[:, 0].sum(-1) > 0) + (x[:, 1].sum(-1) > 0)
    start = torch.randint(20, (16, 1), generator=generator)
    sequence = (start + 3 * torch.arange(7)) % 20
    return sequence[:, :-1], sequence[:, 1:].flatten()


def hidden_matrices(model):
    return [p for name, p in model.named_parameters() if p.ndim == 2 and name[:4] not in ("wte.", "head")]


def trained(model, optimizer, moments, steps):
    """Trains for the `steps`. Returns the loss of each."""
    matrices = set(optimizer.matrices)
    others = torch.optim.SGD([p for p in model.parameters() if p not in matrices], lr=0.1)
    losses = []
    for step in steps:
        x, targets = batch(type(model), step)
        with moments.collecting(step):
            loss = F.cross_entropy(model(x), targets)
            loss.backward()
        optimizer.step()
        others.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


def collected(optimizer, moments, forward, step=0):
    """[Z Z^T / N, ...] for the optimizer's matrices, of a step of forward(), which returns a loss."""
    found = []
    refresh = optimizer.refresh
    optimizer.refresh = lambda grams, tokens: found.extend(gram / tokens for gram in grams)
    with moments.collecting(step):
        forward().backward()
    optimizer.refresh = refresh
    return found


def second_moment(z, blocks=1):
    """Z Z^T / N of inputs z (..., n), in diagonal blocks, in float64."""
    z = z.detach().double().flatten(0, -2) if z.ndim > 1 else z.detach().double()[None]
    return torch.stack([part.T @ part / len(z) for part in z.chunk(blocks, -1)])


# what is collected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trainers_own_grams(tiny, dtype):
    torch.manual_seed(0)
    model = GPT(tiny)
    idx, targets = torch.randint(64, (2, 3, 4, 16))  # three micro-batches
    names, matrices = zip(*model.hidden_matrices().items())
    optimizer = NewtonMuon(matrices, refresh_interval=1)

    def forward():
        with autocast(idx.device, dtype):
            return sum(model(i, t)[0] for i, t in zip(idx, targets))

    found = collected(optimizer, InputMoments(model, optimizer), forward)
    expected = [torch.zeros_like(K) for K in found]
    for i, t in zip(idx, targets):
        with autocast(idx.device, dtype):
            _, grams = model(i, t, collect=names)
        for total, gram in zip(expected, grams, strict=True):
            total += gram / idx.numel()
    for K, total in zip(found, expected, strict=True):
        assert (K - total).norm() < 1e-5 * total.norm()


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 1, 3, 8)])
@pytest.mark.parametrize("outputs", [24, 8, 4])
def test_inputs_of_any_leading_shape(shape, outputs):
    layer = nn.Linear(8, outputs)
    optimizer = NewtonMuon([layer.weight], refresh_interval=1)
    z = torch.randn(shape)
    K, = collected(optimizer, InputMoments(layer, optimizer), lambda: layer(input=z).sum())
    torch.testing.assert_close(K.double(), second_moment(z, 2 if outputs == 4 else 1), rtol=1e-5, atol=1e-6)


def test_layer_called_several_times_and_weight_of_two_layers():
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
    layers[1].weight = layers[0].weight
    optimizer = NewtonMuon([layers[0].weight], refresh_interval=1)
    x, y, z = torch.randn(3, 6, 4)
    K, = collected(optimizer, InputMoments(layers, optimizer),
                   lambda: (layers[0](x) + layers[0](y) + layers[1](z)).sum())
    torch.testing.assert_close(K.double(), second_moment(torch.cat([x, y, z])), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flat", [False, True])
def test_masked_tokens_do_not_count(flat):
    layer = nn.Linear(8, 8)
    optimizer = NewtonMuon([layer.weight], refresh_interval=1)
    moments = InputMoments(layer, optimizer)
    x, y = torch.randn(2, 3, 5, 8)
    x[0, 4] = torch.nan
    masks = torch.ones(2, 3, 5, dtype=torch.int64)
    masks[0, :2, 2:] = 0
    masks[1, 2] = 0

    def forward():
        loss = 0
        for z, mask in zip((x, y), masks):
            moments.mask = mask
            loss = loss + layer(z.flatten(0, 1) if flat else z).sum()
        return loss

    K, = collected(optimizer, moments, forward)
    kept = torch.cat([x[masks[0].bool()], y[masks[1].bool()]])
    torch.testing.assert_close(K.double(), second_moment(kept), rtol=1e-5, atol=1e-6)
    K, = collected(optimizer, moments, lambda: layer(y).sum(), step=1)  # the mask is gone
    torch.testing.assert_close(K.double(), second_moment(y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_activation_checkpointing_counts_once(use_reentrant, masked):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    optimizer = NewtonMuon([layers[0].weight, layers[2].weight], refresh_interval=1)
    moments = InputMoments(layers, optimizer)
    x, y = torch.randn(2, 3, 5, 8, requires_grad=True)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 2:] = False

    def forward(checkpointed):
        moments.mask = mask if masked else None
        half = checkpoint(layers, x, use_reentrant=use_reentrant) if checkpointed else layers(x)
        return (half + layers(y)).square().sum()  # both halves would still give the same mean

    plain = collected(optimizer, moments, lambda: forward(False))
    checkpointed = collected(optimizer, moments, lambda: forward(True), step=1)
    assert all(map(torch.equal, plain, checkpointed))


def test_compiled_model_is_compiled_once():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = VisionMLP()
        matrices = hidden_matrices(model)
        if compiled:
            model.compile(backend=backend)
        optimizer = NewtonMuon(matrices, lr=0.01, refresh_interval=2)
        losses.append(trained(model, optimizer, InputMoments(model, optimizer), range(6)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(graphs) == 1


def test_hooks_only_in_steps_that_refresh():
    model = VisionMLP()
    optimizer = NewtonMuon(hidden_matrices(model), refresh_interval=3)
    moments = InputMoments(model, optimizer)

    def hooks():
        return sum(len(module._forward_pre_hooks) for module in model.modules())

    for step, expected in enumerate([0, 0, 2, 0]):
        with moments.collecting(step):
            assert hooks() == expected
            model(torch.randn(2, 4, 4)).sum().backward()
        assert hooks() == 0
    with pytest.raises(KeyError), moments.collecting(5):
        raise KeyError
    assert hooks() == 0


# steps


def steepest(G):
    """Newton-Schulz of Muon as its polynomial on the singular values of G, times sqrt(max(m, n))."""
    left, values, right = torch.linalg.svd(G, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values ** 3 + 2.0315 * values ** 5
    return left * values @ right * max(G.shape) ** 0.5


@pytest.mark.parametrize("power", [1, 0.5])
@pytest.mark.parametrize("kind", [VisionMLP, Transformer])
def test_a_step_is_the_equation_in_float64(kind, power):
    torch.manual_seed(0)
    model = kind()
    if power == 1:
        optimizer = NewtonMuon(hidden_matrices(model), lr=0.01, refresh_interval=1, ewma=0.5, ridge=0.3)
    else:
        optimizer = PowerNewtonMuon(hidden_matrices(model), lr=0.01, power=power, refresh_interval=1,
                                    ewma=0.5, ridge=0.3)
    x, targets = batch(kind, 0)
    w = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    logits, inputs = kind.formulas(w, x.double() if x.is_floating_point() else x)
    F.cross_entropy(logits, targets).backward()

    with InputMoments(model, optimizer).collecting(0):
        F.cross_entropy(model(x), targets).backward()
    optimizer.step()
    assert len(inputs) == len(optimizer.matrices)
    for name, Z in inputs.items():
        G = w[name].grad
        n = min(G.shape)
        preconditioned = []
        for K, columns in zip(second_moment(Z, G.size(1) // n), G.split(n, 1)):
            K = 0.5 * 1e-3 * torch.eye(n) + 0.5 * K
            values, Q = torch.linalg.eigh(K + (0.3 * K.trace() / n + 1e-8) * torch.eye(n))
            preconditioned.append(columns @ Q @ torch.diag(values ** -power) @ Q.T)
        U = 1.95 * torch.cat(preconditioned, 1)  # the first step: G + 0.95 G
        parts = U.split(n, 0) if len(U) == 3 * n else [U]  # q, k and v
        expected = -0.01 * torch.cat([steepest(part) for part in parts])
        change = model.get_parameter(name).detach() - w[name].detach()
        assert (change - expected).norm() < 1e-3 * expected.norm(), name


@pytest.mark.parametrize("optimizer", [NewtonMuon, PowerNewtonMuon])
@pytest.mark.parametrize("kind", [VisionMLP, Transformer])
def test_models_train_and_resume(kind, optimizer, tmp_path):
    torch.manual_seed(0)
    model = kind()
    settings = dict(lr=0.003, refresh_interval=4)
    first = optimizer(hidden_matrices(model), **settings)
    moments = InputMoments(model, first)
    start, *_ = trained(model, first, moments, range(50))
    torch.save([model.state_dict(), first.state_dict()], tmp_path / "saved.pt")
    losses = trained(model, first, moments, range(50, 100))
    assert losses[-1] < start / 3

    resumed = kind()
    weights, state = torch.load(tmp_path / "saved.pt")
    resumed.load_state_dict(weights)
    second = optimizer(hidden_matrices(resumed), **settings)
    second.load_state_dict(state)
    assert trained(resumed, second, InputMoments(resumed, second), range(50, 100)) == losses


class Conv1D(nn.Module):
    """As in transformers."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], len(self.bias))


@pytest.mark.parametrize("zero_grad", ["model", "optimizer", "zeros"])
def test_conv1d_is_a_transposed_linear(zero_grad):
    torch.manual_seed(0)
    linear = Transformer()
    conv = copy.deepcopy(linear)
    for name in ("c_attn", "c_proj", "c_fc", "mlp_proj"):
        layer = getattr(linear, name)
        replacement = Conv1D(*layer.weight.shape)
        replacement.weight.data.copy_(layer.weight.mT)
        replacement.bias.data.copy_(layer.bias)
        setattr(conv, name, replacement)
    for model, view in ((linear, lambda p: p), (conv, Transposed)):
        optimizer = NewtonMuon(map(view, hidden_matrices(model)), lr=0.01, refresh_interval=2)
        moments = InputMoments(model, optimizer)
        for step in range(5):
            x, targets = batch(Transformer, step)
            with moments.collecting(step):
                F.cross_entropy(model(x), targets).backward()
            optimizer.step()
            if zero_grad == "model":
                model.zero_grad()
            else:
                optimizer.zero_grad(set_to_none=zero_grad == "optimizer")
    expected = dict(linear.named_parameters())
    for name, p in conv.named_parameters():
        p = p.mT if p.shape != expected[name].shape or "c_proj.weight" in name else p
        torch.testing.assert_close(p, expected[name], rtol=1e-3, atol=1e-4)


def test_matrices_of_no_layer_get_muons_steps():
    torch.manual_seed(0)
    ours = nn.TransformerEncoderLayer(8, 2, 32, dropout=0)
    muons = copy.deepcopy(ours)
    optimizer = NewtonMuon(hidden_matrices(ours), lr=0.01, refresh_interval=1)
    names = "self_attn.in_proj_weight, self_attn.out_proj.weight"
    with pytest.warns(UserWarning, match=f"Muon's steps: {names}$"):
        moments = InputMoments(ours, optimizer)
    x = torch.randn(5, 3, 8)
    muon = Muon(hidden_matrices(muons), lr=0.01)
    with moments.collecting(0):
        ours(x).square().sum().backward()
    muons(x).square().sum().backward()
    optimizer.step()
    muon.step()
    same = {name for name, p in ours.named_parameters()
            if p.ndim == 2 and torch.equal(p, muons.get_parameter(name))}
    assert same == set(names.split(", "))


def test_groups_without_preconditioner():
    model = VisionMLP()
    kept = []
    for power in (0, 0.5):
        groups = [dict(params=[model.fc1.weight], power=0), dict(params=[model.fc2.weight], power=power)]
        optimizer = PowerNewtonMuon(groups, refresh_interval=1)
        with InputMoments(model, optimizer).collecting(0):
            model(torch.ones(2, 4, 4)).sum().backward()
        kept.append(["K" in optimizer.state[p] for p in optimizer.matrices])
    assert kept == [[False, False], [False, True]]


def test_layer_that_is_not_called_keeps_its_preconditioner():
    experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    optimizer = NewtonMuon([expert.weight for expert in experts], refresh_interval=1)
    moments = InputMoments(experts, optimizer)
    for step, expert in enumerate((0, 1, 0)):
        if step == 2:
            before = [optimizer.state[expert.weight]["K"].clone() for expert in experts]
        with moments.collecting(step):
            experts[expert](torch.randn(3, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    same = [torch.equal(optimizer.state[expert.weight]["K"], K) for expert, K in zip(experts, before)]
    assert same == [False, True]


# several processes


def train_ragged(path):
    """Trains on two micro-batches with different masks in each step, shared by the processes there are."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    optimizer = NewtonMuon([model[0].weight, model[2].weight], lr=0.01, refresh_interval=2)
    moments = InputMoments(model, optimizer)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        x, y = torch.randn(2, 2, 6, 5, 8, generator=generator)
        masks = torch.rand(2, 6, 5, generator=generator) < torch.tensor([0.9, 0.2])[:, None, None]
        with moments.collecting(step):
            for i in range(2) if world == 1 else [dist.get_rank()]:
                moments.mask = masks[i]
                loss = (wrapped(x[i]) - y[i]).square()[masks[i]].sum()
                (loss * world / 2).backward()
        optimizer.step()
        model.zero_grad()
    state = optimizer.state_dict()["state"]  # all processes must call it
    if world == 1 or dist.get_rank() == 0:
        torch.save([model.state_dict(), state], path)


def test_two_processes(tmp_path):
    train_ragged(tmp_path / "one.pt")
    done = fork(*torchrun(2), __file__, tmp_path / "two.pt", env=PATHS)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


# bad use


def linear_and_moments(**settings):
    layer = nn.Linear(4, 4)
    optimizer = NewtonMuon([layer.weight], refresh_interval=1, **settings)
    return layer, InputMoments(layer, optimizer)


def test_matrix_of_another_model():
    with pytest.raises(ValueError, match=r"shape \(4, 4\) in the optimizer is not in the model"):
        InputMoments(nn.Linear(4, 4), NewtonMuon([nn.Linear(4, 4).weight]))


def test_embedding():
    model = Transformer()
    model.head.weight = model.wte.weight
    with pytest.raises(ValueError, match="wte.weight = head.weight is an embedding"):
        InputMoments(model, NewtonMuon([model.wte.weight]))


def test_conv1d_that_is_not_transposed():
    with pytest.raises(ValueError, match="^weight: .* takes Transposed"):
        layer = Conv1D(4, 4)
        InputMoments(layer, NewtonMuon([layer.weight]))
    with pytest.raises(ValueError, match="^weight: .* any other weight as it is"):
        layer = nn.Linear(4, 4)
        InputMoments(layer, NewtonMuon([Transposed(layer.weight)]))


def test_transposed_weight_that_moved():
    layer = Conv1D(4, 4)
    optimizer = NewtonMuon([Transposed(layer.weight)])
    layer.double()
    layer(torch.ones(2, 4).double()).sum().backward()
    with pytest.raises(RuntimeError, match=r"\(4, 4\) has moved after"):
        optimizer.step()


def test_optimizer_without_moments():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="not Muon"):
        InputMoments(layer, Muon([layer.weight]))


def test_nothing_collected():
    layer, moments = linear_and_moments()
    with pytest.raises(RuntimeError, match="step 0 saw no inputs of weight"):
        with moments.collecting(0):
            pass
    with pytest.raises(RuntimeError, match="step 0 saw no inputs of weight"):
        loss = layer(torch.ones(2, 4)).sum()
        with moments.collecting(0):
            loss.backward()


def test_weight_that_is_used_without_its_layer():
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    moments = InputMoments(layers, NewtonMuon([layer.weight for layer in layers], refresh_interval=1))
    with pytest.raises(RuntimeError, match="step 0 saw no inputs of 1.weight"):
        with moments.collecting(0):
            F.linear(layers[0](torch.ones(2, 4)), layers[1].weight).sum().backward()


def test_block_for_each_micro_batch():
    layer, moments = linear_and_moments()
    with moments.collecting(0):
        layer(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="step 0 has been refreshed: put all its micro-batches"):
        with moments.collecting(0):
            layer(torch.ones(2, 4)).sum().backward()


def test_mask_of_another_shape():
    layer, moments = linear_and_moments()
    with pytest.raises(ValueError, match=r"weight has inputs of shape \(2, 3, 4\), moments.mask is of shape "
                                         r"\(3, 2\)"):
        with moments.collecting(0):
            moments.mask = torch.ones(3, 2)
            layer(torch.ones(2, 3, 4))


# the example


def test_example():
    pytest.importorskip("sklearn")
    path = ROOT / "examples/newton_muon_elsewhere.py"
    source = path.read_text()
    assert len(source.splitlines()) <= 60
    done = run(sys.executable, path)
    assert done.returncode == 0, done.stderr
    line = r"(\w+) +lr \S+ +loss (\S+)"
    printed = dict(re.findall(line, done.stdout))
    documented = dict(re.findall(line, source.split('"""')[1]))
    assert printed.keys() == documented.keys() == {"AdamW", "Muon", "NewtonMuon"}
    assert max(map(float, printed.values())) < 0.15  # the best rate may be another one on another CPU


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train_ragged(sys.argv[1])
    dist.destroy_process_group()
