#!/usr/bin/env bash
# Injects faults into real trainings of the mini suite, and sees that each ends as it should.
#   chaos.sh [--out FOLDER] [--faults NAME...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
set_up_packages run
set_up_renderer
exec "$python" -m verl_vla chaos "$@"
