"""Which rows an update is made of; all ranks are in this process."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from ranks import LR, Ranks
from row_store import rewards_of
from step_tables import episode_column, step_tables
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

from verl_vla.config.compose import group_options, load_recipe, recipe_names
from verl_vla.config.grpo import Recipe
from verl_vla.core.tables import Trajectories
from verl_vla.rl.group_sampling import GroupFilter, GroupResult
from verl_vla.runs.metrics import check_declared
from verl_vla.trainer.grpo.rows import RowKey, group_key, is_padding, make_rows, score_tags
from verl_vla.trainer.grpo.update import update

CHUNK, DIM, PLACES = 2, 1, 3
TOKENS = CHUNK * DIM
FORMER_MULTIPLE = 4
"""What the batch was padded to when log-probs were computed."""
UNIFORM, MIXED = [0.0] * 2, [0.0, 1.0]


@cache
def recipe_of(*words: str) -> Recipe:
    """Composing takes longer than the rest of a test, and nothing changes a recipe."""
    return load_recipe(["out=runs/test", *words])


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch):
    """Let groups with these scores be sampled and learned from, as a recipe says."""

    def play_step(
        groups: list[list[float]], *words: str
    ) -> tuple[Ranks, KVBatchMeta, dict[str, float]]:
        rank = Ranks(recipe_of(*words), num_tokens=TOKENS, action_dim=DIM)
        rank.stand_in(monkeypatch)
        batch = sampled(rank, groups)
        batch = upsample_batch_to_divisible_size(batch, FORMER_MULTIPLE, eos_token_id=0)
        learned, values = update(batch, rank, rank.recipe, eos_token_id=0)
        check_declared(values)
        return rank, learned, values

    return play_step


def sampled(rank: Ranks, groups: list[list[float]]) -> KVBatchMeta:
    """The rows that are left by the rules of the recipe, with veRL's advantages."""
    group_filter = GroupFilter(config=rank.recipe.sampling)
    dropped = group_filter.add_round(
        [result(number, scores) for number, scores in enumerate(groups)]
    )
    score = np.array([score for scores in groups for score in scores], dtype=np.float32)
    keys, fields, tags = make_rows(played(groups), chunk_length=CHUNK, global_step=1)
    rank.kv_batch_put(keys, "train", fields, tags)
    last, scored = score_tags(played(groups), score)
    rank.kv_batch_put(last, "train", tags=scored)
    for key in [key for key in keys if RowKey.parse(key).group in dropped]:
        rank.kv_clear([key], "train")
        keys.remove(key)
    tags = [rank.tags[key] for key in keys]
    masks = torch.stack([rank.rows[key]["response_mask"] for key in keys])
    rewards = rewards_of(masks, tags)
    uid = np.array([group_key(RowKey.parse(key).group) for key in keys], dtype=object)
    data = DataProto.from_single_dict(
        {
            "response_mask": masks,
            "rm_scores": rewards,
            "token_level_rewards": rewards,
            "uid": uid,
        }
    )
    data = compute_advantage_for_multi_trajectories(data, batch_keys=keys, adv_estimator="grpo")
    # the first token of a row always ran
    advantages = data.batch["advantages"][:, 0].tolist()
    for key in keys if rank.recipe.loss.kl.is_on else ():
        rank.rows[key]["ref_log_prob"] = rank.rows[key]["rollout_log_probs"]
    tags = [tag | {"advantage": value} for tag, value in zip(tags, advantages, strict=True)]
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
    group = [number for number, scores in enumerate(groups) for _ in scores]
    episode, _ = episode_column([PLACES] * len(group))
    count = len(episode)
    return step_tables(
        group,
        episode,
        image=torch.zeros(count, 1, 2, 2, 3, dtype=torch.uint8),
        action_tokens=torch.zeros(count, TOKENS, dtype=torch.int64),
        log_probs=torch.full((count, TOKENS), -1.0),
        executed=torch.full((count,), CHUNK),
        prompt_ids=[torch.arange(4)] * count,
    )


def rows_of(group: int, member: int) -> list[str]:
    episode = len(MIXED) * group + member  # groups are of this size, or there is one alone
    return [str(RowKey(group, episode, place)) for place in range(PLACES)]


SMALL = ("recipe=libero_spatial_tiny",)


