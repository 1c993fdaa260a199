from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.policies.normalization import (
    ActionStatistics,
    load_proprio_stats,
    load_statistics,
    save_statistics,
)

NUM_BINS, CHUNK, DIM = 256, 8, 7
# dataset_statistics.json of the published libero_10 checkpoint, five digits.
LIBERO_10 = ActionStatistics(
    q01=[-0.63482, -0.77411, -0.76339, -0.09750, -0.14820, -0.27429, 0.0],
    q99=[0.77143, 0.84643, 0.93750, 0.13929, 0.15964, 0.32464, 1.0],
    mask=[True] * 6 + [False],
    key="libero_10_no_noops",
)
FROZEN_ROTATION = ActionStatistics(
    q01=[-0.6, -0.6, -0.6, 0.0, 0.0, 0.25, 0.0],
    q99=[0.7, 0.7, 0.7, 0.0, 0.0, 0.25, 1.0],
    mask=[True] * 6 + [False],
)


def make_codec(statistics: ActionStatistics = LIBERO_10) -> ActionCodec:
    return ActionCodec(NUM_BINS, CHUNK, DIM, statistics)


def all_action_tokens(value: int) -> torch.Tensor:
    return torch.full((1, CHUNK * DIM), value, dtype=torch.int64)


def write(folder: Path, content: object) -> Path:
    (folder / "dataset_statistics.json").write_text(json.dumps(content))
    return folder


def entry(**changes: object) -> dict[str, object]:
    return {"action": {"q01": [0, 0], "q99": [1, 1], "mask": [True, False]} | changes}


