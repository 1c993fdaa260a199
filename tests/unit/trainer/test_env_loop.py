"""A training step's episodes: what is stored of them, and what they cost and brought."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transfer_queue as tq
from one_chunk_world import CRASH, SUCCESS, TIMEOUT, NotingPolicy, OneChunkSimulators, starts_of
from row_store import RowStore
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from verl_vla.core.errors import RewardError
from verl_vla.rewards import RewardResult, StatelessReward, TrajectoryBatch, video_need
from verl_vla.rewards.loading import load_reward
from verl_vla.rl.group_sampling import StartSampler
from verl_vla.rl.rollout import NoiseSource, RolloutTimes
from verl_vla.trainer.grpo.env_loop import EpisodeLoop, StepStats
from verl_vla.trainer.grpo.rows import RowKey, group_of
from verl_vla.trainer.grpo.unscored_episodes import UnscoredEpisodes

ONE_OF_EACH = starts_of({4: [SUCCESS], 0: [TIMEOUT]})
GROUP_SIZE = 3


class RefusingReward(StatelessReward):
    """Cannot score anything, and says so once rows are stored: an error cancels those that wait."""

    def __init__(self, store: RowStore, num_rows: int) -> None:
        self._store, self._num_rows = store, num_rows

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        while len(self._store.rows) < self._num_rows:
            time.sleep(0.001)
        raise RewardError("no scores today")


class NoRecorder:
    """Takes what a run writes down."""

    def __init__(self) -> None:
        self.scores: dict[int, float] = {}

    def add_episodes(self, step: int, played: Any, scores: dict[int, float]) -> None:
        self.scores |= scores


def make_loop(
    folder: Path, starts: Any = ONE_OF_EACH, reward: Any = None, timeout_s: float = 60
) -> Any:
    return EpisodeLoop(
        NotingPolicy(),  # pyright: ignore[reportArgumentType] -- in this process
        OneChunkSimulators(),
        reward or load_reward("binary", {}),
        StartSampler(starts, seed=0, group_size=GROUP_SIZE),
        suite="mini",
        mirrored=False,
        temperature=1.0,
        seed=0,
        reward_timeout_s=timeout_s,
        recorder=NoRecorder(),  # pyright: ignore[reportArgumentType] -- what the loop calls of it
        unscored=UnscoredEpisodes(folder, first_step=1),
        most_policy_steps=4,
    )


def asked_for(uids: list[str], step: int = 1) -> TensorDict:
    batch = tu.get_tensordict({"uid": uids})
    tu.assign_non_tensor_data(batch, "global_steps", step)
    return batch


def row_keys(uids: list[str]) -> list[str]:
    """Keys of the only row of each episode of these groups."""
    return [
        str(RowKey(group, GROUP_SIZE * group + member, 0))
        for group in map(group_of, uids)
        for member in range(GROUP_SIZE)
    ]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> RowStore:
    store = RowStore()
    store.stand_in(monkeypatch)
    return store


def test_each_policy_step_is_a_row_and_each_group_a_tag_that_comes_last(
    tmp_path: Path, store: RowStore
) -> None:
    loop = make_loop(tmp_path)
    uids = loop.next_groups(2)
    loop.generate_sequences(asked_for(uids))
    rows = row_keys(uids)
    # rows while episodes play, then scores, then what lets the groups be taken
    *stored, scores, tags = store.puts
    assert sorted(key for put in stored for key in put) == rows
    assert (scores, tags) == (rows, uids)
    solved = [store.tags[uid]["num_solved"] for uid in uids]
    assert sorted(solved) == [0, GROUP_SIZE]
    for uid, num_solved in zip(uids, solved, strict=True):
        tag = store.tags[uid]
        assert tag["is_prompt"] and tag["status"] == "finished"
        assert (tag["num_failed"], tag["num_crashed"]) == (GROUP_SIZE - num_solved, 0)
        earned = [store.tags[key]["score"] for key in row_keys([uid])]
        assert earned == [num_solved / GROUP_SIZE] * GROUP_SIZE
    assert (loop.stats.episodes, loop.stats.solved, loop.stats.policy_steps) == (6, 3, 6)


def test_rows_are_stored_while_other_episodes_play(
    tmp_path: Path, store: RowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round of the published recipe takes longer to store than the ranks should wait."""
    loop = make_loop(tmp_path)
    first_is_stored = threading.Event()
    put = store.kv_batch_put

    def put_and_tell(*args: Any, **kwargs: Any) -> Any:
        done = put(*args, **kwargs)
        first_is_stored.set()
        return done

    monkeypatch.setattr(tq, "kv_batch_put", put_and_tell)
    step = loop._simulators.step

    def step_once_a_row_is_there(chunks: Any) -> None:
        # the second slot group's episodes wait for rows of the first one's
        if len(loop._simulators.specs) > OneChunkSimulators.num_slots:
            assert first_is_stored.wait(timeout=30)
        step(chunks)

    monkeypatch.setattr(loop._simulators, "step", step_once_a_row_is_there)
    loop.generate_sequences(asked_for(loop.next_groups(2)))
    assert len(store.rows) == 6 + 2


