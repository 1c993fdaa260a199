"""The update of a training step: choose the rows of the learner, cut them, and count them.

A row whose advantage is 0 has no gradient where the loss has no other term, so it never reaches
the engine. The loss stays what it would be with it: its episode counts in the denominator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.utils import tensordict_utils as tu

from verl_vla.config.grpo import Recipe
from verl_vla.trainer.grpo.mini_batches import MiniBatch, cut, order_for_ranks, padded_size
from verl_vla.trainer.grpo.rows import is_padding
from verl_vla.trainer.grpo.update_metrics import summarise_no_update, summarise_update


def update(
    batch: KVBatchMeta, workers: Any, recipe: Recipe, eos_token_id: int
) -> tuple[KVBatchMeta, dict[str, float]]:
    """Learn from a batch in one pass over it, in ``num_mini_batches`` optimizer steps.

    Where no row has a gradient there is none; the schedule of the learning rate
    advances nevertheless, since it counts training steps.

    Args:
        batch: with advantages in its tags; may hold padding.
        workers: the ranks.
        recipe: of the run.
        eos_token_id: fills rows of padding.

    Returns:
        The batch without the rows that were left out, and the metrics of the update.
    """
    real = [key for key in batch.keys if not is_padding(key)]
    # the KL term has a gradient also where the advantage is 0
    idle = set() if recipe.loss.kl.is_on else _without_advantage(batch)
    num_mini_batches = recipe.optimizer.num_mini_batches
    if len(idle) == len(real):
        # every rank answers the same
        (lr,) = set(workers.go_without_update())
        return batch, summarise_no_update(len(idle), num_mini_batches, lr)
    mini_batches = cut(real, idle, num_mini_batches)
    # the padding goes too: another number of rows needs other padding
    batch = _take_out(batch, idle | (set(batch.keys) - set(real)))
    batch = _write_loss_columns(batch, mini_batches)
    batch = _pad_and_order(batch, mini_batches, recipe.cluster.num_ranks, eos_token_id)
    batch.extra_info = {
        # not veRL's mini_batch_size, which counts rows: their number differs from step to step
        "num_mini_batch": len(mini_batches),
        "temperature": recipe.sampling.temperature,
        "epochs": 1,
    }
    output = workers.update_actor(batch)
    num_padding = sum(map(is_padding, batch.keys))
    return batch, summarise_update(tu.get(output, "metrics"), num_padding, len(idle))


def _without_advantage(batch: KVBatchMeta) -> set[str]:
    return {
        key
        for key, tag in zip(batch.keys, batch.tags, strict=True)
        if not is_padding(key) and tag["advantage"] == 0
    }


def _take_out(batch: KVBatchMeta, keys: set[str]) -> KVBatchMeta:
    """The batch without these rows, which leave TransferQueue as well."""
    if keys:
        tq.kv_clear(keys=sorted(keys), partition_id=_partition(batch))
    return batch.select_keys([key for key in batch.keys if key not in keys])


def _write_loss_columns(batch: KVBatchMeta, mini_batches: Sequence[MiniBatch]) -> KVBatchMeta:
    """Give every row its advantage, and the denominator of its mini-batch's loss: [N, 1] both."""
    number = {key: part.num_trajectories for part in mini_batches for key in part.keys}
    columns = {
        "advantages": torch.tensor([[tag["advantage"]] for tag in batch.tags]),
        "num_trajectories": torch.tensor([[number[key]] for key in batch.keys]),
    }
    fields = TensorDict(columns, batch_size=len(batch))
    # ranks read the fields that the answer names
    return tq.kv_batch_put(keys=batch.keys, partition_id=_partition(batch), fields=fields)


def _pad_and_order(
    batch: KVBatchMeta, mini_batches: Sequence[MiniBatch], num_ranks: int, eos_token_id: int
) -> KVBatchMeta:
    """Arrange the rows as `order_for_ranks` says; padding is a copy of a row with an empty mask."""
    wanted = padded_size(mini_batches, num_ranks) * len(mini_batches)
    # the next multiple of a number that is not smaller is that number
    batch = upsample_batch_to_divisible_size(batch, wanted, eos_token_id)
    padding = [key for key in batch.keys if is_padding(key)]
    lengths = {key: tag["seq_len"] for key, tag in zip(batch.keys, batch.tags, strict=True)}
    order = order_for_ranks(mini_batches, padding, lengths, num_ranks)
    index = {key: i for i, key in enumerate(batch.keys)}
    batch.reorder([index[key] for key in order])
    return batch


def _partition(batch: KVBatchMeta) -> str:
    assert batch.partition_id is not None, "the replay buffer names it"
    return batch.partition_id