def test_every_bin_decodes_as_openvla_decodes_its_token_id() -> None:
    edges = np.linspace(-1, 1, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    for k in range(NUM_BINS):
        token_id = 31744 + k
        published = centres[np.clip(32000 - token_id - 1, 0, 254)]  # modeling_prismatic.py
        assert make_codec().decode(all_action_tokens(k))[0, 0, 0] == published


def test_two_ids_share_the_largest_action_and_all_others_differ() -> None:
    decoded = [make_codec().decode(all_action_tokens(k))[0, 0, 0] for k in range(NUM_BINS)]
    assert decoded[0] == decoded[1] == max(decoded)
    assert len(set(decoded)) == NUM_BINS - 1


@pytest.mark.parametrize(("value", "token_id"), [(0.0, 31872), (1.0, 31744), (-1.0, 31999)])
def test_labels_of_fine_tuning(value: float, token_id: int) -> None:
    action_tokens = make_codec().encode(np.full((CHUNK, DIM), value))
    assert action_tokens.dtype == torch.int64
    assert set(action_tokens.tolist()) == {token_id - 31744}


def test_tokens_are_ordered_time_first() -> None:
    action_tokens = torch.arange(CHUNK * DIM).unsqueeze(0) + 1
    decoded = make_codec().decode(action_tokens)
    assert decoded.shape == (1, CHUNK, DIM)
    flat = decoded.reshape(-1)
    assert np.all(np.diff(flat) < 0)
    assert torch.equal(make_codec().encode(decoded), action_tokens)


def test_a_rare_value_is_normalised_to_the_ends_and_a_constant_to_zero(tmp_path: Path) -> None:
    """openvla-oft ``normalize_action_and_proprio``: zero only where min and max agree."""
    quantiles = {"q01": [0.0, 0.0], "q99": [0.0, 0.0], "mask": [True, True]}
    stats = ActionStatistics(**quantiles, extremes=np.array([[-1.0, 0.0], [1.0, 0.0]]))
    save_statistics(tmp_path, stats)
    for known in (stats, load_statistics(tmp_path)):
        assert known.normalize([0.0, 0.0]).tolist() == [-1.0, 0.0]
        assert known.normalize([0.3, 0.0]).tolist() == [1.0, 0.0]
        assert known.unnormalize([1.0, 1.0]).tolist() == [0.0, 0.0]
    assert ActionStatistics(**quantiles).normalize([0.3, 0.0]).tolist() == [0.0, 0.0]


@given(st.lists(st.integers(0, NUM_BINS - 1), min_size=CHUNK * DIM, max_size=CHUNK * DIM))
def test_encoding_a_decoded_bin_gives_it_back(chosen: list[int]) -> None:
    action_tokens = torch.tensor([chosen])
    again = make_codec().encode(make_codec().decode(action_tokens))
    assert torch.equal(again, action_tokens.clamp(min=1))


@given(st.floats(-1.5, 1.5))
def test_quantisation_loses_at_most_half_a_cell(value: float) -> None:
    codec = make_codec()
    decoded = codec.decode(codec.encode(np.full((1, CHUNK, DIM), value)))
    assert np.abs(decoded - np.clip(value, -1, 1)).max() <= 1 / 255 + 1e-12


def test_unnormalised_range_is_the_datasets() -> None:
    codec = make_codec()
    motion = slice(0, 6)
    assert np.allclose(codec.unnormalize(-np.ones(DIM))[motion], LIBERO_10.q01[motion], atol=1e-7)
    assert np.allclose(codec.unnormalize(np.ones(DIM))[motion], LIBERO_10.q99[motion], atol=1e-7)
    assert codec.unnormalize(np.full(DIM, 0.3))[6] == 0.3


def test_normalising_inverts_unnormalising_and_clips() -> None:
    codec = make_codec()
    values = np.linspace(-1, 1, 5)[:, None].repeat(DIM, 1)
    assert np.allclose(codec.normalize(codec.unnormalize(values)), values, atol=1e-6)
    assert codec.normalize(np.full(DIM, 99.0))[:6].tolist() == [1.0] * 6


def test_gripper_command() -> None:
    assert make_codec().gripper([0.0, 0.4, 0.6, 1.0]).tolist() == [1.0, 1.0, -1.0, -1.0]


def test_a_bin_becomes_a_simulator_command() -> None:
    codec = make_codec()
    most = codec.to_simulator(all_action_tokens(0))  # the largest value: gripper 1, open
    least = codec.to_simulator(all_action_tokens(255))
    middle = codec.to_simulator(all_action_tokens(128))  # gripper 0, closed
    assert most.dtype == np.float32 and most.shape == (1, CHUNK, DIM)
    assert most[0, 0, 6] == -1 and least[0, 0, 6] == 1 and middle[0, 0, 6] == 1
    assert np.all(most[0, 0, :6] > LIBERO_10.q99[:6] - 0.01)
    assert np.all(least[0, 0, :6] < LIBERO_10.q01[:6] + 0.01)


def test_a_value_that_never_moves_decodes_to_its_constant_whatever_the_bin() -> None:
    codec = make_codec(FROZEN_ROTATION)
    for k in (0, 7, 255):
        assert (
            codec.to_simulator(all_action_tokens(k))[0, :, 3:6].tolist()
            == [[0.0, 0.0, 0.25]] * CHUNK
        )
    actions = codec.to_simulator(all_action_tokens(9))
    labels = codec.from_simulator(actions).view(1, CHUNK, DIM)
    assert torch.all(labels[..., 3:6] == codec.encode(np.zeros((CHUNK, DIM)))[0])


@given(st.lists(st.integers(0, NUM_BINS - 1), min_size=CHUNK * DIM, max_size=CHUNK * DIM))
def test_labelling_a_played_chunk_plays_the_same_chunk(chosen: list[int]) -> None:
    codec = make_codec()
    played = codec.to_simulator(torch.tensor([chosen]))
    again = codec.to_simulator(codec.from_simulator(played))
    assert np.allclose(again, played, atol=1e-6)


def test_labelling_does_not_change_the_actions_it_is_given() -> None:
    actions = make_codec().to_simulator(all_action_tokens(10))
    before = actions.copy()
    make_codec().from_simulator(actions)
    assert np.array_equal(actions, before)


@pytest.mark.parametrize(
    "action_tokens",
    [
        torch.full((1, CHUNK * DIM), NUM_BINS),
        torch.full((1, CHUNK * DIM), -1),
        torch.zeros(1, CHUNK * DIM - 1, dtype=torch.int64),
        torch.zeros(1, CHUNK * DIM),
    ],
)
def test_impossible_bins_are_refused(action_tokens: torch.Tensor) -> None:
    with pytest.raises(ContractError, match="action tokens"):
        make_codec().decode(action_tokens)


def test_actions_of_another_shape_are_refused() -> None:
    with pytest.raises(ContractError, match=r"\[..., \(8, 7\)\]"):
        make_codec().encode(np.zeros((1, DIM, CHUNK)))


def test_a_codec_refuses_statistics_of_another_robot() -> None:
    with pytest.raises(ConfigError, match="7 action values, the policy has 14"):
        ActionCodec(NUM_BINS, CHUNK, 14, LIBERO_10)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q01": [0.0]}, "one number per action value"),
        ({"q01": [2.0, 0.0]}, "reversed"),
        ({"q99": [float("nan"), 1.0]}, "finite"),
    ],
)
def test_impossible_statistics_are_refused(changes: dict[str, list[float]], reason: str) -> None:
    fields = {"q01": [0.0, 0.0], "q99": [1.0, 1.0], "mask": [True, False]} | changes
    with pytest.raises(ConfigError, match=reason):
        ActionStatistics(**fields)


