"""Trajectories as veRL's rows, held against the functions of veRL that will read them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_store import RowStore
from step_tables import episode_column, step_tables
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested

from verl_vla.core.tables import Trajectories
from verl_vla.rl.advantage import group_advantage
from verl_vla.rl.loss import executed_mask
from verl_vla.trainer.grpo.advantage import row_advantages, write_advantages
from verl_vla.trainer.grpo.rows import (
    RowKey,
    dense,
    group_key,
    group_of,
    lengths,
    make_rows,
    pack_like_language_model,
    right_padded,
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


def rows_of(trajectories: Trajectories, score: list[float] | None = None):
    given = np.zeros(len(trajectories.episodes)) if score is None else np.array(score)
    return make_rows(trajectories, given.astype(np.float32), chunk_length=CHUNK, global_step=5)


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
    for i, (row, tag) in enumerate(zip(fields, tags, strict=True)):
        prompt = played.prompt_ids[i]
        assert row["uid"] == "g3"
        assert torch.equal(row["prompts"], prompt)
        assert torch.equal(row["responses"], played.policy_steps.action_tokens[i])
        assert (
            row["input_ids"].tolist()
            == prompt.tolist() + played.policy_steps.action_tokens[i].tolist()
        )
        assert row["position_ids"].tolist() == list(range(len(prompt) + TOKENS))
        assert torch.equal(row["response_mask"], mask[i].long())
        assert torch.equal(row["loss_mask"], mask[i].long())
        assert torch.equal(row["rollout_log_probs"], played.policy_steps.log_probs[i])
        assert torch.equal(row["images"], played.policy_steps.image[i])
        assert tag["status"] == "success"
        assert tag["prompt_len"] + tag["response_len"] == tag["seq_len"] == len(row["input_ids"])
        assert {tag[f"{which}global_steps"] for which in ("", "min_", "max_")} == {5}


def test_every_row_knows_how_long_its_whole_trajectory_was():
    _, fields, _ = rows_of(make_trajectories([3, 3], [2, 3]))
    steps = [row["trajectory_steps"].tolist() for row in fields]
    assert steps == [[CHUNK + 1]] * 2 + [[2 * CHUNK + 1]] * 3


def test_the_score_stands_on_the_last_executed_token_of_a_trajectory():
    _, fields, _ = rows_of(make_trajectories([3, 3], [2, 1]), score=[0.75, -0.5])
    rewards = torch.stack([row["rm_scores"] for row in fields])
    place = [(int(i), int(j)) for i, j in rewards.nonzero()]
    assert place == [(1, DIM - 1), (2, DIM - 1)]
    assert rewards.sum(1).tolist() == [0, 0.75, -0.5]


def test_an_episode_without_policy_steps_makes_no_row_and_keeps_its_number():
    keys, _, _ = rows_of(make_trajectories([3, 3, 3], [1, 0, 1]))
    assert keys == ["g3_0_0", "g3_2_0"]


def test_no_trajectories_make_no_rows():
    whole = make_trajectories([3], [1])
    assert rows_of(whole.select(torch.tensor([False])), score=[]) == ([], [], [])


def test_verl_packs_the_rows_and_they_come_out_unchanged():
    _, fields, _ = rows_of(make_trajectories([3, 4], [2, 3]))
    packed = list_of_dict_to_tensordict(fields)
    sizes = [len(row["prompts"]) for row in fields]
    assert packed["prompts"].offsets().diff().tolist() == sizes
    assert lengths(packed["prompts"]).tolist() == sizes
    images = torch.stack([row["images"] for row in fields])
    assert torch.equal(stacked(packed["images"]), images)
    assert stacked(packed["trajectory_steps"]).flatten().tolist() == [
        int(row["trajectory_steps"]) for row in fields
    ]
    assert packed["uid"] == [row["uid"] for row in fields]


def test_verl_computes_our_advantage_from_the_rows():
    """Its estimator looks at each trajectory's last row and spreads what it finds."""
    played = make_trajectories([7, 7, 7, 2, 2], [2, 1, 3, 2, 2])
    score = [1.0, 0.0, 0.25, 1.0, 0.0]
    keys, fields, _ = rows_of(played, score)
    names = ("response_mask", "rm_scores")
    tensors = {name: torch.stack([row[name] for row in fields]) for name in names}
    data = DataProto.from_single_dict(
        tensors
        | {
            "token_level_rewards": tensors["rm_scores"],
            "uid": np.array([row["uid"] for row in fields], dtype=object),
        }
    )
    theirs = compute_advantage_for_multi_trajectories(data, batch_keys=keys, adv_estimator="grpo")
    scores = tensors["rm_scores"].sum(-1)
    for name in (ADV_ESTIMATOR, "grpo"):
        # a row of padding, as veRL adds them, changes nothing
        ours = row_advantages(
            [*keys, "pad0f_0_0"], torch.cat([scores, torch.zeros(1)]), algorithm(name)
        )
        assert ours[-1] == 0
        expected = ours[:-1, None] * tensors["response_mask"]
        assert torch.equal(theirs.batch["advantages"], expected), name
    by_episode = group_advantage(torch.tensor(score), played.episodes.group_id)
    assert torch.equal(
        row_advantages(keys, scores, algorithm(ADV_ESTIMATOR)),
        by_episode[played.policy_steps.episode],
    )


def test_a_row_that_verl_fills_up_with_carries_no_gradient_and_a_finite_weight():
    _, fields, tags = rows_of(make_trajectories([3], [2]))
    row, tag = construct_minimal_padding_template(fields[0], tags[0], eos_token_id=31_999)
    assert tag["is_padding"]
    assert int(row["response_mask"].sum()) == 0 and float(row["rm_scores"].sum()) == 0
    assert int(row["trajectory_steps"]) > 0
    assert row["images"].shape == fields[0]["images"].shape
    mask = dense(jagged([row["response_mask"], fields[1]["response_mask"]]), TOKENS)
    assert mask[0].sum() == 0 and torch.equal(mask[1], fields[1]["response_mask"])


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


def test_an_advantage_is_written_to_the_tokens_that_ran_and_padding_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = RowStore()
    store.stand_in(monkeypatch)
    groups, lengths_ = [3, 3], [2, 1]
    keys, fields, tags = rows_of(make_trajectories(groups, lengths_), [1.0, 0.0])
    for key, row, tag in zip(keys, fields, tags, strict=True):
        store.rows[key], store.tags[key] = dict(row), tag
    # as veRL pads: one token that counts nowhere
    store.rows["pad_0_0"] = {"response_mask": torch.zeros(1).long(), "rm_scores": torch.zeros(1)}
    store.tags["pad_0_0"] = {}
    batch = KVBatchMeta(keys=[*keys, "pad_0_0"], tags=[{}] * 4, partition_id="train")
    write_advantages(batch, algorithm(ADV_ESTIMATOR))
    score = group_advantage(torch.tensor([1.0, 0.0]), torch.tensor([3, 3]))
    for key in keys:
        episode = RowKey.parse(key).episode
        wanted = (score[episode] * store.rows[key]["response_mask"]).tolist()
        assert store.rows[key]["advantages"].tolist() == wanted
        assert store.rows[key]["returns"].tolist() == wanted
    assert 0.0 in store.rows[keys[-1]]["advantages"].tolist(), "its chunk was cut short"
    assert store.rows["pad_0_0"]["advantages"].tolist() == [0.0]
