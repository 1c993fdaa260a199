"""Score finished trajectories with a reward, and check that the scores can be trained on."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from typing import cast

import numpy as np
import numpy.typing as npt

from verl_vla.core.errors import ConfigError, ContractError, RewardError
from verl_vla.core.tables import Trajectories
from verl_vla.rewards.base import (
    HasEncoder,
    HasVideo,
    Need,
    RewardResult,
    Rows,
    Split,
    TrajectoryBatch,
    TrajectoryReward,
    VideoNeed,
)

logger = logging.getLogger(__name__)

THIRD_PERSON = 0
"""Index of the view that encoders see: the first camera of the environment."""


def score(
    reward: TrajectoryReward,
    trajectories: Trajectories,
    *,
    suite: str,
    split: Split,
    mirrored: bool,
) -> tuple[TrajectoryBatch, RewardResult]:
    """Score trajectories without crashes and check the scores.

    Returns:
        The batch that the reward saw, for `learn`, and the result of `judge`.

    Raises:
        ContractError: a crashed episode, or a duplicate episode id.
        RewardError: as in `complete` and `judge`.
    """
    batch = complete(reward, make_batch(trajectories, suite=suite, split=split, mirrored=mirrored))
    return batch, judge(reward, batch)


def looks_at_images(reward: TrajectoryReward) -> bool:
    """Check whether a reward requires images, directly or as features."""
    return bool(reward.requires & {"frames", "features"})


def video_need(reward: TrajectoryReward) -> VideoNeed | None:
    """Return the video that a reward requires; None for one that requires no video.

    Raises:
        ConfigError: frames that are less than a step apart.
    """
    if "video" not in reward.requires:
        return None
    need = cast("HasVideo", reward).video
    if need.every < 1:
        raise ConfigError(
            f"{type(reward).__name__} wants a frame every {need.every} steps; set at least 1"
        )
    return need


def make_batch(
    trajectories: Trajectories, *, suite: str, split: Split, mirrored: bool
) -> TrajectoryBatch:
    """Arrange trajectories by episode, with every input that a reward may require except features.

    ``mirrored`` is the suite's `Suite.images_are_mirrored`.

    Raises:
        ContractError: a crashed episode, or a duplicate episode id.
    """
    episodes, policy_steps = trajectories.episodes, trajectories.policy_steps
    if bool(episodes.crashed.any()):
        raise ContractError("a crashed episode reached the reward; select the others first")
    ids, counts = np.unique(episodes.episode_id.numpy(), return_counts=True)
    if (counts > 1).any():
        raise ContractError(
            f"episode {ids[counts > 1][0]} stands {counts.max()} times in one batch; every "
            "episode needs an id of its own, or siblings are given each other's images"
        )
    rows = [_rows_of(policy_steps.episode.numpy(), b) for b in range(len(episodes))]
    image, proprio = policy_steps.image.numpy(), policy_steps.proprio.numpy()
    return TrajectoryBatch(
        episode_id=episodes.episode_id.numpy(),
        group_id=episodes.group_id.numpy(),
        task_key=tuple(f"{suite}/{task}" for task in episodes.task_id.tolist()),
        init_state_id=episodes.init_state_id.numpy(),
        success=episodes.success.numpy(),
        num_steps=episodes.num_steps.numpy(),
        frames=tuple(
            # the image after the last step, where the environment rendered one
            image[r] if final_image is None else np.concatenate([image[r], final_image[None]])
            for r, final_image in zip(
                rows, trajectories.final_images or [None] * len(rows), strict=True
            )
        ),
        proprio=tuple(proprio[r] for r in rows),
        videos=trajectories.videos or None,
        goals=trajectories.goals,
        mirrored=mirrored,
        split=split,
    )


def _rows_of(episode: npt.NDArray[np.int64], b: int) -> slice | npt.NDArray[np.int64]:
    """Which policy steps are those of episode ``b``; a slice where they follow each other."""
    rows = np.flatnonzero(episode == b)
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        # an index array would copy the images of a round
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def complete(reward: TrajectoryReward, batch: TrajectoryBatch) -> TrajectoryBatch:
    """Return ``batch`` with what ``reward`` requires, features encoded, and nothing else.

    Raises:
        ContractError: frames or a video are required but missing.
        RewardError: the encoder raised, lost an episode, or gave siblings whose images differ the
            same features (one identity for several episodes makes every shaped score of a group
            the same).
    """
    needs: frozenset[Need] = reward.requires
    if "video" in needs and not all(len(video) for video in batch.videos or ((),)):
        raise ContractError(
            f"{type(reward).__name__} requires a video of every episode, and there is none; the "
            "environments must follow EnvConfig.video_every"
        )
    features, space = batch.features, batch.feature_space
    if "features" not in needs:
        features, space = None, None
    elif features is None:
        features, space = _encode(cast("HasEncoder", reward), batch, _clips(reward, batch))
    return replace(
        batch,
        frames=batch.frames if "frames" in needs else None,
        videos=batch.videos if "video" in needs else None,
        proprio=batch.proprio if "proprio" in needs else None,
        goals=batch.goals if "goals" in needs else None,
        features=features,
        feature_space=space,
    )


def judge(reward: TrajectoryReward, batch: TrajectoryBatch) -> RewardResult:
    """Compute scores, check them, and add the counts of `count_cases` to the metrics.

    Raises:
        RewardError: the reward raised; or a score is missing, not finite, or above
            `RewardResult.max_score`.
    """
    name = type(reward).__name__
    with _named(name, f"while scoring {_describe(batch)}", "correct the reward"):
        result = reward(batch)
    if type(result) is not RewardResult:
        raise RewardError(
            f"{name} returned {type(result).__name__} for {_describe(batch)}; it must return a "
            "RewardResult"
        )
    _check_shapes(name, batch, result)
    _check_values(name, batch, result)
    # a reward's own metric of the same name wins
    return replace(result, metrics={**count_cases(batch), **result.metrics})


def learn(reward: TrajectoryReward, batch: TrajectoryBatch) -> Mapping[str, float]:
    """Let a reward learn from a batch that it has scored.

    Raises:
        ContractError: the batch is held out, of which nothing may be learned.
        RewardError: the reward raised.
    """
    if batch.split != "train":
        raise ContractError(f"{_describe(batch)} are held out; score them, never learn from them")
    doing = f"while learning from {_describe(batch)}"
    with _named(type(reward).__name__, doing, "correct its update"):
        return reward.update(batch)


def count_cases(batch: TrajectoryBatch) -> dict[str, float]:
    """Count groups by outcome and length, and episodes of a group that have the same features."""
    groups = [np.flatnonzero(batch.group_id == g) for g in np.unique(batch.group_id)]
    failed = [int((~batch.success[g]).sum()) for g in groups]
    features = batch.features
    duplicates = 0 if features is None else sum(len(_duplicates(features, rows)) for rows in groups)
    return {
        "groups_all_failed": float(sum(n == len(g) for n, g in zip(failed, groups, strict=True))),
        "groups_all_solved": float(failed.count(0)),
        "groups_one_failure": float(failed.count(1)),
        "groups_unequal_lengths": float(
            sum(len(np.unique(batch.num_steps[g])) > 1 for g in groups)
        ),
        "duplicate_features": float(duplicates),
    }


@contextmanager
def _named(who: str, doing: str, remedy: str) -> Generator[None]:
    """Turn any exception raised inside into a `RewardError`, and log its traceback."""
    try:
        yield
    except Exception as error:
        # the message is one line for the user; the traceback goes to the log
        logger.exception("%s raised %s", who, doing)
        raise RewardError(f"{who} raised {error!r} {doing}; {remedy}") from error


def _clips(reward: TrajectoryReward, batch: TrajectoryBatch) -> list[npt.NDArray[np.uint8]]:
    """Return what an encoder sees of each episode, [T, H, W, 3]: its video if one is required."""
    if "video" in reward.requires and batch.videos is not None:
        return list(batch.videos)
    if batch.frames is None:
        raise ContractError(
            f"{type(reward).__name__} requires features, but the batch holds neither features nor "
            "frames to make them of"
        )
    return [episode[:, THIRD_PERSON] for episode in batch.frames]


def _encode(
    reward: HasEncoder, batch: TrajectoryBatch, frames: list[npt.NDArray[np.uint8]]
) -> tuple[tuple[Rows, ...], str]:
    who, doing = f"the encoder of {type(reward).__name__}", f"on {_describe(batch)}"
    with _named(who, doing, "correct it, or its encoder_args"):
        features = tuple(reward.encoder.encode(frames))
    if len(features) != len(batch):
        raise RewardError(
            f"the encoder made features of {len(features)} episodes, given {len(batch)}; it must "
            "return one array an episode"
        )
    for group in np.unique(batch.group_id):
        for a, b in _duplicates(features, np.flatnonzero(batch.group_id == group)):
            # equal images may well have equal features, e.g. of a policy that stands still
            if not np.array_equal(frames[a], frames[b]):
                raise RewardError(
                    f"episodes {batch.episode_id[a]} and {batch.episode_id[b]} of one group have "
                    "different images but the same features; the encoder mixes episodes up or "
                    "has lost what tells them apart"
                )
    return features, reward.encoder.feature_space


def _duplicates(features: tuple[Rows, ...], rows: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the pairs of ``rows`` that have the same features, bit for bit."""
    return [
        (int(a), int(b))
        for a, b in combinations(rows, 2)
        # episodes without features are not equal, just empty
        if len(features[a]) and np.array_equal(features[a], features[b])
    ]


