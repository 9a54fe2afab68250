"""What the tests of optimizers/ share: matrices and gradients in float64, and training on them."""
import torch

CLOSE = dict(rtol=0, atol=1e-9)  # for updates of about 0.1: rounding in float64, magnified by inverse roots


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradients(count, *shape):
    """Random, with rows and singular values of different sizes, as in training."""
    scales = torch.logspace(0, -1, shape[0], dtype=torch.float64)[:, None]
    return [scales * normal(*shape, seed=seed + 1) for seed in range(count)]


def rotation(n, seed):
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


def trained(optimizer, start, grads, **settings):
    """The weights after one step with each of the gradients."""
    W = torch.nn.Parameter(start.clone())
    optimizer = optimizer([W], **settings)
    for G in grads:
        W.grad = G.clone()
        optimizer.step()
    return W.detach()


def momenta(grads, mu):
    """Muon's U in each step, with Nesterov momentum."""
    M = torch.zeros_like(grads[0])
    for G in grads:
        M = mu * M + G
        yield G + mu * M
