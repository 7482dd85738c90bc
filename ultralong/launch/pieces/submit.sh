
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
