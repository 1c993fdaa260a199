"""The wheel, far from any checkout: recipes, rewards and bases are in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from verl_vla.core.files import PROJECT_FOLDER

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "runs", "docs", "tests", "build", "*.egg-info", "__pycache__", ".*_cache"
)
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel({out!r}))"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel is installed, and nothing else."""
    source = shutil.copytree(
        PROJECT_FOLDER, tmp_path_factory.mktemp("source") / "project", ignore=LEFT_OUT
    )
    out = tmp_path_factory.mktemp("wheel")
    program = BUILD.format(out=str(out))
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
    [wheel] = out.glob("*.whl")
    installed = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    return installed


def run(site: Path, folder: Path, program: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_the_wheel_that_runs(site: Path, tmp_path: Path) -> None:
    where = run(site, tmp_path, ["-c", "import verl_vla; print(verl_vla.__file__)"])
    assert Path(where.strip()).is_relative_to(site)
    commit = "from verl_vla.core.provenance import commit; print(commit())"
    assert run(site, tmp_path, ["-c", commit]).strip() == "unknown"
    [names] = site.glob("*.dist-info/entry_points.txt")
    assert "verl-vla = verl_vla.cli.main:main" in names.read_text()


def test_it_holds_recipes_and_rewards(site: Path, tmp_path: Path) -> None:
    listed = run(site, tmp_path, ["-m", "verl_vla", "recipes"])
    for path in [
        *(PROJECT_FOLDER / "recipes").glob("*.yaml"),
        *(PROJECT_FOLDER / "recipes" / "sft").glob("*.yaml"),
    ]:
        assert path.stem in listed
    words = ["-m", "verl_vla", "explain", "recipe=libero", "suite=spatial", "reward=srpo"]
    assert "optimizer.lr" in run(site, tmp_path, words)


@pytest.mark.sim
def test_it_evaluates_its_own_base(site: Path, tmp_path: Path) -> None:
    words = "eval --policy bases/mini --suite mini --tasks 0 --episodes-per-task 2"
    pool = ["--num-slots", "2", "--num-workers", "1", "--out", str(tmp_path / "out")]
    out = run(site, tmp_path, ["-m", "verl_vla", *words.split(), *pool])
    assert "2/2 played" in out
    assert (tmp_path / "out" / "evaluation.json").is_file()
