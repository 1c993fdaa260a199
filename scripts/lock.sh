#!/usr/bin/env bash
# Writes requirements/*.lock from pyproject.toml and requirements/run.in. Locked versions stay where
# they can; arguments go to uv, for example: --upgrade-package ruff
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$root"
set_up_packages dev

lock() { # <lock file> <uv pip compile arguments>
    "$uv" pip compile --quiet --universal --python-version 3.10 --no-emit-index-url \
        --no-header --no-annotate --output-file "$@" pyproject.toml requirements/run.in
}

lock requirements/run.lock "$@"
cp requirements/run.lock requirements/dev.lock # uv keeps the versions it finds there
lock requirements/dev.lock --extra dev "$@"
