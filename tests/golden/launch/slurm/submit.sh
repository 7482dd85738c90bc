#!/usr/bin/env bash
# llama-1m: 120 steps on 2 hosts of 8 GPUs.
# Run it once, on a host that has sbatch: ./submit.sh [--dry-run]
# After a stop, start it again: it resumes from the newest checkpoint.
# Rendered by ultralong VERSION; to change it, render it again (ultralong launch).
# shellcheck disable=SC2016,SC2329
set -euo pipefail

# ---- Values of the run.
nodes=2
gpus_per_node=8
run_name=llama-1m

# ---- Facts of the site: export them before the start. None of them is guessed; all that are missing are named at once.
missing=()
fact() {
  if [[ -z "${!1:-}" ]]; then
    missing+=("$1 is $2")
  fi
}
complete() {
  if ((${#missing[@]} > 0)); then
    echo "$0: export what is missing, then start it again:" >&2
    printf '  %s\n' "${missing[@]}" >&2
    exit 2
  fi
}

fact PARTITION "the Slurm partition with the GPUs; the command sinfo lists them"
fact TIME_LIMIT "the longest time of one allocation, such as 24:00:00; the run resumes in the next"
fact PYTHON "the interpreter that ultralong is installed for, such as /path/to/clone/.venv/bin/python"
fact WORKDIR "the folder that the paths in config.yaml are relative to, the same on every host"
if ((nodes > 1)); then
  fact NCCL_SOCKET_IFNAME "the network interface that joins the hosts; the command ip -brief address lists them"
fi
complete
# sbatch runs a copy of the job script from its own folder, so the job cannot find its neighbours by itself.
LAUNCH_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export LAUNCH_DIR PYTHON WORKDIR
export LOGS="${LOGS:-$LAUNCH_DIR/logs}"
mkdir -p "$LOGS"

# Values follow their option after =, as some of Slurm's options take them in no other way.
options=("--partition=$PARTITION" "--time=$TIME_LIMIT" "--job-name=$run_name" "--chdir=$WORKDIR"
  "--output=$LOGS/slurm-%j.log" --export=ALL)
if [[ -n "${ACCOUNT:-}" ]]; then
  options+=("--account=$ACCOUNT")
fi
if [[ "${1:-}" == --dry-run ]]; then
  (cd "$WORKDIR" && exec "$PYTHON" -m ultralong.launch "$LAUNCH_DIR/config.yaml" --nodes "$nodes" \
    --gpus-per-node "$gpus_per_node")
  exec sbatch --test-only "${options[@]}" "$LAUNCH_DIR/job.sbatch"
fi
exec sbatch "${options[@]}" "$@" "$LAUNCH_DIR/job.sbatch"
