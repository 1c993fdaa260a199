"""Declaration of every metric that a training step reports, and the file that they are written to.

A metric that is logged but not declared stops the run, so the table in the documentation, the
file and the console can never disagree.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from verl_vla.core.errors import ContractError
from verl_vla.core.files import atomic_write, recording
from verl_vla.core.json_files import keep_json_lines, read_json_lines, read_last_json_lines

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Declaration of one metric."""

    unit: str
    meaning: str


SAMPLED = "_sampled"
"""Last part of the names of a second, sampled evaluation's metrics and records."""

METRICS: dict[str, Metric] = {
    "env/success_rate": Metric(
        unit="share", meaning="solved / (played - crashed), all groups of the step, sampled"
    ),
    "critic/score/mean": Metric(unit="score", meaning="mean reward of the episodes played"),
    "env/episodes": Metric(unit="count", meaning="episodes played, crashed ones included"),
    "env/crashes": Metric(unit="count", meaning="episodes lost with their simulator"),
    "env/steps": Metric(unit="count", meaning="simulator steps the policy chose"),
    "env/policy_steps": Metric(unit="count", meaning="policy calls with an answer"),
    "perf/policy_steps_per_s": Metric(unit="1/s", meaning="policy steps / seconds of rollout"),
    "env/policy_steps_after_end": Metric(
        unit="count", meaning="policy calls for episodes that had ended; always 0"
    ),
    "perf/env_wait_share": Metric(
        unit="share", meaning="of the rollout's seconds spent waiting for simulators"
    ),
    "perf/policy_share": Metric(
        unit="share", meaning="of the rollout's seconds spent asking the policy and waiting for it"
    ),
    "sampling/groups_played": Metric(unit="count", meaning="groups played in the step"),
    "sampling/groups_kept": Metric(unit="count", meaning="groups trained on"),
    "sampling/rounds": Metric(unit="count", meaning="rounds of rollout, the first included"),
    "actor/pg_loss": Metric(unit="1", meaning="clipped loss, mean over the optimizer steps"),
    "actor/grad_norm": Metric(unit="1", meaning="before clipping, mean of those that were finite"),
    "actor/skipped_steps": Metric(
        unit="count",
        meaning="optimizer steps left out: the loss or the gradient was not finite, or, where "
        "actor/rows is 0, no policy step of the training step had a gradient",
    ),
    "actor/lr": Metric(unit="1", meaning="learning rate after the step"),
    "actor/entropy": Metric(
        unit="nats", meaning="mean per executed token, at the sampling temperature"
    ),
    "actor/ratio_first": Metric(
        unit="1", meaning="mean ratio of the first mini-batch; 1 unless rollout and update differ"
    ),
    "actor/ratio_first_deviation": Metric(
        unit="1", meaning="largest distance of a token's ratio from 1 in the first mini-batch"
    ),
    "actor/pg_clipfrac_low": Metric(
        unit="share", meaning="executed tokens stopped by the lower bound"
    ),
    "actor/pg_clipfrac_high": Metric(
        unit="share", meaning="executed tokens stopped by the upper bound"
    ),
    "actor/kl_loss": Metric(
        unit="nats",
        meaning="mean divergence from the reference policy per executed token; with loss.kl only",
    ),
    "actor/mini_batches": Metric(
        unit="count",
        meaning="optimizer steps, each of whole groups; fewer than optimizer.num_mini_batches "
        "where fewer groups have a gradient",
    ),
    "actor/rows": Metric(unit="count", meaning="policy steps trained on, all ranks"),
    "actor/padding_rows": Metric(
        unit="count",
        meaning="rows without content, so that every mini-batch is as large as the largest and "
        "every rank gets equally many",
    ),
    "actor/rows_left_out": Metric(
        unit="count",
        meaning="policy steps whose advantage was 0, kept from the update; 0 with loss.kl, which "
        "moves them",
    ),
    "actor/rows_without_gradient": Metric(
        unit="count", meaning="policy steps trained on that no term of the loss moves; always 0"
    ),
    "perf/max_process_memory_gb": Metric(
        unit="GiB", meaning="peak resident memory of a learner process"
    ),
    "perf/max_memory_allocated_gb": Metric(
        unit="GiB", meaning="peak device memory allocated since the last report; 0 on a CPU"
    ),
    "perf/max_memory_reserved_gb": Metric(
        unit="GiB", meaning="the same, with what torch keeps for later"
    ),
    "timing_s/step": Metric(unit="s", meaning="the whole training step"),
    "timing_s/gen": Metric(unit="s", meaning="playing episodes"),
    "timing_s/reward": Metric(unit="s", meaning="scoring trajectories"),
    "timing_s/transfer": Metric(unit="s", meaning="moving rows to the learner's store"),
    "timing_s/update": Metric(unit="s", meaning="log-probs, advantages and optimizer steps"),
    "timing_s/save_checkpoint": Metric(
        unit="s", meaning="writing the checkpoint before this step; 0 if there was none"
    ),
    "timing_s/testing": Metric(unit="s", meaning="held-out evaluation"),
    "val/success_rate": Metric(
        unit="share",
        meaning="held-out, at evaluation.temperature (0: greedy), all tasks pooled",
    ),
    "val/episodes": Metric(unit="count", meaning="held-out episodes behind that rate"),
    "val/ci_low": Metric(unit="share", meaning="lower end of the Wilson 95% interval"),
    "val/ci_high": Metric(unit="share", meaning="upper end of the Wilson 95% interval"),
    "val/success_rate_sampled": Metric(
        unit="share", meaning="the same starts, sampled at the training temperature"
    ),
    "val/episodes_sampled": Metric(unit="count", meaning="sampled episodes behind that rate"),
    "val/ci_low_sampled": Metric(unit="share", meaning="lower end of its Wilson 95% interval"),
    "val/ci_high_sampled": Metric(unit="share", meaning="upper end of its Wilson 95% interval"),
}
"""Declarations by name. Names under ``val/task/`` and ``reward/`` need no declaration."""
SFT_METRICS: dict[str, Metric] = {
    "train/loss": Metric(
        unit="nats",
        meaning="cross-entropy over the whole vocabulary, mean of the batch's action tokens and "
        "stops",
    ),
    "train/accuracy": Metric(
        unit="share", meaning="of the batch's action tokens whose likeliest bin is demonstrated"
    ),
    "train/grad_norm": Metric(unit="1", meaning="before clipping"),
    "train/skipped_steps": Metric(
        unit="count", meaning="1 where the step was left out: loss or gradient was not finite"
    ),
    "train/lr": Metric(unit="1", meaning="learning rate of the step"),
    "val/loss": Metric(unit="nats", meaning="as train/loss, on the held-out episodes"),
    "val/accuracy": Metric(
        unit="share", meaning="open-loop token accuracy on the held-out episodes, centre crop"
    ),
    "timing_s/step": Metric(unit="s", meaning="forward, backward and optimizer step"),
    "timing_s/data": Metric(unit="s", meaning="waiting for the step's samples"),
    "timing_s/validation": Metric(unit="s", meaning="open-loop test"),
    "timing_s/save_checkpoint": Metric(unit="s", meaning="writing the step's checkpoint"),
} | {
    name: METRICS[name]
    for name in (
        "val/success_rate",
        "val/episodes",
        "val/ci_low",
        "val/ci_high",
        "timing_s/testing",
    )
}
"""Declarations of fine-tuning, by name. Names under ``val/task/`` need no declaration."""

