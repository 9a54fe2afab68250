#!/usr/bin/env bash
# Train Muon, Newton-Muon and AdamW one after the other and show which was faster.
#
#   scripts/run.sh                          Shakespeare's plays, on the CPU: 3 to 5 minutes on 2 cores
#   scripts/run.sh speedrun [options]       the GPT-2 speedrun on all GPUs of this machine; downloads the FineWeb shards first, with
#                                           the options of data/fineweb.py. Run it again to go on after an interruption.
set -euo pipefail
case "${1:-}" in
    ""|speedrun) ;;
    -h|--help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "error: unknown argument '$1'; usage: scripts/run.sh [speedrun [options of data/fineweb.py]]" >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [ "${1:-}" = speedrun ]; then
    shift
    gpus=$($python -c 'import torch; print(torch.cuda.device_count())')
    if [ "$gpus" = 0 ]; then
        echo "error: torch finds no GPU on this machine, and the speedrun needs one or more; scripts/run.sh alone runs on a CPU" >&2
        exit 1
    fi
    $python data/fineweb.py configs/speedrun_muon.toml "$@"
    track=speedrun logs=logs/speedrun
    start="$python -m torch.distributed.run --standalone --nproc_per_node $gpus train_gpt2.py"
else
    $python data/shakespeare.py
    track=cpu logs=logs/cpu_$(date +%Y%m%d-%H%M%S)
    start="$python train_gpt2.py"
fi
for optimizer in muon newton_muon adamw; do
    echo
    $start "configs/${track}_$optimizer.toml" --log_dir "$logs" --run_name "$optimizer" --resume auto
done
echo
$python scripts/compare.py "$logs" --png logs/compare.png
