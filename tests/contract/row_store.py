"""A dictionary for TransferQueue, in this process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu


class RowStore:
    """Rows and tags of one partition by their keys."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.tags: dict[str, dict[str, Any]] = {}
        self.puts: list[list[str]] = []
        """Keys of each call, in order."""

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("kv_batch_get", "kv_batch_put", "kv_clear", "kv_list"):
            monkeypatch.setattr(tq, name, getattr(self, name))

    def kv_batch_get(self, keys, partition_id, select_fields=None) -> TensorDict:
        names = select_fields or self.rows[keys[0]].keys()
        columns = {name: [self.rows[key][name] for key in keys] for name in names}
        return tu.get_tensordict({n: jagged(column) for n, column in columns.items()})

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None) -> KVBatchMeta:
        self.puts.append(list(keys))
        names = [] if fields is None else list(map(str, fields.keys()))
        columns = {name: rows_of(fields[name]) for name in names}
        for i, key in enumerate(keys):
            self.rows.setdefault(key, {}).update({name: columns[name][i] for name in names})
            if tags is not None:
                # entries are added to those that are there
                self.tags[key] = self.tags.get(key, {}) | tags[i]
        return KVBatchMeta(
            keys=keys,
            tags=[self.tags[key] for key in keys],
            partition_id=partition_id,
            fields=list(self.rows[keys[0]]),
        )

    def kv_clear(self, keys, partition_id) -> None:
        assert keys, "as TransferQueue has it"
        for key in keys:
            del self.rows[key], self.tags[key]

    def kv_list(self, partition_id: str | None = None) -> dict[str, dict[str, dict[str, Any]]]:
        return {"train": dict(self.tags)}


def one_by_one(fields: TensorDict) -> list[dict[str, Any]]:
    """The rows of columns."""
    return [{str(n): column[i] for n, column in fields.items()} for i in range(len(fields))]


def rewards_of(masks: torch.Tensor, tags: list[dict[str, Any]]) -> torch.Tensor:
    """[N, T]: veRL's ``rm_scores`` of rows, each score on the last token of its row that ran."""
    rewards = torch.zeros(masks.shape)
    for row, (mask, tag) in enumerate(zip(masks, tags, strict=True)):
        if "score" in tag:
            rewards[row, int(mask.sum()) - 1] = tag["score"]
    return rewards


def jagged(column: list[Any]) -> Any:
    """As TransferQueue hands out a field, whatever its rows' lengths."""
    is_text = isinstance(column[0], str | int)
    return column if is_text else torch.nested.as_nested_tensor(column, layout=torch.jagged)


def rows_of(column: Any) -> Any:
    """The rows of a field, to be taken by index."""
    # at once: an index of a ragged tensor splits all of it each time
    return column.unbind() if isinstance(column, torch.Tensor) else column
