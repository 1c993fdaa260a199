"""Episodes prepared for a measurement: split by start, cut by length, shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from verl_vla.core.errors import ConfigError
from verl_vla.core.tables import Trajectories, pick_by_time
from verl_vla.rewards import Floats, TrajectoryBatch, VideoNeed, goal_progress, make_batch
from verl_vla.rewards.base import Split

Indices = npt.NDArray[np.int64]
Item = TypeVar("Item")

RAGGED = ("frames", "videos", "proprio", "goals", "features")
"""Fields of a batch that hold one array per episode, or None."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Episodes without crashes, with every input that a reward may require except features."""

    batch: TrajectoryBatch
    executed: tuple[Indices, ...]
    """B arrays [policy steps], simulator steps that each chunk executed."""
    need: VideoNeed | None = None
    """The videos that the batch holds; None where it holds none."""

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def truth(self) -> Floats:
        """True progress at the end by the simulator's state, [B], 0 to 1; see `goal_progress`."""
        assert self.batch.goals is not None
        return np.array([goal_progress(readings)[-1] for readings in self.batch.goals])

    def take(self, rows: Indices) -> Sample:
        """Keep some episodes, in this order."""
        executed = tuple(self.executed[row] for row in rows)
        return replace(self, batch=take(self.batch, rows), executed=executed)

    def cut(self, num_policy_steps: Indices) -> Sample:
        """Keep the first policy steps of every episode, and hide its outcome.

        Of a video, the frames up to there are kept, so its last one may be earlier than the cut.

        Args:
            num_policy_steps: [B], at least 1 each and at most the length of the episode.
        """
        batch = self.batch
        assert batch.goals is not None
        kept = tuple(e[:n] for e, n in zip(self.executed, num_policy_steps, strict=True))
        num_steps = np.array([steps.sum() for steps in kept], dtype=np.int64)
        return replace(
            self,
            batch=replace(
                batch,
                # hidden: a reward must not know how the episode ends later
                success=np.zeros(len(batch), dtype=np.bool_),
                num_steps=num_steps,
                # one image and one reading more than policy steps: those after the last
                frames=_cut(batch.frames, num_policy_steps + 1),
                videos=_cut(batch.videos, self._num_frames(num_steps)),
                proprio=_cut(batch.proprio, num_policy_steps),
                goals=_cut(batch.goals, num_policy_steps + 1),
            ),
            executed=kept,
        )

    def _num_frames(self, num_steps: Indices) -> Indices:
        """Count the frames of every video that show the first ``num_steps`` [B] steps."""
        if self.need is None:
            return np.zeros(len(num_steps), dtype=np.int64)
        times = [frame_steps(int(steps), self.need) for steps in self.batch.num_steps]
        return np.array([(t <= end).sum() for t, end in zip(times, num_steps, strict=True)])

    def shuffle_failures(self, seed: int) -> Sample:
        """Shuffle the frames of every failure, and of its video, except the first.

        The first frame shows the layout of the scene, which rewards subtract; it has no information
        about time. Successes do not change: they are the references of failures.
        """
        batch = self.batch
        assert batch.frames is not None
        frames = list(batch.frames)
        videos = None if batch.videos is None else list(batch.videos)
        for row in np.flatnonzero(~batch.success):
            # by episode: its order does not depend on the rest of the sample
            rng = np.random.default_rng([seed, int(batch.episode_id[row])])
            for shown in (frames, videos):
                if shown is not None:
                    order = np.concatenate([[0], 1 + rng.permutation(len(shown[row]) - 1)])
                    shown[row] = shown[row][order]
        shuffled = None if videos is None else tuple(videos)
        return replace(self, batch=replace(batch, frames=tuple(frames), videos=shuffled))


