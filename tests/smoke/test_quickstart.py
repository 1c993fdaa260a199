"""README's first command, to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest

from verl_vla.core.episode import Outcome
from verl_vla.runs.run_dir import evaluation_file

pytestmark = [pytest.mark.smoke, pytest.mark.sim]


def test_the_quickstart_shows_what_it_has_counted(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["quickstart", "--seed", "3", "--total-training-steps", "1", "--out", str(out)]
    ended = subprocess.run(
        [sys.executable, "-m", "verl_vla", *words], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads((out / "summary.json").read_text())
    for step, name in ((0, "held_out_before"), (1, "held_out_after")):
        record = json.loads(evaluation_file(out, step).read_text())
        solved = sum(e["outcome"] == Outcome.SUCCESS for e in record["episodes"])
        assert (summary[name]["successes"], summary[name]["episodes"]) == (solved, 100)
        assert [e["episode"] for e in record["episodes"]] == list(range(100))
    assert "training success by step" in ended.stdout
    frames = iio.imread(out / "before_after.mp4")
    assert len(frames) > 10
    assert frames.std() > 0
    assert (out / "curve.png").stat().st_size > 0
