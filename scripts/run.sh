#!/usr/bin/env bash
# Train Muon, Newton-Muon and AdamW, compare their final losses, and say whether Newton-Muon saved steps.
#
#   scripts/run.sh                    Shakespeare's plays, one run of each: 6 minutes at most on 2 cores
#   scripts/run.sh --seeds 5          five runs of each, and a verdict; finished runs are not run again
#   scripts/run.sh --track speedrun   the GPT-2 speedrun on all GPUs of this machine; downloads FineWeb first
#
# Arguments are those of scripts/replicate.py (--help lists them). After an interruption, run it again.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then  # without an installation
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec $python scripts/replicate.py "$@"
