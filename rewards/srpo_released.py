"""The reward that siiRL released for SRPO, with its bugs, for comparison. Do not train on it.

Encoders see the third-person camera's full image at every step, as in the release, and prepare it
themselves; one deviation is `sample_frames`.

Sources: siiRL's ``utils/reward_score/embodied.py`` and ``rollout/embodied_rollout.py``. Frames are
stored under the name of the start, which all episodes of a group share: they are interleaved in one
video, and the group has a single embedding. Every failure of a group then has the same score, and
GRPO's advantages are those of the outcome only. On other embeddings no cluster is ever found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn.cluster import dbscan
from sklearn.preprocessing import StandardScaler

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.rewards import (
    Floats,
    Need,
    RewardResult,
    StatelessReward,
    TrajectoryBatch,
    min_max_sigmoid,
    optional_video,
)
from verl_vla.rewards.encoders import make_encoder

# numbers of the release
NUM_FRAMES = 64
RADIUS, MIN_SAMPLES = 0.5, 2
THIRD_PERSON = 0

Aliasing = Literal["group", "pair", "none"]


class SrpoReleasedReward(StatelessReward):
    """A reward of the min-max normalised distance to the mean success, by a sigmoid, times 0.6."""

    def __init__(
        self,
        encoder: str,
        encoder_args: Mapping[str, Any] | None = None,
        aliasing: Aliasing = "group",
        video_every: int = 1,
    ) -> None:
        """Make the reward.

        Args:
            encoder: see `verl_vla.rewards.encoders.make_encoder`; the release's is ``vjepa2``.
            encoder_args: arguments of the encoder.
            aliasing: episodes whose frames are merged into one video: all of the ``group`` (branch
                feature/srpo-embodied, which its guide names), a ``pair`` (its main branch), or
                each episode separately (``none``: the intended formula).
            video_every: simulator steps between two frames of an episode; the release has 1, a
                frame a step, and `verl_vla.envs.base.EnvConfig` says what that costs. 0 takes the
                images that the policy saw instead, prepared for it, one a policy step: a success
                has few of them and a failure many, so their number tells the outcome.

        Raises:
            ConfigError: an unknown aliasing, or a number of steps below 0.
        """
        # where videos are merged, frames of all are needed to interleave them as the release does
        max_frames = NUM_FRAMES if aliasing == "none" else None
        self.video = optional_video(video_every, max_frames=max_frames)
        if aliasing not in ("group", "pair", "none"):
            raise ConfigError(f"aliasing is {aliasing!r}; choose 'group', 'pair' or 'none'")
        self.encoder = make_encoder(encoder, encoder_args or {})
        self._aliasing: Aliasing = aliasing
        self.requires: frozenset[Need] = frozenset({"video" if self.video else "frames"})

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score each episode as the release does."""
        embeddings = self._embed(batch)
        score = released_scores(embeddings, batch.success, batch.task_key)
        return RewardResult(
            score=score.astype(np.float32),
            progress=score.astype(np.float32),
            status=tuple("success" if solved else "shaped" for solved in batch.success),
            metrics={"distinct_embeddings": float(len(np.unique(embeddings, axis=0)))},
        )

    def _episodes(self, batch: TrajectoryBatch) -> Sequence[npt.NDArray[np.uint8]]:
        """Return the frames [F, H, W, 3] of each episode."""
        if "video" in self.requires and batch.videos is not None:
            return batch.videos
        if "frames" in self.requires and batch.frames is not None:
            return [frames[:, THIRD_PERSON] for frames in batch.frames]
        raise ContractError(f"{type(self).__name__} requires {min(self.requires)}, and has none")

    def _embed(self, batch: TrajectoryBatch) -> Floats:
        episodes = self._episodes(batch)
        shared = _episodes_of_one_video(batch, self._aliasing)
        videos = []
        for rows in shared:
            # frame 0 of every episode, then frame 1, and so on: interleaved, as in the release
            parts = zip_longest(*(episodes[row] for row in rows))
            frames = [frame for moment in parts for frame in moment if frame is not None]
            videos.append(sample_frames(np.stack(frames)))
        made = [f.astype(np.float64).mean(axis=0) for f in self.encoder.encode(videos)]
        embeddings = np.zeros((len(batch), len(made[0]) if made else 0))
        for rows, embedding in zip(shared, made, strict=True):
            # one row for all episodes of the video: the bug that is reproduced here
            embeddings[rows] = embedding
        return embeddings


def sample_frames(video: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pick `NUM_FRAMES` of [N, H, W, 3] evenly in time, rounding down.

    A shorter video repeats frames in place. The release loops it, so that a short success is seen
    several times and a failure once; its own, a frame a step, are rarely that short.
    """
    return video[np.linspace(0, len(video) - 1, NUM_FRAMES, dtype=int)]


def released_scores(
    embeddings: Floats, success: npt.NDArray[np.bool_], task_key: tuple[str, ...]
) -> Floats:
    """Compute the release's scores.

    Args:
        embeddings: [B, D]; in the release a row of zeros means "no video".
        success: [B]
        task_key: B tasks; all starts of a task are pooled.

    Returns:
        [B], 1 for a success with a video and 0 for one without; failures 0 to 0.6.
    """
    valid = ~np.all(embeddings == 0, axis=1)
    score = np.zeros(len(embeddings))
    score[success & valid] = 1.0
    for key in sorted(set(task_key)):
        member = np.array([k == key for k in task_key]) & valid
        solved, failed = member & success, member & ~success
        if solved.any() and failed.any():
            score[failed] = _failure_scores(embeddings[solved], embeddings[failed])
    return score


def _failure_scores(successes: Floats, failures: Floats) -> Floats:
    centres = _released_centres(successes)
    distance = np.linalg.norm(failures[:, None] - centres[None], axis=2).min(axis=1)
    return min_max_sigmoid(-distance)


def _released_centres(successes: Floats) -> Floats:
    """Cluster standardised features; return raw means of the clusters, or of all without any."""
    # standardised for clustering only; the distances are of raw features
    standard = StandardScaler().fit_transform(successes)
    _, labels = dbscan(standard, eps=RADIUS, min_samples=MIN_SAMPLES)
    found = [successes[labels == label].mean(axis=0) for label in np.unique(labels[labels >= 0])]
    return np.stack(found) if found else successes.mean(axis=0, keepdims=True)


def _episodes_of_one_video(batch: TrajectoryBatch, aliasing: Aliasing) -> list[list[int]]:
    """Return the rows whose frames are stored under one name, in the order of their episode ids."""
    order = np.argsort(batch.episode_id, kind="stable")
    groups = [[int(r) for r in order if batch.group_id[r] == g] for g in np.unique(batch.group_id)]
    size = {"group": len(batch), "pair": 2, "none": 1}[aliasing]
    return [
        rows[start : start + size] for rows in groups for start in range(0, len(rows), max(size, 1))
    ]
