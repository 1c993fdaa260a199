"""Optimizer steps that nothing finite came of: left out, counted, and at some point the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id

from verl_vla.core.errors import DivergedError

Batch = Mapping[str, Any]
"""Names to tensors, rows of tensors, and plain values."""


Export = Callable[[Path], None]
"""Writes the weights to a folder; every rank takes part."""


@dataclass(slots=True, kw_only=True)
class FiniteGuard:
    """Ends a run whose optimizer steps are left out one after the other; one for each rank."""

    folder: Path
    """Folder for the batch of the last skipped step and the weights at that moment."""
    max_in_a_row: int
    """Number of consecutive skipped steps that ends the run."""
    num_in_a_row: int = field(default=0, init=False)
    """Number of consecutive steps skipped until now."""

    def count(self, norm: float, batch: Callable[[], Batch], export: Export) -> None:
        """Enter one optimizer step, on every rank.

        Args:
            norm: of the gradient; not finite where the step was left out.
            batch: returns what this rank learned from.
            export: as `Export`.

        Raises:
            DivergedError: it was one too many.
        """
        self.num_in_a_row = 0 if math.isfinite(norm) else self.num_in_a_row + 1
        # the norm is the same on every rank, so all of them stop here or none does
        if self.num_in_a_row < self.max_in_a_row:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(dict(batch()), self.folder / f"batch_rank_{torch.distributed.get_rank()}.pt")
        export(self.folder / "policy")
        raise DivergedError(
            f"{self.num_in_a_row} optimizer steps in a row were left out, since the loss or the "
            f"gradient was not finite. The batch of the last one and the weights it met are in "
            f"{self.folder}. Start another out=FOLDER from the newest checkpoint's policy with a "
            "lower optimizer.lr"
        )


def all_finite(losses: list[float]) -> bool:
    """Return true where the losses of all ranks are finite; the same answer on every rank."""
    is_finite = all(math.isfinite(loss) for loss in losses)
    # on the rank's device, since NCCL takes no tensor of the host
    answer = torch.tensor(int(is_finite), device=get_device_id())
    # a rank that skipped its step alone would let the others wait in clipping's all-reduce
    torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MIN)
    return bool(answer)


def plain_rows(data: TensorDict) -> dict[str, Any]:
    """The rows of a mini-batch as tuples of tensors, and its plain values, for `torch.save`."""
    rows: dict[str, Any] = {}
    for name in map(str, data.keys()):
        value = data[name]
        if isinstance(value, Tensor):
            # a view would be saved with the storage of the whole batch
            rows[name] = tuple(row.clone() for row in value.unbind())
        elif value is None or isinstance(value, str | int | float):
            rows[name] = value
    return rows


def load_rows(file: Path) -> TensorDict:
    """Read what `plain_rows` gave, as the engine's ``train_batch`` takes it."""
    saved: dict[str, Any] = torch.load(file, weights_only=True)
    rows = {name: list(value) for name, value in saved.items() if isinstance(value, tuple)}
    values = {name: value for name, value in saved.items() if name not in rows}
    jagged: dict[str, Tensor | list[Any]] = {
        name: torch.nested.as_nested_tensor(value, layout=torch.jagged)
        for name, value in rows.items()
    }
    return tu.get_tensordict(jagged, values)
