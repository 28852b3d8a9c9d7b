#!/bin/bash
# Pretend nodes of a cluster on one machine, to try and test what happens between nodes. Root is needed.
#   pretend_nodes.sh check                        exit code 2 and the reason where it cannot work
#   pretend_nodes.sh with N [-s SIZE] COMMAND…    N nodes (/dev/shm of SIZE, default 256m) while COMMAND runs
#   eval "$(pretend_nodes.sh up N [-s SIZE])"     N nodes until `pretend_nodes.sh down`
# and then, in COMMAND or after up:
#   pretend_nodes.sh run RANKS[,RANKS…] COMMAND…  mpirun with so many ranks on each node, or on node 0, node 1, …
#   pretend_nodes.sh on K COMMAND…                on node K, without mpirun
#   pretend_nodes.sh kill K | restart K           power failure: all is gone in an instant, and nobody is told
#   pretend_nodes.sh link K down|up               cable out, cable in
# KEEPALIVE="TIME INTERVAL PROBES" in the environment of run: how mpirun watches its nodes (oob_tcp_keepalive_…).
# A node is a set of Linux namespaces: host name node0, node1, …, address on a bridge, processes, IPC and /dev/shm are its
# own; files are shared. mpirun runs in one more, "control". All of them live within the process space of control and have
# no names outside it, so any number of clusters get along, and the end of control's first process, or of the script that
# started it, is the end of everything. $PRETEND_NODES is the folder of the cluster.
set -euo pipefail
self=$(realpath "$0")
net=10.99.0
dir=${PRETEND_NODES:-}
own_spaces=(--net --uts --ipc --mount --pid)

cannot() {
  echo "pretend nodes: not possible here: $*" >&2
  exit 2
}
usage() {
  sed -n '2,/^set/s/^# \?//p' "$self" >&2
  exit 1
}

check() {
  [ "$(id -u)" = 0 ] || cannot "needs root"
  local tool missing=""
  for tool in ip:iproute2 unshare:util-linux nsenter:util-linux setpriv:util-linux mount:mount mpirun:openmpi-bin; do
    command -v "${tool%:*}" >/dev/null || missing+=" ${tool%:*} (package ${tool#*:})"
  done
  [ -z "$missing" ] || cannot "missing:$missing"
  unshare "${own_spaces[@]}" --fork --mount-proc true 2>/dev/null ||
    cannot "this system does not let root make namespaces (a container without CAP_SYS_ADMIN?)"
  unshare --net sh -c 'ip link add name bridge0 type bridge && ip link add name end0 type veth peer name end1' 2>/dev/null ||
    cannot "the kernel lacks bridges or pairs of virtual cables (bridge, veth)"
}

# enter PID COMMAND…: in the namespaces of a process, here in the file system.
enter() {
  local pid=$1
  shift
  exec nsenter -t "$pid" "${own_spaces[@]}" --wd="$PWD" -- "$@"
}
has_cluster() {
  [ -n "$dir" ] && [ -e "$dir/control" ] && return
  echo "pretend nodes: PRETEND_NODES names no cluster: see up and with" >&2
  exit 1
}
in_control() {
  has_cluster
  enter "$(cat "$dir/control")" "$self" "$@"
}
wait_for() {
  local i
  for ((i = 0; i < 400; i++)); do
    [ -s "$1" ] && return
    sleep 0.05
  done
  echo "pretend nodes: $1 did not come" >&2
  return 1
}
# The process that the `unshare --fork` with this id started: the first one of the new namespaces.
first_process() {
  local i child=""
  for ((i = 0; i < 400; i++)); do
    read -r child _ <"/proc/$1/task/$1/children" || true # its line has no end
    [ -n "$child" ] && break
    sleep 0.05
  done
  echo "$child"
}
# What the first process of a process space does: it collects those that lost their parent.
idle() {
  while :; do
    sleep 3600 &
    wait $!
  done
}
new_shm() {
  mkdir -p /dev/shm
  mount -t tmpfs -o "size=$(cat "$dir/shm")" tmpfs /dev/shm
  mount --bind "$dir/hosts" /etc/hosts
}

# --- outside
up() {
  local n=${1:-} size=256m k
  [ "${2:-}" = -s ] && size=$3
  [[ $n =~ ^[1-9][0-9]?$ ]] || usage
  check
  dir=$(mktemp -d "${TMPDIR:-/tmp}/nodes.XXXXXX")
  echo "$size" >"$dir/shm"
  {
    echo "127.0.0.1 localhost"
    echo "$net.254 control"
    for ((k = 0; k < n; k++)); do echo "$net.$((k + 1)) node$k"; done
  } >"$dir/hosts"
  PRETEND_NODES=$dir "${guard[@]}" unshare "${own_spaces[@]}" --fork --kill-child --mount-proc "$self" _control "$n" \
    </dev/null >"$dir/log" 2>&1 &
  unshare_pid=$!
  disown
  if ! wait_for "$dir/ready"; then
    cat "$dir/log" >&2
    exit 1
  fi
  first_process $unshare_pid >"$dir/control"
}
down() {
  [ -n "$dir" ] && [ -d "$dir" ] || return 0
  local pid
  pid=$(cat "$dir/control" 2>/dev/null || echo "${unshare_pid:-}")
  # Its number may be another's by now.
  grep -qs _control "/proc/$pid/cmdline" && kill -KILL "$pid"
  rm -rf "$dir"
}

