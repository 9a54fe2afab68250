"""A small GPT on Shakespeare's bytes and the trainer's own step, for the experiments that train one."""
import glob
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from train_gpt2 import (GPT, Config, Shards, UserError, accumulate, build_optimizers, learning_rate_scale,
                        read_toml, set_learning_rates, with_grams)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT  # where the paths of the shards in the configurations start

# a step takes about 10 ms on one core
SMALL = dict(n_layer=2, n_head=2, n_embd=32, batch_size=16, sequence_length=64)


def parallel(function, items):
    """[function(item), ...], two at a time, in processes with one thread each.

    Models this small gain nothing from a second thread.
    """
    if len(items) == 1:
        return [function(items[0])]
    with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(function, items))


def cpu_config(**fields):
    """The Config of configs/cpu_muon.toml, with `fields` in place of its own.

    Seeds are taken modulo 2^32. The warm-down is 30 % of the run, if `fields` has no other.
    """
    values = read_toml(ROOT / "configs/cpu_muon.toml")
    steps = fields.get("num_iterations", values["num_iterations"])
    values |= dict(warmdown_iters=int(0.3 * steps))
    values |= fields
    for name in ("seed", "data_seed"):
        if name in fields:
            values[name] = fields[name] % 2 ** 32
    return Config(**values)


def open_shards(config, pattern="input_bin"):
    """Shards of the training text, or of the validation text with "input_val_bin".

    Raises UserError if there are none.
    """
    path = str(DATA / getattr(config, pattern))
    if not glob.glob(path):
        raise UserError(f"no file matches {getattr(config, pattern)}; "
                        "make these shards with: python data/shakespeare.py")
    return Shards(path, config.sequence_length, config.vocab_size, config.allow_repeat, config.data_seed)


def new_model(config):
    """(GPT with the initial weights of config.seed, [optimizer of the table, of the hidden matrices])."""
    torch.manual_seed(config.seed)
    model = GPT(config)
    return model, list(build_optimizers(model, config))


def training_steps(config, model, optimizers, shards):
    """Takes config.num_iterations steps of training.

    Yields the loss of each batch when its gradient is there, before weights change.
    """
    _, hidden = optimizers
    names = with_grams(model, hidden)
    for step in range(config.num_iterations):
        set_learning_rates(optimizers, learning_rate_scale(config, step))
        batch = shards.batch(range(step * config.batch_size, (step + 1) * config.batch_size))
        collect = names if names and (step + 1) % hidden.defaults["refresh_interval"] == 0 else ()
        loss, grams = accumulate(model, [batch], collect, torch.float32)
        if grams:
            hidden.refresh(grams, batch[0].numel())
        yield float(loss)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
