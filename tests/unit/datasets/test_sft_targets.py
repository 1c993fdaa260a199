"""What is learned from recorded actions, against openvla's own rules."""

from __future__ import annotations

import numpy as np
import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.datasets.action_targets import (
    action_chunks,
    measure_statistics,
    moving_steps,
    target_action_tokens,
    to_dataset_units,
)
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.policies.normalization import load_statistics, save_statistics

IDLE = np.zeros(6)


def actions(*rows: tuple[float, float]) -> np.ndarray:
    """Steps of a motion along x and a gripper command."""
    return np.array([[x, 0, 0, 0, 0, 0, grip] for x, grip in rows])


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([(0, -1), (0.5, -1)], [1]),  # the first step's gripper is not asked
        ([(0.5, -1), (0, -1), (0.5, -1)], [0, 2]),
        ([(0.5, -1), (0, 1), (0, 1), (0.5, 1)], [0, 1, 3]),  # closing is no idling
        ([(0, 1), (0.5, -1), (0, -1)], [1]),
        ([(0.00009, -1), (0.00011, -1), (0.00009, -1)], [1]),
        ([(0.5, -1), (0, -1), (0, 1), (0, -1)], [0, 2, 3]),  # compared with the last one kept
    ],
)
def test_idle_steps_are_found(rows: list[tuple[float, float]], kept: list[int]) -> None:
    assert moving_steps(actions(*rows)).tolist() == kept


def test_the_gripper_becomes_an_opening() -> None:
    found = to_dataset_units(actions((0.1, -1), (0.1, 1), (0.1, 0), (0.1, 0.25)))
    assert found[:, -1].tolist() == [1.0, 0.0, 1.0, 0.75]
    assert found.dtype == np.float32


def test_ranges_are_quantiles_of_all_episodes(tmp_path) -> None:
    rng = np.random.default_rng(0)
    episodes = [rng.uniform(-1, 1, (n, 7)).astype(np.float32) for n in (400, 700)]
    for episode in episodes:
        episode[:, -1] = np.sign(episode[:, -1])
        episode[:, 4] = 0.0
    found = measure_statistics(episodes, key="libero_spatial_no_noops")
    everything = np.concatenate(episodes)
    assert np.array_equal(found.q01[:6], np.quantile(everything, 0.01, axis=0)[:6])
    assert np.array_equal(found.q99[:6], np.quantile(everything, 0.99, axis=0)[:6])
    assert (found.q01[6], found.q99[6], found.q01[4], found.q99[4]) == (0, 1, 0, 0)
    assert found.mask.tolist() == [True] * 6 + [False]
    save_statistics(tmp_path, found)
    again = load_statistics(tmp_path, "libero_spatial")
    assert again.key == "libero_spatial_no_noops"
    assert np.array_equal(again.q01, found.q01)
    with pytest.raises(ConfigError, match="no demonstrations to measure"):
        measure_statistics([], key="x")


def test_the_last_steps_begin_no_chunk() -> None:
    """openvla-oft's `chunk_act_obs` keeps T - (K - 1) steps, so nothing is repeated."""
    episode = np.arange(35, dtype=np.float32).reshape(5, 7)
    chunks = action_chunks(episode, 3)
    assert chunks.shape == (3, 3, 7)
    assert all(np.array_equal(chunks[i], episode[i : i + 3]) for i in range(3))
    with pytest.raises(ConfigError, match="5 actions, but the policy acts 6 steps"):
        action_chunks(episode, 6)


def test_the_bins_command_what_was_recorded() -> None:
    rng = np.random.default_rng(1)
    episode = rng.uniform(-0.9, 0.9, (30, 7)).astype(np.float32)
    episode[:, -1] = np.where(np.arange(30) < 12, -1, 1)
    codec = ActionCodec(
        num_bins=256,
        chunk_length=4,
        action_dim=7,
        statistics=measure_statistics([episode], key="x"),
    )
    action_tokens = target_action_tokens(episode, codec)
    assert action_tokens.shape == (27, 28)
    commanded = codec.to_simulator(action_tokens)
    cell = (codec.statistics.q99 - codec.statistics.q01)[:6] / 255
    wanted = action_chunks(np.clip(episode, codec.statistics.q01, codec.statistics.q99), 4)
    assert (np.abs(commanded - wanted)[..., :6] <= cell + 1e-6).all()
    assert np.array_equal(commanded[..., 6], action_chunks(episode, 4)[..., 6])
