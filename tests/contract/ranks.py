"""The ranks of a training run in this process: they note what reaches them and learn nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from row_store import RowStore
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from verl_vla.config.grpo import LossConfig, Recipe
from verl_vla.trainer.grpo.rows import is_padding
from verl_vla.trainer.grpo.worker import row_loss

LR = 1e-4
GIB = 1024**3


class Ranks(RowStore):
    """Have the rows of a training step in ``rows``; note which of them reach the loss."""

    def __init__(self, recipe: Recipe, *, num_tokens: int, action_dim: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.num_tokens, self.action_dim = num_tokens, action_dim
        self.steps: list[list[str]] = []
        """Rows of every optimizer step, over all ranks."""
        self.num_trajectories: list[int] = []
        """Denominator of every optimizer step."""
        self.steps_of_schedule = 0

    @property
    def seen(self) -> list[str]:
        return [key for step in self.steps for key in step]

    def go_without_update(self) -> list[float]:
        self.steps_of_schedule += 1
        return [LR]

    def update_actor(self, batch: KVBatchMeta) -> TensorDict:
        assert batch.extra_info is not None
        parts, found = batch.extra_info["num_mini_batch"], []
        runs = [run.keys for run in batch.chunk(self.recipe.cluster.num_ranks)]
        (size,) = {len(keys) for keys in runs}
        assert size % parts == 0
        assert batch.extra_info["epochs"] == 1
        assert batch.extra_info["temperature"] == self.recipe.sampling.temperature
        for part in range(parts):
            mine = slice(part * size // parts, (part + 1) * size // parts)
            keys = [key for keys in runs for key in keys[mine]]
            self.steps.append(keys)
            found.append(self._learn(batch, keys, part))
        reported = {name: [one[name] for one in found] for name in found[0]}
        return tu.get_tensordict({}, {"metrics": reported})

    def _learn(self, batch: KVBatchMeta, keys: list[str], part: int) -> dict[str, float]:
        data = self.kv_batch_get(keys, batch.partition_id, batch.fields)
        (number,) = {int(self.rows[key]["num_trajectories"]) for key in keys if not is_padding(key)}
        self.num_trajectories.append(number)
        log_probs = torch.full((len(keys), self.num_tokens), -1.0)
        _, sums = row_loss(
            log_probs=log_probs,
            entropy=log_probs,
            data=data,
            config=self.recipe.loss,
            action_dim=self.action_dim,
            num_ranks=1,
        )
        return sums | {"optimizer_step": part, "grad_norm": 1.0, "lr": LR}


@dataclass(frozen=True)
class Answer:
    """What ranks answer without blocking; every one of them has."""

    data: TensorDict
    futures: list[int]

    def get(self) -> TensorDict:
        return self.data


class PlayingRanks(Ranks):
    """Sample, save and load as well; a checkpoint holds the number of updates so far."""

    def __init__(self, recipe: Recipe, *, num_tokens: int, action_dim: int) -> None:
        super().__init__(recipe, num_tokens=num_tokens, action_dim=action_dim)
        self.requests: list[TensorDict] = []
        self.loss: tuple[LossConfig, int] | None = None
        self.guard: tuple[str, int] | None = None
        self.num_updates = 0
        self.before_save: Callable[[], None] = lambda: None
        """Called before a checkpoint is written."""

    def sample_actions(self, request: TensorDict) -> Answer:
        self.requests.append(request)
        count, ranks = len(request["images"]), self.recipe.cluster.num_ranks
        assert count % ranks == 0
        answer = {
            "action_tokens": torch.arange(count)[:, None].repeat(1, self.num_tokens),
            "log_probs": torch.full((count, self.num_tokens), -1.0),
        }
        return Answer(tu.get_tensordict(answer), list(range(ranks)))

    def update_actor(self, batch: KVBatchMeta) -> TensorDict:
        self.num_updates += 1
        return super().update_actor(batch)

    def set_policy_loss(self, config: LossConfig, action_dim: int) -> None:
        self.loss = config, action_dim

    def guard_updates(self, folder: str, max_in_a_row: int) -> None:
        self.guard = folder, max_in_a_row

    def peak_memory(self) -> list[tuple[int, int, int]]:
        return [(3 * GIB, 2 * GIB, GIB), (GIB, 2 * GIB, 4 * GIB)]

    def save_checkpoint(self, local_path: str, *_: Any, **__: Any) -> None:
        self.before_save()
        Path(local_path).mkdir(parents=True)
        (Path(local_path) / "updates").write_text(str(self.num_updates))

    def load_checkpoint(self, local_path: str, **_: Any) -> None:
        self.num_updates = int((Path(local_path) / "updates").read_text())

    def export_policy(self, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "weights").write_text(str(self.num_updates))
