"""What the lock files promise to an index that is not ours."""

from __future__ import annotations

import operator
import re
from pathlib import Path

import pytest
from project_extras import EXTRAS

from verl_vla.config.compose import group_options, load_recipe
from verl_vla.core.plugins import EXTRAS as OPTIONAL

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


@pytest.mark.parametrize("reward", group_options("reward"))
@pytest.mark.parametrize("profile", group_options("profile"))
def test_a_profile_needs_nothing_that_the_launchers_do_not_install(profile, reward) -> None:
    """All of them, Modal and SkyPilot too, install the run lock and no extra."""
    recipe = load_recipe(["recipe=libero", f"profile={profile}", f"reward={reward}"])
    locked = (ROOT / "requirements" / "run.lock").read_text()
    for (option, value), extra in OPTIONAL.items():
        chosen = operator.attrgetter(option)(recipe)
        if value in ((chosen,) if isinstance(chosen, str) else chosen):
            assert f"\n{extra.package}==" in locked, f"{option}={value} of {profile}"


def test_every_extra_is_resolved_and_told_of() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert set(re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE)) == set(EXTRAS)
    told = (ROOT / "docs" / "running.md").read_text()
    assert all(f"| `{extra}` |" in told for extra in EXTRAS)
