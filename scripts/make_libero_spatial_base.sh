#!/usr/bin/env bash
# Makes bases/libero_spatial again: demonstrations of three tasks, then fine-tuning, on two cores.
#   make_libero_spatial_base.sh [FOLDER]
# A second call resumes. The policy is FOLDER/policy.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$root"
set_up_packages run
set_up_renderer
out=${1:-runs/libero_spatial_base}
"$python" -m verl_vla demos --suite libero_spatial --tasks 0 2 3 --episodes-per-task 750 --seed 11 --every 4 --noise 0.3 \
    --height-error 0.025 --cameras agentview --num-workers 2 --out "$out/demos"
"$python" -m verl_vla sft recipe=base_libero_spatial demos.folder="$out/demos" out="$out/sft"
ln -sfn sft/checkpoints/global_step_3000/policy "$out/policy"
