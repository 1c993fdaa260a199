"""The published SigLIP-T against its formula, and beside ours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.rewards import TrajectoryBatch, load_reward

PIXELS = {"encoder": "pixels", "encoder_args": {"grid": 4}}
SIZE = 16


def made(temporal: str = "none", **arguments):
    return load_reward("siglip_t_published", {**PIXELS, "temporal": temporal, **arguments})


def batch_of(angles: list[float], success: list[bool], task: str = "mini/0") -> TrajectoryBatch:
    """Episodes of 4 rows whose features point at an angle, degrees, from the successes'."""
    turn = np.deg2rad(angles)
    vectors = np.zeros((len(angles), SIZE), dtype=np.float32)
    vectors[:, 0], vectors[:, 1] = np.cos(turn), np.sin(turn)
    num = len(angles)
    return TrajectoryBatch(
        episode_id=np.arange(num),
        group_id=np.zeros(num, dtype=np.int64),
        task_key=(task,) * num,
        init_state_id=np.zeros(num, dtype=np.int64),
        success=np.array(success),
        num_steps=np.full(num, 32),
        frames=None,
        proprio=None,
        features=tuple(np.tile(vector, (4, 1)) for vector in vectors),
        feature_space="test",
    )


def test_scores_are_those_of_the_formula():
    angles = [0, 0, 10, 40, 75]
    result = made()(batch_of(angles, [True, True, False, False, False]))
    similarity = np.cos(np.deg2rad(angles[2:]))
    stretched = (similarity - similarity.min()) / np.ptp(similarity)
    expected = 0.6 / (1 + np.exp(-10 * (stretched - 0.5)))
    np.testing.assert_allclose(result.score, [1, 1, *expected], rtol=1e-5)
    np.testing.assert_allclose(result.progress[2:], similarity, rtol=1e-5)
    assert result.score[2:].max() == pytest.approx(0.596, abs=1e-3)
    assert result.score[2:].min() == pytest.approx(0.004, abs=1e-3)


def test_failures_that_hardly_differ_are_stretched_as_far_and_by_ours_are_not():
    batch = batch_of([0, 0, 20, 20.5, 21], [True, True, False, False, False])
    published = made()(batch).score[2:]
    assert np.ptp(published) > 0.59
    # ours subtracts the first row, so give it a start that all episodes share
    start = np.zeros((1, SIZE), dtype=np.float32)
    moved = tuple(np.concatenate([start, rows]) for rows in batch.features)
    ours = load_reward("siglip_t", {**PIXELS, "temporal": "none"})
    assert np.ptp(ours(replace(batch, features=moved)).score[2:]) < 0.01


def test_without_a_success_failures_score_nothing_and_equal_ones_the_middle():
    assert not made()(batch_of([10, 20], [False, False])).score.any()
    result = made()(batch_of([0, 30, 30], [True, False, False]))
    np.testing.assert_allclose(result.score[1:], 0.3, atol=1e-6)


def test_the_random_embedding_is_a_function_of_the_seed_alone():
    batch = batch_of([0, 20, 60], [True, False, False])
    first, again = made("additive", seed=3)(batch), made("additive", seed=3)(batch)
    other = made("additive", seed=4)(batch)
    assert np.array_equal(first.progress, again.progress)
    assert not np.array_equal(first.progress, other.progress)
    assert not np.array_equal(first.progress, made()(batch).progress)


def test_the_last_rows_are_pooled():
    batch = batch_of([0, 0], [True, False])
    turned = batch.features[1].copy()
    turned[0] = -turned[0]  # an early row that points away
    changed = replace(batch, features=(batch.features[0], turned))
    assert made(last_k=3)(changed).progress[1] == pytest.approx(1.0)
    assert made(last_k=0)(batch_of([0, 90], [True, False])).progress[1] == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temporal": "causal"}, "temporal is 'causal'"), ({"last_k": -1}, "last_k is -1")],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        load_reward("siglip_t_published", {**PIXELS, **options})
