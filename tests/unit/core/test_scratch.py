"""What a command leaves in the folder for temporary files: nothing, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.core.scratch import PREFIX, remove_abandoned, scratch_folder

LEAVES_FILES = """
import subprocess, sys, tempfile, time
from pathlib import Path
from verl_vla.core.errors import Interrupted
from verl_vla.core.scratch import scratch_folder
child = "import tempfile; from pathlib import Path; (Path(tempfile.gettempdir()) / 'c').touch()"
try:
    with scratch_folder() as folder:
        tempfile.mkstemp(prefix="ckpt_", suffix=".lock")
        tempfile.mkdtemp(prefix="verl-vla-libero-")
        subprocess.run([sys.executable, "-c", child], check=True)
        print(len(list(folder.iterdir())), flush=True)
        time.sleep(60 if sys.argv[1:] else 0)
except Interrupted as error:
    sys.exit(128 + error.signal_number)
"""


@pytest.fixture
def usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LEAVES_FILES, *words], stdout=subprocess.PIPE, text=True
    )


def test_a_command_and_its_children_leave_nothing(usual: Path) -> None:
    process = start()
    # the lock, a file, a folder, and the child's file
    assert process.communicate()[0] == "4\n"
    assert process.returncode == 0
    assert list(usual.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_a_signal_ends_leaves_nothing_for_long(
    usual: Path, number: signal.Signals
) -> None:
    process = start("long")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    killed = number == signal.SIGKILL
    assert process.wait() == (-number if killed else 128 + number)
    process.stdout.close()
    assert len(list(usual.iterdir())) == int(killed)
    with scratch_folder() as folder:
        assert list(usual.iterdir()) == [folder]
    assert list(usual.iterdir()) == []


def test_the_folder_is_the_one_that_everybody_finds(usual: Path) -> None:
    with scratch_folder() as folder:
        assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(folder)
        assert folder.name.startswith(PREFIX)
        # 0700, as mkdtemp makes it
        assert folder.stat().st_mode & 0o77 == 0
    assert os.environ["TMPDIR"] == str(usual)
    assert tempfile.gettempdir() == str(usual)


def test_folders_that_are_in_use_or_not_ours_stay(usual: Path) -> None:
    (usual / f"{PREFIX}libero-x").mkdir()
    (usual / f"{PREFIX}file").touch()
    (usual / "elsewhere").mkdir()
    (usual / "elsewhere" / "lock").touch()
    (usual / f"{PREFIX}link").symlink_to(usual / "elsewhere")
    with scratch_folder() as folder:
        before = sorted(usual.iterdir())
        remove_abandoned(usual)
        assert sorted(usual.iterdir()) == before
        assert folder in before
    assert len(list(usual.iterdir())) == 4


def test_sigterm_is_handled_as_before_afterwards(usual: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with scratch_folder():
        assert callable(signal.getsignal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == before
    assert list(usual.iterdir()) == []


def test_a_forked_child_ends_by_the_signal_itself(usual: Path) -> None:
    with scratch_folder():
        ready, begun = os.pipe()
        child = os.fork()
        if not child:
            # a signal before Python is ready for it would be lost
            os.write(begun, b"x")
            time.sleep(60)
            os._exit(0)
        os.read(ready, 1)
        os.close(ready)
        os.close(begun)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert list(usual.iterdir()) == []


def test_a_machine_without_a_folder_for_temporary_files_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_found() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none_found)
    with (
        pytest.raises(ConfigError, match="no folder for temporary files can be made .*set TMPDIR"),
        scratch_folder(),
    ):
        pytest.fail("made")


@pytest.mark.parametrize("home", ["/proc/no/home", "/dev/null"])
def test_caches_have_a_place_where_there_is_no_home(
    usual: Path, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    with scratch_folder() as folder:
        assert Path.home() == folder / "home"
        assert Path.home().is_dir()
    assert os.environ["HOME"] == home
    assert list(usual.iterdir()) == []


def test_a_user_without_an_entry_in_the_system_has_a_home(
    usual: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "home", unknown)
    with scratch_folder() as folder:
        assert Path("~").expanduser() == folder / "home"
    assert "HOME" not in os.environ


def test_a_home_that_is_there_is_used(
    usual: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    with scratch_folder():
        assert Path.home() == home
    assert list(usual.iterdir()) == []
