"""What docs/experiments/rewards_grpo.py makes of finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verl_vla.core.episode import Outcome
from verl_vla.core.plugins import import_file

SCRIPT: Any = import_file(
    Path(__file__).resolve().parents[3] / "docs" / "experiments" / "rewards_grpo.py"
)
STARTS = 20


def write_run(folder: Path, solved: int, episodes: int = 64) -> None:
    (folder / "evaluations").mkdir(parents=True)
    line = {"env/success_rate": 0.5, "env/episodes": episodes, "env/steps": 1000}
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step} | line) + "\n" for step in (1, 2, 3, 4))
    )
    played = [
        {"outcome": int(Outcome.SUCCESS if start < solved else Outcome.TIMEOUT)}
        for start in range(STARTS)
    ]
    (folder / "evaluations" / "step_4.json").write_text(json.dumps({"episodes": played}))


def test_the_table_holds_every_seed_and_the_gain_over_the_outcome(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / "runs" / "binary" / f"seed{seed}", solved=8)
        write_run(tmp_path / "runs" / "aaa" / f"seed{seed}", solved=10 + 2 * seed)
    lines = SCRIPT.main(tmp_path / "runs", tmp_path / "curves.png").splitlines()
    assert lines[2] == "| `binary` | 40, 40, 40 | 40% (29-53) |  | 50% | 4000 |"
    assert lines[3].startswith("| `aaa` | 50, 60, 70 | 60% (47-71) | +20 (")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_runs_of_unequal_length_are_not_compared(tmp_path):
    write_run(tmp_path / "binary" / "seed0", solved=8)
    write_run(tmp_path / "longer" / "seed0", solved=8, episodes=72)
    with pytest.raises(ValueError, match="longer trained on"):
        SCRIPT.main(tmp_path, tmp_path / "curves.png")
