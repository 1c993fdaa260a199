"""What docs/experiments/libero.py makes of finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from verl_vla.core.episode import Outcome
from verl_vla.core.plugins import import_file

SCRIPT: Any = import_file(
    Path(__file__).resolve().parents[3] / "docs" / "experiments" / "libero.py"
)
STARTS = 10


def write_run(folder: Path, high: float, solved: dict[int, int]) -> None:
    (folder / "evaluations").mkdir(parents=True)
    recipe = {"out": str(folder), "seed": 0, "loss": {"clip": {"high": high}}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    values = dict.fromkeys(SCRIPT.STEP_VALUES, 50.0) | {"env/success_rate": 0.5}
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step} | values) + "\n" for step in (0, 1, 2))
    )
    for step, number in solved.items():
        write_evaluation(folder / "evaluations" / f"step_{step}.json", number)


def write_evaluation(file: Path, number: int) -> None:
    outcomes = [Outcome.SUCCESS] * number + [Outcome.TIMEOUT] * (STARTS - number)
    content = {
        "total": {
            "rate": number / STARTS,
            "successes": number,
            "episodes": STARTS,
            "crashes": 0,
            "ci95": [number / STARTS - 0.05, number / STARTS + 0.05],
        },
        "episodes": [{"outcome": int(outcome)} for outcome in outcomes],
        "states": "sampled",
        "sampling": "greedy",
        "renderer": "egl",
        "step_limits": {"task": 112},
        "assets": {"differing": {}},
        "versions": {"commit": "abc"},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def test_the_base_comes_first_and_each_run_says_what_it_changed(tmp_path: Path) -> None:
    write_run(tmp_path / "binary", 0.28, {0: 4, 2: 8})
    write_run(tmp_path / "a_clip", 0.2, {2: 6})
    write_run(tmp_path / "b_unplayed", 0.28, {})
    write_evaluation(tmp_path / "sampled" / "a_clip" / "evaluation.json", 5)
    write_evaluation(tmp_path / "sampled" / "binary_step_1" / "evaluation.json", 4)
    write_evaluation(tmp_path / "greedy" / "binary_step_1" / "evaluation.json", 6)
    write_evaluation(tmp_path / "before" / "evaluation.json", 3)
    write_evaluation(tmp_path / "after" / "evaluation.json", 7)
    lines = SCRIPT.main(tmp_path, tmp_path / "runs.json", tmp_path / "runs.png").splitlines()
    assert lines[2:] == [
        "| base |  | 0 | 0 | 0 | 4 of 10 (35-45%) | 3 of 10 (25-35%) |",
        "| `binary` |  | 1 | 50 | 50 | 6 of 10 (55-65%) | 4 of 10 (35-45%) |",
        "| `binary` |  | 2 | 100 | 100 | 8 of 10 (75-85%) | 7 of 10 (65-75%) |",
        "| `a_clip` | loss.clip.high: 0.28 -> 0.2 | 2 | 100 | 100 | 6 of 10 (55-65%) "
        "| 5 of 10 (45-55%) |",
        "| `b_unplayed` |  | 2 | 100 | 100 | — | — |",
    ]
    record = json.loads((tmp_path / "runs.json").read_text())
    assert record["recipe"]["loss"]["clip"]["high"] == 0.28
    after = record["runs"]["a_clip"]["evaluations"]["2"]
    assert (after["solved"], after["differing_assets"]) == ("1111110000", {})
    assert len(record["runs"]["binary"]["steps"]) == 2
    assert record["sampled"]["binary"]["successes"] == 7
    assert (tmp_path / "runs.png").stat().st_size > 0
