#!/usr/bin/env bash
# Makes bases/mini again: some minutes of demonstrations and of fine-tuning on two cores.
#   make_mini_base.sh [FOLDER]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$root"
set_up_packages run
set_up_renderer
out=${1:-runs/mini_base}
mkdir -p "$out"
"$python" -m verl_vla demos --suite mini --tasks 0 1 4 6 --episodes-per-task 250 --seed 11 --noise 0.05 --height-error 0.06 \
    --num-workers 2 --out "$out/demonstrations.npz"
"$python" -m verl_vla sft --demos "$out/demonstrations.npz" --steps 1300 --smoothing 4 --seed 1 --threads 1 \
    --out "$out/policy"
