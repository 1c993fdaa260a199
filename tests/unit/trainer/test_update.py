"""Which rows an update is made of: a dictionary for TransferQueue, one rank in this process."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils import tensordict_utils as tu

from verl_vla.config.compose import group_options, load_recipe, recipe_names
from verl_vla.config.grpo import Recipe
from verl_vla.core.episode import Outcome
from verl_vla.core.tables import Episodes, PolicySteps, Trajectories
from verl_vla.rl.group_sampling import GroupFilter, GroupResult
from verl_vla.runs.metrics import check_declared
from verl_vla.trainer.grpo.rows import RowKey, group_key, is_padding, make_rows
from verl_vla.trainer.grpo.update import update
from verl_vla.trainer.grpo.worker import row_loss

CHUNK, DIM, PLACES = 2, 1, 3
TOKENS = CHUNK * DIM
LR = 1e-4
UNIFORM, MIXED = [0.0] * 2, [0.0, 1.0]


class OneRank:
    """Has the rows of a training step in ``rows``; notes which of them reach the loss."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.rows: dict[str, dict[str, Any]] = {}
        self.seen: list[str] = []
        self.num_trajectories = math.nan
        self.steps_of_schedule = 0

    def kv_batch_get(self, keys, partition_id, select_fields=None) -> TensorDict:
        names = select_fields or self.rows[keys[0]].keys()
        columns = {name: [self.rows[key][name] for key in keys] for name in names}
        return tu.get_tensordict({n: jagged(column) for n, column in columns.items()})

    def kv_batch_put(self, keys, partition_id, fields, tags=None) -> None:
        rows = [
            {name: fields[name][i] for name in map(str, fields.keys())} for i in range(len(keys))
        ]
        self.rows |= dict(zip(keys, rows, strict=True))

    def kv_clear(self, keys, partition_id) -> None:
        assert keys, "as TransferQueue has it"
        for key in keys:
            del self.rows[key]

    def go_without_update(self) -> list[float]:
        self.steps_of_schedule += 1
        return [LR]

    def update_actor(self, batch: KVBatchMeta) -> TensorDict:
        self.seen, found = batch.keys, []
        assert batch.extra_info is not None
        self.num_trajectories = batch.extra_info["num_trajectories"]
        parts = batch.extra_info["num_mini_batch"]
        assert len(batch) % parts == 0
        for part in range(parts):
            mine = batch.keys[part * len(batch) // parts : (part + 1) * len(batch) // parts]
            data = self.kv_batch_get(mine, batch.partition_id)
            tu.assign_non_tensor_data(data, "num_trajectories", self.num_trajectories)
            log_probs = torch.full((len(mine), TOKENS), -1.0)
            _, sums = row_loss(
                log_probs=log_probs,
                entropy=log_probs,
                data=data,
                config=self.recipe.loss,
                action_dim=DIM,
                num_ranks=1,
            )
            found.append(sums | {"optimizer_step": part, "grad_norm": 1.0, "lr": LR})
        reported = {name: [one[name] for one in found] for name in found[0]}
        return tu.get_tensordict({}, {"metrics": reported})


def jagged(column: list[Any]) -> Any:
    """As TransferQueue hands out a field, whatever its rows' lengths."""
    is_text = isinstance(column[0], str | int)
    return column if is_text else torch.nested.as_nested_tensor(column, layout=torch.jagged)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch):
    """Let groups with these scores be sampled and learned from, as a recipe says."""

    def play_step(
        groups: list[list[float]], *words: str
    ) -> tuple[OneRank, KVBatchMeta, dict[str, float]]:
        rank = OneRank(load_recipe(["out=runs/test", *words]))
        for name in ("kv_batch_get", "kv_batch_put", "kv_clear"):
            monkeypatch.setattr(tq, name, getattr(rank, name))
        batch = sampled(rank, groups)
        balance = partial(
            upsample_batch_to_divisible_size,
            batch_multiple=rank.recipe.optimizer.num_mini_batches,
            eos_token_id=0,
        )
        learned, values = update(balance(batch), rank, rank.recipe, balance)
        check_declared(values)
        return rank, learned, values

    return play_step


def sampled(rank: OneRank, groups: list[list[float]]) -> KVBatchMeta:
    """The rows that are left by the rules of the recipe, with veRL's advantages."""
    group_filter = GroupFilter(config=rank.recipe.sampling)
    dropped = group_filter.add_round(
        [result(number, scores) for number, scores in enumerate(groups)]
    )
    score = np.array([score for scores in groups for score in scores], dtype=np.float32)
    keys, fields, tags = make_rows(played(groups), score, chunk_length=CHUNK, global_step=1)
    kept = [i for i, key in enumerate(keys) if RowKey.parse(key).group not in dropped]
    keys, fields, tags = ([column[i] for i in kept] for column in (keys, fields, tags))
    tensors = {n: torch.stack([r[n] for r in fields]) for n in ("response_mask", "rm_scores")}
    uid = np.array([group_key(RowKey.parse(key).group) for key in keys], dtype=object)
    data = DataProto.from_single_dict(
        tensors | {"token_level_rewards": tensors["rm_scores"], "uid": uid}
    )
    data = compute_advantage_for_multi_trajectories(data, batch_keys=keys, adv_estimator="grpo")
    for key, row, advantage in zip(keys, fields, data.batch["advantages"], strict=True):
        more = {"advantages": advantage, "old_log_probs": row["rollout_log_probs"]}
        if rank.recipe.loss.kl.is_on:
            more["ref_log_prob"] = row["rollout_log_probs"]
        rank.rows[key] = row | more
    return KVBatchMeta(keys=keys, tags=tags, partition_id="train")


