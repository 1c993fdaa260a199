#!/usr/bin/env bash
# Makes the main row of docs/experiments/libero.md again from nothing: demonstrations, a base, GRPO.
# A second call resumes after the last finished part.
#   reproduce_libero.sh [FOLDER] [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
source "$(dirname "${BASH_SOURCE[0]}")/_libero.sh"
cd "$root"
out=${1:-runs/libero}
shift || true
export OMP_NUM_THREADS=1
say "about 70 minutes on two idle cores (docs/experiments/libero.md): recording, fine-tuning, training and
four evaluations of 102 episodes; longer the first time, to set up"
scripts/make_libero_spatial_base.sh "$out"
"$python" -m verl_vla train recipe=quickstart_libero_spatial policy.path="$out/policy" out="$out/binary" \
    evaluation.temperature=0 "$@" # greedily; below the same init states are evaluated sampled
evaluate "$out/policy" "$out/before"
evaluate "$out/binary/checkpoints/latest/policy" "$out/after"
"$python" -m verl_vla compare "$out/before" "$out/after"
"$python" docs/experiments/libero.py "$out" "$out/libero.json" "$out/libero.png"
