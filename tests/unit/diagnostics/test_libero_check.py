"""What the one file makes of measured values; tests/sim/test_libero_check.py measures them."""

from __future__ import annotations

import ast
import copy
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from verl_vla.diagnostics import libero_check
from verl_vla.diagnostics.libero_check import COLOURS, PHYSICS, REFERENCE, Check, describe, judge
from verl_vla.envs.libero.assets import libero_root
from verl_vla.envs.libero.init_states import read_states

DARK_FLOOR = "05210c26 Tvt(NWMN}qU0hdDTT)A2R!(kaUvFn%ZemzuSWj|iU5I~jesE=ga%PHqZi;<z"
"""Of LIBERO-Object task 0 under MuJoCo 3.3.3, 3.4.0 and 3.8.1 alike."""
BOWL_ON_THE_RIM = [-0.21178, 0.16785, 0.94282, 0.75797, -0.01331, 0.09057, 0.64584]
"""Of LIBERO-Spatial task 5 under MuJoCo 3.4.0 and 3.8.1; that of 3.3.3 is the reference's."""
KETCHUP_IN_THE_AIR = [-0.26846, -0.14857, 1.05368, 0.50006, 0.49994, 0.49981, 0.50019]
"""Of LIBERO-10 task 0, the same versions."""
COMMAND = "pip install mujoco==3.3.2"


@pytest.fixture
def measured() -> dict[str, Any]:
    """A machine that is LIBERO."""
    versions = {"robosuite": "1.4.0", "libero": "hf-libero 0.1.4", "python": "3.8.18"}
    versions |= {"mujoco": "3.3.2", "numpy": "1.24.4"}
    gl = "egl, llvmpipe (LLVM 15.0.6, 256 bits)"
    return {"versions": versions, "gl": gl, "failure": None, **copy.deepcopy(REFERENCE)}


def under_mujoco(version: str, measured: dict[str, Any]) -> dict[str, Any]:
    measured["versions"]["mujoco"] = version
    measured["frames"]["libero_object/0"] = DARK_FLOOR
    if version >= "3.4.0":
        measured["poses"]["libero_spatial/5"]["akita_black_bowl_1"] = BOWL_ON_THE_RIM
        measured["poses"]["libero_10/0"]["ketchup_1"] = KETCHUP_IN_THE_AIR
    return measured


def found(measured: dict[str, Any]) -> dict[str, Check]:
    return {check.subject: check for check in judge(measured) if check.differs}


def test_it_runs_on_python_3_8_with_numpy_alone_until_libero_is_needed() -> None:
    source = Path(libero_check.__file__).read_text()
    module = ast.parse(source, feature_version=(3, 8))
    names = {alias.name for n in module.body if isinstance(n, ast.Import) for alias in n.names}
    names |= {str(node.module) for node in module.body if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in names}
    assert packages - sys.stdlib_module_names == {"numpy"}


def test_libero_is_libero(measured: dict[str, Any]) -> None:
    assert found(measured) == {}
    lines = describe(judge(measured))
    assert lines[-1] == "this is LIBERO"
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert any("equal to the byte" in line for line in lines)


@pytest.mark.parametrize("version", ["3.4.0", "3.8.1"])
def test_other_physics_are_found_and_mended_by_one_command(
    version: str, measured: dict[str, Any]
) -> None:
    differing = found(under_mujoco(version, measured))
    assert set(differing) == {
        "mujoco",
        "settled poses, libero_spatial/5",
        "settled poses, libero_10/0",
        "image, libero_object/0",
    }
    assert differing["mujoco"].here == version
    bowl = differing["settled poses, libero_spatial/5"]
    assert bowl.here == "akita_black_bowl_1 35.33 mm off, 14.17 degrees"
    assert bowl.effect == PHYSICS
    assert "544.50 mm" in differing["settled poses, libero_10/0"].here
    assert {check.remedy for check in differing.values()} == {COMMAND}
    report = "\n".join(describe(judge(measured)))
    assert report.count(COMMAND) == 1
    assert "1. pip install mujoco==3.3.2\n   effect: LIBERO-Object 88% -> 69%" in report
    assert "98% -> 12%" in report


