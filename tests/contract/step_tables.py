"""Tables of a training step from the columns that a test cares for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from verl_vla.core.episode import Outcome
from verl_vla.core.tables import Episodes, PolicySteps, Trajectories


def episode_column(num_policy_steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[N], the episode of each policy step, and whether it is the episode's last."""
    lengths = torch.tensor(num_policy_steps)
    episode = torch.arange(len(lengths)).repeat_interleave(lengths)
    return episode, torch.cat([episode[1:] != episode[:-1], torch.tensor([True])])


def step_tables(
    group: Sequence[int],
    episode: Tensor,
    *,
    image: Tensor,
    action_tokens: Tensor,
    log_probs: Tensor,
    executed: Tensor,
    prompt_ids: Sequence[Tensor],
    outcome: Tensor | None = None,
) -> Trajectories:
    """Episodes of these groups, each with a task of its own; failures unless ``outcome`` says."""
    ids = torch.arange(len(group))
    timeout = torch.full_like(ids, int(Outcome.TIMEOUT))
    return Trajectories(
        episodes=Episodes(
            task_id=ids,
            init_state_id=ids,
            group_id=torch.tensor(group),
            episode_id=ids,
            outcome=timeout if outcome is None else outcome,
            num_steps=torch.zeros_like(ids).index_add_(0, episode, executed),
        ),
        policy_steps=PolicySteps(
            episode=episode,
            image=image,
            proprio=torch.zeros(len(episode), 8),
            action_tokens=action_tokens,
            log_probs=log_probs,
            executed=executed,
        ),
        prompt_ids=tuple(prompt_ids),
        goals=(np.zeros((1, 1, 3), dtype=np.float32),) * len(ids),
    )