def test_groups_that_agree_never_reach_the_loss_and_count_in_its_denominator(play):
    rank, learned, values = play([UNIFORM, MIXED, UNIFORM], *SMALL)
    assert sorted(rank.seen) == rows_of(1, 0) + rows_of(1, 1)
    assert rank.num_trajectories == [6]
    assert values["actor/rows"] == 6
    assert values["actor/rows_left_out"] == 12
    assert values["actor/rows_without_gradient"] == values["actor/padding_rows"] == 0
    assert set(rank.rows) == set(learned.keys), "what was left out has left the store too"


def test_an_episode_as_good_as_its_group_is_left_out_alone(play):
    rank, _, values = play([[0.0, 0.5, 1.0]], *SMALL)
    assert sorted(rank.seen) == rows_of(0, 0) + rows_of(0, 2)
    assert (values["actor/rows_left_out"], rank.num_trajectories) == (PLACES, [3])


def test_what_is_left_is_padded_anew(play):
    words = ("sampling.groups_per_step=3", "optimizer.num_mini_batches=2")
    rank, learned, values = play([UNIFORM, MIXED, [0.0, 1.0, 1.0]], *SMALL, *words)
    assert [list(map(is_padding, step)).count(True) for step in rank.steps] == [3, 0]
    assert values["actor/padding_rows"] == 3
    assert values["actor/rows"] == 15
    assert values["actor/rows_without_gradient"] == 0
    assert rank.num_trajectories == [4, 3], "a group that agrees counts in its own mini-batch"
    assert set(rank.rows) == set(learned.keys), "the former padding has left the store"


def test_an_optimizer_step_learns_from_whole_groups(play):
    groups = [MIXED, MIXED, MIXED]
    words = (*SMALL, "sampling.groups_per_step=3", "optimizer.num_mini_batches=2")
    rank, _, _ = play(groups, *words)
    real = [[key for key in step if not is_padding(key)] for step in rank.steps]
    seen = [{RowKey.parse(key).group for key in step} for step in real]
    assert not seen[0] & seen[1], "no group is cut in two"
    assert sorted(map(len, seen)) == [1, 2]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_rank_has_its_share_of_every_group_that_is_large_enough(play, num_ranks):
    words = ("optimizer.num_mini_batches=2", f"cluster.ranks_per_node={num_ranks}")
    rank, _, values = play([MIXED, MIXED], *SMALL, *words)
    assert [sorted(step) for step in rank.steps] == [
        sorted(rows_of(group, 0) + rows_of(group, 1)) for group in (0, 1)
    ]
    assert values["actor/padding_rows"] == 0


def test_there_are_no_more_optimizer_steps_than_groups_with_a_gradient(play):
    words = ("sampling.groups_per_step=4", "optimizer.num_mini_batches=4")
    rank, _, values = play([UNIFORM, MIXED, UNIFORM, MIXED], *SMALL, *words)
    assert (values["actor/mini_batches"], values["actor/padding_rows"]) == (2, 0)
    assert rank.num_trajectories == [4, 4]


def test_where_all_have_a_gradient_nothing_is_touched(play):
    rank, learned, values = play([MIXED, MIXED], *SMALL)
    assert learned.keys == [k for g in (0, 1) for m in (0, 1) for k in rows_of(g, m)]
    assert rank.num_trajectories == [4]
    assert (values["actor/rows"], values["actor/padding_rows"]) == (12, 0)
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
    size = recipe_of(*words).sampling.group_size
    groups = [
        *([score] * size for score in (0.0, 1.0, 0.25)),
        *([float(member < solved) for member in range(size)] for solved in range(1, size)),
        [0.0, 1.0, *[0.5] * (size - 2)],
    ]
    rank, _, values = play(groups, *words)
    steps, ranks = rank.recipe.optimizer.num_mini_batches, rank.recipe.cluster.num_ranks
    assert values["actor/mini_batches"] == steps == len(rank.steps)
    assert values["actor/rows"] > 0
    assert values["actor/rows_without_gradient"] == 0
    # of groups of one size, the last mini-batches have one less
    assert values["actor/padding_rows"] < steps * (ranks + size * PLACES)
    is_dropped_before = rank.recipe.sampling.dynamic
    left_out = [0.5] * (size - 2) + [0.0] * (0 if is_dropped_before else 3 * size)
    assert values["actor/rows_left_out"] == PLACES * len(left_out)
