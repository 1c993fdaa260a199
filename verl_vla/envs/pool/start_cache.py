"""Cache of starts that were simulated before.

A start settles and renders to the same image each time, and GRPO plays every start once for each
episode of a group, so each start is simulated once and then served from here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from verl_vla.core.episode import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class StartKey:
    """The identity of a start."""

    task_id: int
    init_state_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A simulated start: its first observation and its snapshot."""

    observation: Observation
    snapshot: bytes
    """A pickled `verl_vla.envs.base.Snapshot`."""


class StartCache:
    """The most recently used starts, at most ``capacity`` of them.

    A start takes about the memory of its image: 512 of one 224-pixel view take 77 MB.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._starts: OrderedDict[StartKey, Start] = OrderedDict()

    def __len__(self) -> int:
        return len(self._starts)

    def find(self, key: StartKey) -> Start | None:
        """Return a cached start and mark it as used, or None if it is not cached."""
        if key not in self._starts:
            return None
        self._starts.move_to_end(key)
        return self._starts[key]

    def keep(self, key: StartKey, start: Start) -> None:
        """Add a start; the least recently used one is dropped if the cache is full."""
        self._starts[key] = start
        self._starts.move_to_end(key)
        while len(self._starts) > self._capacity:
            self._starts.popitem(last=False)
