"""Ranks as processes of their own, forked from one that has imported veRL for all of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from verl_vla.trainer.verl_compat.process import prepare_verl

PATIENCE_S = 300.0
SLOW_IMPORTS = ["verl_vla.trainer.engine.engine", "verl.workers.engine_workers"]


def run_ranks(work: Callable[..., None], *ranks: tuple[Any, ...]) -> None:
    """Run ``work`` in one process for each of these arguments, at the same time."""
    # the server inherits the choice of the platform
    prepare_verl("cpu", option="cluster.device")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    processes = [context.Process(target=work, args=given) for given in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * len(ranks), f"exit codes {codes}; what they said is above"
