#!/usr/bin/env bash
# Train on several nodes. Run the same command on each of them, in any order:
#
#   scripts/launch_multinode.sh NODES HEAD CONFIG.toml [--field value ...]
#   scripts/launch_multinode.sh 2 node1 configs/speedrun_newton_muon.toml
#
# HEAD is the name or address of one of the nodes (HEAD:PORT if 29400 is taken), at which they find each other. When a process or a node dies,
# the others stop, wait until all NODES are there again (start the command again on the node that died), and resume, up to MAX_RESTARTS
# times, from the last checkpoint in log_dir, a folder that all nodes must share. Without --save_every there is none before the end.
# Environment:
#   NPROC         processes on this node (default: one for each GPU; 1 without GPUs)
#   MAX_RESTARTS  (default: 3)
#   JOB           name of the job; the same on all nodes (default: the name of the configuration)
#   LOCAL_ADDR    address of this node for the others, where its host name does not resolve to one
#   PYTHON        (default: .venv/bin/python if it is there, else python3)
set -euo pipefail
if [ $# -lt 3 ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
    sed -n '2,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
nodes=$1 head=$2 config=$3
shift 3
if [ ! -f "$config" ]; then
    echo "error: no configuration $config; name one relative to $PWD" >&2
    exit 1
fi
root=$(unset CDPATH; cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
default_python=$root/.venv/bin/python
[ -x "$default_python" ] || default_python=python3
python=${PYTHON:-$default_python}
job=${JOB:-$(basename "$config" .toml)}
processes=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))' 2> /dev/null)} || {
    echo "error: $python cannot import torch; set PYTHON to an interpreter that can" >&2
    exit 1
}
case $head in *:*) ;; *) head=$head:29400 ;; esac
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a store for each attempt: a node that comes back does not find the one torchrun shares
here=()
if [ -n "${LOCAL_ADDR:-}" ]; then  # torchrun would compare HEAD with the host name
    here=(--local_addr "$LOCAL_ADDR" --rdzv_conf "is_host=$([ "${head%:*}" = "$LOCAL_ADDR" ] && echo 1 || echo 0)")
fi
exec "$python" -m torch.distributed.run --nnodes "$nodes" --nproc_per_node "$processes" --max_restarts "${MAX_RESTARTS:-3}" \
    --rdzv_backend c10d --rdzv_endpoint "$head" --rdzv_id "$job" "${here[@]}" \
    "$root/train_gpt2.py" "$config" --run_name "$job" --resume auto "$@"
