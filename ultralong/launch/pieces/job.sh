: "${LAUNCH_DIR:?is set by submit.sh: submit the job with it}"
: "${WORKDIR:?is set by submit.sh: submit the job with it}"
cd "$WORKDIR"

# Not a pipe into head: with pipefail a long list of hosts would end the job by a broken pipe.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# From the job's number, so that two jobs on one host do not meet.
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
RUN_ID="$run_name-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
export MASTER_ADDR MASTER_PORT RUN_ID

requeue() {
  # A job that a person cancelled stays cancelled.
  if [[ "$(squeue --noheader --format %T --jobs "$SLURM_JOB_ID")" != RUNNING ]]; then
    return 1
  fi
  echo "job $SLURM_JOB_ID: $1; back into the queue, to go on from $(newest)"
  scontrol requeue "$SLURM_JOB_ID"
}

# Slurm sends USR1 five minutes before the time limit and, where the site asks for it, before preemption. Processes that
# are told to stop now leave their GPUs clean, and the allocation after this one goes on from the newest checkpoint.
interrupted=false
step=""
interrupt() {
  interrupted=true
  if [[ -n "$step" ]]; then
    kill -TERM "$step" 2>/dev/null || true
  fi
}
trap interrupt USR1

before="$(newest)"
# One task a host with all its cores; binding it to one core would leave the processes it starts on that core.
srun --ntasks-per-node 1 --cpus-per-task "$SLURM_CPUS_ON_NODE" --cpu-bind none --kill-on-bad-exit 1 \
  bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$LAUNCH_DIR/run.sh"' &
step=$!
code=0
wait "$step" || code=$?
if "$interrupted"; then
  wait "$step" 2>/dev/null || true
  requeue "the time limit or a preemption is near" && exit 0
elif ((code != 0)) && [[ "$(newest)" != "$before" ]]; then
  requeue "exit code $code after new checkpoints" && exit 0
fi
exit "$code"
