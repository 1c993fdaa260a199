"""What lies around on a machine: another copy of LIBERO, and another user's log of robosuite."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.envs.libero import assets
from verl_vla.envs.libero.assets import libero_root
from verl_vla.envs.registry import suite


@pytest.mark.parametrize("has_init", [True, False])
def test_a_clone_on_the_path_is_refused_at_once_with_its_place(
    has_init: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "LIBERO" / "libero"
    (clone / "libero").mkdir(parents=True)
    if has_init:
        (clone / "__init__.py").touch()
        (clone / "libero" / "__init__.py").touch()
    before = libero_root()
    monkeypatch.syspath_prepend(str(clone.parent))
    monkeypatch.delitem(sys.modules, "libero", raising=False)
    if not has_init:
        # a package comes before folders without one, wherever they are
        assert libero_root() == before
        return
    with pytest.raises(ConfigError) as caught:
        libero_root()
    said = str(caught.value)
    assert f"Python finds LIBERO in {clone}, which hides the installed hf-libero" in said
    assert f"remove {clone.parent} from PYTHONPATH" in said
    for name in ("mini", "libero_spatial"):
        with pytest.raises(ConfigError, match="Python finds LIBERO in"):
            suite(name).require_simulator()


def test_robosuites_log_file_is_not_opened(tmp_path: Path) -> None:
    theirs = tmp_path / assets.ROBOSUITE_LOG
    # another user's: a folder, since root may open any file
    theirs.mkdir()
    with assets._without_log_file():
        logging.FileHandler(str(theirs)).close()
        other = logging.FileHandler(str(tmp_path / "other.log"))
        other.close()
        assert isinstance(other, logging.Handler)
    assert (tmp_path / "other.log").is_file()
    with pytest.raises(OSError, match="directory"):
        logging.FileHandler(str(theirs))
