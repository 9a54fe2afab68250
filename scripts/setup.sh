# Sourced by run.sh and test.sh: goes to the repository and makes .venv, with the packages of requirements.txt
# in the versions of constraints.txt. Does it again when these files change. Sets $python.
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python

python_that_is_new_enough() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer on the PATH; install one, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

make_environment() {
    local base
    base=$(python_that_is_new_enough) || return
    if ! "$base" -m venv --without-pip .venv; then
        echo "error: '$base -m venv' failed (on Debian and Ubuntu: apt-get install python3-venv)" >&2
        return 1
    fi
}

# An environment that is there may be somebody's own, with packages in it: it is never deleted or made again.
if ! [ -e .venv ]; then
    make_environment || exit 1
elif ! $python -c "" 2> /dev/null; then
    if [ -n "$(find .venv/ -mindepth 1 -path '*/site-packages/*' -print -quit)" ]; then
        echo "error: $PWD/$python does not run, and .venv has packages in it; repair it, or delete .venv" >&2
        exit 1
    fi
    make_environment || exit 1
fi
# `uv venv` leaves pip out; and what was stopped while it was made may lack it
if ! $python -c "import pip._internal" 2> /dev/null && ! $python -m ensurepip > /dev/null 2>&1; then
    echo "error: .venv has no pip, and Python's own cannot be installed there; add it (uv pip install pip)," \
        "or delete .venv (on Debian and Ubuntu: apt-get install python3-venv)" >&2
    exit 1
fi

if ! cat requirements.txt constraints.txt | cmp -s - .venv/requirements.installed; then
    echo "Installing requirements.txt into .venv ..."
    # without the byte code of 10,000 files, most of which are never imported: half of the time
    $python -m pip install --quiet --disable-pip-version-check --no-compile \
        -r requirements.txt -c constraints.txt || exit 1
    cat requirements.txt constraints.txt > .venv/requirements.installed
fi
