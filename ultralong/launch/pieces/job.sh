: "${LAUNCH_DIR:?is set by submit.sh: submit the job with it}"
: "${WORKDIR:?is set by submit.sh: submit the job with it}"
cd "$WORKDIR"
logs="${LOGS:-$LAUNCH_DIR/logs}"
mkdir -p "$logs"

# Not a pipe into head: with pipefail a long list of hosts would end the job by a broken pipe.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# From the job's number, so that two jobs on one host do not meet.
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
RUN_ID="$run_name-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
export MASTER_ADDR MASTER_PORT RUN_ID

# Starts in a row that found no checkpoint newer than the start before did, kept in a file over requeues: a job whose
# allocations all end before its first checkpoint would otherwise start anew for ever.
before="$(newest)"
record="$logs/starts-$SLURM_JOB_ID"
stalled=0
if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -f "$record" ]]; then
  read -r stalled last < "$record" || true
  if [[ "$last" == "${before##*/}" ]]; then
    stalled=$((stalled + 1))
  else
    stalled=0
  fi
fi
echo "$stalled ${before##*/}" > "$record"

requeue() {
  # A job that a person cancelled stays cancelled.
  if [[ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")" != RUNNING ]]; then
    return 1
  fi
  if [[ "$(newest)" == "$before" ]] && ((stalled >= ${ATTEMPTS:-3})); then
    echo "job $SLURM_JOB_ID: $1, but $((stalled + 1)) allocations in a row left no new checkpoint: not requeued." \
      "Give it more time (TIME_LIMIT), or save more often (save_every)." >&2
    return 1
  fi
  local from
  from="$(newest)"
  echo "job $SLURM_JOB_ID: $1; back into the queue, to resume from ${from:-the start}"
  scontrol requeue "$SLURM_JOB_ID"
}

# Slurm sends USR1 five minutes before the time limit and, where the site asks for it, before preemption. Processes that
# are told to stop finish their step and save, and the next allocation resumes from there; a step that takes longer than
# STOP_SECONDS is lost. The signal goes to the tasks through scancel: srun, told to terminate, kills them at once.
# After scancel by a person Slurm kills what is left after its KillWait (30 seconds by default).
export STOP_SECONDS="${STOP_SECONDS:-240}"
interrupted=false
step=""
interrupt() {
  interrupted=true
  if [[ -n "$step" ]]; then
    scancel --signal=TERM "$SLURM_JOB_ID" || kill -TERM "$step" 2>/dev/null || true
  fi
}
trap interrupt USR1

# One task a host with all its cores; binding it to one core would leave the processes it starts on that core.
# --kill-on-bad-exit takes its value after = only.
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none --kill-on-bad-exit=1 \
  bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$LAUNCH_DIR/run.sh"' &
step=$!
code=0
wait "$step" || code=$?
if "$interrupted"; then
  # The signal ended the first wait, not the step.
  code=0
  wait "$step" || code=$?
  if ((code != 0)); then
    requeue "the time limit or a preemption is near" && exit 0
  fi
elif ((code != 0)) && [[ "$(newest)" != "$before" ]]; then
  requeue "exit code $code after new checkpoints" && exit 0
fi
exit "$code"
