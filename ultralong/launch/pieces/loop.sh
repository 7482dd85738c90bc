
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
