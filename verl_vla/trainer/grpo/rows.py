"""Trajectories to veRL's rows and back: names and shapes change here and nowhere else.

One policy step is one row. veRL expects a language model's row: a prompt of P tokens, a response of
T tokens, and per-token values as long as the response. The T action tokens are the response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict
from torch import Tensor

from verl_vla.core.tables import Trajectories
from verl_vla.rl.loss import executed_mask

Tag = dict[str, Any]
"""What TransferQueue's controller knows of a row."""
ALL_ROWS = slice(None)


class RowKey(NamedTuple):
    """Key of one row in TransferQueue; keys sort by group, episode and policy step."""

    group: int
    episode: int
    """Its ``episode_id``, unique in the run."""
    step: int
    """Index of the policy step in its episode."""

    def __str__(self) -> str:
        """Spell the key: veRL's ``uid`` of the group, an underscore and the rest.

        >>> str(RowKey(12, 99, 0))
        'g12_99_0'
        """
        return f"{group_key(self.group)}_{self.episode}_{self.step}"

    @classmethod
    def parse(cls, key: str) -> RowKey:
        """Read a key back.

        >>> RowKey.parse("g12_99_0")
        RowKey(group=12, episode=99, step=0)
        """
        uid, episode, step = key.split("_")
        return cls(group_of(uid), int(episode), int(step))


def group_key(group_id: int) -> str:
    """Return the ``uid`` that veRL knows a group by; it must hold no underscore."""
    return f"g{group_id}"


def group_of(uid: str) -> int:
    """Return the group of a ``uid``.

    >>> group_of("g12")
    12
    """
    return int(uid.removeprefix("g"))


def is_padding(key: str) -> bool:
    """Return true for a key that veRL made for a row without content.

    >>> is_padding("pad0f3c_1_0"), is_padding("g12_3_0")
    (True, False)
    """
    return not key.startswith("g")


def make_rows(
    trajectories: Trajectories,
    *,
    chunk_length: int,
    global_step: int,
    rows: slice = ALL_ROWS,
) -> tuple[list[str], TensorDict, list[Tag]]:
    """Make the rows of trajectories: keys, columns and tags, as TransferQueue takes them.

    A score is not known before a round has ended, so it comes later: `score_tags`.

    Args:
        trajectories: without crashed episodes.
        chunk_length: K.
        global_step: the training step that plays.
        rows: which of ``trajectories.policy_steps``; at least one.
    """
    episodes, policy_steps = trajectories.episodes, trajectories.policy_steps
    group, number = episodes.group_id.tolist(), episodes.episode_id.tolist()
    next_step = [0] * len(episodes)
    keys: list[str] = []
    episode_of_row: list[int] = policy_steps.episode.tolist()
    for b in episode_of_row:
        keys.append(str(RowKey(group[b], number[b], next_step[b])))
        next_step[b] += 1
    prompts = trajectories.prompt_ids[rows]
    action_tokens = policy_steps.action_tokens[rows]
    log_probs = policy_steps.log_probs[rows]
    num_tokens = action_tokens.shape[1]
    mask = _mask(policy_steps.executed[rows], num_tokens, chunk_length)
    columns = {
        "prompts": _stack(prompts),
        "responses": action_tokens,
        "response_mask": mask,
        # veRL counts the tokens of a batch by it
        "loss_mask": mask,
        "rollout_log_probs": log_probs,
        # the learner's own take their place with ``loss.recompute_log_probs``
        "old_log_probs": log_probs,
        # a view: an index would copy the images of a round
        "images": policy_steps.image[rows],
        "proprio": policy_steps.proprio[rows],
        "trajectory_steps": episodes.num_steps[policy_steps.episode[rows]][:, None],
    }
    # what veRL's replay buffer, padding and metrics read of a row without fetching it
    tags = [
        {
            "status": "success",
            "prompt_len": len(prompt),
            "response_len": num_tokens,
            "seq_len": len(prompt) + num_tokens,
            "global_steps": global_step,
            "min_global_steps": global_step,
            "max_global_steps": global_step,
        }
        for prompt in prompts
    ]
    return keys[rows], TensorDict(columns, batch_size=len(tags)), tags


