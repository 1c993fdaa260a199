"""Build every task of a suite, and count what fails, by reason."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import atomic_write, require_place
from verl_vla.diagnostics.suite_check import SMALL_PX, TaskCheck, check_tasks, count_faults
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.registry import absolute_name, suite

logger = logging.getLogger(__name__)

PROGRESS_EVERY = 50
"""Number of tasks between two lines of progress."""
EXIT_FAULTY = 1
"""Exit code if a task failed that the suite itself does not declare as broken."""


def run(options: argparse.Namespace) -> int:
    """Print each task that fails, and the counts; return 0 if the suite declared every failure."""
    chosen = suite(options.suite)
    out = None if options.out is None else Path(options.out)
    if out is not None:
        require_place(out, "--out")
    if options.every < 1:
        raise ConfigError(f"--every is {options.every}; set at least 1, which checks all tasks")
    tasks = range(len(chosen.tasks)) if options.tasks is None else options.tasks
    # an unknown task id is refused before the first one is built
    for task in tasks:
        chosen.task(task)
    chosen.require_simulator()
    config = EnvConfig(
        suite=absolute_name(options.suite),
        render_size=SMALL_PX,
        image_size=SMALL_PX,
        max_simulators=1,
    )
    chosen_tasks = tasks[:: options.every]
    progress = _Progress(len(chosen_tasks), out)
    try:
        checks = check_tasks(chosen, config, chosen_tasks, progress.show)
    # an interrupted check keeps what it has found
    finally:
        progress.write()
    faults = count_faults(checks)
    logger.info("%d of %d tasks can be built", len(checks) - sum(faults.values()), len(checks))
    for fault, number in faults.items():
        logger.info("%d: %s", number, fault)
    is_new = any(check.fault is not None and not check.was_foreseen for check in checks)
    return EXIT_FAULTY if is_new else 0


class _Progress:
    """Progress of the check: logs failing tasks, and at intervals saves the results so far."""

    def __init__(self, total: int, out: Path | None) -> None:
        self._total = total
        self._out = out
        self._checks: list[TaskCheck] = []

    def show(self, check: TaskCheck) -> None:
        """Add the result of one task."""
        self._checks.append(check)
        # what the suite declares as broken is no news; it is counted at the end
        if check.fault is not None and not check.was_foreseen:
            logger.info("task %d, %s: %s", check.task_id, check.name, check.fault)
        if len(self._checks) % PROGRESS_EVERY == 0:
            logger.info("%d of %d tasks checked", len(self._checks), self._total)
            self.write()

    def write(self) -> None:
        """Write the results so far to the file of ``--out``."""
        if self._out is not None:
            rows = [check.as_json() for check in self._checks]
            atomic_write(self._out, json.dumps(rows, indent=1))
