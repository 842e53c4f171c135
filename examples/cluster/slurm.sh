#!/usr/bin/env bash
#SBATCH --job-name=lasp
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
# Train over 2 to 64 nodes under Slurm, a task for each GPU, from the root of the checkout:
#   sbatch --nodes 16 examples/cluster/slurm.sh [FLAGS OF THE TRAINING SCRIPT...]
#   NODES=16 examples/cluster/slurm.sh --dry-run
# IMAGE=... runs it in a container: by pyxis (an image or .sqsh file of enroot), with
# RUNTIME=apptainer by Apptainer (a .sif file). The checkout is mounted, so the image needs only
# torch, triton and what the extra "examples" brings.
# sbatch runs a copy of this file, so that the checkout is where it was called from.
export LASP_ROOT=${LASP_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}}
. "$LASP_ROOT/examples/cluster/common.sh"
nodes=${SLURM_JOB_NUM_NODES:-${NODES:-2}}
sizes "$nodes"
tasks=(srun --nodes "$nodes" --ntasks-per-node "$gpus" --kill-on-bad-exit=1)
if [ -n "${IMAGE:-}" ] && [ "${RUNTIME:-pyxis}" = apptainer ]; then
  tasks+=(apptainer exec --nv --bind "$root" --pwd "$root" "$IMAGE")
elif [ -n "${IMAGE:-}" ]; then
  tasks+=(--container-image "$IMAGE" --container-mounts "$root:$root" --container-workdir "$root")
fi
# shellcheck disable=SC2086  # flags are words
start "${tasks[@]}" python "$script" $flags --dtype bfloat16 "$@"
