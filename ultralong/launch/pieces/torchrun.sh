
# ---- One agent a host starts the processes and watches them.
rendezvous=(--standalone)
if ((nodes > 1)); then
  # A host that was lost and comes back joins again; the others wait for it this long. Host 0 keeps the meeting place.
  rendezvous=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RUN_ID:-$run_name}"
    --rdzv-conf "is_host=$( ((node_rank == 0)) && echo true || echo false ),join_timeout=${REJOIN_SECONDS:-1800}")
  if [[ -n "${LOCAL_ADDR:-}" ]]; then
    rendezvous+=(--local-addr "$LOCAL_ADDR")
  fi
fi
if ((gpus_per_node > 1)) && [[ -n "${NUMA_BINDING:-}" ]]; then
  # Host memory that is near a GPU is filled at full speed: NUMA_BINDING=node where the kernel exports its nodes.
  rendezvous+=(--numa-binding "$NUMA_BINDING")
fi
start() {
  # exec, so that a signal to this job reaches the agent and not a shell in front of it.
  exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$gpus_per_node" \
    --max-restarts "${MAX_RESTARTS:-3}" --log-dir "$logs/node-$node_rank" --redirects 3 --tee 0:3 \
    -m ultralong train "$here/config.yaml" --resume
}
