"""Trains a run whole, then another one that is killed 20 times and resumed: kills.py CONFIG.toml

Each attempt is a fork of this process, which has torch imported, so that the kills fall into training and
checkpoints, not into imports. It kills itself at a random number of Python's calls and returns: such a
number does not depend on how busy the machine is, as a time would. Prints the exit codes of the attempts
and of a last one that is not killed.
"""
import json
import multiprocessing
import os
import random
import signal
import sys

import torch
import torch._dynamo  # an optimizer imports this when it is made

import train_gpt2

KILLS = 20


class Calls:
    """Counts the calls and returns of this thread. Ends the process at number `fatal`, if there is one."""

    def __init__(self, fatal=None):
        self.fatal = fatal
        self.count = 0

    def __call__(self, frame, event, arg):
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def train(words, fatal, counts):
    calls = Calls(fatal)
    sys.setprofile(calls)
    code = train_gpt2.run(train_gpt2.load_config(words))
    sys.setprofile(None)
    counts.put(calls.count)
    sys.exit(code)


def attempt(*words, fatal=None):
    """(exit code, calls and returns) of a training run in a fork."""
    forks = multiprocessing.get_context("fork")
    counts = forks.SimpleQueue()
    fork = forks.Process(target=train, args=([sys.argv[1], *words], fatal, counts))
    fork.start()
    fork.join()
    return fork.exitcode, None if counts.empty() else counts.get()


if __name__ == "__main__":
    torch.set_num_threads(1)
    code, total = attempt("--run_name", "whole")
    assert code == 0
    rng = random.Random(0)
    codes = []
    for fatal in [rng.randrange(1, total // 8) for _ in range(KILLS)] + [None]:
        code, _ = attempt("--run_name", "killed", "--resume", "auto", fatal=fatal)
        codes.append(code)
    print(json.dumps(codes))
