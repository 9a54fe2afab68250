"""Small functions and models, and what scripts/estimate_step.py counts of them: for test_estimate_step.py.

Prints the table of two models, and in the last line all counts as JSON.
"""
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


def model(name, n_layer=2, collect=False):
    """A model for 8 sequences of 64 tokens."""
    import train_gpt2
    config = train_gpt2.Config(model=name, n_layer=n_layer, n_head=2, n_embd=128, vocab_size=1000,
                               sequence_length=64)
    idx = torch.zeros(8, 64, dtype=torch.long)
    model = train_gpt2.make_model(config)
    return model, [idx, idx, list(model.hidden_matrices()) if collect else []]


# {name in the results: of what function; with its instructions, which take seconds; as DDP compiles it}
CASES = {
    "pointwise": (pointwise, True, False),
    "flip": (flip, True, False),
    "slices": (slices, True, False),
    "product": (product, True, False),
    "trainer": (lambda: model("gpt", collect=True), False, False),
    "trainer_ddp": (lambda: model("gpt"), False, True),
    "faster_ddp": (lambda: model("models.faster:BF16GPT"), False, True),
    "track": (lambda: model("models.optimizer_track:GPT", n_layer=1), False, False),
    "NanoGPT": (lambda: model("models.peers:NanoGPT", n_layer=1), False, False),
}


def main():
    from scripts import estimate_step  # not at the top: it changes torch for the whole process
    estimate_step.pretend()
    found = {}
    steps = {}
    instructions = estimate_step.instructions
    for name, (make, counts_instructions, ddp) in CASES.items():
        estimate_step.instructions = instructions if counts_instructions else lambda kernel: None
        function, inputs = make()
        step = steps[name] = estimate_step.count(function, inputs, ddp)
        kernels, loss = ([dict(launches=kernel.launches, bytes=kernel.bytes, instructions=kernel.instructions)
                          for kernel in kernels] for kernels in (step.kernels, step.loss))
        found[name] = dict(kernels=kernels, loss=loss, flops=step.flops, graphs=step.graphs, saved=step.saved,
                           unknown=sorted(step.unknown), parts=estimate_step.times(step))
    estimate_step.estimate = lambda name, args: steps[name]
    estimate_step.show_peers({name: name for name in ("trainer", "NanoGPT")}, args=None, tokens=8 * 64)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
