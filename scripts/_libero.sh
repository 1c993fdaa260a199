#!/usr/bin/env bash
# Sourced, after _setup.sh, by the scripts of docs/experiments/libero.md: every policy there is evaluated alike.

evaluate() { # <policy> <folder>, sampled as in training; a run itself may evaluate the same starts greedily
    "$python" -m verl_vla eval --policy "$1" --suite libero_spatial --tasks 0 2 3 --episodes-per-task 34 --states sampled \
        --temperature 0.6 --step-limit 128 --num-slots 16 --num-workers 2 --out "$2"
}
