"""Code of somebody else that takes too long: interrupted, or ended with the process."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
from script_process import run_script

from verl_vla.core import time_limit as module
from verl_vla.core.plugins import import_file
from verl_vla.core.processes import is_alive
from verl_vla.core.time_limit import INTERRUPT, run_within

LONG_S = 60
TOO_LONG = 9


class TooSlow(Exception):  # noqa: N818 -- an event
    """What the limit is to raise."""


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPEAT_S", 0.05)


def wait_in_lock() -> None:
    threading.Event().wait(LONG_S)


def sleep() -> None:
    time.sleep(LONG_S)


def survive_errors() -> None:
    for _ in range(LONG_S):
        try:
            time.sleep(1)
        except Exception:  # noqa: BLE001 -- as careless as a plug-in may be
            continue


def survive_everything() -> None:
    for _ in range(3):
        try:
            time.sleep(LONG_S)
        except BaseException:  # noqa: BLE001 -- more careless still
            continue


def rename_the_interruption() -> None:
    try:
        time.sleep(LONG_S)
    except BaseException as error:
        raise SystemError("returned a result with an exception set") from error


@pytest.mark.parametrize("code", [wait_in_lock, sleep, survive_errors, rename_the_interruption])
def test_what_waits_in_python_is_interrupted(code) -> None:
    before, began = signal.getsignal(INTERRUPT), time.monotonic()
    with pytest.raises(TooSlow):
        run_within(0.05, code, TooSlow, TOO_LONG)
    assert time.monotonic() - began < LONG_S / 2
    assert signal.getsignal(INTERRUPT) == before


def test_what_catches_the_interruption_is_interrupted_again() -> None:
    began = time.monotonic()
    run_within(0.05, survive_everything, TooSlow, TOO_LONG)
    assert time.monotonic() - began < LONG_S / 2


def test_what_is_fast_enough_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_within(LONG_S, lambda: 7, TooSlow, TOO_LONG) == 7
    # the limit and the end of the code meet
    monkeypatch.setattr(module, "REPEAT_S", 0.0)
    for _ in range(50):
        try:
            run_within(0.001, lambda: time.sleep(0.001), TooSlow, TOO_LONG)
        except TooSlow:
            continue
    assert not [t for t in threading.enumerate() if t.name == "run_within"]


def test_an_error_of_the_code_stays_what_it_is() -> None:
    with pytest.raises(KeyError):
        run_within(LONG_S, lambda: {}["absent"], TooSlow, TOO_LONG)


def test_the_line_of_a_plugin_is_told(tmp_path: Path) -> None:
    file = tmp_path / "slow.py"
    file.write_text("import time\n\ndef nap():\n    time.sleep(60)\n")
    plugin = import_file(file)
    with pytest.raises(TooSlow, match=rf"^ \({file}, line 4\)$"):
        run_within(0.05, plugin.nap, TooSlow, TOO_LONG)


SCRIPT = """
    import ctypes, signal, subprocess
    from verl_vla.core import time_limit

    # as native code that takes up its wait again after a signal
    signal.pthread_sigmask(signal.SIG_BLOCK, [time_limit.INTERRUPT])

    time_limit.REPEAT_S = time_limit.GRACE_S = 0.2
    child = subprocess.Popen(["sleep", "600"])
    print(child.pid, flush=True)
    # it leaves Python's lock, and never comes back
    wait = lambda: ctypes.CDLL(None).poll(None, 0, -1)
    time_limit.run_within(0.2, wait, lambda where: ValueError(f"too slow{where}"), 5)
"""


def test_native_code_that_never_returns_is_ended_with_the_process_and_its_children() -> None:
    done = run_script(SCRIPT, LONG_S)
    assert done.returncode == 5
    assert done.stderr == "stopped: too slow\n"
    deadline = time.monotonic() + LONG_S
    while is_alive(int(done.stdout)):
        assert time.monotonic() < deadline
