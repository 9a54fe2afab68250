#!/usr/bin/env bash
# The first minutes on a new GPU, 9 at most. All that is measured goes into one folder and one .tar.gz that can be sent back.
#
#   scripts/gpu_check.sh          environment, CUDA tests, bench.py with profile at 124 M, 200 steps of each optimizer
#   scripts/gpu_check.sh --cpu    a toy version on the CPU, in half a minute: tries the script, says nothing about a GPU
#
# PYTHON names the interpreter (default: .venv's, else python3); torch and numpy are enough. OUT names the folder
# (default: logs/gpu_check_DATE). The 200 steps need shards in data/fineweb10B/ or data/books/. Each part has its own time
# limit, and a part that fails does not stop the others.
set -uo pipefail
device=cuda bench="configs/speedrun_newton_muon.toml --rounds 6 --steps 1" optimizers="muon newton_muon adamw"
train="configs/mini_%s.toml --num_iterations 200 --warmdown_iters 60 --val_tokens 1048576 --allow_repeat true"
case "${1:-}" in
    "") ;;
    --cpu)
        device=cpu bench="configs/cpu_newton_muon.toml --rounds 1 --steps 1 --batch_size 2" optimizers=newton_muon
        train="configs/cpu_%s.toml --num_iterations 4 --warmdown_iters 1 --batch_size 2 --val_tokens 1024" ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;;
    *) echo "error: unknown argument '$1'; there is only --cpu" >&2; exit 2 ;;
esac
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python || PYTHON=python3
fi
"$PYTHON" -c "import numpy, sys, torch; sys.exit(3 if sys.argv[1] == 'cuda' and not torch.cuda.is_available() else 0)" $device 2> /dev/null
case $? in
    0) ;;
    3) echo "error: the torch of $PYTHON finds no GPU on this machine (to try the script itself: $0 --cpu)" >&2; exit 1 ;;
    *) echo "error: $PYTHON has no torch or no numpy; set PYTHON to an interpreter that has both" >&2; exit 1 ;;
esac
folder=$(realpath -m "${OUT:-logs/gpu_check_$(date +%Y-%m-%d_%H%M%S)}")
mkdir -p "$folder" || exit 1
summary=
trap 'kill $(jobs -p) 2> /dev/null; exit 143' TERM

part() {  # part NAME SECONDS COMMAND...: runs the command; its output goes to the terminal and to NAME.txt
    local name=$1 limit=$2 start=$SECONDS result
    shift 2
    echo "== $name, at most $limit s"
    # in the background, since only `wait` can be interrupted by SIGTERM; there the shell would have Ctrl-C ignored
    env --default-signal=INT timeout --foreground --signal INT --kill-after 5 "$limit" "$@" 2>&1 | tee "$folder/$name.txt" &
    wait $!
    case $? in 0) result="done" ;; 124 | 137) result="ended by its time limit" ;; *) result="FAILED" ;; esac
    summary+="$(printf '%-18s %4d s  %s' "$name" $((SECONDS - start)) "$result")"$'\n'
}

part environment 15 bash -c 'command -v nvidia-smi > /dev/null && nvidia-smi
    git log -1 --format="commit %H" 2> /dev/null && git status --short
    exec "$0" -m torch.utils.collect_env' "$PYTHON"

if ! "$PYTHON" -c "import pytest" 2> /dev/null; then
    timeout 10 "$PYTHON" -m pip install --quiet --retries 0 --target "$folder/packages" pytest > /dev/null 2>&1
    export PYTHONPATH="$folder/packages${PYTHONPATH:+:$PYTHONPATH}"
fi
if "$PYTHON" -c "import pytest" 2> /dev/null; then
    part tests 125 "$PYTHON" -m pytest -o addopts= -v -rs --durations 10 -p no:cacheprovider tests/test_cuda.py
else
    summary+="tests: not run, since $PYTHON has no pytest and pip could not install it (is there a network?)"$'\n'
fi

part bench 180 "$PYTHON" scripts/bench.py $bench --device $device --sides muon,newton_muon,adamw --profile --json "$folder/bench.json"

shards=
for candidate in $([ $device = cpu ] && echo data/shakespeare/shakespeare || echo data/fineweb10B/fineweb data/books/books); do
    if [ -z "$shards" ] && compgen -G "${candidate}_train_*.bin" > /dev/null && compgen -G "${candidate}_val_*.bin" > /dev/null; then
        shards=$candidate
    fi
done
if [ -n "$shards" ]; then
    for optimizer in $optimizers; do
        part "train_$optimizer" 55 "$PYTHON" train_gpt2.py $(printf "$train" $optimizer) --device $device --log_dir "$folder/runs" \
            --run_name $optimizer --input_bin "${shards}_train_*.bin" --input_val_bin "${shards}_val_*.bin"
    done
    rm -rf "$folder"/runs/*/checkpoints
else
    summary+="training: not run, since there are no shards in data/fineweb10B/ or data/books/ (python data/fineweb.py 1 fetches some)"$'\n'
fi

rm -rf "$folder/packages"
{
    echo "== summary, after $SECONDS s"
    echo -n "$summary"
    tail -n 1 "$folder/tests.txt" 2> /dev/null
    sed -n '/^where a step goes/,$p' "$folder/bench.txt"
    for run in "$folder"/runs/*/; do
        [ -f "$run/log.txt" ] && echo "$(basename "$run"): $(grep "^step:.* val_loss:" "$run/log.txt" | tail -n 1)"
    done
} | tee "$folder/summary.txt"
tar -czf "$folder/gpu_check.tar.gz" --exclude gpu_check.tar.gz -C "$(dirname "$folder")" "$(basename "$folder")" \
    && echo "send back $folder/gpu_check.tar.gz"
! grep -q " FAILED$" "$folder/summary.txt"
