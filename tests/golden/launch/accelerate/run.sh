#!/usr/bin/env bash
# llama-1m: 120 steps on 2 hosts of 8 GPUs.
# Start it on each host: ./run.sh [--dry-run]
# After a stop, start it again: it resumes from the newest checkpoint.
# Rendered by ultralong VERSION; to change it, render it again (ultralong launch).
# shellcheck disable=SC2016,SC2329
set -euo pipefail

# ---- Values of the run.
nodes=2
gpus_per_node=8
run_folder=runs/llama-1m

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

fact PYTHON "the interpreter that ultralong is installed for, such as /path/to/clone/.venv/bin/python"
fact WORKDIR "the folder that the paths in config.yaml are relative to, the same on every host"
if ((nodes > 1)); then
  fact NODE_RANK "the number of this host, counted from 0"
  fact MASTER_ADDR "the name or address of host 0, as the other hosts reach it"
  fact MASTER_PORT "a free port on host 0, the same on every host"
  fact NCCL_SOCKET_IFNAME "the network interface that joins the hosts; the command ip -brief address lists them"
fi
complete
node_rank="${NODE_RANK:-0}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
logs="${LOGS:-$here/logs}"
mkdir -p "$logs"
cd "$WORKDIR"

if [[ "${1:-}" == --dry-run ]]; then
  exec "$PYTHON" -m ultralong.launch "$here/config.yaml" --nodes "$nodes" --gpus-per-node "$gpus_per_node"
elif (($# > 0)); then
  echo "usage: $0 [--dry-run]" >&2
  exit 2
fi

# ---- Memory and communication. Whatever is exported already wins.
# Freed blocks of a long row are of many sizes; segments that grow let one be used for the next instead of lying idle.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
echo "allocator of GPU memory on $(hostname): $PYTORCH_ALLOC_CONF"
# torchrun's default of one thread a process starves what runs on the host: loading rows, pinned copies, checkpoints.
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > gpus_per_node ? cores / gpus_per_node : 1))}"
# Processes that are told to stop finish their step and save. torchrun waits as long as this script does (30 seconds
# with torch 2.11, whatever this says).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-${STOP_SECONDS:-20}}"
# Each process tokenises nothing itself; without this, tokenizers warns in every one of them.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# When processes wait for one that does not come, each writes what it last did; the files tell which one to look at.
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$logs/waiting-}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
if ((nodes > 1)); then
  # Barriers and checkpoints of host memory go over gloo, which would otherwise pick an interface by itself.
  export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$NCCL_SOCKET_IFNAME}"
  # Agents of torch 2.11 to 2.13 that share their store say its address in the first round only: a host that comes back
  # waits a minute for it, then all start anew. Unshared, rank 0 opens a store each round and says where.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
  # Network cards reach memory that is locked; a low limit shows later as an unclear error of the first transfer.
  ulimit -l unlimited 2>/dev/null || echo "locked memory is limited to $(ulimit -l) KiB on this host" >&2
fi

# ---- accelerate starts one agent a host, which starts the processes and watches them.
# On one host any free port does, so that two runs on it do not meet.
machine=(--main_process_port 0)
if ((nodes > 1)); then
  machine=(--machine_rank "$node_rank" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT"
    --rdzv_conf "is_host=$( ((node_rank == 0)) && echo true || echo false ),join_timeout=${REJOIN_SECONDS:-1800}")
fi
start() {
  # exec, so that a signal to this job reaches the agent and not a shell in front of it.
  exec "$PYTHON" -m accelerate.commands.launch --config_file "$here/accelerate.yaml" "${machine[@]}" \
    --num_cpu_threads_per_process "$OMP_NUM_THREADS" --max_restarts "${MAX_RESTARTS:-3}" \
    --log_dir "$logs/node-$node_rank" --tee 3 -m ultralong train "$here/config.yaml" --resume
}

newest() {
  # find would take a name with a leading dash for an option.
  local folder="$run_folder/checkpoints"
  if [[ "$folder" != /* ]]; then
    folder="./$folder"
  fi
  find "$folder" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1 || true
}

# ---- Start, and start again from the newest checkpoint when something outside of the run stopped it.
agent=""
stop() {
  if [[ -n "$agent" ]]; then
    kill -TERM "$agent" 2>/dev/null || true
    # An agent that waits for other hosts may not listen; Slurm kills what is left after 30 seconds, ranks included.
    for ((second = 0; second < ${STOP_SECONDS:-20}; second++)); do
      if ! kill -0 "$agent" 2>/dev/null; then
        break
      fi
      sleep 1
    done
    if kill -0 "$agent" 2>/dev/null; then
      echo "host $node_rank: the agent did not stop within ${STOP_SECONDS:-20} s and is killed" >&2
      for rank in $(ps -o pid= --ppid "$agent"); do
        kill -KILL "$rank" 2>/dev/null || true
      done
      kill -KILL "$agent" 2>/dev/null || true
    fi
    wait "$agent" || true
  fi
  exit "$1"
}
trap 'stop 143' TERM
trap 'stop 130' INT

attempts=0
while true; do
  before="$(newest)"
  start &
  agent=$!
  code=0
  wait "$agent" || code=$?
  agent=""
  if ((code == 0)); then
    exit 0
  fi
  # A run that gets further may fail as often as it likes; one that does not would fail forever.
  if [[ "$(newest)" != "$before" ]]; then
    attempts=0
  fi
  attempts=$((attempts + 1))
  if ((attempts > ${ATTEMPTS:-3})); then
    echo "host $node_rank: stopped with exit code $code and no new checkpoint; logs are in $logs" >&2
    exit "$code"
  fi
  echo "host $node_rank: exit code $code, attempt $((attempts + 1)) from ${before:-the start}" >&2
  sleep "${RESTART_DELAY:-10}"
done
