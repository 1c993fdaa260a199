#!/usr/bin/env bash
# Makes the main row of docs/experiments/libero.md again from nothing: demonstrations, a base, GRPO.
# A second call goes on where the first one ended.
#   reproduce_libero.sh [FOLDER] [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
source "$(dirname "${BASH_SOURCE[0]}")/_libero.sh"
cd "$root"
out=${1:-runs/libero}
shift || true
export OMP_NUM_THREADS=1
say "about an hour on two cores, twice that on busy ones (docs/experiments/libero.md): recording, fine-tuning,
12 training steps and four evaluations of 100 episodes; longer the first time, to set up"
set_up_packages run
set_up_renderer
mkdir -p "$out"
if [ ! -e "$out/demonstrations.npz" ]; then
    "$python" -m verl_vla demos --suite libero_spatial --task 0 --episodes 80 --seed 11 --every 2 --noise 0.3 \
        --height-error 0.025 --workers 1 --out "$out/demonstrations.npz"
fi
if [ ! -e "$out/base" ]; then
    "$python" -m verl_vla sft --demos "$out/demonstrations.npz" --steps 1000 --smoothing 4 --threads 1 --out "$out/base.partial"
    mv "$out/base.partial" "$out/base"
fi
"$python" -m verl_vla train recipe=libero_spatial_small policy.path="$out/base" out="$out/binary" "$@"
evaluate "$out/base" "$out/before"
evaluate "$out/binary/checkpoints/latest/policy" "$out/after"
"$python" -m verl_vla compare "$out/before" "$out/after"
"$python" docs/experiments/libero.py "$out" "$out/libero.json" "$out/libero.png"
