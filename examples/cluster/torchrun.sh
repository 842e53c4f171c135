#!/usr/bin/env bash
# Train over 2 to 64 nodes by torchrun. The same line on every node:
#   examples/cluster/torchrun.sh [--dry-run] NODES FIRST_NODE [FLAGS OF THE TRAINING SCRIPT...]
# GPUS (of a node, 8) and CONTEXT (tokens of a pack, 1048576) may be set. A rank that fails ends the
# others; all of them start again from the newest checkpoint, up to RESTARTS times (3).
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
nodes=${1:?number of nodes} first=${2:?name or address of the first node}
shift 2
sizes "$nodes"
# shellcheck disable=SC2086  # flags are words
start torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-id "${JOB:-lasp}" --rdzv-endpoint "$first:${PORT:-29400}" \
  "$script" $flags --dtype bfloat16 "$@"
