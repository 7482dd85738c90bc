
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
