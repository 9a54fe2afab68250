"""scripts/setup.sh in small repositories, and the launchers of a cluster with stubs for Slurm and Python."""
import json
import os
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from conftest import ROOT, refused, run

RECORD = f"""#!{sys.executable}
import json, os, sys
print(json.dumps(dict(arguments=sys.argv[1:], job=os.environ.get("JOB"), folder=os.getcwd())))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """stub(name, text) puts a command on the PATH; by default one that prints how it was called."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def stub(name, text=RECORD):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
        return tmp_path / name
    return stub


# the environment


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_constraints_are_exact_versions_that_satisfy_the_requirements():
    exact = {}
    for constraint in requirements("constraints.txt"):
        specifier, = constraint.specifier
        assert specifier.operator == "==" and not constraint.url and "+" not in specifier.version, constraint
        exact[constraint.name.lower()] = specifier.version
    for requirement in requirements("requirements.txt"):
        if requirement.name == "triton":  # each build of torch names the one it needs
            assert "triton" not in exact
        else:
            assert requirement.specifier.contains(exact[requirement.name.lower()]), requirement


@pytest.fixture
def repository(tmp_path):
    """A repository with nothing to install."""
    (tmp_path / "scripts").mkdir()
    for name in ("requirements.txt", "constraints.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "scripts/setup.sh").write_text((ROOT / "scripts/setup.sh").read_text())
    return tmp_path


def set_up(repository):
    """Sources setup.sh as the other scripts do, and says which Python it set."""
    command = "set -euo pipefail; source scripts/setup.sh; $python -c 'import pip, sys; print(sys.prefix)'"
    return run("bash", "-c", command, cwd=repository, env={"PYTHON": sys.executable})


def package(environment):
    """A package in the environment: (its folder, a command that imports it)."""
    python = environment / "bin/python"
    path = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (path / "somebodys").mkdir(parents=True)
    (path / "somebodys/__init__.py").write_text("")
    return path / "somebodys", [python, "-c", "import somebodys"]


def test_setup_makes_an_environment_once(repository):
    done = set_up(repository)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Installing requirements.txt into .venv ...\n{repository / '.venv'}\n"
    assert set_up(repository).stdout == f"{repository / '.venv'}\n"
    (repository / "constraints.txt").write_text("# changed\n")
    assert set_up(repository).stdout == done.stdout


def test_setup_uses_an_environment_without_pip(repository):
    """As `uv venv` makes it; the packages in it stay."""
    run(sys.executable, "-m", "venv", "--without-pip", repository / ".venv")
    folder, imports = package(repository / ".venv")
    done = set_up(repository)
    assert done.returncode == 0, done.stderr
    assert run(*imports).returncode == 0


def test_setup_refuses_an_environment_without_pip_that_cannot_get_it(repository):
    run(sys.executable, "-m", "venv", "--without-pip", repository / ".venv")
    folder, imports = package(repository / ".venv")
    (folder.parent / "ensurepip.pth").write_text("import sys; sys.modules['ensurepip'] = None\n")
    done = set_up(repository)
    refused(done, ".venv has no pip")
    assert run(*imports).returncode == 0


def test_setup_refuses_an_environment_whose_python_is_gone(repository):
    run(sys.executable, "-m", "venv", "--without-pip", repository / ".venv")
    folder, _ = package(repository / ".venv")
    (repository / ".venv/bin/python").unlink()
    done = set_up(repository)
    refused(done, ".venv/bin/python does not run")
    assert folder.exists()


def test_setup_completes_an_environment_that_was_stopped_while_it_was_made(repository):
    (repository / ".venv/lib").mkdir(parents=True)
    done = set_up(repository)
    assert done.returncode == 0, done.stderr


def test_setup_without_a_python_says_so(repository, stub):
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        stub(name, "#!/bin/sh\nexit 1\n")
    done = run("bash", "-c", "source scripts/setup.sh", cwd=repository, env={"PYTHON": ""})
    assert done.returncode == 1 and done.stderr.startswith("error: no Python 3.11 or newer on the PATH")


# several nodes


def test_slurm_starts_the_launcher(stub):
    stub("srun")
    node_names = "yes node7 | head -n 99999"  # more than a pipe holds
    stub("scontrol", f'#!/bin/sh\n[ "$*" = "show hostnames node[7-8]" ] && {node_names}\n')
    script = stub("slurm_script", (ROOT / "scripts/slurm.sbatch").read_text())  # Slurm runs a copy
    slurm = dict(SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="40123", SLURM_JOB_NODELIST="node[7-8]",
                 SLURM_JOB_NUM_NODES="2", SLURM_CPUS_PER_TASK="48")
    done = run("bash", script, "configs/speedrun_muon.toml", "--save_every", 500, env=slurm)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict(job="speedrun_muon_40123", folder=str(ROOT), arguments=[
        "--kill-on-bad-exit=0", "--cpus-per-task=48", "scripts/launch_multinode.sh", "2", "node7:20123",
        "configs/speedrun_muon.toml", "--save_every", "500"])


def test_slurm_output_folder_exists():
    script = (ROOT / "scripts/slurm.sbatch").read_text()
    output, = re.findall(r"^#SBATCH --output=(.*)$", script, re.MULTILINE)
    assert Path(output).parent == Path(".")
    assert run("git", "check-ignore", "-q", output.replace("%j", "1"), cwd=ROOT).returncode == 0


def test_launcher_starts_torchrun_with_the_nodes_rendezvous(stub):
    config = str(ROOT / "configs/cpu_muon.toml")
    done = run(ROOT / "scripts/launch_multinode.sh", 2, "node7", config, "--save_every", 5,
               env=dict(PYTHON=str(stub("python")), NPROC="4"))
    assert json.loads(done.stdout)["arguments"] == [
        "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "4", "--max_restarts", "3",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "node7:29400", "--rdzv_id", "cpu_muon",
        str(ROOT / "train_gpt2.py"), config, "--run_name", "cpu_muon", "--resume", "auto",
        "--save_every", "5"]


@pytest.mark.parametrize("script, arguments, env, code, words", [
    ("slurm.sbatch", [], {}, 2, "usage: sbatch"),
    ("slurm.sbatch", ["a.toml"], {}, 1, "start this with sbatch"),
    ("slurm.sbatch", ["a.toml"], {"SLURM_SUBMIT_DIR": "/"}, 1, "start sbatch in the repository"),
    ("launch_multinode.sh", ["2", "node7"], {}, 2, "HEAD is the name or address"),
    ("launch_multinode.sh", ["two", "node7", "a.toml"], {}, 2, "NODES HEAD CONFIG"),
    ("launch_multinode.sh", ["2", "node7", "no.toml"], {}, 1,
     "no configuration no.toml; name one relative to"),
])
def test_scripts_say_how_to_start_them(script, arguments, env, code, words, monkeypatch):
    monkeypatch.delenv("SLURM_SUBMIT_DIR", raising=False)
    done = run("bash", ROOT / "scripts" / script, *arguments, env=env)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr


def test_launcher_without_torch_says_so(stub):
    python = stub("python", "#!/bin/sh\necho ModuleNotFoundError >&2; exit 1\n")
    launcher = ROOT / "scripts/launch_multinode.sh"
    done = run(launcher, 2, "node7", ROOT / "configs/cpu_muon.toml", env=dict(PYTHON=str(python)))
    assert done.returncode == 1
    assert done.stderr == f"error: {python} cannot import torch; set PYTHON to an interpreter that can\n"
