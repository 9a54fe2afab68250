"""Is it faster on a GPU? Seven minutes at most: parts of a step, then whole steps of models side by side.

    python scripts/gpu_faster.py --out FOLDER                on a GPU; torch and numpy are enough
    python scripts/gpu_faster.py --out FOLDER --parts mlp    only these parts, separated by commas
    python scripts/gpu_faster.py --cpu                       the same at toy size: tries the script

products     torch.mm at the shapes of the model, forward and both gradients, for 64 x 1024 tokens
attention    cuDNN's and flash attention, forward and backward
layers       two layers, compiled, of the models below: whole steps, and where they go, by kernel
mlp          the kernel of models/fused_mlp.py, in several tiles, against product and gelu
steps        twelve layers, compiled: whole steps of the models, which take turns
training     200 steps with each model; their losses side by side, as far as the time goes

The models: gpt, the trainer's; models.faster:GPT, whose backward pass is cheaper; models.faster:BF16GPT, with
a residual stream in bf16; models.fused_mlp:GPT. What has been found so far is always in FOLDER: report.txt,
which grows, the results of scripts/bench.py as JSON, and runs.tar.gz with logs and complete output.
"""
import time

START = time.monotonic()  # the imports below count, too

import json
import re
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command
from harness import parts
from train_gpt2 import UserError

SECONDS = 420
AT_THE_END = 10  # seconds kept for stopping a part, and for the archive
MODELS = ("gpt", "models.faster:GPT", "models.faster:BF16GPT", "models.fused_mlp:GPT")
KERNELS = 25  # the longest of a step that the report lists
GPU = dict(
    device="cuda", config="configs/speedrun_{}.toml",
    model=["--batch_size", "64", "--device_batch_size", "64"], layers=2, rounds="6", steps="2",
    shards="data/fineweb10B/fineweb", vocab_size=50257, val_tokens=2 ** 19, training_steps=200)
TOY = dict(
    device="cpu", config="configs/cpu_{}.toml",
    model=["--n_layer", "1", "--batch_size", "4", "--sequence_length", "32"], layers=1, rounds="1", steps="1",
    shards="data/shakespeare/shakespeare", vocab_size=256, val_tokens=1024, training_steps=4)


def speed(part, report, size, shards):
    """A part of harness/gpu_speed.py, whose every line is worth a report."""
    arguments = [sys.executable, "-m", "harness.gpu_speed", part]
    if size is TOY:
        arguments.append("--cpu")
    report.say(report.part(part, 40, arguments).rstrip())


def bench(report, size, part, limit, models, fields=()):
    """scripts/bench.py with Muon for each of these models, the first of which is gpt. Returns its results."""
    sides = ["muon", *(f"muon@{model}" for model in models[1:])]
    results = report.folder / f"{part}.json"
    arguments = [sys.executable, "scripts/bench.py", size["config"].format("muon"), *size["model"],
                 "--device", size["device"], "--rounds", size["rounds"], "--steps", size["steps"],
                 "--sides", ",".join(sides), *fields, "--json", results]
    text = report.part(part, limit, arguments)
    tables = re.split(r"^(?=after \d+ rounds)", text, flags=re.MULTILINE)
    report.say(tables[-1].rstrip())  # the last one, and the profile below it
    return json.loads(results.read_text()) if results.is_file() else {"sides": {}}


def layers(report, size, shards):
    """Without the fused MLP: its part, and whole steps, say what there is to know of it."""
    fields = ["--n_layer", size["layers"], "--profile"]
    result = bench(report, size, "layers", 110, MODELS[:3], fields)
    for name, side in result["sides"].items():
        if "step" in side["profile"]:
            report.say(f"the longest kernels of a step, {name}")
            for kernel in side["profile"]["step"]["kernels"][:KERNELS]:
                report.say("{ms:9.3f} ms {launches:6.0f} launches  {group:22} {kernel:.70}".format(**kernel))


def steps(report, size, shards):
    bench(report, size, "steps", 190, MODELS)


def training(report, size, shards):
    """Batches of the size of `steps`, so that its graphs serve again."""
    count = size["training_steps"]
    fields = ["--num_iterations", count, "--warmdown_iters", count // 4, "--val_loss_every", count // 4]
    found = {}
    for model in MODELS:
        name = f"{count} steps of {model}"
        folder = parts.train(report, size, shards, "muon", re.sub(r"\W", "_", name), SECONDS,
                             [*fields, "--model", model])
        found[model] = parts.losses(folder)
    report.say("validation losses\n  step" + "".join(f"{model:>24}" for model in found))
    for step in sorted(set().union(*found.values())):
        cells = [f"{losses[step]:24.4f}" if step in losses else f"{'-':>24}" for losses in found.values()]
        report.say(f"{step:6}" + "".join(cells))


PARTS = {
    "products": partial(speed, "products"),
    "attention": partial(speed, "attention"),
    "layers": layers,
    "mlp": partial(speed, "mlp"),
    "steps": steps,
    "training": training,
}


@command(interrupted="interrupted; what was found until then is in the folder")
def main():
    parser = parts.argument_parser(__doc__, SECONDS)
    every = ",".join(PARTS)
    parser.add_argument("--parts", default=every, help=f"in their order here (default: {every})")
    args = parts.parse(parser)
    chosen = args.parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        raise UserError(f"--parts {args.parts}: there is no {unknown[0]}; the parts are {every}")
    size = TOY if args.cpu else GPU
    with parts.reported("gpu_faster", args, size, START, SECONDS, AT_THE_END) as (report, shards):
        for name, part in PARTS.items():
            if name in chosen:
                part(report, size, shards)


if __name__ == "__main__":
    main()