def make_sample(
    trajectories: Trajectories,
    *,
    suite: str,
    split: Split,
    mirrored: bool,
    need: VideoNeed | None = None,
) -> Sample:
    """Arrange trajectories by episode, without the crashed ones.

    ``need`` says which videos the trajectories have.
    """
    alive = trajectories.select(~trajectories.episodes.crashed)
    episode, executed = alive.policy_steps.episode.numpy(), alive.policy_steps.executed.numpy()
    return Sample(
        make_batch(alive, suite=suite, split=split, mirrored=mirrored),
        tuple(executed[episode == row] for row in range(len(alive.episodes))),
        need,
    )


def halve(sample: Sample) -> tuple[Sample, Sample]:
    """Split the starts of every task into a train and a test half.

    The train half has the starts with the lower ids, and the odd one.

    Raises:
        ConfigError: a task has one start only.
    """
    batch = sample.batch
    learns = np.zeros(len(batch), dtype=np.bool_)
    tasks = np.array(batch.task_key)
    for task in np.unique(tasks):
        ids = np.unique(batch.init_state_id[tasks == task])
        if len(ids) < 2:
            raise ConfigError(
                f"task {task} has episodes of {len(ids)} start; two are needed, one to learn from "
                "and one to be judged on: play more groups"
            )
        learns |= (tasks == task) & np.isin(batch.init_state_id, ids[: -(-len(ids) // 2)])
    first, second = sample.take(np.flatnonzero(learns)), sample.take(np.flatnonzero(~learns))
    return first, replace(second, batch=replace(second.batch, split="held_out"))


def take(batch: TrajectoryBatch, rows: Indices) -> TrajectoryBatch:
    """Keep some episodes, in this order."""
    ragged: dict[str, Any] = {name: _pick(getattr(batch, name), rows) for name in RAGGED}
    return replace(
        batch,
        episode_id=batch.episode_id[rows],
        group_id=batch.group_id[rows],
        task_key=tuple(batch.task_key[row] for row in rows),
        init_state_id=batch.init_state_id[rows],
        success=batch.success[rows],
        num_steps=batch.num_steps[rows],
        **ragged,
    )


def join(first: TrajectoryBatch, second: TrajectoryBatch) -> TrajectoryBatch:
    """Concatenate two batches of the same kind; split and feature space are those of the first."""
    ragged: dict[str, Any] = {}
    for name in RAGGED:
        a, b = getattr(first, name), getattr(second, name)
        ragged[name] = None if a is None or b is None else a + b
    return replace(
        first,
        episode_id=np.concatenate([first.episode_id, second.episode_id]),
        group_id=np.concatenate([first.group_id, second.group_id]),
        task_key=first.task_key + second.task_key,
        init_state_id=np.concatenate([first.init_state_id, second.init_state_id]),
        success=np.concatenate([first.success, second.success]),
        num_steps=np.concatenate([first.num_steps, second.num_steps]),
        **ragged,
    )


def frame_steps(num_steps: int, need: VideoNeed) -> Indices:
    """Return the simulator step that each frame of an episode's video was rendered after.

    >>> frame_steps(10, VideoNeed(every=4, max_frames=None)).tolist()
    [0, 4, 8, 10]
    """
    # the last moment of an episode is a frame, whatever the rate
    steps = np.union1d(np.arange(0, num_steps, need.every), [num_steps])
    return steps if need.max_frames is None else steps[pick_by_time(len(steps), need.max_frames)]


def prefix_lengths(num_policy_steps: int, max_points: int) -> list[int]:
    """Return the lengths to which an episode is cut: evenly spaced, from 1 to its full length.

    >>> prefix_lengths(4, 8), prefix_lengths(9, 3)
    ([1, 2, 3, 4], [1, 5, 9])
    """
    points = np.linspace(1, num_policy_steps, min(num_policy_steps, max_points)).round()
    return [int(point) for point in points]


def _cut(arrays: tuple[npt.NDArray[Any], ...] | None, lengths: Indices) -> Any:
    if arrays is None:
        return None
    return tuple(array[:length] for array, length in zip(arrays, lengths, strict=True))


def _pick(items: Sequence[Item] | None, rows: Indices) -> tuple[Item, ...] | None:
    return None if items is None else tuple(items[row] for row in rows)
