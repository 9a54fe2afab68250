"""How a script begins and ends, its lock on a folder, and its tables."""
import contextlib
import fcntl
import functools
import os
import signal
import sys
from pathlib import Path

NOT_INSTALLED = ("error: {}; install requirements.txt, or activate the environment that has it: "
                 "source .venv/bin/activate")
try:
    from train_gpt2 import UserError
except ImportError as error:
    sys.exit(NOT_INSTALLED.format(error))

ROOT = Path(__file__).resolve().parents[1]


def printable(text):
    """`text` without what a terminal, a table or a plot could choke on."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def command(interrupted="interrupted; run the same command again to continue"):
    """Decorates a script's main(): what a user can cause ends it with one sentence, and exit code 1.

    Ctrl-C and SIGTERM raise KeyboardInterrupt in it, and end it with the sentence `interrupted` and exit code
    130.
    """
    def decorate(main):
        @functools.wraps(main)
        def run():
            # show lines at once, in a file or a pipe too, whatever their characters
            sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                return main()
            except KeyboardInterrupt:
                print(f"\n{interrupted}", file=sys.stderr)
                sys.exit(130)
            except BrokenPipeError:  # `| head` has seen enough
                os._exit(1)
            except ImportError as error:
                sys.exit(NOT_INSTALLED.format(error))
            except (UserError, OSError) as error:
                sys.exit("error: " + "\n".join(map(printable, str(error).split("\n"))))
        return run
    return decorate


def markdown(rows):
    """A table; the first row is its head. Cells are Markdown."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body]) + "\n"


@contextlib.contextmanager
def locked(folder, option="--out", wait=True):
    """Makes `folder`, which `option` names, and holds its lock: one process at a time writes there.

    Others wait. Raises UserError if it cannot be used, or if another process has it and `wait` is false.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        remedy = f"choose another folder with {option}"
        raise UserError(f"{folder}: cannot be used ({error.strerror}); {remedy}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            os.close(descriptor)
            remedy = f"let it end, or choose another {option}"
            raise UserError(f"another process is using {folder}; {remedy}") from None
        print(f"another process is writing to {folder}; waiting for it to finish", flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)
