"""What evaluation in bf16 instead of fp32 changes in a loss: the newest checkpoint of each run, in both.

    PYTHONPATH=. python records/bench/evaluation_dtype.py logs/cpu/*/      after scripts/run.sh
"""
import sys
from pathlib import Path

from scripts.sample import load_model
from train_gpt2 import Shards, evaluate, torch

DTYPES = (torch.float32, torch.bfloat16)

for folder in map(Path, sys.argv[1:]):
    model, config, step = load_model(folder)
    shards = Shards(config.input_val_bin, config.sequence_length, config.vocab_size)
    device = torch.device("cpu")
    fp32, bf16 = (evaluate(model, shards, config, device, dtype, 32, []) for dtype in DTYPES)
    print(f"{folder.name}, step {step}: {fp32:.5f} in fp32, {bf16 - fp32:+.5f} in bf16")
