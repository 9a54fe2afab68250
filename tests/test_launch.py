"""scripts/slurm.sbatch and scripts/launch_multinode.sh, with stubs for Slurm's commands and for Python."""
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import pytest

import conftest
from conftest import ROOT

run = partial(conftest.run, timeout=60)
RECORD = f'''#!{sys.executable}
import json, os, sys
print(json.dumps(dict(arguments=sys.argv[1:], job=os.environ.get("JOB"), folder=os.getcwd())))
'''


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """stub(name, text) puts a command on the PATH; by default one that prints its arguments, JOB and folder as JSON."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def stub(name, text=RECORD):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
        return tmp_path / name
    return stub


def test_slurm_starts_the_launcher(stub):
    stub("srun")
    stub("scontrol", '#!/bin/sh\n[ "$*" = "show hostnames node[7-8]" ] && yes node7 | head -n 99999\n')  # more than a pipe holds
    script = stub("slurm_script", (ROOT / "scripts/slurm.sbatch").read_text())  # Slurm runs a copy
    done = run("bash", script, "configs/speedrun_muon.toml", "--save_every", 500, env=dict(SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="40123",
               SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_NUM_NODES="2", SLURM_CPUS_PER_TASK="48"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict(job="speedrun_muon_40123", folder=str(ROOT), arguments=[
        "--kill-on-bad-exit=0", "--cpus-per-task=48", "scripts/launch_multinode.sh", "2", "node7:20123", "configs/speedrun_muon.toml",
        "--save_every", "500"])


def test_slurm_output_folder_exists():
    output, = re.findall(r"^#SBATCH --output=(.*)$", (ROOT / "scripts/slurm.sbatch").read_text(), re.MULTILINE)
    assert Path(output).parent == Path(".")
    assert run("git", "check-ignore", "-q", output.replace("%j", "1"), cwd=ROOT).returncode == 0


def test_launcher_starts_torchrun_with_the_nodes_rendezvous(stub):
    config = str(ROOT / "configs/cpu_muon.toml")
    done = run(ROOT / "scripts/launch_multinode.sh", 2, "node7", config, "--save_every", 5,
               env=dict(PYTHON=str(stub("python")), NPROC="4"))
    assert json.loads(done.stdout)["arguments"] == [
        "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "4", "--max_restarts", "3", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "node7:29400", "--rdzv_id", "cpu_muon", str(ROOT / "train_gpt2.py"), config, "--run_name", "cpu_muon",
        "--resume", "auto", "--save_every", "5"]


@pytest.mark.parametrize("script, arguments, env, code, words", [
    ("slurm.sbatch", [], {}, 2, "usage: sbatch"), ("slurm.sbatch", ["a.toml"], {}, 1, "start this with sbatch"),
    ("slurm.sbatch", ["a.toml"], {"SLURM_SUBMIT_DIR": "/"}, 1, "start sbatch in the repository"),
    ("launch_multinode.sh", ["2", "node7"], {}, 2, "HEAD is the name or address"),
    ("launch_multinode.sh", ["two", "node7", "a.toml"], {}, 2, "NODES HEAD CONFIG"),
    ("launch_multinode.sh", ["2", "node7", "no.toml"], {}, 1, "no configuration no.toml; name one relative to"),
])
def test_scripts_say_how_to_start_them(script, arguments, env, code, words, monkeypatch):
    monkeypatch.delenv("SLURM_SUBMIT_DIR", raising=False)
    done = run("bash", ROOT / "scripts" / script, *arguments, env=env)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr


def test_launcher_without_torch_says_so(stub):
    python = stub("python", "#!/bin/sh\necho ModuleNotFoundError >&2; exit 1\n")
    done = run(ROOT / "scripts/launch_multinode.sh", 2, "node7", ROOT / "configs/cpu_muon.toml", env=dict(PYTHON=str(python)))
    assert done.returncode == 1 and done.stderr == f"error: {python} cannot import torch; set PYTHON to an interpreter that can\n"
