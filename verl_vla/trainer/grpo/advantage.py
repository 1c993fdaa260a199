"""The advantage of a training step: an estimator of veRL's registry, over whole episodes.

veRL's estimators know one row a response. Here an episode has a row for every policy step, so the
estimator gets one row an episode, and its answer is written to all rows of the episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, register_adv_est

from verl_vla.rl.advantage import group_advantage
from verl_vla.trainer.grpo.rows import RowKey, is_padding
from verl_vla.trainer.verl_compat.process import ADV_ESTIMATOR


@register_adv_est(ADV_ESTIMATOR)
def grpo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: npt.NDArray[np.object_],
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """Compute `group_advantage` with the signature of veRL's registry.

    Args:
        token_level_rewards: [B, T], whose sum is the score of a response.
        response_mask: [B, T].
        index: [B], the group of each response.
        config: veRL's algorithm section, not used.

    Returns:
        Advantages and returns, [B, T] both and equal.
    """
    # [B] names -> [B] numbers, which can index a tensor
    _, group = np.unique(index.astype(str), return_inverse=True)
    advantage = group_advantage(token_level_rewards.sum(-1), torch.from_numpy(group))
    spread = advantage[:, None] * response_mask
    return spread, spread


def write_advantages(batch: KVBatchMeta, config: Any) -> KVBatchMeta:
    """Compute the advantages of a step's rows and write them back to TransferQueue.

    Args:
        batch: rows of whole episodes, and veRL's rows of padding, whose advantage is 0.
        config: veRL's algorithm section; ``adv_estimator`` names the estimator.
    """
    assert batch.partition_id is not None, "the replay buffer names it"
    names = ["response_mask", "rm_scores"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
    # [rows]: padding rows are shorter than real ones, so they cannot be stacked first
    row_scores = torch.stack([scores.sum() for scores in data["rm_scores"].unbind()])
    advantage = row_advantages(batch.keys, row_scores, config)
    masks = data["response_mask"].unbind()
    rows = [value * mask for value, mask in zip(advantage, masks, strict=True)]
    values = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    fields = TensorDict({"advantages": values, "returns": values}, batch_size=len(batch))
    return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


def row_advantages(keys: Sequence[str], row_scores: Tensor, config: Any) -> Tensor:
    """Return [N] float32, for every row the advantage of its episode; 0 for padding.

    Args:
        keys: N row keys, see `RowKey`.
        row_scores: [N], the score of an episode stands on one of its rows.
        config: veRL's algorithm section.
    """
    episodes: dict[tuple[int, int], int] = {}
    episode_of_row = [
        # (group, member) names an episode; numbered as they appear
        -1 if is_padding(key) else episodes.setdefault(RowKey.parse(key)[:2], len(episodes))
        for key in keys
    ]
    rows = torch.tensor(episode_of_row)
    is_real = rows >= 0
    # [rows] -> [episodes]: every row but the last of an episode scores 0
    scores = torch.zeros(len(episodes)).index_add_(0, rows[is_real], row_scores[is_real].float())
    estimate = get_adv_estimator_fn(config.adv_estimator)
    advantage, _ = estimate(
        token_level_rewards=scores[:, None],
        response_mask=torch.ones(len(episodes), 1),
        index=np.array([group for group, _ in episodes], dtype=object),
        config=config,
    )
    # [episodes] -> [rows]
    spread = torch.zeros(len(keys))
    spread[is_real] = advantage[rows[is_real], 0]
    return spread
