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
    def policy_steps(self) -> float:
        """Policy calls of the step."""
        limit = self.step_limit / self.chunk_length
        return self.episodes * self.rounds * limit * self.share_played

    @property
    def rows(self) -> float:
        """Policy steps that are trained on."""
        return self.policy_steps * self.share_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the parts take on one machine."""

    num_gpus: int
    policy_steps_per_gpu_s: float
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
        deciding_s=load.policy_steps / (machine.num_gpus * machine.policy_steps_per_gpu_s),
        simulating_s=load.policy_steps * machine.chunk_core_s / machine.num_cores,
        transfer_s=load.rows * machine.bytes_per_row / machine.transfer_bytes_per_s,
        update_s=load.rows / (machine.num_gpus * machine.rows_per_gpu_s),
    )


TFLOP_PER_POLICY_STEP = 4.94
"""Forward pass of OpenVLA-OFT 7.5 B, one 224 px view, 32 prompt tokens; counted by torch's
FlopCounterMode on the published sizes."""
TFLOP_PER_ROW = 4 * TFLOP_PER_POLICY_STEP
"""Forward, backward (twice a forward) and the forward again for checkpointed activations."""
SHARE_OF_PEAK = 0.5
"""Assumed; `bench gpu` measures it where there is a GPU."""
CORES = 96
"""Assumed to simulate, on a node of eight GPUs."""
CHUNK_CORE_S = 0.133
"""Measured: ``chunk_ours_processor_ms`` in docs/benchmarks/env_libero_spatial.json, software GL."""
TRANSFER_BYTES_PER_S = 225e6
"""Measured: rows with images into TransferQueue 0.1.10 on two busy cores."""
BYTES_PER_ROW = 224 * 224 * 3.0
"""One view, uint8; everything else of a row is small."""
PEAK_TFLOPS = {"8 x A100": 312.0, "8 x H200": 790.0}
"""One GPU's dense bfloat16 peak: NVIDIA's data sheet, and for the H200 what was reached in
practice by large products, which is below its sheet's 989."""
PUBLISHED_MINUTES = 45
"""SimpleVLA-RL's author on a training step of this size on 8 x A800, an A100 with slower links
(issue 8 of its repository)."""


def simplevla_load(share_played: float) -> Load:
    """Describe SimpleVLA-RL's LIBERO step: 64 groups of 8, chunks of 8, step limit 512.

    One and a half rounds are assumed, so that two thirds of the episodes are trained on.
    """
    return Load(
        episodes=64 * 8,
        step_limit=512,
        chunk_length=8,
        share_played=share_played,
        rounds=1.5,
        share_kept=1 / 1.5,
    )


def node(name: str) -> Machine:
    """Describe one of `PEAK_TFLOPS`."""
    reached = PEAK_TFLOPS[name] * SHARE_OF_PEAK
    return Machine(
        num_gpus=8,
        policy_steps_per_gpu_s=reached / TFLOP_PER_POLICY_STEP,
        rows_per_gpu_s=reached / TFLOP_PER_ROW,
        num_cores=CORES,
        chunk_core_s=CHUNK_CORE_S,
        transfer_bytes_per_s=TRANSFER_BYTES_PER_S,
        bytes_per_row=BYTES_PER_ROW,
    )


def table_rows() -> list[str]:
    """Write the rows of the table in docs/performance.md."""
    rows: list[str] = []
    for name in PEAK_TFLOPS:
        for share in (1.0, 0.5):
            load = simplevla_load(share)
            found = step_time(load, node(name))
            seconds = (found.deciding_s, found.simulating_s, found.transfer_s, found.update_s)
            parts = " | ".join(f"{part:.0f}" for part in seconds)
            total = f"{found.total_s / 60:.1f}"
            rows.append(f"| {name} | {share:.0%} | {parts} | {total} | {found.bottleneck} |")
    return rows
