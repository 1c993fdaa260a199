"""The gradient of every mini-batch, by the real engine on one and two ranks, and by plain PyTorch.

Only the store is a stand-in: rows go from `update` through veRL's slices to the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mini_batch_rank
import pytest
import torch
from rank_processes import run_ranks
from row_store import RowStore
from step_tables import episode_column, step_tables
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from verl_vla.config.compose import load_recipe
from verl_vla.config.grpo import ClipRange, Recipe
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.core.tables import Trajectories
from verl_vla.envs.registry import suite
from verl_vla.policies.registry import load_policy
from verl_vla.rl.advantage import group_advantage
from verl_vla.trainer.engine.divergence_guard import plain_rows
from verl_vla.trainer.grpo.rows import RowKey, is_padding, make_rows
from verl_vla.trainer.grpo.update import update

TEMPERATURE = 1.0
GROUPS = [[5, 2, 1], [3, 3], [1, 2, 2], [2, 2, 1]]
"""Policy steps of the episodes of each group."""
SCORES = [[0.0, 1.0, 1.0], [1.0, 0.0], [0.0, 1.0, 0.5], [1.0, 1.0, 1.0]]
"""One episode is as good as its group and one group agrees: both count, without a gradient."""
SILENT = 3
"""That group."""
CLIP = ClipRange()


class Workers(RowStore):
    """Learn in processes of their own from the rows of a training step."""

    def __init__(self, folder: Path, num_ranks: int) -> None:
        super().__init__()
        self.folder, self.num_ranks = folder, num_ranks
        self.runs: list[list[str]] = []
        """Rows of every rank."""
        self.num_mini_batches = 0

    def update_actor(self, batch: KVBatchMeta) -> TensorDict:
        assert batch.extra_info is not None
        self.num_mini_batches = batch.extra_info["num_mini_batch"]
        self.runs = [run.keys for run in batch.chunk(self.num_ranks)]
        for rank, keys in enumerate(self.runs):
            data = self.kv_batch_get(keys, batch.partition_id, batch.fields)
            tu.assign_non_tensor(data, **batch.extra_info)
            torch.save(plain_rows(data), self.folder / f"rows_{rank}.pt")
        ranks = range(self.num_ranks)
        run_ranks(mini_batch_rank.main, *((self.folder, rank, self.num_ranks) for rank in ranks))
        names = ("num_tokens", "ratio_sum", "ratio_deviation", "loss_sum", "entropy_sum")
        counts = ("num_rows", "num_rows_idle", "num_clipped_low", "num_clipped_high")
        unread = dict.fromkeys((*names, *counts, "grad_norm", "lr", "optimizer_step"), [0.0])
        return tu.get_tensordict({}, {"metrics": unread})

    def step_of(self, key: str) -> int:
        """Which optimizer step learns from a row."""
        (run,) = (run for run in self.runs if key in run)
        return run.index(key) * self.num_mini_batches // len(run)


def trajectories() -> tuple[Trajectories, Any]:
    """Episodes of random images and actions; the last chunk of each is cut short."""
    policy = load_policy(PROJECT_FOLDER / "bases" / "mini")
    shape = policy.processor.shape
    episode, is_last = episode_column([steps for group in GROUPS for steps in group])
    count = len(episode)
    generator = torch.Generator().manual_seed(3)
    short = torch.randint(1, shape.chunk_length + 1, (count,), generator=generator)
    executed = torch.where(is_last, short, shape.chunk_length)
    images = torch.randint(
        0, 256, (count, *shape.image_shape), generator=generator, dtype=torch.uint8
    )
    tokens = torch.randint(0, shape.num_bins, (count, shape.num_tokens), generator=generator)
    texts = [task.instruction for task in suite("mini").tasks]
    prompts = tuple(policy.processor.prompt(texts[b % len(texts)]) for b in episode.tolist())
    with torch.no_grad():
        now = policy.log_prob(images, prompts, tokens, temperature=TEMPERATURE)
    return step_tables(
        [g for g, steps in enumerate(GROUPS) for _ in steps],
        episode,
        image=images,
        action_tokens=tokens,
        # some ratios are outside of the clip range
        log_probs=now + 0.3 * torch.randn(now.shape, generator=generator),
        executed=executed,
        prompt_ids=prompts,
    ), policy


def reference(played: Trajectories, policy: Any, advantage: Tensor, groups: set[int]) -> Any:
    """The gradient of the mean over these groups' episodes of their mean token loss."""
    steps, chunk = played.policy_steps, policy.processor.shape.chunk_length
    losses = []
    for b, group in enumerate(played.episodes.group_id.tolist()):
        if group not in groups:
            continue
        tokens = []
        for row in torch.nonzero(steps.episode == b).flatten().tolist():
            one = slice(row, row + 1)
            log_probs = policy.log_prob(
                steps.image[one],
                played.prompt_ids[one],
                steps.action_tokens[one],
                temperature=TEMPERATURE,
            )[0]
            ran = len(log_probs) * int(steps.executed[row]) // chunk
            ratio = (log_probs - steps.log_probs[row]).exp()[:ran]
            bounded = ratio.clamp(1 - CLIP.low, 1 + CLIP.high)
            tokens.append(-torch.minimum(ratio * advantage[b], bounded * advantage[b]))
        losses.append(torch.cat(tokens).mean())
    policy.model.zero_grad()
    torch.stack(losses).mean().backward()
    named = policy.model.named_parameters()
    return {name: w.grad.clone() for name, w in named if w.grad is not None}


