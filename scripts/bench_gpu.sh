#!/usr/bin/env bash
# PolicySteps, updates and simulators on one GPU, with random weights: no hub, no Ray, no data set.
# Needs python with torch, transformers, peft, mujoco and hf-libero; PYTHON names another one.
#   ./scripts/bench_gpu.sh [FOLDER]      records go to FOLDER, default docs/benchmarks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
folder=${1:-docs/benchmarks}
timeout 300 "$python" -m verl_vla bench gpu --keep "$folder/gpu.json"
timeout 120 "$python" -m verl_vla bench env --suite mini --pairs 5 --resets 5 --keep "$folder/gpu_env.json"
timeout 120 "$python" -m verl_vla bench pool --processes 1 8 16 --keep "$folder/gpu_pool.json"
