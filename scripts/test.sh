#!/usr/bin/env bash
# Run the tests in .venv, made first if need be. Arguments go to pytest: scripts/test.sh -k golden
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
$python data/shakespeare.py
exec $python -m pytest "$@"
