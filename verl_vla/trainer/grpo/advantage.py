"""The advantage of a training step: an estimator of veRL's registry, over whole episodes.

veRL's estimators know one row a response. Here an episode has a row for every policy step, so the
estimator gets one row an episode, and its answer holds for all rows of the episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, register_adv_est

from verl_vla.rl.advantage import group_advantage
from verl_vla.trainer.grpo.rows import RowKey, Tag, is_padding
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


def tag_advantages(batch: KVBatchMeta, config: Any) -> KVBatchMeta:
    """Note the advantage of every row in its tag.

    Scores are in tags too (`score_tags`), so neither way has a row to carry.

    Args:
        batch: rows of whole episodes, and veRL's rows of padding, whose advantage is 0.
        config: veRL's algorithm section; ``adv_estimator`` names the estimator.
    """
    advantage = row_advantages(batch.keys, batch.tags, config).tolist()
    tags = [tag | {"advantage": a} for tag, a in zip(batch.tags, advantage, strict=True)]
    return replace(batch, tags=tags)


def row_advantages(keys: Sequence[str], tags: Sequence[Tag], config: Any) -> Tensor:
    """Return [N] float32, for every row the advantage of its episode; 0 for padding.

    Args:
        keys: N row keys, see `RowKey`.
        tags: N tags; that of one row of each episode has its score.
        config: veRL's algorithm section.
    """
    episodes: dict[tuple[int, int], int] = {}
    scores: dict[int, float] = {}
    episode_of_row: list[int] = []
    for key, tag in zip(keys, tags, strict=True):
        # veRL copies the tag of a real row, which may have a score
        if is_padding(key):
            episode_of_row.append(-1)
            continue
        # (group, member) names an episode; numbered as they appear
        index = episodes.setdefault(RowKey.parse(key)[:2], len(episodes))
        episode_of_row.append(index)
        if "score" in tag:
            scores[index] = tag["score"]
    estimate = get_adv_estimator_fn(config.adv_estimator)
    advantage, _ = estimate(
        token_level_rewards=torch.tensor([[scores[index]] for index in range(len(episodes))]),
        response_mask=torch.ones(len(episodes), 1),
        index=np.array([group for group, _ in episodes], dtype=object),
        config=config,
    )
    # [episodes] -> [rows]
    rows = torch.tensor(episode_of_row)
    is_real = rows >= 0
    spread = torch.zeros(len(keys))
    spread[is_real] = advantage[rows[is_real], 0]
    return spread
