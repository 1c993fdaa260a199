"""Trajectories to veRL's rows and back: names and shapes change here and nowhere else.

One policy step is one row. veRL expects a language model's row: a prompt of P tokens, a response of
T tokens, and per-token values as long as the response. The T action tokens are the response.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from verl_vla.core.tables import PolicySteps, Trajectories
from verl_vla.rl.loss import executed_mask

Row = dict[str, Any]


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
    score: npt.NDArray[np.float32],
    *,
    chunk_length: int,
    global_step: int,
) -> tuple[list[str], list[Row], list[Row]]:
    """Make the rows of scored trajectories: keys, fields and tags, as TransferQueue takes them.

    Args:
        trajectories: without crashed episodes.
        score: [B], stands on the last executed token of each trajectory; zeros where it is not
            known yet, see `score_rows`.
        chunk_length: K.
        global_step: the training step that plays.
    """
    keys: list[str] = []
    fields: list[Row] = []
    tags: list[Row] = []
    episodes, policy_steps = trajectories.episodes, trajectories.policy_steps
    num_tokens = policy_steps.action_tokens.shape[1]
    mask = _mask(policy_steps.executed, policy_steps, chunk_length)
    numbers = zip(episodes.group_id.tolist(), episodes.episode_id.tolist(), strict=True)
    for b, (group, episode) in enumerate(numbers):
        rows = torch.nonzero(policy_steps.episode == b).flatten().tolist()
        for index, row in enumerate(rows):
            keys.append(str(RowKey(group, episode, index)))
            is_last = index == len(rows) - 1
            earned = float(score[b]) if is_last else 0.0
            prompt = trajectories.prompt_ids[row]
            fields.append(
                {
                    "uid": group_key(group),
                    "prompts": prompt,
                    "responses": policy_steps.action_tokens[row],
                    # veRL fills micro-batches by the length of ``input_ids``
                    "input_ids": torch.cat([prompt, policy_steps.action_tokens[row]]),
                    "position_ids": torch.arange(len(prompt) + num_tokens),
                    "response_mask": mask[row],
                    # veRL counts the tokens of a batch by it
                    "loss_mask": mask[row],
                    # on one row of an episode: `row_advantages` adds up its rows
                    "rm_scores": _on_last_token(earned, mask[row]),
                    "rollout_log_probs": policy_steps.log_probs[row],
                    "images": policy_steps.image[row],
                    "proprio": policy_steps.proprio[row],
                    "trajectory_steps": episodes.num_steps[b : b + 1],
                }
            )
            # what veRL's balancing and metrics read of a row; a missing one is a KeyError there
            tags.append(
                {
                    "status": "success",
                    "prompt_len": len(prompt),
                    "response_len": num_tokens,
                    "seq_len": len(prompt) + num_tokens,
                    "global_steps": global_step,
                    "min_global_steps": global_step,
                    "max_global_steps": global_step,
                }
            )
    return keys, fields, tags


def score_rows(
    trajectories: Trajectories, score: npt.NDArray[np.float32], *, chunk_length: int
) -> tuple[list[str], Tensor]:
    """Place scores that were not known when the rows were made.

    Args:
        trajectories: without crashed episodes.
        score: [B].
        chunk_length: K.

    Returns:
        Keys of the last row of each episode that has rows, and ``rm_scores`` of these rows, [b, T].
    """
    episodes, policy_steps = trajectories.episodes, trajectories.policy_steps
    counts = torch.bincount(policy_steps.episode, minlength=len(episodes))
    rows = torch.arange(len(policy_steps))
    last = torch.zeros_like(counts).scatter_reduce(0, policy_steps.episode, rows, "amax")
    played = counts.nonzero().flatten()
    mask = _mask(policy_steps.executed[last[played]], policy_steps, chunk_length)
    keys: list[str] = []
    values: list[Tensor] = []
    for b, row_mask in zip(played.tolist(), mask, strict=True):
        group, episode = int(episodes.group_id[b]), int(episodes.episode_id[b])
        keys.append(str(RowKey(group, episode, int(counts[b]) - 1)))
        values.append(_on_last_token(float(score[b]), row_mask))
    return keys, torch.stack(values) if values else torch.zeros(mask.shape)


def _mask(executed: Tensor, policy_steps: PolicySteps, chunk_length: int) -> Tensor:
    """[n, T] int64, 1 on the tokens of the actions that ran."""
    num_tokens = policy_steps.action_tokens.shape[1]
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


def _on_last_token(score: float, mask: Tensor) -> Tensor:
    values = torch.zeros(len(mask))
    values[int(mask.sum()) - 1] = score
    return values
