"""Fetch FineWeb, tokenised with GPT-2's BPE for the speedrun, from the public data set kjj0/fineweb10B-gpt2.

    python data/fineweb.py 33                                 the validation shard and the first 33 training shards
    python data/fineweb.py configs/speedrun_muon.toml         as many as this configuration needs

A shard holds 100 million tokens in 200 MB; there are 103 of them. Each is downloaded under another name, checked, and only then put in its place in
--out, so that what lies there is whole; run the script again to go on after an interruption. HF_ENDPOINT, HF_HOME, HF_TOKEN and proxies
work as everywhere in huggingface_hub.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository instead of data/: train_gpt2 is there

import argparse
import math
import os
import shutil

from train_gpt2 import Config, UserError, open_shard, read_toml

REPOSITORY = "kjj0/fineweb10B-gpt2"
SHARD_TOKENS, SHARDS, VOCABULARY = 100_000_000, 103, 50257


def shards_needed(config):
    """Training shards that `config` reads without repeating any."""
    per_shard = (SHARD_TOKENS - 1) // config.sequence_length
    return math.ceil(config.num_iterations * config.batch_size / per_shard)


def check(path):
    """Raises UserError unless the file at `path` is a shard with GPT-2's tokens."""
    tokens = open_shard(path)
    if len(tokens) and tokens.max() >= VOCABULARY:
        raise UserError(f"{path}: token {tokens.max()} is outside GPT-2's vocabulary of {VOCABULARY}: damaged")


def fetch(name, out):
    """Downloads one shard into `out`, unless a good one is there."""
    from huggingface_hub import hf_hub_download
    path = out / name
    if path.exists():
        try:
            check(path)
            print(f"{path}: is there")
            return
        except UserError as error:
            print(f"{error}; downloading it again", file=sys.stderr)
    partial = out / ".download"
    try:
        downloaded = Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=partial))
    except Exception as error:  # the library and its transports raise many kinds
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{name} cannot be downloaded from {os.environ.get('HF_ENDPOINT', 'the hub')}: {reason}; run the script again to go on") from None
    try:
        check(downloaded)
    except UserError:
        downloaded.unlink()
        raise
    os.replace(downloaded, path)
    print(f"{path}: downloaded and checked")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="N|CONFIG.toml", help=f"training shards, 1 to {SHARDS}, or a configuration file")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "fineweb10B", help="folder (default: data/fineweb10B)")
    args = parser.parse_args()
    if args.shards.isdecimal():
        number = int(args.shards)
    else:
        number = shards_needed(Config(**read_toml(args.shards)))
        print(f"{args.shards} needs {number} training shards")
    if not 1 <= number <= SHARDS:
        raise UserError(f"{number} training shards: there are 1 to {SHARDS}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, number + 1))]:
        fetch(name, args.out)
    shutil.rmtree(args.out / ".download", ignore_errors=True)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the script again to go on")
