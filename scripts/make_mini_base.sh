#!/usr/bin/env bash
# Makes bases/mini again: some minutes of demonstrations and of fine-tuning on two cores.
#   make_mini_base.sh [FOLDER]
# A second call resumes. The policy is FOLDER/policy.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$root"
set_up_packages run
set_up_renderer
out=${1:-runs/mini_base}
"$python" -m verl_vla demos --suite mini --tasks 0 1 4 6 --episodes-per-task 250 --seed 11 --every 2 --noise 0.05 \
    --height-error 0.06 --cameras agentview --num-workers 2 --out "$out/demos"
"$python" -m verl_vla sft recipe=base_mini demos.folder="$out/demos" out="$out/sft"
ln -sfn sft/checkpoints/global_step_1300/policy "$out/policy"
