"""models/faster.py: the same model as the trainer's, up to rounding."""
import copy

import pytest
import torch
import torch.nn.functional as F

import train_gpt2
from models.faster import BF16GPT, GPT, Gelu, Norm, Rotate, normal
from train_gpt2 import Config

CONFIG = Config(n_layer=2, n_head=2, n_embd=32, vocab_size=100, sequence_length=16)
MODELS = [GPT, BF16GPT]


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def loss_and_gradients(kind, config=CONFIG, bf16=False):
    torch.manual_seed(0)
    model = kind(config)
    idx, targets = torch.randint(config.vocab_size, (2, 3, config.sequence_length))
    names = list(model.hidden_matrices())
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, grams = model(idx, targets, names)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    return loss.item(), gradients, grams


def relative(values, exact):
    return ((values.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_norm_is_the_equation_in_float64():
    x = random(5, 32)
    g = torch.randn(5, 32)
    y = Norm.apply(x, torch.float32)
    z = x.detach().double().requires_grad_()
    exact = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact.backward(g.double())
    y.backward(g)
    assert relative(y, exact) < 1e-6
    assert relative(x.grad, z.grad) < 1e-6


def test_norm_keeps_only_what_it_returns():
    """And r, a number for each token: not its input."""
    x = random(5, 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = Norm.apply(x, torch.bfloat16)
    assert [t.shape for t in kept] == [(5, 32), (5, 1)]
    assert kept[0].data_ptr() == y.data_ptr()


def test_rotation_is_bit_identical():
    model = train_gpt2.GPT(CONFIG)
    tables = model.cos, model.sin
    x = random(3, 16, 2, 16)
    g = torch.randn(3, 16, 2, 16)
    same = x.detach().clone().requires_grad_()
    y = Rotate.apply(x, *tables)
    z = train_gpt2.rotate(same, *tables)
    y.backward(g)
    z.backward(g)
    assert torch.equal(y, z)
    assert torch.equal(x.grad, same.grad)


def test_rotation_goes_back_where_it_came_from():
    model = train_gpt2.GPT(CONFIG)
    x = random(3, 16, 2, 16)
    y = Rotate.apply(x, model.cos, model.sin)
    y.backward(y.detach())
    assert x.grad == pytest.approx(x.detach(), abs=1e-5)


def test_gelu_is_that_of_float64():
    x = torch.linspace(-12, 12, 100_001).requires_grad_()
    z = x.detach().double().requires_grad_()
    y = Gelu.apply(x)
    exact = F.gelu(z)
    y.sum().backward()
    exact.sum().backward()
    assert (y - exact).abs().max() < 1e-6
    assert (x.grad - z.grad).abs().max() < 1e-6


def test_normal_distribution_function():
    x = torch.linspace(-6, 6, 10_001)
    exact = torch.special.ndtr(x.double())
    assert (normal(x)[1] - exact).abs().max() < 3e-7


@pytest.mark.parametrize("kind", MODELS)
def test_fp32_is_the_trainers_model(kind):
    loss, gradients, grams = loss_and_gradients(kind)
    exact_loss, exact_gradients, exact_grams = loss_and_gradients(train_gpt2.GPT)
    assert loss == pytest.approx(exact_loss, rel=1e-6)
    for ours, theirs in zip([*gradients, *grams], [*exact_gradients, *exact_grams], strict=True):
        assert relative(ours, theirs) < 1e-5


def test_gradients_in_bf16_are_as_near_to_fp32_as_the_trainers():
    exact = loss_and_gradients(train_gpt2.GPT)[1]

    def error(kind):
        gradients = loss_and_gradients(kind, bf16=True)[1]
        return sum(relative(ours, theirs) for ours, theirs in zip(gradients, exact)) / len(exact)
    plain = error(train_gpt2.GPT)
    assert 0.001 < plain < 0.02
    assert error(GPT) < 1.1 * plain
    assert error(BF16GPT) < 2 * plain


@pytest.mark.parametrize("kind, dtype", [(GPT, torch.float32), (BF16GPT, torch.bfloat16)])
def test_type_of_the_residual_stream(kind, dtype):
    model = kind(CONFIG)
    seen = []
    block = model.block
    model.block = lambda b, x, *rest: seen.append(x.dtype) or block(b, x, *rest)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long))
    assert seen == [dtype] * CONFIG.n_layer


@pytest.mark.parametrize("kind", MODELS)
def test_compiled(kind):
    """The graph as torch.compile traces it, without generating kernels."""
    torch.manual_seed(0)
    model = kind(CONFIG)
    twin = copy.deepcopy(model)
    idx, targets = torch.randint(CONFIG.vocab_size, (2, 3, 16))
    names = list(model.hidden_matrices())
    torch.compile(model, backend="aot_eager", fullgraph=True)(idx, targets, names)[0].backward()
    twin(idx, targets, names)[0].backward()
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert relative(ours.grad, theirs.grad) < 1e-5
