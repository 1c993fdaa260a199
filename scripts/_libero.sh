#!/usr/bin/env bash
# Sourced, after _setup.sh, by the scripts of docs/experiments/libero.md: every policy there is judged alike.

evaluate() { # <policy> <folder>, sampled as in training; a run itself may play the same starts greedily
    "$python" -m verl_vla eval --policy "$1" --suite libero_spatial --tasks 0 --episodes 100 --states drawn \
        --sampling 0.6 --limit 112 --slots 8 --workers 1 --out "$2"
}
