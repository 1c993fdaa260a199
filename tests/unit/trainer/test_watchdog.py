"""A process that dies ends the run, whatever the main thread waits for; with real processes."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError
from script_process import run_script

from verl_vla.core import processes
from verl_vla.core.errors import EXIT_LEARNER_LOST, LearnerLostError
from verl_vla.trainer.verl_compat import watchdog
from verl_vla.trainer.verl_compat.watchdog import Watchdog, dead_among, ray_daemons

LONG_S = 60


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "CHECK_EVERY_S", 0.02)


@pytest.fixture
def child() -> Generator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", str(LONG_S)])
    yield process
    process.kill()
    process.wait()


def message(name: str) -> str:
    return f"{name} is dead. Resume"


def test_a_wait_without_a_limit_is_interrupted(child: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    with Watchdog(message) as dog:
        child.kill()
        with (
            pytest.raises(
                LearnerLostError, match=rf"^storage \(process {child.pid}\) is dead\. Re"
            ),
            dog.watching(lambda: dead_among({}, {"storage": child.pid})),
        ):
            threading.Event().wait(LONG_S)
    assert time.monotonic() - began < LONG_S / 2


def test_what_a_call_makes_of_its_interruption_does_not_hide_the_death(
    child: subprocess.Popen[bytes],
) -> None:
    def wait() -> None:
        try:
            threading.Event().wait(LONG_S)
        except LearnerLostError as error:
            # as Ray's calls do
            raise SystemError("returned a result with an exception set") from error

    with Watchdog(message) as dog:
        child.kill()
        with (
            pytest.raises(LearnerLostError, match=r"^storage .* is dead\. Resume$"),
            dog.watching(lambda: dead_among({}, {"storage": child.pid})),
        ):
            wait()


def test_an_error_while_all_live_stays_what_it_is(child: subprocess.Popen[bytes]) -> None:
    with (
        Watchdog(message) as dog,
        pytest.raises(KeyError),
        dog.watching(lambda: dead_among({}, {"storage": child.pid})),
    ):
        raise KeyError


def test_nothing_happens_while_all_live_and_the_old_handler_comes_back(
    child: subprocess.Popen[bytes],
) -> None:
    before = signal.getsignal(watchdog.INTERRUPT)
    looked = threading.Semaphore(0)

    def look() -> str | None:
        looked.release()
        return dead_among({}, {"child": child.pid})

    with Watchdog(message) as dog, dog.watching(look):
        for _ in range(3):
            assert looked.acquire(timeout=LONG_S)
    assert signal.getsignal(watchdog.INTERRUPT) == before


def test_a_death_after_the_end_of_the_watch_is_nobodys_business() -> None:
    is_asked, is_over = threading.Event(), threading.Event()

    def look() -> str:
        is_asked.set()
        is_over.wait(LONG_S)
        return "a process that was ended on purpose"

    with Watchdog(message) as dog:
        with dog.watching(look):
            assert is_asked.wait(LONG_S)
        is_over.set()
        time.sleep(0.1)


SCRIPT = """
    import subprocess, sys, threading
    from verl_vla.trainer.verl_compat import watchdog

    watchdog.CHECK_EVERY_S = watchdog.END_LIMIT_S = 0.2
    child = subprocess.Popen(["sleep", "600"])
    print(child.pid, flush=True)

    def hang():
        threading.Event().wait()

    with watchdog.Watchdog(lambda name: f"{name} is dead. Resume") as dog:
        try:
            with dog.watching(lambda: "storage"):
                hang()
        finally:
            hang()
"""


def test_a_run_whose_end_hangs_too_is_ended_with_its_children() -> None:
    done = run_script(SCRIPT, LONG_S)
    assert done.returncode == EXIT_LEARNER_LOST
    assert done.stderr.splitlines()[-1] == "stopped: storage is dead. Resume"
    # what nobody waits for any more may not have been buried yet, and a busy machine takes a moment
    deadline = time.monotonic() + LONG_S
    while (dead := dead_among({}, {"child": int(done.stdout)})) is None:
        assert time.monotonic() < deadline
    assert dead is not None


QUIET = """
    import asyncio, threading
    from verl_vla.core.errors import LearnerLostError
    from verl_vla.trainer.verl_compat import watchdog

    watchdog.CHECK_EVERY_S = 0.05

    class Call:
        def __del__(self):
            raise ValueError("nobody answers")

    loop = asyncio.new_event_loop()
    task = loop.create_task(asyncio.sleep(60))
    loop.run_until_complete(asyncio.sleep(0))
    call = Call()
    with watchdog.Watchdog(str) as dog:
        try:
            with dog.watching(lambda: "storage"):
                threading.Event().wait()
        except LearnerLostError:
            pass
"""


def test_calls_that_wait_for_a_dead_process_are_dropped_without_tracebacks() -> None:
    done = run_script(QUIET, LONG_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Actor:
    """An actor's handle, as far as it is asked whether it lives."""

    def __init__(self, answer: Exception | None) -> None:
        self.answer = answer
        self.__ray_ready__ = SimpleNamespace(remote=lambda: self)


def test_an_actor_is_dead_when_ray_says_so_and_not_when_it_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def get(actor: Actor, timeout: float) -> None:
        assert timeout == watchdog.ANSWER_LIMIT_S
        if actor.answer is not None:
            raise actor.answer

    monkeypatch.setattr(watchdog.ray, "get", get)
    alive, busy, dead = Actor(None), Actor(GetTimeoutError()), Actor(ActorDiedError())
    assert dead_among({"alive": alive, "busy": busy}, {}) is None
    assert dead_among({"alive": alive, "busy": busy, "dead": dead}, {}) == "dead"


def test_daemons_are_found_by_name_among_this_processs_own_children(
    monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setattr(watchdog, "RAY_DAEMONS", ("sleep",))
    assert ray_daemons() == {"sleep": child.pid}
    monkeypatch.setattr(watchdog, "RAY_DAEMONS", ("raylet",))
    assert ray_daemons() == {}


def test_a_name_with_brackets_does_not_confuse_the_table_of_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for pid, stat in {7: "7 (a) b (c)) Z 3 0", 3: "3 (x) S 1 0"}.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(stat)
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert processes.descendants(3) == [7]
    assert dead_among({}, {"c": 3}) is None
    assert dead_among({}, {"c": 7}) == "c (process 7)"
    assert dead_among({}, {"gone": 8}) == "gone (process 8)"
