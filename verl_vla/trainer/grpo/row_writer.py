"""Store the rows of episodes in TransferQueue while other episodes still play."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import transfer_queue as tq

from verl_vla.core.tables import Trajectories
from verl_vla.trainer.grpo.rows import make_rows

ROWS_A_PUT = 1024
"""Rows from which on a call stores no further episode, 0.15 GB with one view of 224 px: a put
copies its images."""


class RowWriter:
    """A thread that stores the rows of episodes, in the order in which they end.

    Rows are stored without their score, which is known once a round has ended (`score_tags`).
    As a context manager it ends when everything is stored.

    Args:
        chunk_length: K.
        global_step: the training step that plays.
    """

    def __init__(self, *, chunk_length: int, global_step: int) -> None:
        self._chunk_length = chunk_length
        self._global_step = global_step
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self._waiting: deque[Trajectories] = deque()
        self._puts: list[Future[None]] = []

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for what is under way; without an error, for all rows.

        Raises:
            Exception: of the first put that failed.
        """
        self._thread.shutdown(cancel_futures=error is not None)
        if error is None:
            for put in self._puts:
                put.result()

    def add(self, episodes: Trajectories) -> None:
        """Take episodes that have ended, and do not wait. Crashed ones have no rows."""
        alive = episodes.select(~episodes.episodes.crashed)
        if len(alive.policy_steps):
            self._waiting.append(alive)
            self._puts.append(self._thread.submit(self._store_waiting))

    def _store_waiting(self) -> None:
        """Store what waits, in as few calls as `ROWS_A_PUT` allows: each takes milliseconds."""
        parts: list[Trajectories] = []
        # none may wait any more: the put before took it along
        while self._waiting and sum(len(p.policy_steps) for p in parts) < ROWS_A_PUT:
            parts.append(self._waiting.popleft())
        if parts:
            self._store(parts[0] if len(parts) == 1 else Trajectories.concat(parts))

    def _store(self, played: Trajectories) -> None:
        for first in range(0, len(played.policy_steps), ROWS_A_PUT):
            keys, fields, tags = make_rows(
                played,
                chunk_length=self._chunk_length,
                global_step=self._global_step,
                rows=slice(first, first + ROWS_A_PUT),
            )
            tq.kv_batch_put(keys=keys, fields=fields, tags=tags, partition_id="train")
