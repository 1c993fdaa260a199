"""What the lock files promise to an index that is not ours."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_lock_files_hold_exact_versions_and_nothing_else() -> None:
    pin = re.compile(r"[a-z0-9-]+==[\w.]+ ; .+")
    for lock in (ROOT / "requirements").glob("*.lock"):
        assert [line for line in lock.read_text().splitlines() if not pin.fullmatch(line)] == []


def test_the_tools_lock_contains_the_run_lock() -> None:
    run, dev = (
        set((ROOT / "requirements" / f"{name}.lock").read_text().splitlines())
        for name in ("run", "dev")
    )
    assert run <= dev


def test_every_exact_pin_of_the_project_is_the_locked_version() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    lock = (ROOT / "requirements" / "run.lock").read_text().splitlines()
    pins = re.findall(r'^    "([\w-]+)==([\w.]+)",$', pyproject, flags=re.MULTILINE)
    assert pins, "pyproject.toml has no exact pin, or they are written in another way"
    for name, version in pins:
        assert any(line.startswith(f"{name.lower()}=={version} ;") for line in lock), name
