"""scripts/dry_run.py: the training step on a GPU that is not there."""
import pytest
import torch

from conftest import refused
from scripts import dry_run


@pytest.mark.skipif(torch.version.cuda is None or torch.cuda.is_available(), reason="needs CUDA, not a GPU")
def test_a_cuda_build_accepts_the_step(call):
    done = call(dry_run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all operations accept what the trainer gives them"


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch is installed")
def test_a_cpu_build_is_refused(call):
    refused(call(dry_run), "is no CUDA build", "scripts/dry_run.sh installs one")
