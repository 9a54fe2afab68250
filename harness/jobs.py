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
    """Whether `folder` holds the finished run of `config` by this code.

    UserError if it holds a run of another code or configuration.
    """
    facts = read_facts(folder)
    if not facts:
        return False

    def refuse(what):
        raise UserError(f"{folder} {what}; choose another --log_dir, or delete it")

    if facts.get("code_sha256") != code_sha256():
        refuse("is from another version of train_gpt2.py")
    config_there = facts.get("config", {})
    for name, value in dataclasses.asdict(config).items():
        if name in MAY_CHANGE_ON_RESUME and name != "stop_at_target":
            continue
        if config_there.get(name) != value:
            refuse(f"has {name} = {config_there.get(name)!r}, this run {value!r}")
    if ":" in config.optimizer:
        module = importlib.util.find_spec(config.optimizer.split(":")[0])
        if module:
            sha256 = hashlib.sha256(Path(module.origin).read_bytes()).hexdigest()
            if sha256 != facts.get("optimizer_sha256", ""):
                refuse(f"is from another version of {module.origin}")
    return "end" in facts


def ended(folder, config):
    """Whether `folder` holds the run of `config`, finished or diverged."""
    return finished(folder, config) or diverged(folder)


class Jobs:
    """Runs of train_gpt2.py, `number` at a time, each started by a thread of its own.

    After stop() none is started.
    """

    def __init__(self, number):
        self.threads = threads_for(number)
        self.processes = []
        self.stopped = False
        self.lock = threading.Lock()

    def train(self, arguments, folder):
        """Runs train_gpt2.py with `arguments`, into `folder`.

        Returns the final validation loss, None if the run failed or was stopped.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        command = [sys.executable, str(ROOT / "train_gpt2.py"), *arguments]
        with self.lock:  # so that stop() does not miss a process that is being started
            if self.stopped:
                return None
            process = subprocess.Popen(command, text=True, env=environment,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            self.processes.append(process)
        _, errors = process.communicate()
        if process.returncode:
            reason = errors.strip() or f"ended with code {process.returncode}"
            print(f"{folder.name}: {reason}", file=sys.stderr, flush=True)
            return None
        return read_facts(folder).get("final_val_loss")

    def stop(self):
        """Ends all runs, each after its step and with a checkpoint; none is begun any more."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()  # does nothing to one that has ended


def threads_for(number):
    """CPU threads for each of so many runs at a time: OMP_NUM_THREADS, else an equal share of the cores."""
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return int(os.environ["OMP_NUM_THREADS"])
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # those that this process may use
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // number)


# running commands, and showing what they print


def echo(output, published):
    """Copies what one run of train_gpt2.py prints to the terminal, as it comes.

    `published` is {step: loss}: evaluations at these steps get the published loss beside them.
    """
    line = b""
    with open(output, "rb", buffering=0) as output:
        while True:
            try:
                *complete, rest = output.read(65536).split(b"\n")
            except OSError:  # a pseudo-terminal ends like this
                return
            for part in complete:
                comparison = beside(line + part, published)
                sys.stdout.write(f"{part.decode(errors='replace').rstrip()}{comparison}\n")
                line = b""
            if not complete and not rest:
                return
            line += rest
            sys.stdout.write(rest.decode(errors="replace"))
            sys.stdout.flush()


def beside(line, published):
    """What to write after a line of a log: the published loss of its step, and the difference to it."""
    found = re.search(rb"step:(\d+)/\d+ val_loss:(\S+)", line)
    if not found:
        return ""
    theirs = published.get(int(found[1]))
    if theirs is None:
        return ""
    return f"  published: {theirs:.4f} ({float(found[2]) - theirs:+.4f})"


def label(output, name):
    """Copies lines to the terminal, with `name` in front."""
    with open(output, encoding="utf-8", errors="replace") as output:
        for line in output:
            # a terminal that is gone, or knows few letters, ends no run
            with contextlib.suppress(OSError, UnicodeError):
                sys.stdout.write(f"{name}  {line.rstrip()}\n")  # in one piece: several do this at once
                sys.stdout.flush()


def launch(commands, published=None):
    """Runs `python ARGUMENTS` for each of `commands`, {name: arguments}, all at once.

    Returns their exit codes. Several share the CPU's cores, and label() shows what they print. echo() shows
    what one prints, if there is a `published` curve. Raises KeyboardInterrupt if Ctrl-C or SIGTERM stopped
    them.
    """
    several = len(commands) > 1
    environment = None
    if several:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads_for(len(commands)))}
    processes = []
    copies = []
    stops = []

    def stop(number, frame):
        """Passes the signal on: a run ends after its step and writes a checkpoint."""
        stops.append(number)
        if number == signal.SIGTERM or not os.isatty(0):  # a terminal has told it of Ctrl-C already
            for process in processes:
                process.send_signal(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for name, arguments in commands.items():
            print(f"\n$ {shlex.join(['python', *arguments])}", flush=True)
            process, output = open_process(arguments, environment, several, published)
            processes.append(process)
            if output is not None:
                show, what = (label, name) if several else (echo, published)
                copies.append(threading.Thread(target=show, args=(output, what), daemon=True))
                copies[-1].start()
            if stops:  # it came before this process was there
                process.terminate()
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


def open_process(arguments, environment, several, published):
    """(process, descriptor from which to read what it prints) of `python ARGUMENTS`.

    The descriptor is None if it prints to the terminal itself.
    """
    command = [sys.executable, *arguments]
    if not several and not published:
        return subprocess.Popen(command), None
    if published and sys.stdout.isatty():
        output, end = pty.openpty()  # so that the run sees a terminal too
    else:
        output, end = os.pipe()
    process = subprocess.Popen(command, stdout=end, stderr=end if several else None, env=environment)
    os.close(end)
    return process, output


def start(arguments, otherwise):
    """Runs `python ARGUMENTS`, as launch() does. Raises UserError with `otherwise` if that fails."""
    code, = launch({"": arguments})
    if code:
        raise UserError(f"that command ended with code {code}: {otherwise}")


def fetch_data(track, fields):
    """Makes or downloads the track's shards, unless the `fields` from the command line name others."""
    if any(field.startswith("--input_bin") for field in fields):
        return
    command = ["data/fineweb.py", f"configs/{track}_muon.toml"]
    if track == "cpu":
        command = ["data/shakespeare.py"]
    start(command, "the data are not there; run the same command again to continue")
