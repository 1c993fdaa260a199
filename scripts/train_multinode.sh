#!/usr/bin/env bash
# Trains on several nodes. On the first:   train_multinode.sh head NODES suite=spatial ...
# On every other one, before or after it:  train_multinode.sh join ADDRESS
# On one that only simulates:              train_multinode.sh simulate ADDRESS
# The folders of the checkout, the policy and the run must be the same on all nodes.
# SIGINT or SIGTERM to the first ends training after its step, with a checkpoint; then Ray ends.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$root"
set_up_packages run
set_up_renderer
port=${RAY_PORT:-6379}
share_ray_token
case ${1:-} in
    join) exec "$venv/bin/ray" start --address "${2:?name the first node}:$port" --block ;;
    simulate)
        exec "$venv/bin/ray" start --address "${2:?name the first node}:$port" --block \
            --num-cpus=0 --resources '{"env_node": 1}'
        ;;
    head) ;;
    *) stop "say head NODES, join ADDRESS or simulate ADDRESS" ;;
esac
nodes=${2:?say how many nodes}
shift 2
# Ray and training get process groups of their own: what is sent to this script's group, such as
# Ctrl-C, would end Ray at once, and reach training twice, which makes it end at once
set -m
"$venv/bin/ray" start --head --port "$port" --dashboard-host 127.0.0.1
trap '"$venv/bin/ray" stop' EXIT
"$python" -m verl_vla train recipe=libero profile=8gpu cluster.num_nodes="$nodes" \
    cluster.address="127.0.0.1:$port" "$@" </dev/null &
pass_signals_on $!
