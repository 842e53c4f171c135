# Sourced by the launch scripts: where the job is, its parallel sizes, and what is run.
set -euo pipefail
root=${LASP_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
gpus=${GPUS:-8}
context=${CONTEXT:-1048576}
dry_run=false
if [ "${1:-}" = --dry-run ]; then
  dry_run=true
  shift
fi

# sizes NODES: sets flags, the last line of the report, which a dry run prints.
sizes() {
  local report
  report=$(python "$root/examples/cluster/sizes.py" --nodes "$1" --gpus "$gpus" --context "$context")
  flags=${report##*$'\n'}
  if $dry_run; then
    echo "$report"
  fi
}

# start WORDS...: runs them, or prints them in a dry run.
start() {
  if $dry_run; then
    echo "$@"
  else
    exec "$@"
  fi
}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
script=$root/examples/05_train_hybrid.py
