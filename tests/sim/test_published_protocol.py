"""The published protocol on LIBERO itself, a part of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_vla.cli import eval as eval_verb
from verl_vla.cli.main import main
from verl_vla.evaluation.compare import RESULT
from verl_vla.runs.episode_log import read_episodes

pytestmark = pytest.mark.sim


def test_what_was_played_already_is_set_beside_published_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The protocol is one word for options that can be written out: the same evaluation."""
    words = [
        *("eval", "--policy", "bases/mini", "--suite", "libero_spatial", "--out", str(tmp_path)),
        *("--tasks", "5", "--episodes-per-task", "1", "--num-workers", "1", "--num-slots", "1"),
    ]
    assert main([*words, "--states", "official", "--render-size", "256"]) == 0
    played = read_episodes(tmp_path)
    plain = json.loads((tmp_path / RESULT).read_text())
    assert "published" not in plain
    capsys.readouterr()

    # nothing is left to play, so neither the weights nor a simulator are needed
    eval_verb._load.cache_clear()
    monkeypatch.delattr(eval_verb, "load_policy")
    monkeypatch.delattr(eval_verb, "open_simulators")
    assert main([*words, "--protocol", "published"]) == 0
    assert read_episodes(tmp_path) == played
    record = json.loads((tmp_path / RESULT).read_text())
    assert record["states"] == "official"
    assert record["fixtures"] == plain["fixtures"] == "redrawn"
    assert set(record["step_limits"].values()) == {220}
    assert record["render_size"] == 256
    assert record["published"]["left_out"] == ["1 of 10 tasks", "1 of 50 init states a task"]
    assert record["published"]["ours"] == record["total"] == plain["total"]
    said = capsys.readouterr().out
    assert "OpenVLA-OFT, tokens" in said
    assert "Not the whole protocol: 1 of 10 tasks" in said
