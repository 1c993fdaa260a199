"""One of the trials of `scripts/chaos.sh`, with real trainings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_vla.cli.chaos import RESULT
from verl_vla.cli.main import main

pytestmark = [pytest.mark.smoke, pytest.mark.sim]

END_LIMIT_S = 60


def test_a_run_whose_ray_dies_ends_in_time_and_resumes_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    out = tmp_path / "chaos"
    assert main(["chaos", "--out", str(out), "--faults", "Ray's gcs_server is killed"]) == 0
    (trial,) = json.loads((out / RESULT).read_text())["trials"]
    assert trial["equal"]
    assert trial["end_s"] < END_LIMIT_S
