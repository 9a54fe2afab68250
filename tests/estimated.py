"""Small functions, and what scripts/estimate_step.py counts of them, as JSON: for test_estimate_step.py."""
import json

import torch

ROWS = 4096


def pointwise():
    """Reads x and y in fp32, writes the sum in bf16; its backward pass has the two ways to go back."""
    def function(x, y):
        return (x * 2 + y.sin()).to(torch.bfloat16)
    return function, [torch.zeros(ROWS, 128, requires_grad=True), torch.zeros(ROWS, 128)]


def flip():
    """Loads each row of x twice, in two orders."""
    def function(x):
        return x + 2 * x.flip(-1)
    return function, [torch.zeros(ROWS, 128, requires_grad=True)]


def slices():
    """Loads one of three slices of x."""
    def function(x):
        return x[:, 128:256] * 3
    return function, [torch.zeros(ROWS, 384)]


def product():
    """Keeps q and v, views that keep a buffer half as large again as they are."""
    weight = torch.zeros(48, 16, requires_grad=True)

    def function(x):
        q, k, v = (x @ weight.mT).view(-1, 3, 16).unbind(1)
        return (q * v).sum()
    return function, [torch.zeros(64, 16)]


def trainer(collect=True):
    import train_gpt2
    config = train_gpt2.Config(n_layer=2, n_head=2, n_embd=128, vocab_size=1000, sequence_length=64)
    idx = torch.zeros(8, 64, dtype=torch.long)
    model = train_gpt2.GPT(config)
    return model, [idx, idx, list(model.hidden_matrices()) if collect else []]


def trainer_ddp():
    return trainer(collect=False)


def main():
    from scripts import estimate_step  # not at the top: it changes torch for the whole process
    estimate_step.pretend()
    found = {}
    for name in ("pointwise", "flip", "slices", "product", "trainer", "trainer_ddp"):
        function, inputs = globals()[name]()
        if name == "trainer_ddp":
            estimate_step.instructions = lambda kernel: None  # 10 s, for kernels like those of "trainer"
        step = estimate_step.count(function, inputs, ddp=name.endswith("_ddp"))
        kernels = [dict(launches=kernel.launches, bytes=kernel.bytes, instructions=kernel.instructions)
                   for kernel in step.kernels]
        found[name] = dict(kernels=kernels, flops=step.flops, graphs=step.graphs, saved=step.saved,
                           parts=estimate_step.times(step, []))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
