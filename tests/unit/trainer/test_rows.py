"""Trajectories as veRL's rows, held against the functions of veRL that will read them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_store import one_by_one, rewards_of
from step_tables import episode_column, step_tables
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested

from verl_vla.core.tables import Trajectories, map_columns
from verl_vla.rl.advantage import group_advantage
from verl_vla.rl.loss import executed_mask
from verl_vla.trainer.grpo.advantage import row_advantages, tag_advantages
from verl_vla.trainer.grpo.rows import (
    RowKey,
    dense,
    group_key,
    group_of,
    lengths,
    make_rows,
    pack_like_language_model,
    right_padded,
    score_tags,
    stacked,
)
from verl_vla.trainer.verl_compat.process import ADV_ESTIMATOR

CHUNK, DIM = 4, 2
TOKENS = CHUNK * DIM


def make_trajectories(groups: list[int], num_policy_steps: list[int]) -> Trajectories:
    """One episode per entry; its last chunk is cut after one action."""
    episode, is_last = episode_column(num_policy_steps)
    count = len(episode)
    rng = torch.Generator().manual_seed(0)
    return step_tables(
        groups,
        episode,
        image=torch.randint(0, 255, (count, 1, 2, 2, 3), generator=rng, dtype=torch.uint8),
        action_tokens=torch.randint(0, 256, (count, TOKENS), generator=rng),
        log_probs=-torch.rand(count, TOKENS, generator=rng),
        executed=torch.where(is_last, 1, CHUNK),
        prompt_ids=[torch.arange(3 + i % 4) + 1000 for i in range(count)],
        outcome=torch.arange(len(groups)) % 2,
    )


def rows_of(trajectories: Trajectories, **rows: slice):
    return make_rows(trajectories, chunk_length=CHUNK, global_step=5, **rows)


def scored_rows_of(trajectories: Trajectories, score: list[float]):
    """Keys, columns and tags as the trainer finds them once the scores are known."""
    keys, fields, tags = rows_of(trajectories)
    last, scores = score_tags(trajectories, np.array(score, dtype=np.float32))
    known = dict(zip(last, scores, strict=True))
    # TransferQueue adds entries of a tag to those that are there
    return (
        keys,
        fields,
        [tag | (known[key] if key in known else {}) for key, tag in zip(keys, tags, strict=True)],
    )


def algorithm(estimator: str) -> SimpleNamespace:
    return SimpleNamespace(adv_estimator=estimator)


def jagged(rows) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


@pytest.mark.parametrize("group", [0, 7, 12345])
def test_a_group_is_found_again_from_all_keys_that_veRL_makes_of_it(group):  # noqa: N802
    key = group_key(group)
    assert "_" not in key
    assert group_of(key) == RowKey.parse(f"{key}_3_0").group == group


def test_keys_say_group_episode_and_policy_step():
    keys, _, _ = rows_of(make_trajectories([12, 3, 12, 3], [2, 1, 1, 3]))
    assert keys == ["g12_0_0", "g12_0_1", "g3_1_0", "g12_2_0", "g3_3_0", "g3_3_1", "g3_3_2"]


def test_a_row_is_a_prompt_and_the_bins_of_one_policy_step():
    played = make_trajectories([3, 3], [2, 1])
    _, fields, tags = rows_of(played)
    mask = executed_mask(played.policy_steps.executed, chunk_length=CHUNK, action_dim=DIM)
    for i, (row, tag) in enumerate(zip(one_by_one(fields), tags, strict=True)):
        prompt = played.prompt_ids[i]
        assert torch.equal(row["prompts"], prompt)
        assert torch.equal(row["responses"], played.policy_steps.action_tokens[i])
        assert torch.equal(row["response_mask"], mask[i].long())
        assert torch.equal(row["loss_mask"], mask[i].long())
        for name in ("rollout_log_probs", "old_log_probs"):
            assert torch.equal(row[name], played.policy_steps.log_probs[i])
        assert torch.equal(row["images"], played.policy_steps.image[i])
        assert torch.equal(row["proprio"], played.policy_steps.proprio[i])
        assert tag["status"] == "success"
        assert (tag["prompt_len"], tag["response_len"]) == (len(prompt), TOKENS)
        assert tag["seq_len"] == len(prompt) + TOKENS
        assert {tag[f"{which}global_steps"] for which in ("", "min_", "max_")} == {5}


def test_a_slice_of_the_rows_is_that_of_their_keys_columns_and_tags():
    played = make_trajectories([3, 3, 4], [2, 1, 3])
    keys, fields, tags = rows_of(played)
    some = slice(1, 4)
    part_keys, part, part_tags = rows_of(played, rows=some)
    assert part_keys == keys[some] == ["g3_0_1", "g3_1_0", "g4_2_0"]
    assert part_tags == tags[some]
    for mine, whole in zip(one_by_one(part), one_by_one(fields)[some], strict=True):
        assert mine.keys() == whole.keys()
        assert all(torch.equal(mine[name], whole[name]) for name in mine)


def test_the_images_of_rows_are_not_copied():
    played = make_trajectories([3, 4], [2, 3])
    _, fields, _ = rows_of(played, rows=slice(1, 4))
    whole = played.policy_steps.image
    assert fields["images"].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("length, is_nested", [([4, 4, 4], False), ([4, 3, 4], True)])
def test_prompts_are_jagged_where_their_lengths_differ(length: list[int], is_nested: bool):
    played = replace(make_trajectories([3], [3]), prompt_ids=tuple(torch.arange(n) for n in length))
    _, fields, _ = rows_of(played)
    assert fields["prompts"].is_nested == is_nested
    assert [len(row["prompts"]) for row in one_by_one(fields)] == length


def test_every_row_knows_how_long_its_whole_trajectory_was():
    _, fields, _ = rows_of(make_trajectories([3, 3], [2, 3]))
    steps = fields["trajectory_steps"].tolist()
    assert steps == [[CHUNK + 1]] * 2 + [[2 * CHUNK + 1]] * 3


def test_rows_of_episodes_that_lie_between_each_other_keep_their_order():
    played = make_trajectories([3, 4], [2, 2])
    order = torch.tensor([2, 0, 3, 1])
    mixed = Trajectories(
        episodes=played.episodes,
        policy_steps=map_columns(played.policy_steps, lambda column: column[order]),
        prompt_ids=tuple(played.prompt_ids[i] for i in order),
        goals=played.goals,
    )
    keys, fields, _ = rows_of(mixed)
    assert keys == ["g4_1_0", "g3_0_0", "g4_1_1", "g3_0_1"]
    assert torch.equal(fields["responses"], played.policy_steps.action_tokens[order])
    steps = played.episodes.num_steps[played.policy_steps.episode[order]]
    assert fields["trajectory_steps"].flatten().tolist() == steps.tolist()
    last, _ = score_tags(mixed, np.zeros(2, dtype=np.float32))
    assert last == ["g3_0_1", "g4_1_1"]


def test_the_score_stands_in_the_tag_of_the_last_row_of_a_trajectory():
    played = make_trajectories([3, 3], [2, 1])
    _, _, before = rows_of(played)
    _, _, tags = scored_rows_of(played, [0.75, -0.5])
    assert ["score" in tag for tag in before] == [False] * 3
    assert tags == [before[0], before[1] | {"score": 0.75}, before[2] | {"score": -0.5}]


def test_an_episode_without_policy_steps_makes_no_row_and_keeps_its_number():
    keys, _, _ = rows_of(make_trajectories([3, 3, 3], [1, 0, 1]))
    assert keys == ["g3_0_0", "g3_2_0"]


def test_an_episode_without_policy_steps_has_no_tag_to_put_its_score_into():
    keys, tags = score_tags(
        make_trajectories([3, 3, 3], [1, 0, 1]),
        np.array([0.5, 1.0, 0.25], dtype=np.float32),
    )
    assert keys == ["g3_0_0", "g3_2_0"]
    assert tags == [{"score": 0.5}, {"score": 0.25}]


def test_no_trajectories_have_no_scores():
    nothing = make_trajectories([3], [1]).select(torch.tensor([False]))
    assert score_tags(nothing, np.zeros(0, dtype=np.float32)) == ([], [])


def test_verl_packs_the_rows_and_they_come_out_unchanged():
    _, fields, _ = rows_of(make_trajectories([3, 4], [2, 3]))
    rows = one_by_one(fields)
    packed = TensorDict(
        {name: jagged(row[name] for row in rows) for name in rows[0]}, batch_size=len(rows)
    )
    sizes = [len(row["prompts"]) for row in rows]
    assert packed["prompts"].offsets().diff().tolist() == sizes
    assert lengths(packed["prompts"]).tolist() == sizes
    assert torch.equal(stacked(packed["images"]), fields["images"])
    assert torch.equal(stacked(packed["trajectory_steps"]), fields["trajectory_steps"])


def test_verl_computes_our_advantage_from_the_rows():
    """Its estimator looks at each trajectory's last row and spreads what it finds."""
    played = make_trajectories([7, 7, 7, 2, 2], [2, 1, 3, 2, 2])
    score = [1.0, 0.0, 0.25, 1.0, 0.0]
    keys, fields, tags = scored_rows_of(played, score)
    rewards = rewards_of(fields["response_mask"], tags)
    data = DataProto.from_single_dict(
        {
            "response_mask": fields["response_mask"],
            "rm_scores": rewards,
            "token_level_rewards": rewards,
            "uid": np.array([group_key(RowKey.parse(key).group) for key in keys], dtype=object),
        }
    )
    theirs = compute_advantage_for_multi_trajectories(data, batch_keys=keys, adv_estimator="grpo")
    for name in (ADV_ESTIMATOR, "grpo"):
        # a row of padding, as veRL adds them, changes nothing
        ours = row_advantages([*keys, "pad0f_0_0"], [*tags, tags[-1]], algorithm(name))
        assert ours[-1] == 0
        expected = ours[:-1, None] * fields["response_mask"]
        assert torch.equal(theirs.batch["advantages"], expected), name
    by_episode = group_advantage(torch.tensor(score), played.episodes.group_id)
    assert torch.equal(
        row_advantages(keys, tags, algorithm(ADV_ESTIMATOR)),
        by_episode[played.policy_steps.episode],
    )


