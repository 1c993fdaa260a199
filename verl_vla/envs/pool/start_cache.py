"""Starts that were simulated before.

A recorded start settles and renders to the same image each time, and GRPO plays every start a
whole group's number of times, so each is simulated once and served from here afterwards.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from verl_vla.core.episode import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class StartKey:
    """What a start depends on."""

    task_id: int
    init_state_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a start leads to."""

    observation: Observation
    snapshot: bytes
    """A pickled `verl_vla.envs.base.Snapshot`."""


class StartCache:
    """The starts used last, at most ``capacity`` of them.

    One start holds about the size of its image: 512 of one 224-pixel view make 77 MB.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._starts: OrderedDict[StartKey, Start] = OrderedDict()

    def __len__(self) -> int:
        return len(self._starts)

    def find(self, key: StartKey) -> Start | None:
        """Return a start that is known and note that it was used."""
        if key not in self._starts:
            return None
        self._starts.move_to_end(key)
        return self._starts[key]

    def keep(self, key: StartKey, start: Start) -> None:
        """Remember a start; the one unused for longest makes room."""
        self._starts[key] = start
        self._starts.move_to_end(key)
        while len(self._starts) > self._capacity:
            self._starts.popitem(last=False)
