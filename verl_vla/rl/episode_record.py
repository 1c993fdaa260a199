"""What a rollout writes down of one episode, and the tables that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from verl_vla.core.episode import EpisodeSpec, GoalReadings, Observation, Outcome, Reading
from verl_vla.core.errors import EpisodeCrashed
from verl_vla.core.tables import (
    ActionChunk,
    Episodes,
    PolicySteps,
    Trajectories,
    concat_tables,
    pick_by_time,
)
from verl_vla.envs.base import ChunkResult
from verl_vla.policies.base import PolicyShape

Answer = Observation | ChunkResult | EpisodeCrashed
"""What a slot answers: to a reset, to a chunk, or where its simulator was lost."""


class ImageBuffer:
    """Memory for the images of a round, which are gigabytes: copied once, as episodes end.

    Memory that is never written to is not taken from the machine, so the bound may be generous.

    Args:
        num_rows: most policy steps of the round; episodes beyond it have memory of their own.
        shape: of the policy.
    """

    def __init__(self, num_rows: int, shape: PolicyShape) -> None:
        self._rows = torch.empty(num_rows, *shape.image_shape, dtype=torch.uint8)
        self._num_used = 0
        self._has_all = True

    def stack(self, images: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        """Copy images into the next rows and return these, [n, V, H, W, 3]."""
        rows = self._rows[self._num_used : self._num_used + len(images)]
        if len(rows) < len(images) or rows.shape[1:] != images[0].shape:
            self._has_all = False
            return torch.from_numpy(np.stack(images))
        np.stack(images, out=rows.numpy())
        self._num_used += len(images)
        return rows

    @property
    def whole(self) -> Tensor | None:
        """The images of all calls in their order, without a copy; None where some are elsewhere."""
        return self._rows[: self._num_used] if self._has_all else None


@dataclass(slots=True)
class EpisodeRecord:
    """Everything noted of one episode, in order."""

    spec: EpisodeSpec
    observations: list[Observation] = field(default_factory=list[Observation])
    action_tokens: list[Tensor] = field(default_factory=list[Tensor])
    log_probs: list[Tensor] = field(default_factory=list[Tensor])
    prompt_ids: list[Tensor] = field(default_factory=list[Tensor])
    executed: list[int] = field(default_factory=list[int])
    goals: list[GoalReadings] = field(default_factory=list[GoalReadings])
    final_image: npt.NDArray[np.uint8] | None = None
    video: list[npt.NDArray[np.uint8]] = field(default_factory=list[npt.NDArray[np.uint8]])
    """One array [F, H, W, 3] a policy step; a single one once the episode has ended."""
    outcome: Outcome | None = None
    crash: EpisodeCrashed | None = None
    tables: Trajectories | None = None
    """This episode alone, once it has ended."""

    def note_policy_step(self, seen: Observation, chunk: ActionChunk, row: int) -> None:
        """Note what the policy saw, and row ``row`` of what it decided."""
        self.observations.append(seen)
        self.action_tokens.append(chunk.action_tokens[row])
        self.log_probs.append(chunk.log_probs[row])
        self.prompt_ids.append(chunk.prompt_ids[row])

    def note_answer(self, answer: Answer, max_video_frames: int | None) -> Observation | None:
        """Note the answer; return what the policy sees next, None when the episode is over."""
        if isinstance(answer, EpisodeCrashed):
            self.outcome, self.crash = Outcome.CRASH, answer
            return None
        # the answer to a reset: nothing was executed yet
        if isinstance(answer, Observation):
            return answer
        self.executed.append(answer.executed)
        self.goals.append(answer.goals)
        self.final_image = answer.final_image
        self.outcome = answer.outcome
        if max_video_frames != 0 and answer.video is not None:
            self.video.append(answer.video)
            # now, so that only episodes under way take the memory of all their frames
            if answer.outcome is not None:
                self.video = [thin_video(np.concatenate(self.video), max_video_frames)]
        return answer.observation

    def tabulate(self, shape: PolicyShape, *, has_video: bool, images: ImageBuffer) -> Trajectories:
        """Make the tables of an episode that has ended, and give up what they were made from.

        The policy step that a simulator died on has no outcome and is left out.

        Args:
            shape: of the policy.
            has_video: whether videos are kept.
            images: takes the images of the episode.
        """
        assert self.outcome is not None, "the episode goes on"
        spec = self.spec
        self.tables = Trajectories(
            episodes=Episodes(
                task_id=_one(spec.task_id),
                init_state_id=_one(spec.init_state_id),
                group_id=_one(spec.group_id),
                episode_id=_one(spec.episode_id),
                outcome=_one(self.outcome),
                num_steps=_one(sum(self.executed)),
            ),
            policy_steps=self._policy_steps(shape, images),
            prompt_ids=tuple(self.prompt_ids[: len(self.executed)]),
            goals=(self._goals(),),
            final_images=(self.final_image,),
            videos=(self._video(),) if has_video else (),
            crashes={} if self.crash is None else {spec.episode_id: str(self.crash)},
        )
        # the images of a round take gigabytes
        for noted in (self.observations, self.action_tokens, self.log_probs, self.video):
            noted.clear()
        return self.tables

    def take_tables(self) -> Trajectories:
        """Hand over the tables, which are freed once whoever takes them lets go."""
        assert self.tables is not None, "an episode was left unfinished"
        tables, self.tables = self.tables, None
        return tables

    def _policy_steps(self, shape: PolicyShape, images: ImageBuffer) -> PolicySteps:
        count = len(self.executed)
        # its simulator was lost before it answered; stack() needs at least one array
        if not count:
            return _no_policy_steps(shape)
        seen = self.observations[:count]
        return PolicySteps(
            episode=torch.zeros(count, dtype=torch.int64),
            image=images.stack([o.image for o in seen]),
            proprio=torch.from_numpy(np.stack([o.proprio for o in seen])),
            action_tokens=torch.stack(self.action_tokens[:count]),
            log_probs=torch.stack(self.log_probs[:count]),
            executed=torch.tensor(self.executed),
        )

    def _video(self) -> npt.NDArray[np.uint8]:
        """Return the frames; none where the episode crashed, or where nothing was rendered."""
        if self.crash is not None or not self.video:
            return np.zeros((0, 0, 0, 3), dtype=np.uint8)
        return self.video[0]

    def _goals(self) -> GoalReadings:
        """[policy steps + 1, G, 3]; what holds after one chunk holds before the next."""
        if not self.goals:  # its simulator was lost before it answered
            return np.zeros((0, 0, len(Reading)), dtype=np.float32)
        return np.concatenate([self.goals[0][:1], *(after[1:] for after in self.goals)])


def join_tables(
    tables: Sequence[Trajectories], ended: Sequence[int], images: Tensor, shape: PolicyShape
) -> Trajectories:
    """Join the tables of single episodes without a copy of their images.

    Args:
        tables: one episode each.
        ended: indices of ``tables`` in the order of ``images``.
        images: [N, V, H, W, 3], the images of all policy steps.
        shape: of the policy.

    Returns:
        Episodes in the order of ``tables``, their policy steps in the order of ``images``.
    """
    nothing = _no_policy_steps(shape)
    without = [replace(t, policy_steps=nothing, prompt_ids=()) for t in tables]
    # an episode without policy steps does not know the columns' widths
    steps = [
        replace(t.policy_steps, episode=torch.full_like(t.policy_steps.episode, i))
        for i, t in ((i, tables[i]) for i in ended)
        if len(t.policy_steps)
    ]
    return replace(
        Trajectories.concat(without),
        policy_steps=concat_tables(steps, image=images) if steps else nothing,
        prompt_ids=tuple(prompt for i in ended for prompt in tables[i].prompt_ids),
    )


def no_episodes(shape: PolicyShape) -> Trajectories:
    """Return the tables of a rollout without episodes."""
    none = torch.zeros(0, dtype=torch.int64)
    return Trajectories(
        episodes=Episodes(**{column.name: none for column in fields(Episodes)}),
        policy_steps=_no_policy_steps(shape),
        prompt_ids=(),
        goals=(),
    )


def thin_video(video: npt.NDArray[np.uint8], max_frames: int | None) -> npt.NDArray[np.uint8]:
    """Keep frames of [F, H, W, 3] at equal steps of time, the first and the last included."""
    if max_frames is None or len(video) <= max_frames:
        return video
    return video[pick_by_time(len(video), max_frames)]


def _no_policy_steps(shape: PolicyShape) -> PolicySteps:
    size = shape.image_size
    return PolicySteps(
        episode=torch.zeros(0, dtype=torch.int64),
        image=torch.zeros(0, shape.num_views, size, size, 3, dtype=torch.uint8),
        proprio=torch.zeros(0, 0),
        action_tokens=torch.zeros(0, shape.num_tokens, dtype=torch.int64),
        log_probs=torch.zeros(0, shape.num_tokens),
        executed=torch.zeros(0, dtype=torch.int64),
    )


def _one(value: int) -> Tensor:
    return torch.tensor([int(value)])
