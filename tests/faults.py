"""Faults on purpose: a full disk, and optimizers (--optimizer faults:Dies ...) that fail in step 5 of process 1 (of 0 if it is alone)."""
import contextlib
import os
import resource
import signal
import threading
from pathlib import Path

import torch

from train_gpt2 import Muon


@contextlib.contextmanager
def full_disk(limit):
    """In this process no file can grow beyond `limit` bytes: writes fail as on a full disk, with another errno."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Faulty(Muon):
    steps = 0

    def step(self):
        super().step()
        self.steps += 1
        if self.steps == 5 and os.environ.get("RANK", "0") == ("1" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "0"):
            self.fault()


class Dies(Faulty):
    def fault(self):
        os.kill(os.getpid(), signal.SIGKILL)


class DiesOnce(Dies):
    def fault(self):
        with contextlib.suppress(FileExistsError):
            Path(os.environ["FAULT_MARKER"]).touch(exist_ok=False)
            super().fault()


class Hangs(Faulty):
    def fault(self):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # so that torchrun need not wait 30 s before it kills
        threading.Event().wait()


class TurnsNaN(Faulty):
    def fault(self):
        self.param_groups[0]["params"][0].data.fill_(torch.nan)


class FillsDisk(Faulty):
    """From here on as in full_disk(FAULT_BYTES), to the end of the process."""

    def fault(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FAULT_BYTES"]), resource.RLIM_INFINITY))
