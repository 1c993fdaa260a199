"""Many episodes at a time, played by few simulator processes.

A *slot* holds one episode. The pool keeps its latest snapshot and sends it with each action chunk
to any free process. So a few processes play any number of slots, no result depends on which process
served which request, and a process that raises, hangs or dies costs exactly the one episode that it
was serving.
"""

from __future__ import annotations

import atexit
import os
import pickle
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np
import numpy.typing as npt

from verl_vla.core.episode import EpisodeSpec
from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.envs.base import EnvFactory
from verl_vla.envs.libero.egl_devices import device_variable
from verl_vla.envs.pool.dispatcher import Dispatcher
from verl_vla.envs.pool.messages import Request, Result, Setup, make_frames_file, map_frames
from verl_vla.envs.pool.slots import Answer, PoolStats, Slots
from verl_vla.envs.pool.worker_process import WorkerProcess


class EnvPool:
    """Slots for episodes and the processes that simulate them. Use it as a context manager.

    Only one thread may call it. Processes start with the pool and are ready some seconds later;
    until then requests are queued.

    Args:
        factory: picklable function that makes the environment of a process.
        num_workers: largest number of processes; no more are started than there are slots.
        num_slots: number of episodes that can run at the same time.
        image_shape: (V, H, W, 3) of an observation's image.
        timeout_s: time limit of one request, after which its process is killed. The first request
            for a task includes the time to build its simulator.
        worker_env: environment variables of the processes, added to those of this process and to
            `verl_vla.envs.pool.worker_process.ONE_THREAD`.
        render_devices: EGL devices that the processes render on, in turn; empty to let MuJoCo
            choose.
        max_cached_starts: number of recorded starts that are cached instead of simulated again.
        start_timeout_s: time limit for a process to start and to make its environment.

    Raises:
        ConfigError: a number is not positive, or ``max_cached_starts`` is negative.
        ContractError: ``factory`` cannot be sent to another process.
    """

    def __init__(
        self,
        factory: EnvFactory,
        *,
        num_workers: int,
        num_slots: int,
        image_shape: tuple[int, int, int, int],
        timeout_s: float,
        worker_env: Mapping[str, str],
        render_devices: Sequence[int] = (),
        max_cached_starts: int = 512,
        start_timeout_s: float = 300.0,
    ) -> None:
        _check_positive(num_workers=num_workers, num_slots=num_slots)
        _check_positive(timeout_s=timeout_s, start_timeout_s=start_timeout_s)
        if max_cached_starts < 0:
            raise ConfigError(f"max_cached_starts is {max_cached_starts}; set 0 to remember none")
        # before any process starts: what cannot be pickled is the caller's mistake
        setup = Setup(factory=_pack(factory), frames_shape=(num_slots, *image_shape))
        self._frames_file = make_frames_file(setup.frames_shape)
        self._slots = Slots(
            map_frames(self._frames_file, setup.frames_shape), max_cached_starts=max_cached_starts
        )
        self._awaited: frozenset[int] = frozenset()
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._is_open = True
        self._owner_pid = os.getpid()

        def launch(number: int, deadline: float) -> WorkerProcess:
            device = device_variable(render_devices, number)
            environment = {**device, **worker_env}
            return WorkerProcess(
                setup, self._frames_file, environment, number=number, deadline=deadline
            )

        self._dispatcher = Dispatcher(
            launch,
            num_workers=min(num_workers, num_slots),
            timeout_s=timeout_s,
            start_timeout_s=start_timeout_s,
            deliver=self._deliver,
            fail=self._fail,
        )
        atexit.register(self.close)

    @property
    def num_slots(self) -> int:
        """Number of episodes that can run at the same time."""
        return len(self._slots)

    @property
    def stats(self) -> PoolStats:
        """Counters of the work done so far."""
        return replace(self._slots.stats, restarts=self._dispatcher.num_restarts)

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the running simulators, for monitoring."""
        return self._dispatcher.pids

    def reset(self, slots: Mapping[int, EpisodeSpec]) -> None:
        """Start an episode in each of these slots, replacing the old ones, without waiting.

        Raises:
            ContractError: a slot does not exist, or has an answer that was not yet taken.
        """
        with self._changed:
            self._check_usable()
            # all are checked first: a call that is refused starts nothing
            for slot in slots:
                self._slots.check_free(slot)
            for slot, spec in slots.items():
                self._submit(self._slots.start(slot, spec))

    def step(self, chunks: Mapping[int, npt.NDArray[np.float32]]) -> None:
        """Run one action chunk [K, A] in each of these slots, without waiting.

        Raises:
            ContractError: a slot does not exist, plays no episode, or has an answer that was not
                yet taken; or its chunk has a wrong shape or dtype.
        """
        with self._changed:
            self._check_usable()
            for slot, actions in chunks.items():
                self._slots.check_free(slot)
                self._slots.check_playing(slot)
                _check_chunk(slot, actions)
            for slot, actions in chunks.items():
                self._submit(self._slots.step(slot, actions))

    def wait(self, slots: Collection[int]) -> dict[int, Answer]:
        """Wait until all of these slots have answered; other slots keep running.

        Returns:
            The answer of each slot, in the order of ``slots``: an `Observation` to a reset, a
            `ChunkResult` to a step, an `EpisodeCrashed` to either. After a crash, as after the
            end of its episode, a slot is free for `reset`.

        Raises:
            ContractError: a slot has no request, or an environment refused its input.
            ConfigError: the environment cannot be made as configured, or has no such start.
            RuntimeError: no process survives its start.
        """
        began = time.perf_counter()
        with self._changed:
            self._check_usable()
            for slot in slots:
                self._slots.check_asked(slot)
            # lets `_deliver` wake this thread once, with the last answer
            self._awaited = frozenset(slots)
            self._changed.wait_for(
                lambda: self._failure is not None or self._slots.have_answered(self._awaited)
            )
            self._check_usable()
            self._slots.stats += PoolStats(wait_s=time.perf_counter() - began)
            return self._slots.take_answers(slots)

    def have_answered(self, slots: Collection[int]) -> bool:
        """Return True where `wait` would return, or raise, at once."""
        with self._changed:
            return self._failure is not None or self._slots.have_answered(slots)

    def close(self) -> None:
        """End all processes; the pool cannot be used afterwards. A second call does nothing."""
        if not self._is_open or os.getpid() != self._owner_pid:
            return  # the exit of a forked child must not end its parent's processes
        self._is_open = False
        atexit.unregister(self.close)
        self._dispatcher.close()
        os.close(self._frames_file)
        self._failure = ContractError("the pool is closed; make another one")

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _submit(self, request: Request | None) -> None:
        if request is not None:
            self._dispatcher.submit(request)

    def _deliver(self, request: Request, result: Result) -> None:
        """Record the result of a request; the dispatcher's thread calls this."""
        with self._changed:
            # a reset that failed is tried again for the next slot that waits for it
            self._submit(self._slots.note(request, result))
            if self._slots.have_answered(self._awaited):
                self._changed.notify_all()

    def _fail(self, failure: Exception) -> None:
        """Record that no request will be served any more; the dispatcher's thread calls this."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()


def _pack(factory: EnvFactory) -> bytes:
    try:
        return pickle.dumps(factory)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ContractError(
            f"{factory!r} cannot be sent to another process ({error}); pass a functools.partial "
            "of a function that can be imported"
        ) from error


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if number <= 0:
            raise ConfigError(f"{name} is {number}; a pool needs a positive number")


def _check_chunk(slot: int, actions: npt.NDArray[np.float32]) -> None:
    if actions.ndim != 2 or actions.dtype != np.float32:
        raise ContractError(
            f"slot {slot}: a chunk must be float32 [K, A], got {actions.dtype} "
            f"{list(actions.shape)}"
        )
