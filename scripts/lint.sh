#!/usr/bin/env bash
# Runs every gate, also after one has failed; ends with 1 if any did.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$root"
set_up_packages dev

lint_imports='from importlinter.cli import lint_imports_command; lint_imports_command()'
failed=()
gate() { # <name> <command>
    local name=$1
    shift
    say "== $name"
    "$@" </dev/null || failed+=("$name")
}

gate 'ruff check' "$python" -m ruff check --output-format concise .
gate 'ruff format' "$python" -m ruff format --check .
gate 'import-linter' "$python" -c "$lint_imports" --no-logo
export NO_MKDOCS_2_WARNING=1 # of the theme, on every build
gate 'docs' "$python" -m mkdocs build --quiet --site-dir "$venv/site"
gate 'pyright' "$python" -m pyright --pythonpath "$python"

if [ "${#failed[@]}" -gt 0 ]; then stop "gates failed: ${failed[*]}"; fi
say "all gates passed"
