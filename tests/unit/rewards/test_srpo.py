"""SRPO as published and as released: clusters, sign, aliasing, and the release's numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_world import make_batch

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.core.plugins import import_file
from verl_vla.rewards import REWARDS_FOLDER, VideoNeed, complete, load_reward, video_need
from verl_vla.rl.advantage import group_advantage

SRPO: Any = import_file(Path(REWARDS_FOLDER) / "srpo.py")
RELEASED: Any = import_file(Path(REWARDS_FOLDER) / "srpo_released.py")


def two_modes(num: int = 10, size: int = 1408) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(2 * num, size)) + 40 * np.repeat([[0.0], [1.0]], num, axis=0)


def test_clustering_fires_at_its_own_scale_where_the_release_finds_nothing():
    modes = two_modes()
    centres = SRPO.cluster_centres(modes)
    assert len(centres) == 2
    np.testing.assert_allclose(np.sort(centres.mean(axis=1)), [0, 40], atol=0.1)
    np.testing.assert_allclose(RELEASED._released_centres(modes), modes.mean(axis=0)[None])


def test_a_success_that_stands_alone_is_a_centre_of_its_own():
    embeddings = np.array([[0.0], [0.1], [0.2], [9.0]])
    assert sorted(SRPO.cluster_centres(embeddings).ravel().round(6).tolist()) == [0.1, 9.0]


def test_clusters_are_found_where_most_successes_are_the_same():
    embeddings = np.array([[1.0], [1.0], [1.0], [5.0]])
    assert sorted(SRPO.cluster_centres(embeddings).ravel().tolist()) == [1.0, 5.0]


def test_the_released_clusters_drop_whatever_stands_alone():
    embeddings = np.array([[0.0], [0.1], [9.0], [9.1], [40.0]])
    centres = RELEASED._released_centres(embeddings)
    np.testing.assert_allclose(np.sort(centres.ravel()), [0.05, 9.05])


def test_near_failures_are_worth_more_which_is_the_sign_that_was_meant():
    reward = load_reward("srpo", {"encoder": "pixels", "alpha": 0.8})
    reward.update(make_batch([1] * 6, seed=2, first_id=100))
    scores = reward(make_batch([0.1, 0.4, 0.7, 0.95])).score
    assert scores[0] < scores[3]


def test_the_score_is_alpha_times_the_sigmoid_of_minus_z():
    reward: Any = load_reward("srpo", {"encoder": "pixels", "alpha": 0.8})
    distances = np.array([1.0, 2.0, 3.0])
    z = (distances - 2.0) / distances.std()
    np.testing.assert_allclose(reward.quality("mini/0", -distances), 1 / (1 + np.exp(z)))
    assert reward.quality("mini/0", np.array([-5.0])).tolist() == [0.5]


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([[1.0], [2.0]], [0.59598, 0.00402]),
        ([[7.0]], [0.3]),
        ([[3.0], [3.0]], [0.3, 0.3]),
    ],
)
def test_the_released_end_points_are_those_of_the_reference(failures, expected):
    embeddings = np.array([[0.1], [-0.1], *failures])
    success = np.array([True, True] + [False] * len(failures))
    scores = RELEASED.released_scores(embeddings, success, ("mini/0",) * len(success))
    np.testing.assert_allclose(scores[2:], expected, atol=5e-6)
    assert scores[:2].tolist() == [1.0, 1.0]


def test_the_released_formula_gives_nothing_to_a_success_without_a_video():
    scores = RELEASED.released_scores(
        np.array([[0.0], [1.0], [2.0]]), np.array([True, False, False]), ("mini/0",) * 3
    )
    assert scores.tolist() == [0.0, 0.0, 0.0]


def test_the_released_advantages_of_one_failure_in_eight_are_those_of_the_outcome():
    success = np.arange(8) < 7
    scores = RELEASED.released_scores(np.arange(1.0, 9.0)[:, None], success, ("mini/0",) * 8)
    group = torch.zeros(8, dtype=torch.int64)
    shaped = group_advantage(torch.from_numpy(scores).float(), group)
    outcome = group_advantage(torch.from_numpy(success).float(), group)
    np.testing.assert_allclose(shaped, outcome, atol=1e-5)
    # one of n that differs lies (1 - n) / sqrt(n) standard deviations off
    np.testing.assert_allclose(shaped[[0, 7]], [1 / 8**0.5, -7 / 8**0.5], atol=2e-5)


def playable(num: int = 8, first: int = 0) -> Any:
    """A group of one start, with videos."""
    rng = np.random.default_rng(3)
    success = np.arange(num) < 3
    lengths = rng.integers(4, 30, num)
    return replace(
        make_batch(np.where(success, 1.0, 0.5).tolist(), group_size=num, first_id=first),
        features=None,
        feature_space=None,
        videos=tuple(rng.integers(0, 255, (n, 32, 32, 3), dtype=np.uint8) for n in lengths),
    )


@pytest.mark.parametrize(("aliasing", "distinct"), [("group", 1), ("pair", 4), ("none", 8)])
def test_the_release_has_fewer_embeddings_than_episodes(aliasing, distinct):
    reward = load_reward("srpo_released", {"encoder": "pixels", "aliasing": aliasing})
    assert reward(playable()).metrics["distinct_embeddings"] == distinct


def test_the_released_advantages_equal_those_of_the_outcome():
    batch = playable()
    group = torch.zeros(8, dtype=torch.int64)
    outcome = group_advantage(torch.from_numpy(batch.success).float(), group)
    difference = {}
    for aliasing in ("group", "none"):
        reward = load_reward("srpo_released", {"encoder": "pixels", "aliasing": aliasing})
        shaped = group_advantage(torch.from_numpy(reward(batch).score), group)
        difference[aliasing] = float((shaped - outcome).abs().max())
    assert difference["group"] < 1e-5
    assert difference["none"] > 0.5


def test_a_released_video_is_even_in_time_and_never_looped():
    video = np.arange(5, dtype=np.uint8)[:, None, None, None]
    stretched = RELEASED.sample_frames(video).ravel()
    assert len(stretched) == 64 and (np.diff(stretched.astype(int)) >= 0).all()
    assert np.bincount(stretched)[:4].tolist() == [16] * 3 + [15]
    long = np.arange(128, dtype=np.uint8)[:, None, None, None]
    picked = RELEASED.sample_frames(long).ravel()
    assert len(picked) == 64 and picked[[0, 1, -1]].tolist() == [0, 2, 127]


class SeenEncoder:
    """Keeps what it is given; a clip's feature is its mean."""

    feature_space = "seen"

    def __init__(self) -> None:
        self.clips: list[np.ndarray] = []

    def encode(self, frames: Any) -> list[np.ndarray]:
        self.clips += frames
        return [np.full((1, 2), clip.mean(), np.float32) for clip in frames]