def test_a_row_that_verl_fills_up_with_carries_no_gradient_and_a_finite_weight():
    _, fields, tags = rows_of(make_trajectories([3], [2]))
    first, second = one_by_one(fields)
    row, tag = construct_minimal_padding_template(first, tags[0], eos_token_id=31_999)
    assert tag["is_padding"]
    assert int(row["response_mask"].sum()) == 0
    assert int(row["trajectory_steps"]) > 0
    assert row["images"].shape == first["images"].shape
    mask = dense(jagged([row["response_mask"], second["response_mask"]]), TOKENS)
    assert mask[0].sum() == 0 and torch.equal(mask[1], second["response_mask"])


ragged = st.lists(st.tuples(st.integers(1, 6), st.integers(1, TOKENS)), min_size=1, max_size=5)


@given(ragged)
@settings(max_examples=40)
def test_packed_values_are_what_verl_takes_for_a_language_models(sizes):
    prompts = jagged(torch.zeros(p, dtype=torch.int64) for p, _ in sizes)
    responses = jagged(torch.zeros(t, dtype=torch.int64) for _, t in sizes)
    values = torch.zeros(len(sizes), TOKENS)
    for row, (_, t) in enumerate(sizes):
        values[row, :t] = torch.arange(t) + 100 * row + 1
    packed = pack_like_language_model(values, prompts, responses)

    assert lengths(packed).tolist() == [p + t for p, t in sizes]
    batch = TensorDict({"prompts": prompts, "responses": responses}, batch_size=len(sizes))
    widest = max(t for _, t in sizes)
    assert torch.equal(no_padding_2_padding(packed, batch), values[:, :widest])
    back = response_from_nested(packed, responses)
    for row, (_, t) in enumerate(sizes):
        assert torch.equal(back[row], values[row, :t])


