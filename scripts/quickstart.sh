#!/usr/bin/env bash
# Sets everything up and trains a small policy on this machine.
#   quickstart.sh [--suite mini|libero_spatial] [--total-training-steps N] [--seed S] [--out DIR]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
set_up_packages run
set_up_renderer
exec "$python" -m verl_vla quickstart "$@"
