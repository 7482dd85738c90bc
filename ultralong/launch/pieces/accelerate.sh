
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
