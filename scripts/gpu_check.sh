#!/usr/bin/env bash
# The first minutes on a new GPU: starts gpu_check.py, whose --help says what it does. PYTHON names the
# interpreter (default: .venv's, else python3); torch and numpy are enough.
set -euo pipefail
unset CDPATH
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ -x "$folder/../.venv/bin/python" ] && python=$folder/../.venv/bin/python
fi
exec "$python" "$folder/gpu_check.py" "$@"
