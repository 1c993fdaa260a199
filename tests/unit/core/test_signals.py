"""Real signals to real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from verl_vla.cli import main as command
from verl_vla.core.errors import Interrupted
from verl_vla.core.signals import SIGNALS, stop_requests


@pytest.fixture
def hung_up_by_default():
    """Undo what nohup does to this process."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_run_under_nohup_goes_on_when_the_terminal_is_closed(hung_up_by_default):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_requests() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not request.is_made
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request(number, capfd, hung_up_by_default):
    before = [signal.getsignal(one) for one in SIGNALS]
    expected = pytest.raises(Interrupted, match=f"{number.name} after step 3; the same")
    with expected as caught, stop_requests() as request:
        assert not request.is_made
        os.kill(os.getpid(), number)
        assert request.is_made
        request.carry_out(3)
    assert caught.value.signal_number == number
    assert f"{number.name}: stopping after this step" in capfd.readouterr().err
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_nobody_asked_so_nothing_ends():
    with stop_requests() as request, pytest.raises(AssertionError, match="nobody asked"):
        request.carry_out(1)


WAIT = """
import time
from verl_vla.core.signals import leave_signals_to_parent, stop_requests
held = {taken}
print("ready", flush=True)
time.sleep(60)
"""


def start(taken: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT.format(taken=taken)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("first", "second"), [SIGNALS[:2], SIGNALS[1::-1]])
def test_the_second_signal_ends_at_once(first, second):
    process = start("stop_requests(); held.__enter__()")
    process.send_signal(first)
    assert process.stderr is not None
    assert "once more stops at once" in process.stderr.readline()
    began = time.monotonic()
    process.send_signal(second)
    assert process.wait(timeout=10) == -second
    assert time.monotonic() - began < 5


def test_a_process_of_a_run_leaves_the_keyboard_to_the_first_one():
    process = start("leave_signals_to_parent()")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_command_says_what_ended_it(monkeypatch, capsys):
    def interrupted(words):
        raise Interrupted("SIGTERM after step 3", signal.SIGTERM)

    def at_the_keyboard(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("verl_vla.cli.recipes.run", interrupted)
    assert command.main(["recipes"]) == 143
    assert capsys.readouterr().err == "stopped: SIGTERM after step 3\n"
    monkeypatch.setattr("verl_vla.cli.recipes.run", at_the_keyboard)
    assert command.main(["recipes"]) == 130
