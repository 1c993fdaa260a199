"""Model of the time of a training step on a machine, computed from the speed of its parts.

It is not a measurement: docs/performance.md says which of its inputs were measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Work of one training step."""

    episodes: int
    """Episodes of one rollout round."""
    step_limit: int
    chunk_length: int
    share_played: float
    """Share of the step limit that is executed, mean over episodes; successes end early."""
    rounds: float
    """Number of rollout rounds, since groups without a signal are replaced."""
    share_kept: float
    """Share of the episodes whose groups are trained on."""

    @property
    def policy_steps(self) -> float:
        """Number of policy steps in the training step."""
        limit = self.step_limit / self.chunk_length
        return self.episodes * self.rounds * limit * self.share_played

    @property
    def rows(self) -> float:
        """Number of policy steps that are trained on."""
        return self.policy_steps * self.share_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Speed of the parts on one machine."""

    num_gpus: int
    policy_steps_per_gpu_s: float
    rows_per_gpu_s: float
    """Rows per second of forward and backward."""
    num_cores: int
    """Number of cores that simulate."""
    chunk_core_s: float
    """Core seconds for a chunk and its view."""
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
        """Seconds of the rollout: two slot groups alternate, so the slower part sets the pace."""
        return max(self.deciding_s, self.simulating_s)

    @property
    def total_s(self) -> float:
        """Seconds of the complete training step."""
        return self.rollout_s + self.transfer_s + self.update_s

    @property
    def bottleneck(self) -> str:
        """Name of the slowest part."""
        parts = {
            # the shorter of the two overlaps with the longer, and costs nothing
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
"""Cost of a forward pass of OpenVLA-OFT 7.5 B, one 224 px view, 32 prompt tokens; counted by
torch's FlopCounterMode on the published sizes."""
TFLOP_PER_ROW = 3 * TFLOP_PER_POLICY_STEP
"""Cost of forward and backward, which is twice a forward: 8 GPUs hold the activations
(``recipes/profile/8gpu.yaml``), so none is computed again."""
SHARE_OF_PEAK = 0.5
"""Share of the peak that is reached: assumed; `bench gpu` measures it on a GPU."""
CORES = 96
"""Number of cores that simulate, on a node of eight GPUs: assumed."""
CHUNK_CORE_S = 0.324
"""Core seconds per chunk. Measured: ``chunk_ours_processor_ms`` in
docs/benchmarks/env_libero_spatial.json, software GL."""
TRANSFER_BYTES_PER_S = 225e6
"""Transfer speed. Measured: rows with images into TransferQueue 0.1.10 on two busy cores."""
BYTES_PER_ROW = 224 * 224 * 3.0
"""Size of one view, uint8; the other columns of a row are small."""
PEAK_TFLOPS = {"8 x A100": 312.0, "8 x H200": 790.0}
"""Dense bfloat16 peak of one GPU: NVIDIA's data sheet, and for the H200 the value that large
products reach in practice, which is below the 989 of its data sheet."""
PUBLISHED_MINUTES = 45
"""Minutes of a training step of this size on 8 x A800, an A100 with slower links, by
SimpleVLA-RL's author (issue 8 of its repository)."""


def simplevla_load(share_played: float) -> Load:
    """Return the load of SimpleVLA-RL's LIBERO step: 64 groups of 8, chunks of 8, step limit 512.

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
    """Return the machine of one key of `PEAK_TFLOPS`."""
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
    """Return the rows of the table in docs/performance.md."""
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
