"""The cases in which shaped rewards go wrong, one test a row of the table that decides them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from planted_world import episode, make_batch

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.rewards import ReferenceMemory, load_reward
from verl_vla.rewards.loading import SEED
from verl_vla.rl.advantage import group_advantage, is_informative

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "knn_align": ("knn_align", {}),
    "srpo": ("srpo", {}),
    "mean": ("siglip_t", {"temporal": "none", "pooling": "mean"}),
    "last_k": ("siglip_t", {"temporal": "none", "pooling": "last_k"}),
    "additive": ("siglip_t", {"temporal": "additive", "pooling": "align"}),
    "causal": ("siglip_t", {"temporal": "causal", "head_steps": 30, "head_width": 16}),
}
RANKS: dict[str, dict[str, Any]] = {
    "knn_align": {},
    "additive": {},
    "causal": {"head_steps": 200},
}
"""Those that must rank the failures of the planted world, with what they need for it: a head is
trained, here in one update. Pooled features need not rank."""


def make(kind: str, **arguments: Any) -> Any:
    name, own = KINDS[kind]
    return load_reward(name, {"encoder": "pixels", **own, **arguments}, seed=0)


@pytest.fixture(params=KINDS)
def reward(request) -> Any:
    return make(request.param)


@pytest.fixture(params=KINDS)
def taught(request) -> Any:
    """A reward that has seen a training step: eight successes and twelve failures."""
    made = make(request.param)
    failed = np.random.default_rng(5).uniform(0.1, 0.9, 12)
    made.update(make_batch([1] * 8 + failed.tolist(), seed=5, first_id=1000))
    return made


def change_features(batch, row, features):
    changed = list(batch.features)
    changed[row] = features
    return replace(batch, features=tuple(changed))


def test_no_success_in_the_batch_and_none_remembered_is_neutral_and_says_so(reward):
    result = reward(make_batch([0.2, 0.5, 0.7, 0.9]))
    assert result.score.tolist() == [0.0] * 4
    assert set(result.status) == {"no_reference"}
    assert result.num_references.tolist() == [0] * 4
    assert result.reference_source == ("none",) * 4
    assert result.metrics["num_no_reference"] == 4
    advantage = group_advantage(torch.from_numpy(result.score), torch.zeros(4, dtype=torch.int64))
    assert advantage.tolist() == [0.0] * 4


def test_no_success_in_the_batch_takes_what_is_remembered(taught):
    result = taught(make_batch([0.1, 0.4, 0.6, 0.9]))
    assert set(result.status) <= {"shaped", "gated"}
    assert result.num_references.tolist() == [8] * 4
    assert set(result.reference_source) == {"memory"}


def test_all_success_is_one_for_all(taught):
    result = taught(make_batch([1, 1, 1, 1]))
    assert result.score.tolist() == [1.0] * 4
    group = torch.zeros(4, dtype=torch.int64)
    assert group_advantage(torch.from_numpy(result.score), group).tolist() == [0.0] * 4


def test_one_failure_has_an_absolute_score(taught):
    """Where the release gives 0.3 to whatever failed."""
    near, far = taught(make_batch([1, 1, 1, 0.9])), taught(make_batch([1, 1, 1, 0.05]))
    assert near.status[3] == far.status[3] == "shaped"
    assert near.score[3] != far.score[3]


def test_equal_distances_stay_a_tie(taught):
    batch = make_batch([1, 1, 0.5, 0.5])
    batch = change_features(batch, 3, batch.features[2])
    scores = taught(batch).score
    assert scores[2] == scores[3]


def test_two_failures_with_a_tiny_gap_are_not_told_apart(taught):
    batch = make_batch([1, 1, 0.5, 0.5])
    nudged = batch.features[2].copy()
    nudged[-1] += 1e-5
    result = taught(change_features(batch, 3, nudged))
    assert result.score[2] == result.score[3]
    assert result.status[2] == result.status[3]


@pytest.mark.parametrize("noise_gate", [True, False])
def test_a_gap_within_the_noise_of_successes_is_gated_to_half_of_alpha(noise_gate):
    made = make("knn_align", alpha=0.6, noise_gate=noise_gate)
    batch = make_batch([1] * 4 + [0.9, 0.9, 0.9, 0.9], seed=1)
    assert set(made(batch).status[4:]) <= {"gated", "shaped"}
    measures = np.array([0.50, 0.51, 0.50, 0.51])
    made.measure = lambda _task, episodes, _refs: (
        measures if len(episodes) == 4 else np.array([episodes[0].mean()])
    )
    result = made(batch)
    if not noise_gate:
        assert result.status[4:] == ("shaped",) * 4
        np.testing.assert_allclose(result.score[4:], 0.6 * measures, atol=1e-7)
        return
    assert result.status[4:] == ("gated",) * 4
    np.testing.assert_allclose(result.score[4:], 0.3, atol=1e-7)
    assert result.metrics["num_gated"] == 4


def test_a_group_never_differs_by_a_rounding_error(taught):
    scores = taught(make_batch([0.2, 0.20001, 0.2, 0.9])).score
    gaps = np.diff(np.sort(scores.astype(np.float64)))
    assert not ((gaps > 0) & (gaps < 1e-7)).any()


def test_one_success_is_enough_and_its_number_is_told(reward):
    result = reward(make_batch([1, 0.1, 0.5, 0.9]))
    assert result.num_references.tolist() == [0, 1, 1, 1]
    assert result.reference_source == ("none", "batch", "batch", "batch")
    assert np.isfinite(result.score).all()
    assert result.metrics["noise"] >= 0


@pytest.mark.parametrize(
    "broken",
    [
        lambda f: np.full_like(f, np.nan),
        lambda f: np.where(np.arange(len(f))[:, None] == 3, np.inf, f).astype(np.float32),
        np.zeros_like,
        lambda f: f[:0],
    ],
    ids=["nan", "one infinite row", "zeros", "no rows"],
)
def test_broken_features_touch_their_own_episode_alone(taught, broken):
    batch = make_batch([1, 0.2, 0.9, 0.6, 1, 0.3, 0.7, 0.8])
    whole = taught(batch)
    result = taught(change_features(batch, 3, broken(batch.features[3])))
    assert result.status[3] == "invalid_features"
    others = np.arange(8) != 3
    in_group = [i for i in (1, 2) if result.status[i] == whole.status[i]]
    np.testing.assert_array_equal(result.score[in_group], whole.score[in_group])
    np.testing.assert_array_equal(result.score[others][3:], whole.score[others][3:])
    np.testing.assert_allclose(result.score[3], result.score[1:3].mean(), atol=1e-6)
    assert np.isnan(result.progress[3])
    assert result.metrics["num_invalid_features"] == 1


def test_a_success_with_broken_features_is_still_a_success_but_no_reference(reward):
    batch = make_batch([1, 1, 0.2, 0.9])
    result = reward(change_features(batch, 0, np.full_like(batch.features[0], np.nan)))
    assert result.score[:2].tolist() == [1.0, 1.0]
    assert result.num_references.tolist() == [0, 0, 1, 1]


def test_more_than_a_few_broken_episodes_stop_the_run(reward):
    batch = make_batch([1, 0.2, 0.9, 0.6])
    for row in (1, 2):
        batch = change_features(batch, row, np.zeros_like(batch.features[row]))
    with pytest.raises(
        ContractError, match="2 of 4 episodes have no usable features, .* episode 1"
    ):
        reward(batch)


@pytest.mark.parametrize("kind", RANKS)
def test_episodes_of_different_lengths_are_judged_by_content(kind):
    made = make(kind, **RANKS[kind])
    made.update(make_batch([1] * 8, seed=3, first_id=500))
    rng = np.random.default_rng(9)
    quick, slow = (episode(0.6, rng=rng, num_rows=n) for n in (6, 40))
    batch = make_batch([0.1, 0.6, 0.6, 0.95])
    batch = change_features(change_features(batch, 1, quick), 2, slow)
    progress = made(batch).progress
    assert progress[0] < progress[1:3].min() and progress[1:3].max() < progress[3]
    assert abs(progress[1] - progress[2]) < 0.25


def test_idle_frames_change_little():
    made = make("knn_align")
    made.update(make_batch([1] * 8, seed=3, first_id=500))
    batch = make_batch([0.3, 0.6, 0.9, 0.6])
    idle = np.concatenate([batch.features[1], np.repeat(batch.features[1][-1:], 60, axis=0)])
    result = made(change_features(batch, 3, idle))
    assert abs(result.progress[3] - result.progress[1]) < 0.1
    assert result.metrics["idle_share"] > 0.2


def test_layouts_are_taken_out_and_the_same_start_is_preferred():
    made = make("knn_align")
    batch = make_batch([1, 1, 1, 0.5, 1, 1, 1, 0.5])
    moved = change_features(batch, 3, batch.features[3] + 50)
    np.testing.assert_allclose(made(moved).progress[3], made(batch).progress[3], atol=1e-3)
    assert made(batch).num_references[3] == 3
    assert made(make_batch([1, 1, 0.5, 0.5, 1, 1, 1, 0.5])).num_references[3] == 5


def test_tasks_are_never_held_against_each_other(taught):
    batch = make_batch([0.2, 0.9, 0.4, 0.6], tasks=[1] * 4)
    assert set(taught(batch).status) == {"no_reference"}


def test_an_episode_is_known_by_its_own_id_and_not_by_its_start(reward):
    batch = make_batch([1, 0.1, 0.5, 0.9])
    assert len(set(reward(batch).progress[1:].tolist())) == 3 or reward(batch).metrics["noise"] >= 0
    assert len({f.tobytes() for f in batch.features}) == 4


def test_references_come_from_all_groups_of_the_batch(reward):
    result = reward(make_batch([0.2, 0.9, 0.4, 0.6, 1, 1, 1, 1]))
    assert result.num_references[:4].tolist() == [4] * 4
    assert set(result.reference_source[:4]) == {"batch"}


def test_references_are_bounded_deduplicated_and_forgotten_with_age():
    memory = ReferenceMemory(capacity=3, max_age=2)
    first = make_batch([1, 1, 0.5, 0.5])
    memory.add(first)
    memory.add(replace(first, episode_id=first.episode_id + 10))
    assert [r.episode_id for r in memory.of_task("mini/0")] == [0, 1]
    memory.add(make_batch([1, 1], seed=8, first_id=50))
    assert [r.episode_id for r in memory.of_task("mini/0")] == [50, 51]
    memory.add(make_batch([1, 1], seed=9, first_id=60))
    assert [r.episode_id for r in memory.of_task("mini/0")] == [51, 60, 61]


def test_another_encoder_is_an_error(taught):
    with pytest.raises(ContractError, match="features are of 'other', but the references of 'plan"):
        taught(replace(make_batch([0.2, 0.9, 0.4, 1]), feature_space="other"))


def test_no_failure_reaches_a_success(taught):
    batch = make_batch([1, 0.5, 0.5, 0.5])
    scores = taught(change_features(batch, 1, batch.features[0])).score
    assert scores[0] == 1.0
    assert scores[1:].max() <= taught._alpha < 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_looks_like_a_success_is_worth_less_the_more_often_the_task_is_solved(kind):
    """Else a policy may learn the pose of a success instead of succeeding."""
    made, plain = make(kind, anneal=True), make(kind)
    seldom = make_batch([1, 1] + [0.5] * 6, seed=3, first_id=500)
    often = make_batch([1, 1, 1, 1, 1, 1, 0.5, 0.5], seed=4, first_id=600)
    batch = make_batch([0.1, 0.4, 0.6, 0.95], first_id=900)
    for step, left in ((seldom, 1 - 0.25), (often, 1 - (0.8 * 0.25 + 0.2 * 0.75))):
        made.update(step)
        plain.update(step)
        np.testing.assert_allclose(made(batch).score, left * plain(batch).score, rtol=1e-5)
    again = make(kind, anneal=True)
    again.load_state_dict(made.state_dict())
    np.testing.assert_array_equal(again(batch).score, made(batch).score)


@pytest.mark.parametrize("alpha", [0, 1, 1.5, -0.1])
def test_alpha_leaves_room_below_a_success(alpha):
    with pytest.raises(ConfigError, match=f"alpha is {alpha}; a failure must be worth more than"):
        make("srpo", alpha=alpha)


@pytest.mark.parametrize("kind", RANKS)
def test_a_group_in_which_all_failed_can_teach(kind):
    """The outcome alone would drop it."""
    made = make(kind, **RANKS[kind])
    made.update(make_batch([1] * 8, seed=3, first_id=500))
    batch = make_batch([0.1, 0.4, 0.7, 0.95])
    scores = made(batch).score
    assert is_informative(torch.from_numpy(scores), torch.zeros(4, dtype=torch.int64)).all()
    assert np.argsort(scores).tolist() == [0, 1, 2, 3]


def test_held_out_episodes_leave_no_trace(taught):
    batch = make_batch([1, 0.5, 0.7, 1], split="held_out", first_id=5000)
    before = str(taught.state_dict())
    taught(batch)
    assert str(taught.state_dict()) == before
    with pytest.raises(ContractError, match="never learn of them"):
        taught.update(batch)
    assert str(taught.state_dict()) == before


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("knn_align", {"num_neighbours": 0}, "num_neighbours is 0; set at least 1"),
        ("knn_align", {"final_share": 0.0}, "final_share is 0.0; it is a share"),
        ("knn_align", {"memory_capacity": 0}, "memory_capacity is 0; set at least 1"),
        ("knn_align", {"max_invalid_share": 2.0}, "max_invalid_share is 2.0; it is a share"),
        ("knn_align", {"encoder": "pixel"}, "encoder is 'pixel'; did you mean 'pixels'?"),
        ("mean", {"temporal": "causl"}, "temporal is 'causl'; choose"),
        ("mean", {"pooling": "max"}, "pooling is 'max'; choose"),
        ("causal", {"pooling": "align"}, "a causal head has a progress of its own"),
        ("causal", {"head_steps": 0}, "head_steps is 0; set at least 1"),
    ],
)
def test_an_impossible_argument_is_refused(kind, arguments, message):
    with pytest.raises(ConfigError) as caught:
        make(kind, **arguments)
    assert message in str(caught.value)
    assert SEED == "seed"
