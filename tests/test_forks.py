"""tests/forks.py: a script sees no difference to a Python of its own."""
import sys

from conftest import fork, run

# what a Python that another one started ignores, as torchrun's processes
SCRIPT = """
import subprocess, sys
command = "print([line for line in open('/proc/self/status') if line.startswith('SigIgn')])"
print(subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout)
"""


def test_the_same_signals_are_ignored():
    """Without SIGPIPE among them, a process would die of a message to another that is gone."""
    forked = fork("-c", SCRIPT)
    assert "SigIgn" in forked.stdout
    assert forked.stdout == run(sys.executable, "-c", SCRIPT).stdout
