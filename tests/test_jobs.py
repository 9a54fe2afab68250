"""harness/jobs.py: runs that are started, shown and stopped."""
import io
import os
import pty
import signal
import subprocess
import sys
import threading

import pytest

from harness import jobs
from conftest import fork, logged, write_config
from train_gpt2 import UserError


def test_a_run_of_several_is_a_run(shards, tmp_path):
    config = write_config(tmp_path / "config.toml", shards)
    code = ("import pathlib, sys; from harness import jobs; "
            "print(jobs.Jobs(1).train(sys.argv[1:-1], pathlib.Path(sys.argv[-1])))")
    done = fork("-c", code, config, "--run_name", "a", tmp_path / "logs/a")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == logged(tmp_path / "logs/a")[10, "val_loss"]


def test_stop_includes_a_starting_run(monkeypatch, tmp_path):
    (tmp_path / "train_gpt2.py").write_text("import signal; signal.alarm(30); signal.pause()")
    training = jobs.Jobs(1)
    processes = []
    popen = subprocess.Popen

    def stop_while_it_starts(command, **options):
        processes.append(popen(command, **options))
        threading.Thread(target=training.stop).start()
        return processes[-1]

    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    monkeypatch.setattr(jobs.subprocess, "Popen", stop_while_it_starts)
    assert training.train([], tmp_path) is None and processes[0].returncode == -signal.SIGTERM
    assert training.train([], tmp_path) is None and len(processes) == 1  # after stop() none is started


@pytest.mark.parametrize("open_ends", [os.pipe, pty.openpty])
def test_the_published_loss_stands_beside_ours(open_ends, monkeypatch):
    reader, writer = open_ends()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    thread = threading.Thread(target=jobs.echo, args=(reader, {125: 5.2017, 6200: 3.2785}))
    thread.start()
    try:
        for piece in ("Muon\nstep:0/6200 val_loss:10.9",
                      "3 train_time:0ms\n\r\033[Kstep:125/6200 val_loss:5.2117 tr",
                      "ain_time:9ms\nstep:126/6200 val_loss:5.1 x\nstep:6200/6200 val_loss:nan\nend"):
            os.write(writer, piece.encode())
            # shown at once, although its line has no end
            while not sys.stdout.getvalue().endswith(piece.rpartition("\n")[2]):
                assert thread.is_alive()
    finally:
        os.close(writer)
        thread.join(30)
    assert sys.stdout.getvalue() == (
        "Muon\nstep:0/6200 val_loss:10.93 train_time:0ms\n"
        "\r\033[Kstep:125/6200 val_loss:5.2117 train_time:9ms  published: 5.2017 (+0.0100)\n"
        "step:126/6200 val_loss:5.1 x\nstep:6200/6200 val_loss:nan  published: 3.2785 (+nan)\nend")


def test_stopped_runs_end_by_themselves(tmp_path):
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = """
import os, pathlib, signal, sys
folder, name, other = pathlib.Path(sys.argv[1]), *sys.argv[2:]
# blocked until it is waited for: a signal just before signal.pause() would be lost
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
(folder / name).touch()
while not (folder / other).exists():
    pass
if name == "b":
    os.kill(os.getppid(), signal.SIGTERM)
signal.sigwait({signal.SIGTERM})
(folder / (name + " saved")).touch()  # as a run writes its checkpoint
sys.exit(143)
"""
    try:
        with pytest.raises(KeyboardInterrupt):
            jobs.launch({name: ["-c", code, str(tmp_path), name, other] for name, other in ("ab", "ba")})
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # as before
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "a saved", "b saved"}


@pytest.mark.parametrize("failing", [2, None])
def test_no_run_is_left_behind(monkeypatch, failing):
    """Where the second cannot be started, or SIGINT reaches this process alone."""
    processes = []
    popen = jobs.subprocess.Popen

    def start(command, **options):
        if len(processes) + 1 == failing:
            raise BlockingIOError("no more processes")
        processes.append(popen(command, **options))
        return processes[-1]

    interrupt = "" if failing else "os.kill(os.getppid(), signal.SIGINT); "
    code = f"import os, signal; print('x', flush=True); {interrupt}signal.pause()"
    monkeypatch.setattr(jobs.subprocess, "Popen", start)
    monkeypatch.setattr(os, "isatty", lambda number: False)
    with pytest.raises(BlockingIOError if failing else KeyboardInterrupt):
        jobs.launch({"one": ["-c", code], "two": ["-c", code]})
    assert processes and all(process.poll() is not None for process in processes)


def test_runs_side_by_side_are_told_apart(capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
    code = ("import os, sys; print(os.environ['OMP_NUM_THREADS']); print('and this', file=sys.stderr); "
            "sys.exit(int(sys.argv[1]))")
    assert jobs.launch({"one": ["-c", code, "0"], "two": ["-c", code, "3"]}) == [0, 3]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("one ", "two "))]
    assert sorted(lines) == ["one  3", "one  and this", "two  3", "two  and this"]


def test_runs_side_by_side_have_the_users_threads(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert jobs.launch({"one": ["-c", code], "two": ["-c", code]}) == [0, 0]
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line for line in lines if line.startswith(("one ", "two "))) == ["one  5", "two  5"]


def test_failed_command_says_what_remains(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    jobs.start(["-c", "import os; assert 'OMP_NUM_THREADS' not in os.environ"], "one command has all cores")
    with pytest.raises(UserError, match="code 3: it failed"):
        jobs.start(["-c", "raise SystemExit(3)"], "it failed")
