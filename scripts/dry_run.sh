#!/usr/bin/env bash
# Checks a training step against CUDA builds of torch 2.13 and 2.11, on a machine without a GPU (scripts/dry_run.py).
# Makes an environment for each in logs/ (5 GB); a second run uses them again.
set -euo pipefail
unset CDPATH PIP_FIND_LINKS  # a folder of packages may hold a CPU build
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for version in 2.13.0 2.11.0; do
    environment=logs/cuda_$version
    if [ ! -f "$environment/complete" ]; then
        echo "Installing torch $version with CUDA into $environment ..."
        "${PYTHON:-python3}" -m venv --clear "$environment"
        PIP_CONFIG_FILE=/dev/null "$environment/bin/python" -m pip install --quiet "torch==$version" numpy
        touch "$environment/complete"
    fi
    "$environment/bin/python" scripts/dry_run.py
done
