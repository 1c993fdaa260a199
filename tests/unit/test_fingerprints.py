"""What the folders of a policy and of assets hold has a name, wherever they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

from verl_vla.envs.assets import STANDINS_FILE, describe_assets
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


def test_assets_that_are_not_the_real_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "wall.png").write_bytes(b"12")
    whole = describe_assets(tmp_path)
    assert whole["standins"] == []
    (tmp_path / STANDINS_FILE).write_text('["scenes/wall.png"]')
    described = describe_assets(tmp_path)
    assert described["standins"] == ["scenes/wall.png"]
    assert described["fingerprint"] != whole["fingerprint"]
