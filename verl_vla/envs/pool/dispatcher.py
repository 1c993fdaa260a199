"""Dispatcher of requests to simulator processes; it replaces processes that fail.

It runs in a separate thread, so simulators do not idle while the caller computes. It knows
processes and requests, but not episodes.
"""

from __future__ import annotations

import logging
import os
import queue
import selectors
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from verl_vla.core.errors import ConfigError, EpisodeCrashed
from verl_vla.envs.pool.messages import Failed, Ready, Reply, Request, Result, Started, Stepped
from verl_vla.envs.pool.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
"""Number of workers in a row that end before they were of any use, at which the pool gives up."""

LEAVE_S = 5.0
"""Time within which a worker whose simulator raised must exit, s."""

SHUTDOWN_TIMEOUT_S = 2.0
"""Time that workers have to end after each of: a stop message, SIGTERM, SIGKILL; s."""


class Experienced(Protocol):
    """The attributes of a worker that its choice depends on."""

    tasks: dict[int, float]
    """Times at which the worker last served each task, in seconds of any one clock."""


Worker = TypeVar("Worker", bound=Experienced)

Launch = Callable[[int, float], WorkerProcess]
"""Function that starts a process with a number, which must be ready by a deadline on
`time.monotonic`'s clock."""


class Dispatcher:
    """A queue of requests and the processes that serve it.

    Args:
        launch: function that starts a worker. A worker in the place of another gets its number, so
            that the numbers of those that run are 0 to ``num_workers - 1``.
        num_workers: number of workers that run at the same time.
        timeout_s: time limit of one request.
        start_timeout_s: time limit for a worker to become ready.
        deliver: called once for every request with its result, from the dispatcher's thread.
        fail: called at most once, with the error after which no request will be served any more.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        num_workers: int,
        timeout_s: float,
        start_timeout_s: float,
        deliver: Callable[[Request, Result], None],
        fail: Callable[[Exception], None],
    ) -> None:
        self._launch = launch
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._deliver = deliver
        self._fail = fail
        self._inbox: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._waiting: list[Request] = []
        self._workers: list[WorkerProcess] = []
        self._num_launches = 0
        self._failed_starts = 0
        self._has_served = False
        self._is_closing = False
        # wakes the thread from its select() when a request comes from outside
        self._bell = os.eventfd(0)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ)
        # last, as it uses all of the above
        self._thread = threading.Thread(target=self._run, name="env-pool", daemon=True)
        self._thread.start()

    @property
    def num_restarts(self) -> int:
        """Number of workers that were started in place of one that had ended."""
        return max(0, self._num_launches - self._num_workers)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the running workers."""
        return tuple(worker.pid for worker in self._workers)

    def submit(self, request: Request) -> None:
        """Queue a request without waiting. Any thread may call this."""
        self._inbox.put(request)
        # after the request is queued, or the thread could wake too early and sleep on
        os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """End the thread and all workers; results of unfinished requests are not delivered."""
        # before the bell: the thread would wake, see nothing to do, and sleep on
        self._is_closing = True
        os.eventfd_write(self._bell, 1)
        self._thread.join()
        self._selector.close()
        os.close(self._bell)
        alive = list(self._workers)
        # politely first, and all at a time, so that they end side by side
        for insist in (WorkerProcess.ask_to_stop, WorkerProcess.terminate, WorkerProcess.kill):
            for worker in alive:
                insist(worker)
            deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
            alive = [worker for worker in alive if not worker.has_ended(before=deadline)]
        for worker in self._workers:
            worker.reap()
        self._workers.clear()

    def _run(self) -> None:
        try:
            for _ in range(self._num_workers):
                self._add_worker()
            while not self._is_closing:
                self._hand_out()
                for key, _ in self._selector.select(self._seconds_to_next_deadline()):
                    if isinstance(key.fileobj, WorkerProcess):
                        self._listen(key.fileobj)
                    else:
                        os.eventfd_read(self._bell)
                # after listening: an answer that lies there already counts, even if it came late
                self._end_overdue()
        except Exception as error:  # noqa: BLE001 -- end of a thread: the caller must learn why
            self._fail(error)

    def _add_worker(self) -> None:
        taken = {worker.number for worker in self._workers}
        number = next(number for number in range(self._num_workers) if number not in taken)
        worker = self._launch(number, time.monotonic() + self._start_timeout_s)
        self._num_launches += 1
        self._workers.append(worker)
        self._selector.register(worker, selectors.EVENT_READ)

    def _hand_out(self) -> None:
        """Give waiting requests to idle workers, and start workers to replace missing ones."""
        with suppress(queue.Empty):
            while True:
                self._waiting.append(self._inbox.get_nowait())
        idle = [worker for worker in self._workers if worker.state == "idle"]
        while idle and self._waiting:
            worker, request = best_pair(self._workers, idle, self._waiting)
            idle.remove(worker)
            self._give(worker, request)
        coming = sum(worker.state == "starting" for worker in self._workers)
        missing = self._num_workers - len(self._workers)
        # not more than there is work for: a start takes seconds and memory
        for _ in range(min(missing, len(self._waiting) - coming)):
            self._add_worker()

    def _give(self, worker: WorkerProcess, request: Request) -> None:
        try:
            worker.give(request, deadline=time.monotonic() + self._timeout_s)
        except OSError:  # it died while idle, so the request is not lost
            self._remove(worker)
        else:
            self._waiting.remove(request)

    def _listen(self, worker: WorkerProcess) -> None:
        try:
            reply = worker.receive()
        except EOFError:
            self._lose(worker, "its process ended")
            return
        request, worker.request = worker.request, None
        if isinstance(reply, Failed) and isinstance(reply.error, EpisodeCrashed):
            worker.state, worker.deadline = "leaving", time.monotonic() + LEAVE_S
            self._count_failed_start(reply.error, is_start=request is None)
        else:
            worker.state = "idle"
        self._take(request, reply)

    def _take(self, request: Request | None, reply: Reply) -> None:
        if isinstance(reply, Started | Stepped):
            self._has_served, self._failed_starts = True, 0
        if request is not None and not isinstance(reply, Ready):
            self._deliver(request, reply)
        # a wrong setting fails in every process, so no more are started
        elif isinstance(reply, Failed) and isinstance(reply.error, ConfigError):
            raise reply.error

    def _end_overdue(self) -> None:
        at = time.monotonic()
        for worker in list(self._workers):
            if worker.state != "idle" and worker.deadline <= at:
                worker.kill_and_tell()
                limit = self._start_timeout_s if worker.state == "starting" else self._timeout_s
                self._lose(worker, f"no answer within {limit:g} s, so its process was killed")

    def _lose(self, worker: WorkerProcess, what: str) -> None:
        """Remove a dead worker; if it was busy, its request fails, and with it one episode."""
        ending = self._remove(worker)
        if worker.state in ("starting", "idle"):  # no request fails that would report it
            logger.warning("%s simulator process: %s (%s)", worker.state, what, ending)
        if worker.state in ("starting", "busy"):
            error = EpisodeCrashed(f"{worker.request or 'start'}: {what} ({ending})")
            self._count_failed_start(error, is_start=worker.state == "starting")
            if worker.request is not None:
                self._deliver(worker.request, Failed(error=error))

    def _remove(self, worker: WorkerProcess) -> str:
        self._selector.unregister(worker)
        self._workers.remove(worker)
        return worker.reap()

    def _count_failed_start(self, error: EpisodeCrashed, *, is_start: bool) -> None:
        """Give up where every worker fails, at its start or at its first request.

        Raises:
            RuntimeError: `MAX_FAILED_STARTS` workers in a row have failed.
        """
        # once workers have served, a crash is one episode's misfortune
        if not is_start and self._has_served:
            return
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise RuntimeError(
                f"{self._failed_starts} simulator processes in a row ended before they were of "
                f"any use, so no more are started. The last one: {error}"
            )

    def _seconds_to_next_deadline(self) -> float | None:
        deadlines = [w.deadline for w in self._workers if w.state != "idle"]
        # nothing runs that could be late: sleep until something happens
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None


def best_pair(
    workers: Sequence[Worker], idle: Sequence[Worker], waiting: Sequence[Request]
) -> tuple[Worker, Request]:
    """Choose the idle worker and the waiting request that are served next.

    A worker that served a task recently probably still has a simulator for it, and building another
    takes seconds. Where no idle worker has served any of the tasks, the one that has served the
    fewest tasks takes the task that the fewest workers have served.
    """
    # reversed, so that the oldest request of each task is the one that stays
    oldest = {request.task_id: request for request in reversed(waiting)}
    known = [
        (worker.tasks[task_id], worker, request)
        for task_id, request in oldest.items()
        for worker in idle
        if task_id in worker.tasks
    ]
    # the simulator of the newest use is the least likely to have been closed since
    if known:
        _, worker, request = max(known, key=lambda pair: pair[0])
        return worker, request
    holders = Counter(task_id for worker in workers for task_id in worker.tasks)
    return (
        min(idle, key=lambda worker: len(worker.tasks)),
        min(waiting, key=lambda request: holders[request.task_id]),
    )