def result(number: int, scores: list[float]) -> GroupResult:
    solved = sum(score == 1 for score in scores)
    return GroupResult(
        group_id=number,
        task_id=0,
        num_solved=solved,
        num_failed=len(scores) - solved,
        num_crashed=0,
        score_spread=max(scores) - min(scores),
    )


def played(groups: list[list[float]]) -> Trajectories:
    """Episodes of three whole chunks."""
    group = torch.tensor([number for number, scores in enumerate(groups) for _ in scores])
    ids = torch.arange(len(group))
    count = PLACES * len(group)
    return Trajectories(
        episodes=Episodes(
            task_id=ids,
            init_state_id=ids,
            group_id=group,
            episode_id=ids,
            outcome=torch.full_like(ids, int(Outcome.TIMEOUT)),
            num_steps=torch.full_like(ids, PLACES * CHUNK),
        ),
        policy_steps=PolicySteps(
            episode=ids.repeat_interleave(PLACES),
            image=torch.zeros(count, 1, 2, 2, 3, dtype=torch.uint8),
            proprio=torch.zeros(count, 8),
            action_tokens=torch.zeros(count, TOKENS, dtype=torch.int64),
            log_probs=torch.full((count, TOKENS), -1.0),
            executed=torch.full((count,), CHUNK),
        ),
        prompt_ids=(torch.arange(4),) * count,
        goals=(np.zeros((1, 1, 3), dtype=np.float32),) * len(group),
    )


def rows_of(group: int, member: int) -> list[str]:
    return [f"g{group}_{member}_{place}" for place in range(PLACES)]


SMALL = ("recipe=libero_spatial_tiny",)


def test_groups_that_agree_never_reach_the_loss_and_count_in_its_denominator(play):
    rank, learned, values = play([UNIFORM, MIXED, UNIFORM], *SMALL)
    assert sorted(rank.seen) == rows_of(1, 0) + rows_of(1, 1)
    assert rank.num_trajectories == 6
    assert values["actor/rows"] == 6
    assert values["actor/rows_left_out"] == 12
    assert values["actor/rows_without_gradient"] == values["actor/padding_rows"] == 0
    assert set(rank.rows) == set(learned.keys), "what was left out has left the store too"


def test_an_episode_as_good_as_its_group_is_left_out_alone(play):
    rank, _, values = play([[0.0, 0.5, 1.0]], *SMALL)
    assert sorted(rank.seen) == rows_of(0, 0) + rows_of(0, 2)
    assert (values["actor/rows_left_out"], rank.num_trajectories) == (PLACES, 3)


def test_what_is_left_is_padded_anew(play):
    rank, learned, values = play(
        [UNIFORM, MIXED, MIXED[:1]], *SMALL, "optimizer.num_mini_batches=4"
    )
    assert len(learned) == 8
    assert sum(map(is_padding, rank.seen)) == values["actor/padding_rows"] == 2
    assert values["actor/rows"] == 6
    assert values["actor/rows_without_gradient"] == 0
    assert rank.num_trajectories == 4 / 4


def test_where_all_have_a_gradient_nothing_is_touched(play):
    rank, learned, values = play([MIXED, MIXED], *SMALL, "optimizer.num_mini_batches=5")
    assert learned.keys == [k for g in (0, 1) for m in (0, 1) for k in rows_of(g, m)] + [
        key for key in rank.seen if is_padding(key)
    ]
    assert (values["actor/rows"], values["actor/padding_rows"]) == (12, 3)
    assert values["actor/rows_left_out"] == 0


def test_a_step_without_any_gradient_updates_nothing_and_the_schedule_goes_on(play):
    rank, learned, values = play([UNIFORM, [1.0, 1.0]], *SMALL, "optimizer.num_mini_batches=2")
    assert rank.seen == []
    assert rank.steps_of_schedule == 1
    assert set(learned.keys) == set(rank.rows), "the trainer clears them, and needs a key for it"
    assert values["actor/rows"] == 0
    assert values["actor/rows_left_out"] == 12
    assert values["actor/skipped_steps"] == 2
    assert values["actor/lr"] == LR
    assert math.isnan(values["actor/pg_loss"])


def test_with_a_kl_term_every_row_has_a_gradient(play):
    rank, _, values = play([UNIFORM, MIXED], *SMALL, "loss.kl.coefficient=0.1")
    assert len(rank.seen) == 12
    assert values["actor/rows_left_out"] == values["actor/rows_without_gradient"] == 0


def shipped() -> list[tuple[str, ...]]:
    """Every recipe, and each with every choice of a group that it builds on."""
    found: list[tuple[str, ...]] = [(f"recipe={name}",) for name in recipe_names()]
    for group in ("suite", "reward", "profile"):
        found += [("recipe=libero", f"{group}={choice}") for choice in group_options(group)]
    return found


@pytest.mark.parametrize("words", shipped(), ids=" ".join)
def test_no_shipped_recipe_trains_on_rows_without_a_gradient(play, words):
    """Groups that agree at either end or at a shaped score, and groups that do not."""
    size = load_recipe(["out=runs/test", *words]).sampling.group_size
    groups = [
        *([score] * size for score in (0.0, 1.0, 0.25)),
        *([float(member < solved) for member in range(size)] for solved in range(1, size)),
        [0.0, 1.0, *[0.5] * (size - 2)],
    ]
    rank, _, values = play(groups, *words)
    mini_batches = rank.recipe.optimizer.num_mini_batches
    assert values["actor/rows"] > 0
    assert values["actor/rows_without_gradient"] == 0
    assert values["actor/padding_rows"] < mini_batches
    is_dropped_before = rank.recipe.sampling.dynamic
    left_out = [0.5] * (size - 2) + [0.0] * (0 if is_dropped_before else 3 * size)
    assert values["actor/rows_left_out"] == PLACES * len(left_out)
