# Sourced by run.sh and test.sh: goes to the repository and installs requirements.txt into .venv, again whenever that file changes.
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! .venv/bin/python -c "import pip" 2> /dev/null; then  # there is none, or one that was stopped while it was made
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            break
        fi
        candidate=
    done
    if [ -z "$candidate" ]; then
        echo "error: no Python 3.11 or newer on the PATH; install one, or name it: PYTHON=/path/to/python $0" >&2
        exit 1
    fi
    "$candidate" -m venv --clear .venv || { echo "error: '$candidate -m venv' failed (on Debian and Ubuntu: apt-get install python3-venv)" >&2; rm -rf .venv; exit 1; }
fi
if ! cmp -s requirements.txt .venv/requirements.installed; then
    echo "Installing requirements.txt into .venv ..."
    # without the byte code of 10,000 files, most of which are never imported: half of the time
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
    cp requirements.txt .venv/requirements.installed
fi
python=.venv/bin/python