def test_statistics_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        LIBERO_10.q01[0] = 0


def test_saved_statistics_are_read_back_exactly(tmp_path: Path) -> None:
    save_statistics(tmp_path, LIBERO_10)
    again = load_statistics(tmp_path)
    assert again.key == LIBERO_10.key and again.gripper_dims == (6,)
    for name in ("q01", "q99", "mask"):
        assert np.array_equal(getattr(again, name), getattr(LIBERO_10, name))


def test_a_suite_finds_its_filtered_dataset(tmp_path: Path) -> None:
    write(tmp_path, {"libero_goal_no_noops": entry(q99=[5, 1]), "libero_10": entry()})
    assert load_statistics(tmp_path, "libero_goal").q99.tolist() == [5.0, 1.0]
    assert load_statistics(tmp_path, "libero_10").q99.tolist() == [1.0, 1.0]
    assert load_statistics(tmp_path, "libero_goal_no_noops").key == "libero_goal_no_noops"


def test_a_choice_between_datasets_is_never_made_silently(tmp_path: Path) -> None:
    write(tmp_path, {"b": entry(), "a": entry()})
    with pytest.raises(ConfigError, match=r"set unnorm_key to one of \['a', 'b'\]"):
        load_statistics(tmp_path)
    with pytest.raises(ConfigError, match=r"unnorm_key is 'c'.*choose one of \['a', 'b'\]"):
        load_statistics(tmp_path, "c")


def test_a_folder_without_statistics_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no dataset_statistics.json.*copy the file") as e:
        load_statistics(tmp_path)
    assert str(tmp_path) in str(e.value)


def test_an_incomplete_dataset_names_what_it_lacks(tmp_path: Path) -> None:
    write(tmp_path, {"a": {"action": {"q01": [0], "q99": [1]}}})
    with pytest.raises(ConfigError, match=r"'a' lacks \['mask'\]"):
        load_statistics(tmp_path)


def test_two_grippers_are_commanded_by_sign_and_none_at_all_as_the_data_says() -> None:
    """Joints of two arms: `RoboTwin` normalises its grippers like them."""
    one_arm = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    arms = {name: values * 2 for name, values in one_arm.items()}
    two = ActionStatistics(**arms, mask=([True] * 6 + [False]) * 2)
    none = ActionStatistics(**arms, mask=[True] * 14)
    assert (two.gripper_dims, none.gripper_dims) == ((6, 13), ())
    action_tokens = torch.zeros((1, 25 * 14), dtype=torch.int64)  # the largest value: open
    for statistics, at_grippers in ((two, -1.0), (none, 1.0)):
        codec = ActionCodec(NUM_BINS, 25, 14, statistics)
        actions = codec.to_simulator(action_tokens)
        assert actions.shape == (1, 25, 14)
        assert np.allclose(actions[..., [6, 13]], at_grippers, atol=0.01)
        assert np.allclose(actions[..., :6], 1.0, atol=0.01)
        assert torch.equal(codec.from_simulator(actions).clamp(min=1), action_tokens.clamp(min=1))


def test_bounds_are_read_from_other_columns_and_written_back(tmp_path: Path) -> None:
    action = {"q01": [0.1] * 2, "q99": [0.9] * 2, "min": [0, 0], "max": [1, 2], "mask": [True] * 2}
    proprio = {"min": [-1, 0, 5], "max": [1, 4, 5]}
    write(tmp_path, {"lift_pot_1k": {"action": action, "proprio": proprio}})
    found = load_statistics(tmp_path, normalization="bounds")
    assert (found.q01.tolist(), found.q99.tolist()) == ([0, 0], [1, 2])
    assert load_statistics(tmp_path).q99.tolist() == [0.9, 0.9]
    ranges = load_proprio_stats(tmp_path, normalization="bounds")
    assert ranges.normalize([[0, 4, 5], [-9, 0, 7]]).round(6).tolist() == [[0, 1, 0], [-1, -1, 0]]
    with pytest.raises(ConfigError, match=r"'lift_pot_1k' lacks \['q01', 'q99'\]"):
        load_proprio_stats(tmp_path)
    save_statistics(tmp_path, found, ranges)
    again = load_proprio_stats(tmp_path, "lift_pot_1k", "bounds")
    assert np.array_equal(again.q99, ranges.q99)
    assert load_statistics(tmp_path, normalization="bounds").q99.tolist() == [1, 2]


def test_a_policy_that_reads_proprio_needs_its_ranges(tmp_path: Path) -> None:
    write(tmp_path, {"a": entry()})
    with pytest.raises(ConfigError, match=r"'a' lacks \['proprio'\]"):
        load_proprio_stats(tmp_path)
