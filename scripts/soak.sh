#!/usr/bin/env bash
# Plays 2,000 episodes of the mini suite while 1% of them crash, and sees that nothing grows.
#   soak.sh [--episodes N] [--crash-share S] [--out FILE]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
set_up_packages run
set_up_renderer
exec "$python" -m verl_vla soak "$@"
