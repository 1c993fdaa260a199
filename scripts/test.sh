#!/usr/bin/env bash
# Sets everything up, then runs the gates and the tests.
#   test.sh [pytest arguments]          all of it
#   test.sh --fast [pytest arguments]   the gates and tests/unit, without a renderer
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$root"
set_up_packages dev
if [ "${1:-}" = --fast ]; then
    shift
    set -- tests/unit "$@"
else
    set_up_renderer
fi

# Two cores are shared by simulators and torch; one thread each is fastest.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 LP_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false HYDRA_FULL_ERROR=1

gates=0
scripts/lint.sh || gates=$?
tests=0
# A file stays in one process, since its tests share simulators and training runs.
"$python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@" </dev/null || tests=$?
if [ "$gates" -ne 0 ]; then say "the tests ended with $tests, but a gate failed: see above"; fi
exit $((gates ? gates : tests))
