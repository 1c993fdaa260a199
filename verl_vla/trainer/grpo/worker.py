"""The worker extension: one rank that plays and learns with the same weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import (
    Dispatch,
    make_nd_compute_dataproto_dispatch_fn,
    register,
)
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name, get_torch_device
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.rollout import base as rollout_base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from verl_vla.config.grpo import LossConfig
from verl_vla.rewards.encoders.base import BatchedEncoder, Features, Images
from verl_vla.rl.loss import divergence, policy_loss, trajectory_weight
from verl_vla.trainer.engine.divergence_guard import FiniteGuard
from verl_vla.trainer.grpo.cluster_encoder import RankEncoders
from verl_vla.trainer.grpo.rows import dense, stacked
from verl_vla.trainer.verl_compat.platform import peak_process_bytes
from verl_vla.trainer.verl_compat.process import ROLLOUT_NAME

BYTES_PER_GIB = 1024**3

EVERY_RANK: Any = vars(Dispatch)["ONE_TO_ALL"]
"""veRL's enumeration makes its members at run time."""
EACH_ITS_OWN: Any = vars(Dispatch)["ALL_TO_ALL"]
"""Arguments are lists with one element a rank, and so is the answer."""


class VLAWorker(ActorRolloutRefWorker):
    """veRL's actor worker, with `sample_actions` beside it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._encoders = RankEncoders()
        if get_device_name() == "cpu":
            # ranks and simulators share the cores of the host
            torch.set_num_threads(1)
            if not torch.distributed.is_initialized():
                # veRL would ask for "cpu:gloo,cpu:gloo", which torch refuses as a duplicate.
                torch.distributed.init_process_group(
                    "gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
                )

    @property
    def engine(self) -> Any:
        """This rank's `VLAEngine`; veRL's registry hides its type."""
        return self._learner.engine

    @property
    def _learner(self) -> TrainingWorker:
        assert self.actor is not None, "veRL calls init_model first"
        return self.actor

    @register(dispatch_mode=EVERY_RANK)
    def set_policy_loss(self, config: LossConfig, action_dim: int) -> None:
        """Replace veRL's loss, whose clipping always has a third bound, by ours."""
        self._learner.set_loss_fn(
            partial(
                row_loss,
                config=config,
                action_dim=action_dim,
                num_ranks=torch.distributed.get_world_size(),
            )
        )

    @register(dispatch_mode=EVERY_RANK)
    def guard_updates(self, folder: str, max_in_a_row: int) -> None:
        """See `verl_vla.trainer.engine.divergence_guard.FiniteGuard`."""
        self.engine.guard = FiniteGuard(folder=Path(folder), max_in_a_row=max_in_a_row)

    # not blocking: while ranks compute, the driver serves the other slot group
    @register(
        dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"), blocking=False
    )
    def sample_actions(self, data: TensorDict) -> TensorDict:
        """Sample action tokens for a batch of observations.

        Args:
            data: ``input_ids`` and ``attention_mask`` [n, L] right-padded, ``images``
                [n, V, H, W, 3] uint8, ``noise`` [n, T] float64, ``proprio`` [n, P] float32, and
                the number ``temperature``.

        Returns:
            ``action_tokens`` [n, T] int64 and ``log_probs`` [n, T] float32, zeros where play is
            greedy.
        """
        temperature = float(tu.get_non_tensor_data(data, "temperature", None))
        # the next update begins a new count
        self.engine.num_optimizer_steps = 0
        inputs = [data[name] for name in ("input_ids", "attention_mask", "images", "noise")]
        action_tokens, log_probs = self.engine.sample_actions(*inputs, temperature, data["proprio"])
        return tu.get_tensordict({"action_tokens": action_tokens, "log_probs": log_probs})

    @register(dispatch_mode=EVERY_RANK)
    def make_encoders(self, remakes: list[Callable[[str], BatchedEncoder]]) -> None:
        """See `RankEncoders.make`."""
        self._encoders.make(remakes, get_device_name())

    @register(dispatch_mode=EACH_ITS_OWN, blocking=False)
    def compute_features(self, index: int, images: list[Images] | None) -> list[Features] | None:
        """See `RankEncoders.compute`."""
        return self._encoders.compute(index, images)

    @register(dispatch_mode=EVERY_RANK)
    def name_feature_space(self, index: int) -> str:
        """See `RankEncoders.name_space`."""
        return self._encoders.name_space(index)

    @register(dispatch_mode=EVERY_RANK)
    def free_encoders(self) -> None:
        """See `RankEncoders.free`."""
        self._encoders.free()

    @register(dispatch_mode=EVERY_RANK)
    def go_without_update(self) -> float:
        """Let a training step pass that changes no weight; return the learning rate after it."""
        return self.engine.lr_scheduler_step()

    @register(dispatch_mode=EVERY_RANK, blocking=False)
    async def update_weights(
        self, global_steps: int | None = None, mode: str = "auto"
    ) -> dict[str, Any]:
        """Rollout and learner share their weights, so there is nothing to send."""
        # veRL's turns expandable segments off to send weights, and on again; here they stay on
        return {}

    @register(dispatch_mode=EVERY_RANK)
    def export_policy(self, folder: str) -> None:
        """Write a checkpoint folder that `verl_vla eval` and transformers load."""
        self.engine.export(Path(folder))

    @register(dispatch_mode=EVERY_RANK)
    def make_optimizer_state(self) -> None:
        """Give the optimizer a state of its later size; no weight changes."""
        self.engine.make_optimizer_state()

    @register(dispatch_mode=EVERY_RANK)
    def drop_optimizer_state(self) -> None:
        """Forget the optimizer's state, as before the first training step."""
        self.engine.drop_optimizer_state()

    @register(dispatch_mode=EVERY_RANK)
    def peak_memory(self) -> tuple[int, int, int]:
        """Measure peaks, in bytes.

        Returns:
            Resident in this process since it began; on the device, allocated and reserved, since
            this was last asked.
        """
        if get_device_name() == "cpu":
            return peak_process_bytes(), 0, 0
        device = get_torch_device()
        allocated, reserved = device.max_memory_allocated(), device.max_memory_reserved()
        device.reset_peak_memory_stats()
        return peak_process_bytes(), int(allocated), int(reserved)