def test_packing_lets_the_gradient_through():
    values = torch.rand(2, 3, requires_grad=True)
    prompts = jagged([torch.zeros(2), torch.zeros(1)])
    responses = jagged([torch.zeros(3), torch.zeros(1)])
    pack_like_language_model(values, prompts, responses).values().sum().backward()
    assert values.grad.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_dense_pads_on_the_right_to_the_width_that_was_asked_for():
    rows = jagged([torch.tensor([1, 2]), torch.tensor([3])])
    assert dense(rows, 4).tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]]


def test_dense_takes_rows_whose_longest_length_was_forgotten():
    """Ray carries values and offsets; what torch had noted of the lengths is lost."""
    bare = torch.nested.nested_tensor_from_jagged(
        torch.tensor([1, 2, 3]), offsets=torch.tensor([0, 2, 3])
    )
    assert dense(bare, 2).tolist() == [[1, 2], [3, 0]]


def test_right_padded_gives_ids_and_their_mask():
    ids, mask = right_padded(jagged([torch.tensor([5, 6, 7]), torch.tensor([8])]))
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert mask.dtype == torch.int64


def test_stacked_leaves_a_dense_tensor_alone():
    rows = torch.rand(2, 3)
    assert stacked(rows) is rows


def test_every_row_is_tagged_with_the_advantage_of_its_episode_and_padding_with_none():
    keys, _, tags = scored_rows_of(make_trajectories([3, 3], [2, 1]), [1.0, 0.0])
    # veRL copies the tag of the first row, here one that has a score
    order = [2, 0, 1]
    batch = KVBatchMeta(
        keys=[*(keys[i] for i in order), "pad_0_0"],
        tags=[*(tags[i] for i in order), tags[2] | {"is_padding": True}],
        partition_id="train",
        fields=["images"],
        extra_info={"temperature": 1.5},
    )
    tagged = tag_advantages(batch, algorithm(ADV_ESTIMATOR))
    won, lost = group_advantage(torch.tensor([1.0, 0.0]), torch.tensor([3, 3])).tolist()
    assert [tag["advantage"] for tag in tagged.tags] == [lost, won, won, 0.0]
    assert [tag["seq_len"] for tag in tagged.tags] == [tag["seq_len"] for tag in batch.tags]
    assert (tagged.keys, tagged.partition_id) == (batch.keys, "train")
    assert (tagged.fields, tagged.extra_info) == (["images"], {"temperature": 1.5})


def test_an_episode_whose_score_is_missing_is_an_error():
    keys, _, tags = rows_of(make_trajectories([3, 3], [2, 1]))
    with pytest.raises(KeyError):
        row_advantages(keys, tags, algorithm(ADV_ESTIMATOR))