# --- within control
control() {
  local n=$1 k
  hostname control
  new_shm
  ip link set lo up
  ip link add name bridge type bridge
  ip addr add $net.254/24 dev bridge
  ip link set bridge up
  for ((k = 0; k < n; k++)); do start_node "$k"; done
  echo ready >"$dir/ready"
  idle
}
start_node() {
  local k=$1 pid
  rm -f "$dir/ready.$k"
  unshare "${own_spaces[@]}" --fork --kill-child --mount-proc "$self" _node "$k" </dev/null >>"$dir/log" 2>&1 &
  pid=$(first_process $!)
  wait_for "$dir/ready.$k"
  ip link add name "cable$k" type veth peer name eth0 netns "$pid"
  ip link set "cable$k" master bridge up
  nsenter -t "$pid" --net sh -c "ip link set lo up; ip addr add $net.$((k + 1))/24 dev eth0; ip link set eth0 up"
  echo "$pid" >"$dir/node.$k"
}
kill_node() {
  ip link set "cable$1" down # before its last words can leave
  kill -KILL "$(cat "$dir/node.$1")"
  rm "$dir/node.$1"
  # What its last words wait for would keep the cable for minutes.
  ip link delete "cable$1"
}
run() {
  local each=$1 k=0 slots total=0 keepalive
  shift
  : >"$dir/mpi_hosts"
  while [ -e "$dir/node.$k" ]; do
    slots=$(cut -d, -f$((k + 1)) <<<"$each")
    ((slots > 0)) && echo "node$k slots=$slots" >>"$dir/mpi_hosts"
    ((total += slots)) || true
    ((++k))
  done
  mkdir -p "$dir/session"
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  # Ranks share the cores (mpi_yield_when_idle, bind-to). Process ids repeat between clusters: the session is their own.
  # Without KEEPALIVE mpirun sees the loss of a node after 5 to 6 s: later than ranks whose peer_dead_after is 3 s say so,
  # and before they abort, which would make it wait for the lost node. (The first probe is an interval late.)
  read -ra keepalive <<<"${KEEPALIVE:-1 1 5}"
  exec mpirun -np "$total" --hostfile "$dir/mpi_hosts" --bind-to none --mca mpi_yield_when_idle 1 \
    --mca plm rsh --mca plm_rsh_agent "$self _rsh" --mca plm_rsh_no_tree_spawn 1 --mca orte_tmpdir_base "$dir/session" \
    --mca btl self,vader,tcp --mca btl_tcp_if_include $net.0/24 --mca oob_tcp_if_include $net.0/24 \
    --mca oob_tcp_keepalive_time "${keepalive[0]}" --mca oob_tcp_keepalive_intvl "${keepalive[1]}" \
    --mca oob_tcp_keepalive_probes "${keepalive[2]}" "$@"
}
# As ssh: HOST and words for a shell.
rsh() {
  local k=${1#node}
  shift
  [ -e "$dir/node.$k" ] || {
    echo "node$k: no such node" >&2
    exit 255
  }
  enter "$(cat "$dir/node.$k")" /bin/sh -c "$*"
}

guard=()
command=${1:-}
[ $# -gt 0 ] && shift
case $command in
  check) check ;;
  with)
    # However this script ends, the nodes and the command end.
    child=""
    trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true; down' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    guard=(setpriv --pdeathsig KILL)
    up "$@"
    shift
    [ "${1:-}" = -s ] && shift 2
    # In the background, as a signal would wait for a command in the foreground.
    PRETEND_NODES=$dir env --default-signal=INT "$@" <&0 &
    child=$!
    code=0
    wait "$child" || code=$?
    child=""
    exit $code
    ;;
  up)
    trap down EXIT
    trap 'exit 130' INT TERM HUP
    up "$@"
    trap - EXIT
    echo "export PRETEND_NODES=$dir"
    ;;
  down)
    has_cluster
    down
    ;;
  run | kill | restart | link | on) in_control "_$command" "$@" ;;
  _control) control "$@" ;;
  _node)
    hostname "node$1"
    new_shm
    echo ready >"$dir/ready.$1"
    idle
    ;;
  _run) run "$@" ;;
  _rsh) rsh "$@" ;;
  _on)
    pid=$(cat "$dir/node.$1")
    shift
    enter "$pid" "$@"
    ;;
  _kill) kill_node "$1" ;;
  _restart) start_node "$1" ;;
  _link) ip link set "cable$1" "$2" ;;
  *) usage ;;
esac
