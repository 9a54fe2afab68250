"""Two nodes: network namespaces of this machine, joined by a virtual cable, each started by scripts/launch_multinode.sh."""
import os
import signal
import subprocess
import sys
import warnings

import pytest

import train_gpt2
from conftest import ROOT, logged, run, write_config


def ip(*arguments):
    return run("ip", *arguments, check=True)


@pytest.fixture
def nodes():
    """[(command prefix, address, interface)] of two nodes, in namespaces where those can be made, else two addresses of loopback."""
    nodes = {f"gpt2test{os.getpid()}{i}": f"10.77.0.{i}" for i in (1, 2)}
    try:
        try:
            for name in nodes:
                ip("netns", "add", name)
            ip("link", "add", "cable", "netns", min(nodes), "type", "veth", "peer", "name", "cable", "netns", max(nodes))
            for name, address in nodes.items():
                ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
                ip("-n", name, "link", "set", "lo", "up")
            yield [(["ip", "netns", "exec", name], address, "cable") for name, address in nodes.items()]
        except (OSError, subprocess.CalledProcessError) as error:
            warnings.warn(f"no network namespaces here ({error}): two rendezvous endpoints on loopback instead")
            yield [([], "127.0.0.1", "lo"), ([], "127.0.0.2", "lo")]
    finally:
        for name in nodes:
            run("ip", "netns", "delete", name)


def kill_node(process):
    """Kills the launcher and all processes that descend from it; torchrun's are in sessions of their own."""
    pids = [process.pid]
    for pid in pids:
        pids += map(int, run("ps", "-o", "pid=", "--ppid", pid).stdout.split())
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_two_nodes_survive_a_death(nodes, shards, tmp_path, call, launch):
    config = write_config(tmp_path / "config.toml", shards, num_iterations=100, warmdown_iters=20, val_loss_every=2, save_every=2,
                          optimizer="newton_muon", refresh_interval=5, collective_timeout=60)

    def join(prefix, address, interface):
        env = dict(NPROC="2", PYTHON=sys.executable, LOCAL_ADDR=address, GLOO_SOCKET_IFNAME=interface, JOB="together")
        return launch(*prefix, ROOT / "scripts/launch_multinode.sh", 2, nodes[0][1], config, env=env, stderr=subprocess.STDOUT)

    running = first, second = [join(*node) for node in nodes]
    try:
        output = ""
        while "step:10/100" not in output:  # on the node of process 0, whichever that is
            assert (line := first.stdout.readline()), output
            output += line
        kill_node(second)
        running.append(join(*nodes[1]))
        rest = first.communicate(timeout=150)[0]
        assert first.returncode == 0, rest
        assert "resumed at step" in output + rest, rest
        assert running[2].wait(timeout=60) == 0
    finally:
        for process in running:
            if process.poll() is None:
                kill_node(process)
    assert call(train_gpt2, config, "--run_name", "alone").returncode == 0
    assert logged(tmp_path / "logs/together") == pytest.approx(logged(tmp_path / "logs/alone"), rel=2e-4)
