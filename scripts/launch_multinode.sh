#!/usr/bin/env bash
# Train on several nodes. Run the same command on each of them, in any order:
#
#   scripts/launch_multinode.sh NODES HEAD CONFIG.toml [--field value ...]
#   scripts/launch_multinode.sh 2 node1 configs/speedrun_newton_muon.toml
#
# HEAD is the name or address of one of the nodes, at which they find each other (HEAD:PORT if 29400 is
# taken). When a process or a node dies, the others stop, wait until all NODES are there again, and resume
# from the last checkpoint in log_dir, up to MAX_RESTARTS times. Start the command again on the node that
# died. All nodes must share log_dir. Without --save_every there is no checkpoint before the end.
#
# Environment:
#   NPROC         processes on this node (default: one for each GPU; 1 without GPUs)
#   MAX_RESTARTS  (default: 3)
#   JOB           name of the job; the same on all nodes (default: the name of the configuration)
#   LOCAL_ADDR    address of this node for the others, where its host name does not resolve to one
#   PYTHON        (default: .venv/bin/python if it is there, else python3)
set -euo pipefail
if [ $# -lt 3 ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
    sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
nodes=$1
head=$2
config=$3
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
count_gpus='import torch; print(max(1, torch.cuda.device_count()))'
processes=${NPROC:-$("$python" -c "$count_gpus" 2> /dev/null)} || {
    echo "error: $python cannot import torch; set PYTHON to an interpreter that can" >&2
    exit 1
}
[[ $head == *:* ]] || head=$head:29400

here=()
if [ -n "${LOCAL_ADDR:-}" ]; then  # torchrun would compare HEAD with the host name
    is_host=0
    [ "${head%:*}" = "$LOCAL_ADDR" ] && is_host=1
    here=(--local_addr "$LOCAL_ADDR" --rdzv_conf "is_host=$is_host")
fi
# a store for each attempt: a node that comes back does not find the one that torchrun shares
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "$python" -m torch.distributed.run \
    --nnodes "$nodes" --nproc_per_node "$processes" --max_restarts "${MAX_RESTARTS:-3}" \
    --rdzv_backend c10d --rdzv_endpoint "$head" --rdzv_id "$job" "${here[@]}" \
    "$root/train_gpt2.py" "$config" --run_name "$job" --resume auto "$@"
