"""The update of a training step: choose the rows of the learner, and count them.

A row whose advantage is 0 has no gradient where the loss has no other term, so it never reaches
the engine. The loss stays what it would be with it: its episode counts in the denominator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from verl_vla.config.grpo import Recipe
from verl_vla.trainer.grpo.rows import is_padding
from verl_vla.trainer.grpo.update_metrics import summarise_no_update, summarise_update

Balance = Callable[[KVBatchMeta], KVBatchMeta]
"""Shares rows out to the ranks; adds padding where they do not divide."""


def update(
    batch: KVBatchMeta, workers: Any, recipe: Recipe, balance: Balance
) -> tuple[KVBatchMeta, dict[str, float]]:
    """Learn from a batch in one pass over it, in ``num_mini_batches`` optimizer steps.

    Where no row has a gradient there is none; the schedule of the learning rate
    advances nevertheless, since it counts training steps.

    Args:
        batch: padded and balanced, with advantages.
        workers: the ranks.
        recipe: of the run.
        balance: for what is left where rows are left out.

    Returns:
        The batch without the rows that were left out, and the metrics of the update.
    """
    real = [key for key in batch.keys if not is_padding(key)]
    # the KL term has a gradient also where the advantage is 0
    idle = [] if recipe.loss.kl.is_on else _without_advantage(batch, real)
    num_mini_batches = recipe.optimizer.num_mini_batches
    if len(idle) == len(real):
        # every rank answers the same
        (lr,) = set(workers.go_without_update())
        return batch, summarise_no_update(len(idle), num_mini_batches, lr)
    if idle:
        # the padding goes too: another number of rows needs other padding
        batch = balance(_take_out(batch, {*idle, *(k for k in batch.keys if is_padding(k))}))
    # also of rows left out: the mean is over all episodes of the step
    episodes = {key.rsplit("_", 1)[0] for key in real}
    batch.extra_info = {
        **(batch.extra_info or {}),
        # not veRL's mini_batch_size, which counts rows: their number differs from step to step
        "num_mini_batch": num_mini_batches,
        "num_trajectories": len(episodes) / num_mini_batches,
        "temperature": recipe.sampling.temperature,
        "epochs": 1,
    }
    output = workers.update_actor(batch)
    num_padding = sum(map(is_padding, batch.keys))
    return batch, summarise_update(tu.get(output, "metrics"), num_padding, len(idle))


def _without_advantage(batch: KVBatchMeta, keys: list[str]) -> list[str]:
    data = tq.kv_batch_get(keys=keys, partition_id=_partition(batch), select_fields=["advantages"])
    rows = data["advantages"].unbind()
    return [key for key, row in zip(keys, rows, strict=True) if not row.any()]


def _take_out(batch: KVBatchMeta, keys: set[str]) -> KVBatchMeta:
    """The batch without these rows, which leave TransferQueue as well."""
    tq.kv_clear(keys=sorted(keys), partition_id=_partition(batch))
    return batch.select_keys([key for key in batch.keys if key not in keys])


def _partition(batch: KVBatchMeta) -> str:
    assert batch.partition_id is not None, "the replay buffer names it"
    return batch.partition_id
