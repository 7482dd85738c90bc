
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
