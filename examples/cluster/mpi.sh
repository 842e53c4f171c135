#!/usr/bin/env bash
# Train over 2 to 64 nodes by Open MPI, once, on any node:
#   examples/cluster/mpi.sh [--dry-run] NODES HOSTFILE [FLAGS OF THE TRAINING SCRIPT...]
# HOSTFILE has a line "NODE slots=8" for each node. It needs mpi4py on every node (the extra "mpi").
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
nodes=${1:?number of nodes} hostfile=${2:?file of nodes}
shift 2
sizes "$nodes"
# shellcheck disable=SC2086  # flags are words
start mpirun -n "$((nodes * gpus))" --hostfile "$hostfile" --map-by "ppr:$gpus:node" --bind-to none \
  -x OMP_NUM_THREADS -x PYTHONPATH python "$script" $flags --dtype bfloat16 "$@"