def test_a_darker_floor_alone_is_told_from_other_physics(measured: dict[str, Any]) -> None:
    differing = found(under_mujoco("3.3.3", measured))
    assert set(differing) == {"mujoco", "image, libero_object/0"}
    assert {check.effect for check in differing.values()} == {COLOURS}
    assert "mean colour (111, 102, 94)" in differing["image, libero_object/0"].here
    assert "(145, 139, 132)" in differing["image, libero_object/0"].libero


@pytest.mark.parametrize(
    ("mujoco", "assets", "remedy"),
    [
        ("3.3.2", REFERENCE["assets"]["libero_object/0"], libero_check.OTHER_DRIVER),
        ("2.3.7", REFERENCE["assets"]["libero_object/0"], COMMAND),
        ("3.3.2", "00000000", libero_check.INSTALL_ASSETS),
    ],
)
def test_another_image_is_mended_where_it_comes_from(
    mujoco: str, assets: str, remedy: str, measured: dict[str, Any]
) -> None:
    measured["frames"]["libero_object/0"] = DARK_FLOOR
    measured["versions"]["mujoco"] = mujoco
    measured["assets"]["libero_object/0"] = assets
    check = found(measured)["image, libero_object/0"]
    assert check.remedy == remedy
    assert check.effect == libero_check.UNKNOWN


def test_poses_decide_whatever_the_version_says(measured: dict[str, Any]) -> None:
    measured["poses"]["libero_spatial/5"]["akita_black_bowl_1"] = BOWL_ON_THE_RIM
    (pose,) = found(measured).values()
    assert pose.remedy == libero_check.INSTALL_ROBOSUITE


def test_a_hair_and_a_sign_are_no_difference(measured: dict[str, Any]) -> None:
    bowl = measured["poses"]["libero_spatial/0"]["akita_black_bowl_1"]
    bowl[3:] = [-value for value in bowl[3:]]  # the same rotation
    bowl[0] += 0.00009
    assert found(measured) == {}
    bowl[0] += 0.00002
    assert set(found(measured)) == {"settled poses, libero_spatial/0"}


def test_a_tilt_in_place_is_a_difference(measured: dict[str, Any]) -> None:
    half = np.radians(0.2) / 2
    measured["poses"]["libero_10/0"]["ketchup_1"][3:] = [
        0.5 * (np.cos(half) - np.sin(half)),
        0.5 * (np.cos(half) + np.sin(half)),
        0.5 * (np.cos(half) + np.sin(half)),
        0.5 * (np.cos(half) - np.sin(half)),
    ]
    assert found(measured)["settled poses, libero_10/0"].here.endswith("0.20 degrees")


def test_an_object_that_is_not_there_is_named(measured: dict[str, Any]) -> None:
    poses = measured["poses"]["libero_10/0"]
    poses["bottle_1"] = poses.pop("ketchup_1")
    assert found(measured)["settled poses, libero_10/0"].here == "lacks ketchup_1"


@pytest.mark.parametrize(
    ("kind", "place", "remedy"),
    [
        ("assets", "libero_goal/0", libero_check.INSTALL_ASSETS),
        ("files", "libero_10", libero_check.INSTALL_LIBERO),
    ],
)
def test_other_files_are_found(
    kind: str, place: str, remedy: str, measured: dict[str, Any]
) -> None:
    measured[kind][place] = "00000000"
    (check,) = found(measured).values()
    assert place in check.subject
    assert check.remedy == remedy


def test_the_order_is_that_of_the_effects(measured: dict[str, Any]) -> None:
    under_mujoco("3.8.1", measured)
    measured["gl"] = "osmesa, llvmpipe"
    measured["assets"]["libero_goal/0"] = "00000000"
    measured["failure"] = "ValueError: no texture"
    numbered = [line for line in describe(judge(measured)) if line[0].isdigit()]
    assert numbered[0] == "7 of 30 differ from LIBERO; by expected effect:"
    assert [line.split(". ")[1].split(",")[0] for line in numbered[1:]] == [
        "pip install mujoco==3.3.2 robosuite==1.4.0",
        COMMAND,
        libero_check.INSTALL_ASSETS.split(",")[0],
        "export MUJOCO_GL=egl",
    ]


def test_a_mujoco_that_is_not_there_is_found(measured: dict[str, Any]) -> None:
    measured["versions"]["mujoco"] = "not installed"
    check = found(measured)["mujoco"]
    assert check.effect == libero_check.NO_START
    assert check.remedy == COMMAND


