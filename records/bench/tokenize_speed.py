"""Measure data/tokenize_text.py, from file to shards, beside tiktoken's own batch encoding of the same texts, alternating.

    python records/bench/tokenize_speed.py FILE.jsonl
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

encoding, cores, ratios = tiktoken.get_encoding("gpt2"), len(os.sched_getaffinity(0)), []
with open(sys.argv[1]) as file:
    texts = [json.loads(line)["text"] for line in file]
for _ in range(7):
    start = time.perf_counter()
    tokens = sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=cores))) + len(texts)
    batch = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        subprocess.run([sys.executable, Path(__file__).parents[2] / "data/tokenize_text.py", sys.argv[1], "--out", out, "--name", "a"],
                       check=True, capture_output=True)
        ours = time.perf_counter() - start
    ratios.append(batch / ours)
    print(f"tiktoken's batch {tokens / batch:,.0f} tokens/s, tokenize_text.py with its start {tokens / ours:,.0f}: {ratios[-1]:.2f} times")
print(f"median {np.median(ratios):.2f} times, on {cores} cores")
