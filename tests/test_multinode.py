"""Two nodes: network namespaces of this machine, joined by a virtual cable. Each is started by
scripts/launch_multinode.sh. And what makes processes of one attempt find each other."""
import os
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

import train_gpt2
from conftest import HANGS, PATHS, ROOT, logged, run, write_config


def ip(*arguments):
    return run("ip", *arguments, check=True)


def connect(addresses):
    """Makes network namespaces with these {name: address}, joined by a cable."""
    first, second = addresses
    for name in addresses:
        ip("netns", "add", name)
    ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
    for name, address in addresses.items():
        ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
        ip("-n", name, "link", "set", "cable", "up")
        ip("-n", name, "link", "set", "lo", "up")


@pytest.fixture
def nodes():
    """[(command prefix, address, interface)] of two nodes: namespaces where those can be made, otherwise
    two addresses of loopback."""
    addresses = {f"gpt2test{os.getpid()}{i}": f"10.77.0.{i}" for i in (1, 2)}
    try:
        try:
            connect(addresses)
            nodes = []
            for name, address in addresses.items():
                nodes.append((["ip", "netns", "exec", name], address, "cable"))
        except (OSError, subprocess.CalledProcessError) as error:
            warnings.warn(f"no network namespaces here ({error}): using two addresses of loopback instead")
            nodes = [([], "127.0.0.1", "lo"), ([], "127.0.0.2", "lo")]
        yield nodes
    finally:
        for name in addresses:
            run("ip", "netns", "delete", name)


def kill_node(process):
    """Kills the launcher and everything that descends from it. (Its workers are in sessions of their own.)"""
    pids = [process.pid]
    for pid in pids:  # which grows meanwhile
        children = run("ps", "-o", "pid=", "--ppid", pid).stdout.split()
        pids += [int(child) for child in children]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_two_nodes_survive_a_death(nodes, shards, tmp_path, call, launch, monkeypatch):
    """All processes wait in step 11 until the test has killed the second node."""
    marker = tmp_path / "killed"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/forks.py "$@"\n')
    python.chmod(0o755)
    config = write_config(
        tmp_path / "config.toml", shards, num_iterations=30, warmdown_iters=20, val_loss_every=2,
        save_every=2,
        optimizer="faults:WaitsForFile", optimizer_args='{"refresh_interval": 5}')

    def join(prefix, address, interface):
        env = dict(PATHS, NPROC="2", PYTHON=str(python), LOCAL_ADDR=address, GLOO_SOCKET_IFNAME=interface,
                   JOB="together", FAULT_MARKER=str(marker))
        command = [*prefix, ROOT / "scripts/launch_multinode.sh", 2, nodes[0][1], config]
        return launch(*command, env=env, stderr=subprocess.STDOUT)

    first, second = [join(*node) for node in nodes]
    running = [first, second]
    try:
        output = ""
        while "step:10/30" not in output:  # on the node of process 0, whichever that is
            line = first.stdout.readline()
            assert line, output
            output += line
        kill_node(second)
        marker.touch()
        again = join(*nodes[1])
        running.append(again)
        output += first.communicate(timeout=HANGS)[0]
        assert first.returncode == 0, output
        assert "resumed at step 10" in output
        assert again.wait(timeout=HANGS) == 0
    finally:
        for process in running:
            if process.poll() is None:
                kill_node(process)
    monkeypatch.setenv("FAULT_MARKER", str(marker))
    assert call(train_gpt2, config, "--run_name", "alone").returncode == 0
    together = logged(tmp_path / "logs/together")
    alone = logged(tmp_path / "logs/alone")
    assert together == pytest.approx(alone, rel=2e-4)


def test_a_name_for_each_attempt():
    """Processes agree on a name, also where the store still has those of an attempt that lost one of them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def name(process):
        client = dist.TCPStore("127.0.0.1", store.port, wait_for_workers=False)
        return train_gpt2.name_of_this_attempt(client, process, 3, HANGS)

    with ThreadPoolExecutor(3) as pool:
        first = set(pool.map(name, range(3)))
        there = store.num_keys()
        unfinished = [pool.submit(name, process) for process in (0, 1)]
        while store.num_keys() < there + 2:  # each tries the name with the old word of the third
            pass
        second = {name(2), *(attempt.result() for attempt in unfinished)}
    assert len(first) == len(second) == 1
    assert first != second


def test_a_process_that_does_not_come():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("new/1", "of an earlier attempt")
    with pytest.raises(RuntimeError, match="missing"):
        train_gpt2.name_of_this_attempt(store, 0, 2, 1)