def score_tags(
    trajectories: Trajectories, score: npt.NDArray[np.float32]
) -> tuple[list[str], list[Tag]]:
    """Make the scores of episodes an entry of the tag of their last row.

    A tag reaches the trainer with the keys of a batch, so no row has to be read for its score.

    Args:
        trajectories: without crashed episodes.
        score: [B].

    Returns:
        Keys of the last row of each episode that has rows, and what to add to their tags.
    """
    episodes, policy_steps = trajectories.episodes, trajectories.policy_steps
    counts = torch.bincount(policy_steps.episode, minlength=len(episodes))
    played = counts.nonzero().flatten().tolist()
    keys = [
        str(RowKey(int(episodes.group_id[b]), int(episodes.episode_id[b]), int(counts[b]) - 1))
        for b in played
    ]
    return keys, [{"score": float(score[b])} for b in played]


def _stack(prompts: Sequence[Tensor]) -> Tensor:
    """[n, L], or jagged where lengths differ; TransferQueue sends a jagged column row by row."""
    if len({len(prompt) for prompt in prompts}) == 1:
        return torch.stack(list(prompts))
    return torch.nested.as_nested_tensor(list(prompts), layout=torch.jagged)


def _mask(executed: Tensor, num_tokens: int, chunk_length: int) -> Tensor:
    """[n, T] int64, 1 on the tokens of the actions that ran."""
    return executed_mask(
        executed, chunk_length=chunk_length, action_dim=num_tokens // chunk_length
    ).long()


def dense(nested: Tensor, width: int) -> Tensor:
    """[B, width] from a jagged tensor, zeros on the right.

    ``output_size`` is needed: after a trip through Ray, torch otherwise pads to the sum of the
    lengths.
    """
    return torch.nested.to_padded_tensor(
        nested, padding=0, output_size=(len(lengths(nested)), width)
    )


def right_padded(prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, [B, longest L] int64 each, from jagged prompts."""
    sizes = lengths(prompts)
    ids = dense(prompts, int(sizes.max()))
    mask = torch.arange(ids.shape[1], device=ids.device)[None] < sizes[:, None]
    return ids, mask.long()


def stacked(rows: Tensor) -> Tensor:
    """[B, ...] from rows of one shape, which TransferQueue hands out as a jagged tensor."""
    if not rows.is_nested:
        return rows
    # rows of one shape: the jagged dimension is as long in all, so a view is enough
    return rows.values().view(len(lengths(rows)), -1, *rows.shape[2:])


def pack_like_language_model(values: Tensor, prompts: Tensor, responses: Tensor) -> Tensor:
    """Jagged [B, P + T]: where a language model would report the value of each response token.

    Such a model reports token t at position t - 1, so the T values are shifted left by one and
    everything else is zero.

    Args:
        values: [B, T], right-padded.
        prompts: jagged [B, P].
        responses: jagged [B, T].
    """
    before, length = lengths(prompts), lengths(responses)
    # [B + 1]: row b lies between offsets b and b + 1 of the packed values
    offsets = torch.zeros(len(before) + 1, dtype=torch.long, device=values.device)
    offsets[1:] = (before + length).cumsum(0)
    parts: list[Tensor] = []
    for row, (p, t) in enumerate(zip(before.tolist(), length.tolist(), strict=True)):
        parts += [values.new_zeros(p - 1), values[row, :t], values.new_zeros(1)]
    return torch.nested.nested_tensor_from_jagged(torch.cat(parts), offsets)


def lengths(nested: Tensor) -> Tensor:
    """[B] int64, how long each row of a jagged tensor is."""
    return nested.offsets().diff()  # pyright: ignore[reportAttributeAccessIssue] -- jagged only
