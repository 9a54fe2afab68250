"""Small runs to read and compare, for the tests."""
import json

from harness.runs import Run

RULER = "=" * 100
CONFIG = dict(
    optimizer="muon",
    seed=0,
    run_name="a",
    log_dir="logs",
    hidden_learning_rate=0.01,
    batch_size=32,
    sequence_length=8,
    n_layer=2,
    val_tokens=64,
    target_val_loss=1.0,
    num_iterations=100,
)
SHARD = dict(
    name="val_0.bin",
    tokens=10**6,
    sha256_of_first_mebibyte="cc",
)
TRAIN_SHARD = {**SHARD, "name": "train_1.bin", "sha256_of_first_mebibyte": "ee"}


def lines(steps, losses, seconds, unit="ms", total=None):
    """The lines of a log, training losses between them."""
    text = ""
    for step, loss, time in zip(steps, losses, seconds):
        train_time = f"{1000 * time:.0f}ms" if unit == "ms" else f"{time}s"
        for what, value in (("train_loss", 0.5), ("val_loss", loss)):
            text += f"step:{step}/{total or steps[-1]} {what}:{value} "
            text += f"train_time:{train_time} step_avg:nanms\n"
    return text


def facts(val=SHARD, **config):
    """run.json of a small run."""
    return dict(
        config={**CONFIG, **config},
        tokens_per_step=256,
        train_shards=[TRAIN_SHARD],
        val_shards=[val],
        parameters=99,
        dtype="torch.float32",
        machine=dict(cpu="c", cpu_threads=1),
        world_size=1,
    )


def run_of(final=0.9, seconds=10.0, name="r", planned=100, without_json=False, **config):
    """A run from loss 2 to `final` in 100 steps of equal time.

    The line between them meets 1.0 after 100 / (2 - final) steps.
    """
    return Run(
        name,
        {} if without_json else facts(**config),
        [0, 100],
        [2.0, final],
        [0.0, seconds],
        planned,
        origin=dict(folder="f", file=name),
    )


def write(folder, final=0.9, seconds=10.0, json_of=None, **config):
    """The folder of a finished run."""
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(f"code\n{RULER}\n" + lines([0, 100], [2.0, final], [0, seconds]))
    (folder / "run.json").write_text(json.dumps(json_of or facts(**config)))
    return folder