OPEN_FAMILIES = ("val/task/", "reward/")

TIMING_FAMILY = ("timing_s/", "perf/")
"""Prefixes of metrics that may differ between two equal runs."""


def is_reproducible(name: str) -> bool:
    """Check whether two equal runs must report the same number, digit for digit, on a CPU.

    >>> is_reproducible("actor/pg_loss"), is_reproducible("timing_s/step")
    (True, False)
    """
    return not name.startswith(TIMING_FAMILY)


def _check_line(line: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(line.get("step"), int):
        raise ValueError("it has no step")
    for name in line.keys() - {"step"}:
        if not (name in METRICS or name in SFT_METRICS or name.startswith(OPEN_FAMILIES)):
            raise ValueError(f"{name!r} is no metric")
    return line


REMEDY = "remove that line, or restore the file from a copy"
MetricsLine = Annotated[dict[str, int | float | None], AfterValidator(_check_line)]
"""A line of ``metrics.jsonl``: ``step`` and metrics."""


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, in the order of the steps.

    A step that was logged by a process that died before its checkpoint is repeated on resume. Its
    old line is then removed, so no step occurs twice.
    """

    def __init__(self, path: Path, declared: Mapping[str, Metric] = METRICS) -> None:
        self._path = path
        self._declared = declared

    def rewind(self, last_step: int) -> None:
        """Drop the lines after ``last_step``, and a half-written last line."""
        if not self._path.exists():
            return
        with recording(self._path):
            dropped = keep_json_lines(
                self._path, MetricsLine, REMEDY, lambda line: line["step"] <= last_step
            )
        if dropped:
            logger.info(
                "steps %d to %d are newer than the last checkpoint: they are made again and their "
                "lines in %s replaced",
                dropped[0]["step"],
                dropped[-1]["step"],
                self._path.name,
            )

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line.

        Raises:
            ContractError: a name that is not declared.
            WriteError: the file cannot be written.
        """
        check_declared(values, self._declared)
        record = {"step": step} | {name: _plain(value) for name, value in values.items()}
        with recording(self._path), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def add_to_last(self, values: Mapping[str, float]) -> None:
        """Add values that were measured later to the line of the last step, atomically."""
        check_declared(values, self._declared)
        # the whole file again: a line that becomes longer cannot be changed in place
        *before, last = self._path.read_text().splitlines(keepends=True)
        record = json.loads(last) | {name: _plain(value) for name, value in values.items()}
        with recording(self._path):
            atomic_write(self._path, "".join([*before, json.dumps(record) + "\n"]))


def check_declared(values: Mapping[str, float], declared: Mapping[str, Metric] = METRICS) -> None:
    """Check that every metric is declared.

    Raises:
        ContractError: a name that is not declared.
    """
    for name in values:
        if name not in declared and not name.startswith(OPEN_FAMILIES):
            raise ContractError(
                f"metric {name!r} is not declared; add it to METRICS in verl_vla/runs/metrics.py"
            )


def read_metrics(path: Path, last_bytes: int | None = None) -> list[dict[str, float]]:
    """Read the lines of a ``metrics.jsonl``, each a mapping that also holds ``step``.

    A last line that is still being written is left out.

    Args:
        path: path of the file.
        last_bytes: bytes of the newest lines that are read; None reads all.

    Raises:
        ConfigError: a line is damaged; gives its number.
    """
    lines = (
        read_json_lines(path, MetricsLine, REMEDY)
        if last_bytes is None
        else read_last_json_lines(path, MetricsLine, REMEDY, last_bytes)
    )
    return [
        # null stands for a number that was not finite; see `_plain`
        {name: math.nan if value is None else value for name, value in line.items()}
        for line in lines
    ]


def _plain(value: float) -> float | None:
    """Return None for NaN or infinity, since JSON has neither."""
    number = float(value)
    return number if math.isfinite(number) else None
