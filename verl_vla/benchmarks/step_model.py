"""How long a training step takes on a machine, computed from what its parts take.

A model, not a measurement: docs/performance.md says which of its inputs were measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one training step has to do."""

    episodes: int
    """Of one round."""
    step_limit: int
    chunk_length: int
    share_played: float
    """Of the step limit, mean over episodes; successes end early."""
    rounds: float
    """Rounds of rollout, since groups that agree are replaced."""
    share_kept: float
    """Of the episodes played, whose groups are trained on."""

    @property
    def decisions(self) -> float:
        """Policy calls of the step."""
        limit = self.step_limit / self.chunk_length
        return self.episodes * self.rounds * limit * self.share_played

    @property
    def rows(self) -> float:
        """Decisions that are trained on."""
        return self.decisions * self.share_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the parts take on one machine."""

    num_gpus: int
    decisions_per_gpu_s: float
    rows_per_gpu_s: float
    """Forward, backward and recomputation."""
    num_cores: int
    """That simulate."""
    chunk_core_s: float
    """Seconds of a core for a chunk and its view."""
    transfer_bytes_per_s: float
    bytes_per_row: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of each part; rollout is the longer of its two, which overlap."""

    deciding_s: float
    simulating_s: float
    transfer_s: float
    update_s: float

    @property
    def rollout_s(self) -> float:
        """Policy and simulators take turns in halves, so the slower one sets the pace."""
        return max(self.deciding_s, self.simulating_s)

    @property
    def total_s(self) -> float:
        """The whole training step."""
        return self.rollout_s + self.transfer_s + self.update_s

    @property
    def bottleneck(self) -> str:
        """The part that costs most."""
        parts = {
            "deciding": self.deciding_s if self.deciding_s >= self.simulating_s else 0.0,
            "simulating": self.simulating_s if self.simulating_s > self.deciding_s else 0.0,
            "transfer": self.transfer_s,
            "update": self.update_s,
        }
        return max(parts, key=lambda name: parts[name])


def step_time(load: Load, machine: Machine) -> StepTime:
    """Compute the time of a training step."""
    return StepTime(
        deciding_s=load.decisions / (machine.num_gpus * machine.decisions_per_gpu_s),
        simulating_s=load.decisions * machine.chunk_core_s / machine.num_cores,
        transfer_s=load.rows * machine.bytes_per_row / machine.transfer_bytes_per_s,
        update_s=load.rows / (machine.num_gpus * machine.rows_per_gpu_s),
    )
