"""What the folders of a policy and of assets hold has a name, wherever they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.envs.libero.asset_files import check_assets
from verl_vla.envs.libero.assets import (
    ASSET_FOLDERS,
    ASSETS_VARIABLE,
    describe_assets,
    differing_assets,
    find_assets,
)
from verl_vla.policies.checkpoint import fingerprint


def test_a_copy_has_the_same_fingerprint_and_a_change_another(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "a" / "config.json").write_text("{}")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"weighty")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "b" / "other.safetensors")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_assets_that_are_not_liberos_are_named(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    name = "scenes/libero_tabletop_base_style.xml"
    shutil.copy(find_assets() / name, tmp_path / name)
    (tmp_path / "scenes" / "of_another_project.xml").write_text("<mujoco/>")
    assert differing_assets(tmp_path) == []
    (tmp_path / name).write_text("<mujoco/>")
    assert differing_assets(tmp_path) == [name]
    found = describe_assets(tmp_path)["differing"]
    assert list(found) == [name]
    describe_assets.cache_clear()
    (tmp_path / name).write_text("<mujoco model='other'/>")
    assert describe_assets(tmp_path)["differing"] != found


def test_the_assets_of_this_machine_are_liberos() -> None:
    check_assets()


def test_a_stand_in_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ASSET_FOLDERS:
        (tmp_path / name).mkdir()
    (tmp_path / "wall.xml").write_text("<mujoco/>")
    monkeypatch.setenv(ASSETS_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match=r"1 files not LIBERO's, the first wall\.xml.*unset VERL"):
        check_assets()
