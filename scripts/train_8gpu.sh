#!/usr/bin/env bash
# Trains on the GPUs of this node; words choose and override options.
#   train_8gpu.sh suite=spatial reward=srpo policy.path=FOLDER
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$root"
set_up_packages run
set_up_renderer
exec "$python" -m verl_vla train recipe=libero profile=8gpu "$@"
