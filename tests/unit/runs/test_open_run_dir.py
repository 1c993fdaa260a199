"""A run's folder holds one run, of one process."""

from __future__ import annotations

import pytest
import yaml

from verl_vla.core.errors import ConfigError
from verl_vla.runs.run_dir import open_run_dir

RECIPE = {"seed": 1, "trainer": {"steps": 4}}


def test_a_folder_is_made_and_its_recipe_written(tmp_path):
    folder = tmp_path / "runs" / "a"
    with open_run_dir(folder, RECIPE, ()):
        assert yaml.safe_load((folder / "recipe.yaml").read_text()) == RECIPE
    with open_run_dir(folder, RECIPE | {"trainer": {"steps": 9}}, ("trainer",)):
        assert yaml.safe_load((folder / "recipe.yaml").read_text())["trainer"] == {"steps": 9}


def test_another_run_is_refused_and_leaves_the_folder_as_it_is(tmp_path):
    with open_run_dir(tmp_path, RECIPE, ()):
        pass
    with (
        pytest.raises(ConfigError, match="holds a run with other settings \\(seed: 1 -> 2"),
        open_run_dir(tmp_path, RECIPE | {"seed": 2}, ()),
    ):
        pass
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == RECIPE


def test_a_folder_in_use_is_refused_before_its_recipe_is_touched(tmp_path):
    with (
        open_run_dir(tmp_path, RECIPE, ("trainer",)),
        pytest.raises(ConfigError, match=f"{tmp_path} is in use by process [0-9]+ on "),
        open_run_dir(tmp_path, RECIPE | {"trainer": {"steps": 9}}, ("trainer",)),
    ):
        pass
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == RECIPE


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with (
        pytest.raises(ConfigError, match=r"holds 'thesis.tex' and no run; choose a new or an em"),
        open_run_dir(tmp_path, RECIPE, ()),
    ):
        pass
    assert not (tmp_path / "recipe.yaml").exists()


def test_what_a_killed_start_left_is_no_obstacle(tmp_path):
    (tmp_path / "lock").write_text("process 1 on a machine")
    (tmp_path / "recipe.tmp").write_text("seed:")
    with open_run_dir(tmp_path, RECIPE, ()):
        assert (tmp_path / "recipe.yaml").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="file/run, which cannot be written"),
        open_run_dir(tmp_path / "file" / "run", RECIPE, ()),
    ):
        pass
