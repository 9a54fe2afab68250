"""Faults on purpose: a full disk, and optimizers (--optimizer faults:Dies ...) that fail in a training run.

The optimizers fail in step 5. If there are several processes, process 1 has the fault.
"""
import contextlib
import os
import resource
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from train_gpt2 import Muon, NewtonMuon, rank, world_size


@contextlib.contextmanager
def full_disk(limit):
    """In this process no file can grow beyond `limit` bytes: writes fail as on a full disk, but with
    another errno."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def has_the_fault():
    return rank() == min(1, world_size() - 1)


class Faulty(Muon):
    steps = 0

    def step(self):
        super().step()
        self.steps += 1
        if self.steps == 5:
            if has_the_fault():
                self.fault()
            else:
                self.elsewhere()

    def elsewhere(self):
        pass


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
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # so that torchrun need not wait 30 s to kill it
        threading.Event().wait()

    def elsewhere(self):
        # The other process hangs from here on, so a second is as good as collective_timeout.
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))


class TurnsNaN(Faulty):
    def fault(self):
        self.param_groups[0]["params"][0].data.fill_(torch.nan)


class FillsDisk(Faulty):
    """As in full_disk(FAULT_BYTES), from step 5 until the process ends."""

    def fault(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FAULT_BYTES"]), resource.RLIM_INFINITY))


class WaitsForSIGTERM(NewtonMuon):
    """If FAULT_WAITS is set, process 1 does not end step 5 before the trainer has caught a SIGTERM."""

    steps = 0

    def step(self):
        super().step()
        self.steps += 1
        if "FAULT_WAITS" not in os.environ or not has_the_fault():
            return
        if self.steps == 1:
            self.listen()
        if self.steps == 5:
            self.caught.wait()

    def listen(self):
        self.caught = threading.Event()
        trainers = signal.getsignal(signal.SIGTERM)  # not its handler yet during the warm-up

        def handler(number, frame):
            trainers(number, frame)
            self.caught.set()

        if callable(trainers):
            signal.signal(signal.SIGTERM, handler)


class WaitsForFile(NewtonMuon):
    """Does not end step 11 before there is a file FAULT_MARKER."""

    steps = 0

    def step(self):
        super().step()
        self.steps += 1
        while self.steps == 11 and not os.path.exists(os.environ["FAULT_MARKER"]):
            time.sleep(0.05)