def _check_shapes(name: str, batch: TrajectoryBatch, result: RewardResult) -> None:
    per_episode = (len(batch),)
    shapes = [np.shape(part) for part in (result.score, result.progress, result.status)]
    if any(shape != per_episode for shape in shapes):
        raise RewardError(
            f"{name} returned scores {list(shapes[0])}, progress {list(shapes[1])} and "
            f"{len(result.status)} status words for {_describe(batch)}; it must return one of each "
            "per episode"
        )
    for part in (result.num_references, result.reference_source):
        if part is not None and np.shape(part) != per_episode:
            raise RewardError(
                f"{name} did not return one number and one source of references for each of "
                f"{_describe(batch)}; leave both out or give all"
            )


def _check_values(name: str, batch: TrajectoryBatch, result: RewardResult) -> None:
    broken = np.flatnonzero(~np.isfinite(result.score))
    if len(broken):
        raise RewardError(
            f"{name} returned {result.score[broken[0]]} for episode {batch.episode_id[broken[0]]} "
            f"({len(broken)} of {len(batch)} scores are not finite); "
            "a reward that cannot judge an episode must give it a neutral score and say so in "
            "status"
        )
    above = np.flatnonzero(result.score > result.max_score)
    if len(above):
        raise RewardError(
            f"{name} returned {result.score[above[0]]:g} for episode {batch.episode_id[above[0]]} "
            f"({len(above)} of {len(batch)} scores are above {result.max_score:g}); scale the "
            "scores, or state their true bound in RewardResult.max_score"
        )


def _describe(batch: TrajectoryBatch) -> str:
    ids = np.sort(batch.episode_id)
    return f"{len(ids)} episodes, ids {ids[0]} to {ids[-1]}" if len(ids) else "no episodes"
