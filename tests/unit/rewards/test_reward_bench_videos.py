"""Videos of the benchmark's episodes: replayed, checked, cut, shuffled, and fed to rewards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_world import make_trajectories

from verl_vla.core.episode import EpisodeSpec, Outcome
from verl_vla.core.errors import ConfigError, EpisodeCrashed
from verl_vla.core.tables import ActionChunk, Trajectories, map_columns
from verl_vla.core.trajectory_io import read_trajectories, write_trajectories
from verl_vla.envs.fake import FakeEnv, FakeEnvConfig
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.policies.base import PolicyShape
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.rewards import RewardResult, StatelessReward, VideoNeed, load_reward
from verl_vla.rewards.benchmark import (
    BenchConfig,
    BenchRow,
    halve,
    make_entries,
    make_sample,
    measure,
    read_rewards,
    video_needs,
)
from verl_vla.rewards.benchmark.curves import FeatureShelf
from verl_vla.rewards.benchmark.entries import Entry
from verl_vla.rewards.benchmark.episodes import round_file
from verl_vla.rewards.benchmark.samples import frame_steps
from verl_vla.rewards.benchmark.videos import film, film_missing, folder_name
from verl_vla.rl.episode_record import Answer
from verl_vla.rl.rollout import NoiseSource, rollout

CODEC = ActionCodec(
    num_bins=16,
    chunk_length=5,
    action_dim=7,
    statistics=ActionStatistics(q01=[-1.0] * 7, q99=[1.0] * 7, mask=[True] * 6 + [False]),
)
CONFIG = BenchConfig(curve_groups=4, curve_points=4, resamples=50)
EVERY, LIMIT = 2, 17
"""Ends inside a chunk, and not on a frame."""


class Blind:
    """Chooses its actions by the noise alone."""

    shape = PolicyShape(num_views=1, image_size=32, chunk_length=5, action_dim=7, num_bins=16)

    def act(self, observations: Any, noise: torch.Tensor, *, temperature: float) -> ActionChunk:
        tokens = (noise * CODEC.num_bins).long()
        return ActionChunk(
            action_tokens=tokens,
            log_probs=torch.zeros(tokens.shape),
            prompt_ids=[torch.arange(3)] * len(observations),
            actions=CODEC.to_simulator(tokens),
        )


class Here:
    """Slots that simulate when they are asked, in this process."""

    def __init__(self, num_slots: int = 3, *, lost: int | None = None, **options: Any) -> None:
        self.num_slots = num_slots
        self.lost = lost
        """Episode whose simulator is lost."""
        self.started: list[int] = []
        """Episodes in the order of their starts."""
        config = FakeEnvConfig(step_limit=LIMIT, **options)
        self._envs = [FakeEnv(config) for _ in range(num_slots)]
        self._answers: dict[int, Answer] = {}

    def reset(self, slots: Mapping[int, EpisodeSpec]) -> None:
        for slot, spec in slots.items():
            self.started.append(spec.episode_id)
            seen = self._envs[slot].reset(spec.task_id, spec.init_state_id)
            is_lost = spec.episode_id == self.lost
            self._answers[slot] = EpisodeCrashed("killed") if is_lost else seen

    def step(self, chunks: Mapping[int, np.ndarray]) -> None:
        for slot, chunk in chunks.items():
            self._answers[slot] = self._envs[slot].step_chunk(chunk)

    def wait(self, slots: Collection[int]) -> dict[int, Answer]:
        return {slot: self._answers.pop(slot) for slot in slots}


def played(simulators: Here, count: int = 12, max_frames: int | None = 0) -> Trajectories:
    specs = [
        EpisodeSpec(task_id=i % 4, init_state_id=i // 4, group_id=i // 4, episode_id=100 + i)
        for i in range(count)
    ]
    noise = NoiseSource(seed=1, stream=2)
    return rollout(
        specs, Blind(), simulators, temperature=1.0, noise=noise, max_video_frames=max_frames
    )


@pytest.mark.parametrize("max_frames", [None, 4])
@pytest.mark.parametrize("num_slots", [1, 5, 40])
def test_a_replay_shows_what_a_rollout_with_videos_shows(
    max_frames: int | None, num_slots: int
) -> None:
    filmed = played(Here(video_every=EVERY), max_frames=max_frames)
    assert {Outcome.SUCCESS, Outcome.TIMEOUT} == set(filmed.episodes.outcome.tolist())
    without = played(Here())
    assert without.videos == ()
    ended: list[int] = []
    videos = film(
        without,
        CODEC,
        Here(num_slots, video_every=EVERY),
        max_frames=max_frames,
        ended=lambda: ended.append(1),
    )
    assert len(ended) == len(videos) == len(filmed.videos)
    need = VideoNeed(every=EVERY, max_frames=max_frames)
    for mine, right, steps in zip(
        videos, filmed.videos, without.episodes.num_steps.tolist(), strict=True
    ):
        assert np.array_equal(mine, right)
        assert len(mine) == len(frame_steps(steps, need))


def test_what_was_lost_is_not_replayed() -> None:
    episodes = played(Here(lost=103))
    simulators = Here(video_every=EVERY)
    videos = film(episodes, CODEC, simulators, max_frames=None)
    assert [len(video) > 0 for video in videos] == [i != 3 for i in range(12)]
    assert 103 not in simulators.started


def test_a_replay_that_ends_otherwise_is_refused() -> None:
    episodes = played(Here())
    longer = replace(
        episodes, episodes=replace(episodes.episodes, num_steps=episodes.episodes.num_steps + 1)
    )
    solved = replace(
        episodes,
        episodes=replace(
            episodes.episodes, outcome=torch.full_like(episodes.episodes.outcome, Outcome.SUCCESS)
        ),
    )
    steps = episodes.policy_steps
    first = steps.episode != 0
    first[0] = True
    shorter = replace(
        episodes,
        policy_steps=map_columns(steps, lambda column: column[first]),
        prompt_ids=tuple(torch.arange(3) for _ in range(int(first.sum()))),
    )
    for changed, message in (
        (longer, r"episode 100 ended as \w+ after \d+ steps, and its replay ended as"),
        (
            solved,
            r"ended as SUCCESS after 17 steps, and its replay ended as TIMEOUT after 17; this",
        ),
        (shorter, r"and its replay did not end after 5; this machine simulates otherwise"),
    ):
        with pytest.raises(ConfigError, match=message):
            film(changed, CODEC, Here(1, video_every=EVERY), max_frames=None)


def test_a_simulator_lost_in_a_replay_is_reported() -> None:
    with pytest.raises(ConfigError, match="the replay of episode 104 was lost: killed; repeat the"):
        film(played(Here()), CODEC, Here(lost=104, video_every=EVERY), max_frames=None)


def test_rounds_that_are_on_disk_are_not_replayed_again(tmp_path: Path) -> None:
    episodes, folder = tmp_path / "episodes", tmp_path / "videos"
    episodes.mkdir(), folder.mkdir()
    for index in range(2):
        write_trajectories(round_file(episodes, index), played(Here(), count=4))
    options = {"num_groups": 16, "codec": CODEC, "max_frames": 3}
    film_missing(episodes, folder, simulators=Here(video_every=EVERY), **options)
    round_file(folder, 1).unlink()
    simulators = Here(video_every=EVERY)
    film_missing(episodes, folder, simulators=simulators, **options)
    assert simulators.started == [100, 101, 102, 103]
    read = read_trajectories(round_file(folder, 1))
    assert [len(video) for video in read.videos] == [3] * 4
    assert torch.equal(read.policy_steps.image, played(Here(), count=4).policy_steps.image)


def test_each_video_is_asked_for_once() -> None:
    words = read_rewards(
        "binary,a=srpo,b=srpo_released,c=srpo,d=srpo",
        [
            *(f"{label}.encoder=pixels" for label in "abcd"),
            *("a.video_every=1", "b.aliasing=none", "c.video_every=4"),
        ],
    )
    needs = video_needs([entry.reward for entry in make_entries(words, 0)])
    assert needs == [VideoNeed(every=1, max_frames=64), VideoNeed(every=4, max_frames=64)]
    assert [folder_name(need) for need in needs] == ["every_1_frames_64", "every_4_frames_64"]
    assert folder_name(VideoNeed(every=2, max_frames=None)) == "every_2_frames_all"


NEED = VideoNeed(every=4, max_frames=9)


def with_videos(need: VideoNeed) -> Trajectories:
    """The planted world; the brightness of a video's frame is its time, that of its last pixel the
    number of policy steps."""
    world = make_trajectories()
    videos = []
    for row, steps in enumerate(world.episodes.num_steps.tolist()):
        times = frame_steps(steps, need)
        video = np.repeat(times.astype(np.uint8)[:, None, None, None], 3, axis=3)
        video = np.tile(video, (1, 4, 4, 1))
        video[:, 3, 3] = int((world.policy_steps.episode == row).sum())
        # no two episodes alike
        video[:, 0, 0] = row
        videos.append(video)
    return replace(world, videos=tuple(videos))


def sample_of(need: VideoNeed) -> Any:
    return make_sample(with_videos(need), suite="mini", split="train", mirrored=True, need=need)


@pytest.mark.parametrize("need", [NEED, VideoNeed(every=1, max_frames=None)])
def test_a_cut_video_shows_no_later_moment(need: VideoNeed) -> None:
    sample = sample_of(need)
    lengths = np.array([1 + row % len(e) for row, e in enumerate(sample.executed)])
    cut = sample.cut(lengths)
    for row, (shown, whole) in enumerate(zip(cut.batch.videos, sample.batch.videos, strict=True)):
        times = whole[:, 1, 1, 0]
        assert shown[:, 1, 1, 0].tolist() == times[times <= cut.batch.num_steps[row]].tolist()
        assert len(shown) >= 1
    complete = sample.cut(np.array([len(e) for e in sample.executed]))
    assert all(map(np.array_equal, complete.batch.videos, sample.batch.videos))


def test_shuffling_moves_the_frames_of_a_failures_video_and_not_the_first() -> None:
    sample = sample_of(NEED)
    shuffled = sample.shuffle_failures(0)
    moved = 0
    for old, new, solved in zip(
        sample.batch.videos, shuffled.batch.videos, sample.batch.success, strict=True
    ):
        assert np.array_equal(old[0], new[0])
        assert sorted(f.tobytes() for f in old) == sorted(f.tobytes() for f in new)
        assert not solved or np.array_equal(old, new)
        moved += not np.array_equal(old, new)
    assert moved > 0.9 * (~sample.batch.success).sum()
    plain = make_sample(make_trajectories(), suite="mini", split="train", mirrored=True)
    frames = plain.shuffle_failures(0).batch.frames
    assert all(map(np.array_equal, shuffled.batch.frames, frames)), "frames as without a video"


class Watching(StatelessReward):
    """Notes the videos that it is given."""

    requires = frozenset({"video"})

    def __init__(self, need: VideoNeed) -> None:
        self.video = need
        self.lengths: set[int] = set()

    def __call__(self, batch: Any) -> RewardResult:
        assert batch.frames is None
        self.lengths |= {len(video) for video in batch.videos}
        last = np.array([video[-1, 1, 1, 0] for video in batch.videos], dtype=np.float32)
        score = np.where(batch.success, 1.0, last / 200).astype(np.float32)
        return RewardResult(score=score, progress=last, status=("seen",) * len(batch))


def measured(entries: list[Entry], needs: list[VideoNeed]) -> dict[str, BenchRow]:
    world = make_sample(make_trajectories(), suite="mini", split="train", mirrored=True)
    halves: dict[VideoNeed | None, Any] = {None: halve(world)}
    halves |= {need: halve(sample_of(need)) for need in needs}
    return {row.label: row for row in measure(entries, halves, CONFIG)}


def test_a_reward_gets_the_video_that_it_asks_for() -> None:
    needs = [NEED, VideoNeed(every=1, max_frames=None)]
    few, all_of_them = (Watching(need) for need in needs)
    entries = [
        Entry(label="few", reward=few, is_control=False),
        Entry(label="all", reward=all_of_them, is_control=False),
        *make_entries({}, 0),
    ]
    rows = measured(entries, needs)
    assert max(few.lengths) == NEED.max_frames
    assert max(all_of_them.lengths) == 65, "a failure of 64 steps, and its start"
    assert {"few, shuffled", "all, shuffled"} <= rows.keys()
    # along an episode the last frame of a cut one is its time
    for curve in rows["all"].readings.curves:
        assert (np.diff(curve) > 0).all()


def test_features_of_a_video_and_of_images_are_kept_apart() -> None:
    words = read_rewards(
        "images=knn_align,video=srpo,released=srpo_released",
        [
            *(f"{label}.encoder=pixels" for label in ("images", "video", "released")),
            *(f"{label}.encoder_args.grid=4" for label in ("images", "video", "released")),
            *("video.video_every=4", "released.video_every=4", "released.aliasing=none"),
        ],
    )
    entries = make_entries(words, 0)
    needs = video_needs([entry.reward for entry in entries])
    alone = measured(entries[1:2], needs)["video"]
    rows = measured(entries, needs)
    assert np.array_equal(rows["video"].readings.progress, alone.readings.progress)
    # 4 x 4 cells in float32, of at most 17 moments
    assert rows["video"].feature_bytes > rows["images"].feature_bytes
    assert rows["released"].changes_advantage.value > 0.5


def test_a_shelf_tells_videos_of_two_rates_apart() -> None:
    shelf = FeatureShelf()
    every_4, every_8 = (
        load_reward("srpo", {"encoder": "pixels", "encoder_args": {"grid": 4}, "video_every": k})
        for k in (4, 8)
    )
    made = [
        shelf.fill(reward, "train", sample_of(VideoNeed(every=k, max_frames=64)).batch)[0]
        for reward, k in ((every_4, 4), (every_8, 8))
    ]
    assert made[0].features is not None and made[1].features is not None
    assert len(made[0].features[0]) > len(made[1].features[0])
