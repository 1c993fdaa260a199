"""What `scripts/_setup.sh` makes of pip's settings, of the Pythons there are, of a second call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "scripts" / "_setup.sh"
SYSTEM_PATH = "/usr/bin:/bin"


def bash(
    program: str, *, script: Path = SETUP, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``program`` after sourcing the set-up script, with nothing else in the environment."""
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source {script}; {program}"],
        env={"PATH": SYSTEM_PATH, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def taken_over(settings: list[str], **environment: str) -> dict[str, str]:
    """The variables for uv that follow from the lines of ``pip config list``."""
    done = bash(
        'settings=$PIP_LINES; unset PIP_LINES; take_over_pip_settings; env | grep -E "^(UV_|SSL_)"',
        PIP_LINES="\n".join(settings),
        **environment,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_without_settings_only_the_patience_is_set() -> None:
    assert taken_over([]) == {"UV_HTTP_TIMEOUT": "180"}


def test_every_setting_of_pip_reaches_uv() -> None:
    found = taken_over(
        [
            "global.cert='/etc/ca.crt'",
            "global.extra-index-url='https://one.example/a https://two.example/b'",
            "global.find-links='/wheels\\n/more-wheels'",
            "global.index-url='https://index.example/a'",
            "global.timeout='9'",
            "global.trusted-host='index.example'",
        ]
    )
    assert found == {
        "SSL_CERT_FILE": "/etc/ca.crt",
        "UV_DEFAULT_INDEX": "https://index.example/a",
        "UV_FIND_LINKS": "/wheels,/more-wheels",
        "UV_HTTP_TIMEOUT": "180",
        "UV_INDEX": "https://one.example/a https://two.example/b",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_INSECURE_HOST": "index.example",
    }


@pytest.mark.parametrize("order", [1, -1])
def test_the_environment_goes_before_install_before_global(order: int) -> None:
    sections = ["global", "install", ":env:"]
    lines = [f"{section}.index-url='https://{i}.example'" for i, section in enumerate(sections)]
    for last, line in reversed(list(enumerate(lines))):
        found = taken_over(lines[: last + 1][::order])
        assert found["UV_DEFAULT_INDEX"] == f"https://{last}.example", line


def test_what_was_said_to_uv_itself_stays() -> None:
    said = {"UV_INDEX_URL": "https://mine.example", "UV_EXTRA_INDEX_URL": "https://more.example"}
    found = taken_over(
        ["global.index-url='https://other.example'", "global.extra-index-url='https://x.example'"],
        **said,
    )
    assert found == {**said, "UV_HTTP_TIMEOUT": "180"}


def test_a_python_out_of_range_is_passed_over(tmp_path: Path) -> None:
    """One answers as 3.13, one not at all, as a pyenv shim of a version that is not active."""
    for name, body in (("python3.11", "exit 127"), ("python3.12", "exit 1"), ("python3.10", ":")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = bash("find_python", PATH=f"{tmp_path}:{SYSTEM_PATH}")
    assert done.stdout.strip() == str(tmp_path / "python3.10")


def test_no_usable_python_is_said_with_the_remedy(tmp_path: Path) -> None:
    for name in ("python3.10", "python3.11", "python3.12", "python3"):
        (tmp_path / name).write_text("#!/bin/sh\necho Python 3.13.0; exit 1\n")
        (tmp_path / name).chmod(0o755)
    done = bash("base=$(find_python); echo went on", PATH=f"{tmp_path}:{SYSTEM_PATH}")
    assert done.returncode == 1
    assert "went on" not in done.stdout
    assert "no Python 3.10, 3.11 or 3.12 on the PATH (python3 is Python 3.13.0)" in done.stderr
    assert "apt-get install" in done.stderr


def project(folder: Path) -> Path:
    """A project whose environment is stamped as complete; return its set-up script."""
    (folder / "scripts").mkdir()
    (folder / "requirements").mkdir()
    script = folder / "scripts" / "_setup.sh"
    shutil.copy(SETUP, script)
    (folder / "pyproject.toml").write_text("")
    (folder / "requirements" / "run.lock").write_text("")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(shutil.which("true") or os.devnull)
    stamp = 'cd "$root" && pwd && sha256sum pyproject.toml scripts/_setup.sh requirements/*.lock'
    assert bash(f'({stamp}) >"$venv/ready-run"', script=script).returncode == 0
    return script


MARK = "make_venv() { say making; exit 7; }"


def test_a_second_call_takes_what_stands(tmp_path: Path) -> None:
    done = bash(f"{MARK}; set_up_packages run", script=project(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("changed", ["pyproject.toml", "requirements/run.lock"])
def test_a_changed_requirement_is_installed(tmp_path: Path, changed: str) -> None:
    script = project(tmp_path)
    (tmp_path / changed).write_text("something else")
    done = bash(f"{MARK}; set_up_packages run", script=script)
    assert (done.returncode, done.stderr) == (7, "making\n")
    assert not (tmp_path / ".venv" / "ready-run").exists()


def test_a_moved_project_is_installed_again(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    project(tmp_path / "here")
    moved = (tmp_path / "here").rename(tmp_path / "there")
    done = bash(f"{MARK}; set_up_packages run", script=moved / "scripts" / "_setup.sh")
    assert done.returncode == 7


def test_two_calls_at_once_take_turns(tmp_path: Path) -> None:
    script = project(tmp_path)
    program = 'turn() { echo in >>"$root/log"; sleep 0.3; echo out >>"$root/log"; }; '
    done = bash(f"{program} alone turn & alone turn & wait; cat $root/log", script=script)
    assert done.stdout.split() == ["in", "out", "in", "out"]


def test_without_root_the_missing_renderer_is_an_error_with_the_command(tmp_path: Path) -> None:
    lacking = "id() { echo 1000; }; can_render() { false; }; gl_loads() { false; }"
    done = bash(f"{lacking}; set_up_renderer; echo went on", script=project(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "apt-get install -y --no-install-recommends libegl1" in done.stderr


def test_the_installed_assets_are_compared_whatever_a_variable_names(tmp_path: Path) -> None:
    """An old folder that a variable names is no fault of an installation."""
    script = project(tmp_path)
    (tmp_path / "pyproject.toml").write_text("changed")
    called = tmp_path / "python"
    called.write_text('#!/bin/sh\necho "named: ${VERL_VLA_LIBERO_ASSETS:-nothing}" >&2\n')
    called.chmod(0o755)
    program = "make_venv() { :; }; python=$FAKE; uv=true; use_packages run"
    done = bash(program, script=script, FAKE=str(called), VERL_VLA_LIBERO_ASSETS="/old")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "named: nothing")


def test_a_fault_of_the_assets_is_said_without_a_traceback(tmp_path: Path) -> None:
    program = '"$PYTHON" -c "$compare_assets"'
    done = bash(
        program,
        PYTHON=sys.executable,
        PYTHONPATH=str(SETUP.parents[1]),
        VERL_VLA_LIBERO_ASSETS=str(tmp_path),
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: VERL_VLA_LIBERO_ASSETS={tmp_path} lacks")
