"""Python scripts in forks of a process that has imported torch.

A new process takes 4 s of processor time to import what a training run needs. The server of
multiprocessing's method "forkserver" has imported it once for all, and the processes that start here are
forks of it. So are the Pythons that they start themselves, as torchrun does. A script sees no difference: it
is __main__, and has arguments, environment, folder and output of its own. What a script leaves to atexit is
not done.
"""
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
import types

CONTEXT = multiprocessing.get_context("forkserver")
# an optimizer imports torch._dynamo when it is made: 2 s
CONTEXT.set_forkserver_preload(["torch._dynamo", "torch.distributed.run"])
INSTALLED = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
new_process = subprocess.Popen.__init__


def start(words, env, folder, out, errors):
    """Starts `python WORDS` in this folder, with this environment.

    out, errors: paths of files, or Connections. Returns its multiprocessing.Process.
    """
    words = [sys.executable, *map(str, words)]
    process = CONTEXT.Process(target=first, args=(words, env, str(folder), out, errors))
    process.start()
    return process


def first(command, env, folder, *outputs):
    """What a fork of the server does."""
    for number, output in enumerate(outputs, 1):
        if isinstance(output, str):
            output = open(output, "w")
        os.dup2(output.fileno(), number)
        output.close()
    os.chdir(folder)
    subprocess.Popen.__init__ = start_fork
    become(command, env)


def start_fork(process, args, *rest, env=None, **options):
    """Popen(args, ...), which forks if the command is this Python.

    `preexec_fn` is called in a fork that has its output and folder already, and here it never returns.
    """
    def preexec_fn():
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        become(args, os.environ.copy() if env is None else env)

    if isinstance(args, (list, tuple)) and args[0] == sys.executable and not options.get("shell"):
        options["preexec_fn"] = preexec_fn
    new_process(process, args, *rest, env=env, **options)


def become(command, env):
    """Ends this process as `command`, a Python, would end."""
    gc.enable()  # Popen disables it for preexec_fn
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as a Python begins; Popen resets them
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(env)
    encoding = env.get("PYTHONIOENCODING")
    sys.stdout, sys.stderr = (open(number, "w", 1, encoding, closefd=False) for number in (1, 2))
    code = 0
    try:
        interpret([str(word) for word in command[1:] if word != "-u"])
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def interpret(words):
    """Runs SCRIPT, -m MODULE or -c CODE, with the arguments behind it."""
    folder = os.getcwd()
    if not words[0].startswith("-"):
        folder = os.path.dirname(words[0])
    python_path = os.environ.get("PYTHONPATH", "")
    sys.path[:] = [folder, *filter(None, python_path.split(":")), *INSTALLED]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(words[1], vars(sys.modules["__main__"]))
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":  # forks.py WORDS: as `python WORDS`, whose own Pythons are forks
    import torch._dynamo
    import torch.distributed.run  # noqa: F401
    subprocess.Popen.__init__ = start_fork
    become(sys.argv, dict(os.environ))
