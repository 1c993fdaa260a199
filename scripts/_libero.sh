#!/usr/bin/env bash
# Sourced, after _setup.sh, by the scripts of docs/experiments/libero.md: every policy there is evaluated alike.

evaluate() { # <policy> <folder>, sampled as in training; a run itself may evaluate the same starts greedily
    "$python" -m verl_vla eval --policy "$1" --suite libero_spatial --tasks 0 2 3 --episodes 34 --states sampled \
        --sampling 0.6 --limit 128 --slots 16 --workers 2 --out "$2"
}
