"""Starting, stopping and resuming runs of train_gpt2.py, for the scripts that train several."""
import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

from harness.command import ROOT
from harness.runs import diverged, read_facts
from train_gpt2 import MAY_CHANGE_ON_RESUME, UserError, code_sha256

# fields that the plan sets for each of several runs, or that would spoil the final loss
PLANNED_FIELDS = ("seed", "data_seed", "run_name", "resume", "optimizer", "stop_at_target")


def finished(folder, config):
    """Whether `folder` holds the finished run of `config` by this code. UserError if it holds one of another code or configuration."""
    facts = read_facts(folder)
    config_there = facts.get("config", {})
    if not facts:
        return False

    def refuse(what):
        raise UserError(f"{folder} {what}; choose another --log_dir, or delete it")

    if facts.get("code_sha256") != code_sha256():
        refuse("is from another version of train_gpt2.py")
    for name, value in dataclasses.asdict(config).items():
        if name not in MAY_CHANGE_ON_RESUME - {"stop_at_target"} and config_there.get(name) != value:
            refuse(f"has {name} = {config_there.get(name)!r}, this run {value!r}")
    if ":" in config.optimizer:
        module = importlib.util.find_spec(config.optimizer.split(":")[0])
        if module and hashlib.sha256(Path(module.origin).read_bytes()).hexdigest() != facts.get("optimizer_sha256", ""):
            refuse(f"is from another version of {module.origin}")
    return "end" in facts


def ended(folder, config):
    """Whether `folder` holds the run of `config`, finished or diverged."""
    return finished(folder, config) or diverged(folder)


class Jobs:
    """Runs of train_gpt2.py, `number` at a time, each started by a thread of its own, until one thread says stop()."""

    def __init__(self, number):
        self.threads = max(1, (os.cpu_count() or 1) // number)  # of the CPU, for each run
        self.processes, self.stopped, self.lock = [], False, threading.Lock()

    def train(self, arguments, folder):
        """Runs train_gpt2.py with `arguments`, into `folder`; returns the final validation loss, None if the run failed or was stopped."""
        with self.lock:  # a process that is being started is not missed by stop()
            if self.stopped:
                return None
            process = subprocess.Popen([sys.executable, str(ROOT / "train_gpt2.py"), *arguments], text=True, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": str(self.threads)})
            self.processes.append(process)
        errors = process.communicate()[1]
        if process.returncode:
            print(f"{folder.name}: {errors.strip() or f'ended with code {process.returncode}'}", file=sys.stderr, flush=True)
            return None
        return read_facts(folder).get("final_val_loss")

    def stop(self):
        """Ends all runs, each after its step and with a checkpoint; none is begun any more."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()  # of one that has ended it does nothing


def echo(output, published):
    """Copies what train_gpt2.py prints to the terminal, its evaluations with the `published` loss {step: loss} beside them."""
    line = b""
    with open(output, "rb", buffering=0) as output:
        while True:
            try:
                *complete, rest = output.read(65536).split(b"\n")
            except OSError:  # a pseudo-terminal ends like this
                return
            for part in complete:
                found = re.search(rb"step:(\d+)/\d+ val_loss:(\S+)", line + part)
                theirs = published.get(int(found[1])) if found else None
                text = f"  published: {theirs:.4f} ({float(found[2]) - theirs:+.4f})" if theirs else ""
                sys.stdout.write(f"{part.decode(errors='replace').rstrip()}{text}\n")
                line = b""
            if not complete and not rest:
                return
            line += rest
            sys.stdout.write(rest.decode(errors="replace"))
            sys.stdout.flush()


def label(output, name):
    """Copies lines to the terminal, with `name` in front."""
    with open(output, encoding="utf-8", errors="replace") as output:
        for line in output:
            with contextlib.suppress(OSError, UnicodeError):  # a terminal that is gone, or knows few letters, ends no run
                sys.stdout.write(f"{name}  {line.rstrip()}\n")  # in one piece: several do this at once
                sys.stdout.flush()


def launch(commands, published=None):
    """Runs `python ARGUMENTS` for each of `commands`, {name: arguments}, all at once; returns their exit codes.

    Several share the CPU's cores, and what they print goes through label(). What one prints goes through echo(), if there is a `published`
    curve. Raises KeyboardInterrupt if Ctrl-C or SIGTERM stopped them.
    """
    several, processes, copies, stops = len(commands) > 1, [], [], []
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(commands)))} if several else None

    def stop(number, frame):  # a run ends after its step and writes a checkpoint; a terminal has told it of Ctrl-C already
        stops.append(number)
        if number == signal.SIGTERM or not os.isatty(0):
            for process in processes:
                process.send_signal(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for name, arguments in commands.items():
            print(f"\n$ {shlex.join(['python', *arguments])}", flush=True)
            output, end = (pty.openpty() if published and sys.stdout.isatty() else os.pipe()) if published or several else (None, None)
            processes.append(subprocess.Popen([sys.executable, *arguments], stdout=end, stderr=end if several else None, env=environment))
            if end:
                os.close(end)
                copy = (label, (output, name)) if several else (echo, (output, published))
                copies.append(threading.Thread(target=copy[0], args=copy[1], daemon=True))
                copies[-1].start()
            if stops:  # it came before this process was there
                processes[-1].terminate()
                break
        codes = [process.wait() for process in processes]
        for copy in copies:
            copy.join(5)  # a child of a run that hangs, as wandb's may, keeps its pipe open
    except BaseException:  # for instance no memory for another process
        for process in processes:
            process.terminate()
            process.wait()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stops:
        raise KeyboardInterrupt
    return codes


def start(arguments, otherwise):
    """Runs `python ARGUMENTS`, as launch() does. Raises UserError with `otherwise` if that fails."""
    code, = launch({"": arguments})
    if code:
        raise UserError(f"that command ended with code {code}: {otherwise}")


def fetch_data(track, fields):
    """Makes or downloads the track's shards, unless the `fields` from the command line name others."""
    if not any(field.startswith("--input_bin") for field in fields):
        start(["data/shakespeare.py"] if track == "cpu" else ["data/fineweb.py", f"configs/{track}_muon.toml"],
              "the data are not there; run the same command again to continue")