def learn(
    recipe: Recipe,
    workers: Workers,
    played: Trajectories,
    advantage: Tensor,
    chunk: int,
) -> None:
    """Put the rows into the store as the trainer does, and update."""
    keys, fields, tags = make_rows(played, chunk_length=chunk, global_step=1)
    workers.kv_batch_put(keys, "train", fields, tags)
    of_row = advantage[played.policy_steps.episode].tolist()
    tags = [tag | {"advantage": value} for tag, value in zip(tags, of_row, strict=True)]
    batch = KVBatchMeta(keys=keys, tags=tags, partition_id="train")
    update(batch, workers, recipe, eos_token_id=0)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_each_gradient_is_that_of_the_episodes_of_its_mini_batch(
    num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers(tmp_path, num_ranks)
    workers.stand_in(monkeypatch)
    played, policy = trajectories()
    score = torch.tensor([value for scores in SCORES for value in scores])
    advantage = group_advantage(score, played.episodes.group_id)
    recipe = load_recipe(
        [
            "recipe=quickstart",
            f"out='{tmp_path / 'run'}'",
            "optimizer.num_mini_batches=2",
            f"cluster.ranks_per_node={num_ranks}",
            f"sampling.temperature={TEMPERATURE}",
        ]
    )
    learn(recipe, workers, played, advantage, policy.processor.shape.chunk_length)

    real = [key for run in workers.runs for key in run if not is_padding(key)]
    groups: list[set[int]] = [set(), set()]
    for key in real:
        groups[workers.step_of(key)].add(RowKey.parse(key).group)
    assert groups[0].isdisjoint(groups[1])
    assert sorted(map(len, groups)) == [1, 2]
    # both have two groups, so the one that agrees is with the single one
    min(groups, key=len).add(SILENT)
    for rank in range(num_ranks):
        found = torch.load(tmp_path / f"found_{rank}.pt")
        assert min(found["micro_batches"]) > 1
        for mine, own in zip(found["gradients"], groups, strict=True):
            right = reference(played, policy, advantage, own)
            assert mine.keys() == right.keys()
            for name, value in right.items():
                scale = float(value.abs().max())
                assert torch.allclose(mine[name], value, atol=1e-4 * scale + 1e-9), name