@pytest.mark.parametrize(("aliasing", "max_frames"), [("none", 64), ("pair", None)])
def test_the_release_sees_every_step_and_as_many_frames_of_each(aliasing, max_frames):
    """A success of 120 steps and a failure of 520 look equally long."""
    reward: Any = load_reward("srpo_released", {"encoder": "pixels", "aliasing": aliasing})
    assert reward.requires == {"video"}
    assert reward.video == VideoNeed(every=1, max_frames=max_frames)
    reward.encoder = SeenEncoder()
    rng = np.random.default_rng(0)
    videos = tuple(rng.integers(0, 255, (n, 40, 40, 3), dtype=np.uint8) for n in (121, 521))
    reward(replace(make_batch([1, 0.5], group_size=2), features=None, videos=videos))
    clips = reward.encoder.clips
    assert [len(clip) for clip in clips] == [64] * (2 if aliasing == "none" else 1)
    if aliasing == "none":
        for clip, video in zip(clips, videos, strict=True):
            assert np.array_equal(clip, video[np.linspace(0, len(video) - 1, 64, dtype=int)])
    else:
        assert np.array_equal(clips[0][0], videos[0][0])
        assert np.array_equal(clips[0][-1], videos[1][-1]), "the longer one is alone at the end"


def test_the_release_on_what_the_policy_saw_is_there_for_the_benchmark():
    reward: Any = load_reward("srpo_released", {"encoder": "pixels", "video_every": 0})
    assert reward.requires == {"frames"} and video_need(reward) is None
    with pytest.raises(ContractError, match="SrpoReleasedReward requires frames, and has none"):
        reward(playable())


@pytest.mark.parametrize("name", ["srpo", "srpo_released"])
def test_a_rate_below_0_is_refused(name):
    with pytest.raises(ConfigError, match="video_every is -1; set at least 1, or 0 for no video"):
        load_reward(name, {"encoder": "pixels", "video_every": -1})


def test_srpo_encodes_the_video_where_it_is_asked_to():
    plain: Any = load_reward("srpo", {"encoder": "pixels"})
    filmed: Any = load_reward("srpo", {"encoder": "pixels", "video_every": 2})
    assert (plain.requires, video_need(plain)) == ({"features"}, None)
    assert video_need(filmed) == VideoNeed(every=2, max_frames=64)
    batch = replace(
        playable(), frames=tuple(np.zeros((2, 1, 32, 32, 3), np.uint8) for _ in "12345678")
    )
    features = complete(filmed, batch).features
    assert [len(rows) for rows in features] == [len(video) for video in batch.videos]
    assert [len(rows) for rows in complete(plain, batch).features] == [2] * 8
    for videos in (None, (*batch.videos[:7], np.zeros((0, 0, 0, 3), np.uint8))):
        with pytest.raises(ContractError, match="SrpoReward requires a video of every episode"):
            complete(filmed, replace(batch, videos=videos))


def test_an_unknown_aliasing_is_refused():
    with pytest.raises(ConfigError, match="aliasing is 'all'; choose"):
        load_reward("srpo_released", {"encoder": "pixels", "aliasing": "all"})
