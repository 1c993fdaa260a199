#!/usr/bin/env bash
# Trains with each reward of docs/experiments/rewards.md and three seeds. A second call trains what is missing.
#   rewards_grpo.sh FOLDER [key=value ...]
# SEEDS='0 1' trains fewer.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$1
shift
more=("$@")

train() { # <name> <seed> <key=value> ...
    local folder=$out/$1/seed$2 seed=$2
    shift 2
    if [ -e "$folder/curve.png" ]; then return; fi # drawn when a run has ended
    "$root/.venv/bin/python" -m verl_vla train recipe="$root/docs/experiments/rewards_grpo.yaml" \
        seed="$seed" out="$folder" "$@" "${more[@]}"
}

for seed in ${SEEDS:-0 1 2}; do
    train binary "$seed"
    train srpo "$seed" reward=srpo reward_args.encoder=pixels
    train siglip_t_none "$seed" reward=siglip_t reward_args.encoder=pixels reward_args.temporal=none
    train siglip_t_causal "$seed" reward=siglip_t reward_args.encoder=pixels reward_args.temporal=causal
    train knn_align "$seed" reward=knn_align reward_args.encoder=pixels
done
