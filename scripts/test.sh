#!/usr/bin/env bash
# Check the code with ruff and run the tests, in .venv, made first if need be. Arguments go to pytest:
#
#     scripts/test.sh -k golden
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
$python -m ruff check
$python data/shakespeare.py
exec $python -m pytest "$@"
