"""Two processes, one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import folder_lock

HOLD = """
import sys, time
from pathlib import Path
from verl_vla.core.files import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_process_at_a_time(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError) as caught, folder_lock(tmp_path):
        pass
    said = str(caught.value)
    assert f"{tmp_path} is in use by process {other.pid} on " in said
    assert "choose another folder" in said
    other.send_signal(signal.SIGKILL)  # the dead hold nothing
    other.wait()
    with folder_lock(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()


def test_a_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), folder_lock(tmp_path):
        raise KeyError("x")
    with folder_lock(tmp_path):
        pass


def test_a_process_that_is_started_meanwhile_does_not_keep_the_folder(tmp_path):
    with folder_lock(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with folder_lock(tmp_path):
        assert child.poll() is None
    child.kill()
    child.wait()
