"""Measure data/tokenize_text.py, from file to shards, beside tiktoken's own batch encoding of the same texts.

    python records/bench/tokenize_speed.py FILE.jsonl

The two take turns, seven times.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tiktoken

SCRIPT = Path(__file__).parents[2] / "data/tokenize_text.py"


def seconds(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def tokenize(path, out):
    command = [sys.executable, SCRIPT, path, "--out", out, "--name", "a"]
    subprocess.run(command, check=True, capture_output=True)


def main():
    path = sys.argv[1]
    encoding = tiktoken.get_encoding("gpt2")
    cores = len(os.sched_getaffinity(0))
    with open(path) as file:
        texts = [json.loads(line)["text"] for line in file]

    def encode():
        return encoding.encode_ordinary_batch(texts, num_threads=cores)

    ratios = []
    for _ in range(7):
        batch, encoded = seconds(encode)
        tokens = sum(map(len, encoded)) + len(texts)
        with tempfile.TemporaryDirectory() as out:
            ours, _ = seconds(tokenize, path, out)
        ratios.append(batch / ours)
        print(f"tiktoken's batch {tokens / batch:,.0f} tokens/s, tokenize_text.py with its start "
              f"{tokens / ours:,.0f}: {ratios[-1]:.2f} times")
    print(f"median {np.median(ratios):.2f} times, on {cores} cores")


if __name__ == "__main__":
    main()
