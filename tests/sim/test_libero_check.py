"""The file that other projects run, in LIBERO's own environment with its own physics and images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from verl_vla.diagnostics import libero_check
from verl_vla.diagnostics.libero_check import NONE, Check
from verl_vla.diagnostics.libero_report import judge_assets, run_simulator_check
from verl_vla.envs.libero.assets import find_assets
from verl_vla.envs.libero.gl import LIBRARIES, _loads

TASK = "libero_object/0"
"""The quickest to build."""
BASKET = "stable_scanned_objects/basket/texture.png"
RED_BASKET = "stable_scanned_objects/red_basket/texture.png"

pytestmark = pytest.mark.sim


def found(checks: list[Check]) -> dict[str, Check]:
    return {check.subject: check for check in checks if check.differs}


def test_this_is_libero_for_a_user_of_another_project(tmp_path: Path) -> None:
    """All six tasks, with nothing of this project, no answer on stdin and an empty home."""
    script = shutil.copy(libero_check.__file__, tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if "LIBERO" not in k and k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script, "--json"],
        cwd=tmp_path,
        env=kept | {"HOME": str(home), "MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    measured = answer["measured"]
    for name in ("poses", "frames", "assets"):
        assert set(measured[name]) == set(libero_check.TASKS)
    assert len(measured["files"]) == 5
    assert not any(check["differs"] for check in answer["checks"])
    ramekin, bowl = (
        measured["poses"]["libero_spatial/5"][name]
        for name in ("glazed_rim_porcelain_ramekin_1", "akita_black_bowl_1")
    )
    assert bowl[2] - ramekin[2] == pytest.approx(0.035, abs=0.001)  # it sits in it
    assert list(home.iterdir()) == []


def test_a_stand_in_asset_is_found_by_its_content(tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    shutil.copytree(find_assets(), assets, copy_function=os.symlink)
    (assets / BASKET).unlink()
    shutil.copy(assets / RED_BASKET, assets / BASKET)
    checks = found(run_simulator_check(assets, [TASK]))
    assert set(checks) == {f"meshes and textures, {TASK}", f"image, {TASK}"}
    assert {check.remedy for check in checks.values()} == {libero_check.INSTALL_ASSETS}
    assert f"1 files not LIBERO's, the first {BASKET}" in judge_assets(assets).here


@pytest.mark.skipif(not _loads(LIBRARIES["osmesa"]), reason="libOSMesa is not installed")
def test_osmesa_is_found_and_renders_what_egl_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")
    checks = run_simulator_check(find_assets(), [TASK])
    (check,) = found(checks).values()
    assert (check.subject, check.effect) == ("GL", NONE)
    assert check.here.startswith("osmesa, ")
    assert check.remedy == "export MUJOCO_GL=egl"


def test_a_simulator_that_does_not_start_is_what_was_found(tmp_path: Path) -> None:
    checks = found(run_simulator_check(tmp_path, [TASK]))
    assert list(checks) == ["LIBERO"]
    assert checks["LIBERO"].here.startswith("FileNotFoundError: ")