def test_a_mujoco_that_cannot_be_imported_is_what_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"{name}: libGL is missing")

    monkeypatch.setattr(libero_check.importlib, "import_module", fail)
    measured = libero_check.measure([])
    assert measured["failure"] == "ImportError: mujoco: libGL is missing"
    assert measured["versions"]["mujoco"] == libero_check.metadata.version("mujoco")
    assert "Traceback" in capsys.readouterr().err


def test_the_remains_of_a_broken_installation_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "remains-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert libero_check._versions()["robosuite"] == "1.4.0"


def test_what_cannot_be_compared_has_a_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        libero_check.main(["--json", str(tmp_path / "nowhere" / "answer.json")])
    assert stopped.value.code == libero_check.EXIT_UNKNOWN
    assert "there is no folder" in capsys.readouterr().err
    monkeypatch.setattr(libero_check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        libero_check._package("libero")
    assert stopped.value.code == libero_check.EXIT_UNKNOWN
    assert f"libero is not installed; {libero_check.INSTALL_LIBERO}" in capsys.readouterr().err


def test_assets_that_a_libero_does_not_take_are_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = types.SimpleNamespace(__file__="/other/libero/__init__.py")
    monkeypatch.setattr(libero_check.importlib, "import_module", lambda name: other)
    with pytest.raises(SystemExit):
        libero_check._import_libero("/assets")
    assert "reads no assets from /assets; name them in its config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(("chosen", "platform"), [("osmesa", "osmesa"), ("glfw", None)])
def test_pyopengl_is_told_only_what_it_knows(
    chosen: str, platform: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYOPENGL_PLATFORM", "MPLCONFIGDIR", "LIBERO_CONFIG_PATH"):
        monkeypatch.setenv(name, "x")  # restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("MUJOCO_GL", chosen)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    libero_check._prepare(tmp_path)
    told = {k: v for k, v in libero_check.os.environ.items() if k == "PYOPENGL_PLATFORM"}
    assert list(told.values()) == ([] if platform is None else [platform])


def test_another_robosuite_is_found(measured: dict[str, Any]) -> None:
    measured["versions"]["robosuite"] = "1.5.1"
    assert set(found(measured)) == {"robosuite"}
    measured["versions"]["robosuite"] = "1.4.1"  # openvla-oft's
    assert found(measured) == {}


def test_init_states_are_read_as_elsewhere_and_nothing_else_is(tmp_path: Path) -> None:
    file = next((libero_root() / "init_files" / "libero_goal").glob("*.pruned_init"))
    assert np.array_equal(libero_check._read_states(file), read_states(file))
    with zipfile.ZipFile(tmp_path / "evil", "w") as archive:
        archive.writestr("states/data.pkl", pickle.dumps(os.system))
    with pytest.raises(pickle.UnpicklingError, match="asks for posix.system"):
        libero_check._read_states(tmp_path / "evil")


def test_a_signature_is_the_mean_colour_of_each_cell() -> None:
    image = np.zeros((256, 256, 3), np.uint8)
    image[:64, 64:128] = (200, 100, 50)
    image[-32:, -64:] = 255
    cells = libero_check._cells(f"00000000 {libero_check._signature(image)}")
    assert cells.shape == (16, 3)
    assert cells[1].tolist() == [200, 100, 50]
    assert cells[15].tolist() == [128, 128, 128]
    assert cells[[0, *range(2, 15)]].max() == 0


def test_a_config_of_the_user_is_kept_and_a_missing_one_is_made_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "osmesa")  # kept, and restored after the test
    own, temporary = tmp_path / "own", tmp_path / "temporary"
    own.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(own))
    libero_check._prepare(temporary)
    assert libero_check.os.environ["LIBERO_CONFIG_PATH"] == str(temporary)
    text = (temporary / "config.yaml").read_text()
    assert f"init_states: {libero_root() / 'init_files'}\n" in text
    assert list(own.iterdir()) == []
    (own / "config.yaml").write_text(text)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(own))
    libero_check._prepare(temporary)
    assert libero_check.os.environ["LIBERO_CONFIG_PATH"] == str(own)
    assert libero_check.os.environ["MUJOCO_GL"] == "osmesa"
