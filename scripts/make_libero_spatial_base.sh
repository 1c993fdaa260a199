#!/usr/bin/env bash
# Makes bases/libero_spatial again: demonstrations of three tasks, then fine-tuning, on two cores.
#   make_libero_spatial_base.sh [FOLDER]
# A second call resumes after the last finished part.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$root"
set_up_packages run
set_up_renderer
out=${1:-runs/libero_spatial_base}
mkdir -p "$out"
if [ ! -e "$out/demonstrations.npz" ]; then
    "$python" -m verl_vla demos --suite libero_spatial --tasks 0 2 3 --episodes-per-task 250 --seed 11 --every 2 --noise 0.3 \
        --height-error 0.025 --num-workers 2 --out "$out/demonstrations.npz"
fi
if [ ! -e "$out/base" ]; then
    "$python" -m verl_vla sft --demos "$out/demonstrations.npz" --steps 3000 --smoothing 2 --threads 1 --out "$out/base.partial"
    mv "$out/base.partial" "$out/base"
fi