def test_a_put_that_fails_ends_the_step(
    tmp_path: Path, store: RowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("the storage is gone")

    monkeypatch.setattr(tq, "kv_batch_put", fail)
    loop = make_loop(tmp_path)
    with pytest.raises(OSError, match="the storage is gone"):
        loop.generate_sequences(asked_for(loop.next_groups(2)))


def test_crashed_episodes_leave_no_rows_and_no_score(tmp_path: Path, store: RowStore) -> None:
    loop = make_loop(tmp_path, starts_of({4: [CRASH], 0: [TIMEOUT]}))
    uids = loop.next_groups(2)
    loop.generate_sequences(asked_for(uids))
    by_crashes = {store.tags[uid]["num_crashed"]: uid for uid in uids}
    assert by_crashes.keys() == {0, GROUP_SIZE}
    lost = by_crashes[GROUP_SIZE]
    assert not [key for key in store.rows if key.startswith(f"{lost}_")]
    assert store.tags[lost]["score_spread"] == 0.0
    assert len(loop._recorder.scores) == GROUP_SIZE
    assert loop.stats.crashes == GROUP_SIZE


def test_a_round_of_crashes_alone_stores_tags_alone(tmp_path: Path, store: RowStore) -> None:
    loop = make_loop(tmp_path, starts_of({4: [CRASH]}))
    uids = loop.next_groups(1)
    loop.generate_sequences(asked_for(uids))
    assert store.puts == [uids]


def test_a_refill_takes_the_next_groups_and_a_new_step_forgets_them(
    tmp_path: Path, store: RowStore
) -> None:
    loop = make_loop(tmp_path)
    assert loop.next_groups(2) == ["g0", "g1"]
    assert loop.next_groups(1) == ["g2"]
    loop.generate_sequences(asked_for(["g2"]))
    assert {key.split("_")[0] for key in store.rows} == {"g2"}
    assert loop.state_dict()["num_groups_sampled"] == 3
    loop.begin_step()
    with pytest.raises(KeyError):
        loop.generate_sequences(asked_for(["g2"]))
    resumed = make_loop(tmp_path)
    resumed.load_state_dict(loop.state_dict())
    assert resumed.next_groups(1) == loop.next_groups(1) == ["g3"]


def test_episodes_that_the_reward_refuses_are_kept_and_scored_without_being_played_again(
    tmp_path: Path, store: RowStore
) -> None:
    refused = make_loop(tmp_path, reward=RefusingReward(store, num_rows=6))
    uids = refused.next_groups(2)
    with pytest.raises(RewardError, match="no scores today"):
        refused.generate_sequences(asked_for(uids))
    # a group is taken only once its tag is there
    assert store.rows.keys() == set(row_keys(uids))
    corrected = make_loop(tmp_path)
    assert corrected.next_groups(2) == uids
    corrected.generate_sequences(asked_for(uids))
    assert corrected._simulators.specs == []
    assert corrected.stats.episodes == 6
    assert len(store.rows) == 6 + len(uids)
    assert not list(tmp_path.iterdir())


def test_rates_are_over_the_episodes_that_were_judged() -> None:
    account = StepStats(episodes=10, crashes=2, solved=4, score_sum=6.0)
    values = account.as_metrics()
    assert values["env/success_rate"] == 4 / 8
    assert values["critic/score/mean"] == 6 / 8


def test_a_step_in_which_every_simulator_crashed_has_no_success_rate() -> None:
    values = StepStats(episodes=3, crashes=3).as_metrics()
    assert math.isnan(values["env/success_rate"])
    assert math.isnan(values["critic/score/mean"])
    assert values["env/crashes"] == 3


def test_a_step_begins_with_nothing_counted() -> None:
    values = StepStats().as_metrics()
    unknown = {"env/success_rate", "critic/score/mean", "perf/policy_steps_per_s"}
    unknown |= {"perf/env_wait_share", "perf/policy_share"}
    assert {name for name, value in values.items() if math.isnan(value)} == unknown
    assert {value for name, value in values.items() if name not in unknown} == {0.0}


def test_rates_are_of_the_seconds_of_the_rollout() -> None:
    times = RolloutTimes(policy_s=2.0, wait_s=1.0, total_s=4.0, policy_steps_for_ended=3)
    stats = StepStats(
        times=times, reward_s=5.0, transfer_s=6.0, policy_steps=8, reward_metrics={"spread": 7.0}
    )
    values = stats.as_metrics()
    assert values["perf/policy_steps_per_s"] == 2
    assert values["perf/policy_share"] == 0.5
    assert values["perf/env_wait_share"] == 0.25
    assert values["env/policy_steps_after_end"] == 3
    seconds = [values[f"timing_s/{part}"] for part in ("gen", "reward", "transfer")]
    assert seconds == [4, 5, 6]
    assert values["reward/spread"] == 7


class Grading(StatelessReward):
    """Scores by the number of the episode, and says what it has counted and learned."""

    requires = frozenset({"frames"})

    def __init__(self) -> None:
        self.seen: list[TrajectoryBatch] = []
        self.learned: list[TrajectoryBatch] = []

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        self.seen.append(batch)
        score = (batch.episode_id / 10).astype(np.float32)
        return RewardResult(
            score=score, progress=score, status=("ok",) * len(batch), metrics={"seen": 1.0}
        )

    def update(self, batch: TrajectoryBatch) -> dict[str, float]:
        assert len(self.seen) == len(self.learned) + 1, "scored before it is learned from"
        self.learned.append(batch)
        return {"learned": float(len(self.learned))}


def test_a_round_is_scored_then_learned_from_and_its_spread_is_known(
    tmp_path: Path, store: RowStore
) -> None:
    reward = Grading()
    loop = make_loop(tmp_path, starts_of({4: [SUCCESS, CRASH], 0: [TIMEOUT]}), reward)
    uids = loop.next_groups(3)
    loop.generate_sequences(asked_for(uids, step=5))
    (batch,) = reward.seen
    assert reward.learned == [batch]
    assert (batch.split, batch.mirrored) == ("train", False)
    assert set(batch.task_key) == {"mini/4", "mini/0"}
    assert batch.frames is not None
    (lost,) = (uid for uid in uids if store.tags[uid]["num_crashed"])
    for uid in uids:
        tag = store.tags[uid]
        assert tag["global_steps"] == 5
        assert tag["score_spread"] == pytest.approx(0.0 if uid == lost else 0.2)
        start = next(s for s in loop._simulators.specs if f"g{s.group_id}" == uid)
        assert tag["task_id"] == start.task_id
    alive = [key for key in store.rows if key.endswith("_0")]
    assert {store.tags[key]["global_steps"] for key in alive} == {5}
    earned = {key: store.tags[key]["score"] for key in alive}
    numbers = {f"g{s.group_id}_{s.episode_id}_0": s.episode_id for s in loop._simulators.specs}
    assert earned == pytest.approx({key: numbers[key] / 10 for key in alive})
    values = loop.stats.as_metrics()
    assert (values["reward/seen"], values["reward/learned"]) == (1, 1)
    assert values["critic/score/mean"] == pytest.approx(sum(earned.values()) / 6)
    assert loop._recorder.scores == pytest.approx({numbers[key]: earned[key] for key in alive})


class SleepyReward(StatelessReward):
    """Never answers, and survives every error of its own."""

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        while True:
            try:
                time.sleep(60)
            except Exception:  # noqa: BLE001 -- as careless as a plug-in may be
                continue


def test_a_reward_that_never_answers_is_refused_by_name_and_the_episodes_are_kept(
    tmp_path: Path, store: RowStore
) -> None:
    loop = make_loop(tmp_path, reward=SleepyReward(), timeout_s=0.1)
    uids = loop.next_groups(1)
    said = rf"SleepyReward of {__file__} did not score 3 episodes within 0\.1 s.*reward_timeout_s"
    with pytest.raises(RewardError, match=said):
        loop.generate_sequences(asked_for(uids))
    assert (tmp_path / "unscored_step_1.npz").exists()


def test_two_rounds_of_a_step_add_up(tmp_path: Path, store: RowStore) -> None:
    loop = make_loop(tmp_path, starts_of({4: [SUCCESS], 0: [CRASH]}))
    for _ in range(2):
        loop.generate_sequences(asked_for(loop.next_groups(2)))
    stats = loop.stats
    assert (stats.episodes, stats.crashes, stats.solved) == (12, 6, 6)
    assert (stats.policy_steps, stats.steps, stats.score_sum) == (6, 12, 6.0)
    loop.begin_step()
    assert loop.stats == StepStats()


def test_training_noise_is_that_of_the_seed_and_the_temperature_is_handed_on(
    tmp_path: Path, store: RowStore
) -> None:
    loop = make_loop(tmp_path, starts_of({4: [SUCCESS]}))
    loop.generate_sequences(asked_for(loop.next_groups(1)))
    policy = loop._policy
    assert policy.temperatures == {1.0}
    right = NoiseSource(seed=0, stream=0)
    assert [row.tolist() for row in policy.noises] == [
        right.uniform(episode, 0, 2).tolist() for episode in range(GROUP_SIZE)
    ]


def test_videos_are_kept_where_the_reward_needs_them(tmp_path: Path) -> None:
    assert make_loop(tmp_path)._max_video_frames == 0
    filmed = load_reward("srpo", {"encoder": "pixels", "video_every": 2})
    need = video_need(filmed)
    assert need is not None
    assert make_loop(tmp_path, reward=filmed)._max_video_frames == need.max_frames