def memory_metrics(peaks: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    """Turn what `VLAWorker.peak_memory` says of each rank into the metrics of a step, GiB."""
    # the fullest rank is the one that runs out of memory, so no mean
    process, allocated, reserved = (
        max(of_ranks) / BYTES_PER_GIB for of_ranks in zip(*peaks, strict=True)
    )
    return {
        "perf/max_process_memory_gb": process,
        "perf/max_memory_allocated_gb": allocated,
        "perf/max_memory_reserved_gb": reserved,
    }


class SharedWeightsRollout(rollout_base.BaseRollout):
    """veRL insists on a rollout; the learner's module is the one that plays."""

    async def resume(self, tags: list[str]) -> None:
        """Nothing was released."""

    async def update_weights(self, weights: Any, wire_format: str = "", **kwargs: Any) -> None:
        """The weights are the same tensors."""

    async def release(self) -> None:
        """Nothing to release."""


class SharedWeightsReplica(RolloutReplica):
    """The server side of such a rollout: none."""

    async def launch_servers(self) -> None:
        """Name it, and hand out no worker: reading its handle means importing all of veRL."""
        self._server_address = f"{ROLLOUT_NAME}-{self.replica_rank}"
        self.servers: list[Any] = []


def register_rollout() -> None:
    """Tell veRL's two registries of the rollout's name."""
    # a plain dictionary: veRL has no function to add to it
    known: dict[tuple[str, str], str] = vars(rollout_base)["_ROLLOUT_REGISTRY"]
    known[(ROLLOUT_NAME, "async")] = f"{__name__}.SharedWeightsRollout"
    RolloutReplicaRegistry.register(ROLLOUT_NAME, lambda: SharedWeightsReplica)


def row_loss(
    *,
    log_probs: Tensor,
    entropy: Tensor,
    data: TensorDict,
    config: LossConfig,
    action_dim: int,
    num_ranks: int,
) -> tuple[Tensor, dict[str, float]]:
    """Compute the loss of one micro-batch of rows, and sums for the metrics.

    The loss is a sum over ranks and FSDP averages gradients, so it is scaled by ``num_ranks``.
    """
    width = log_probs.shape[1]
    mask = dense(data["response_mask"], width).bool()
    advantage = stacked(data["advantages"]).flatten()
    weight = trajectory_weight(
        stacked(data["trajectory_steps"]).flatten(),
        action_dim=action_dim,
        num_trajectories=stacked(data["num_trajectories"]).flatten(),
    )
    old_log_probs = dense(data["old_log_probs"], width)
    # rows that cannot move a weight: nothing executed or, without a KL term, no advantage
    is_idle = ~mask.any(1) if config.kl.is_on else ~mask.any(1) | (advantage == 0)
    parts = policy_loss(log_probs, old_log_probs, advantage, mask, weight, config.clip)
    metrics = {
        "loss_sum": parts.loss.item(),
        "num_tokens": parts.num_tokens.item(),
        "num_rows": len(mask),
        "num_rows_idle": int(is_idle.sum()),
        "num_clipped_low": parts.num_clipped_low.item(),
        "num_clipped_high": parts.num_clipped_high.item(),
        "ratio_sum": parts.ratio_sum.item(),
        "ratio_deviation": parts.ratio_deviation.item(),
        "entropy_sum": (entropy * mask).sum().item(),
    }
    loss = parts.loss
    if config.kl.is_on:
        kl = divergence(log_probs, dense(data["ref_log_prob"], width), mask)
        # each token weighs as in the policy loss
        loss = loss + config.kl.coefficient * (kl * weight[:, None]).sum()
        metrics["kl_sum"] = kl.sum().item()
    return loss * num_ranks, metrics


register_rollout()
