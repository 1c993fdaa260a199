"""Read the runs of docs/experiments/libero.md: a small record, a picture and a table.

python docs/experiments/libero.py FOLDER RECORD PICTURE

The folder holds what scripts/reproduce_libero.sh makes: the run `binary`, which played the starts
greedily before training and after it, and the evaluations `before` and `after` of the same policies
on the same starts, sampled. Other runs beside them began from the same policy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.figure import Figure

from verl_vla.comparison import RESULT
from verl_vla.config import differences
from verl_vla.metrics import read_metrics
from verl_vla.types import Outcome

MAIN = "binary"
SAMPLED = ("before", "after")
"""Folders of the evaluations that sample."""
STEP_VALUES = {
    "rollout/success_rate": "solved",
    "rollout/episodes": "episodes",
    "rollout/steps": "simulator_steps",
    "groups/played": "groups_played",
    "groups/kept": "groups_kept",
    "time/step_s": "seconds",
}
"""What a record keeps of a training step, and its name there."""

mpl.use("Agg")


def read_run(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """One run as plain values.

    Args:
        folder: of the run.
        recipe: of the main run; what differs is recorded.
    """
    own = yaml.safe_load((folder / "recipe.yaml").read_text())
    steps = [line for line in read_metrics(folder / "metrics.jsonl") if line["step"] > 0]
    played = {int(f.stem.removeprefix("step_")): f for f in folder.glob("evaluations/step_*.json")}
    return {
        "changed": differences(recipe, own, ("out",)),
        "steps": [{name: line[key] for key, name in STEP_VALUES.items()} for line in steps],
        "evaluations": {step: _evaluation(played[step]) for step in sorted(played)},
    }


def _evaluation(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text())
    solved = [str(int(episode["outcome"] == Outcome.SUCCESS)) for episode in content["episodes"]]
    return {
        **content["total"],
        "solved": "".join(solved),
        "starts": content["states"],
        "sampling": content["sampling"],
        "renderer": content["renderer"],
        "step_limits": content["step_limits"],
        "stand_ins": len(content["assets"]["standins"]),
        "versions": content["versions"],
    }


def table(runs: dict[str, Any], sampled: dict[str, Any]) -> str:
    """Return Markdown, a line for each run; all began where the main one did."""
    head = ["run", "changed", "steps", "training episodes", "simulator steps", "greedy", "sampled"]
    before, after = (_held_out(sampled[name]) for name in SAMPLED)
    base = _held_out(runs[MAIN]["evaluations"][0])
    lines = [head, ["---"] * len(head), ["base", "", "0", "0", "0", base, before]]
    for name, run in runs.items():
        last = max(run["evaluations"])
        lines.append(
            [
                f"`{name}`",
                "; ".join(run["changed"]),
                str(last),
                f"{sum(step['episodes'] for step in run['steps']):.0f}",
                f"{sum(step['simulator_steps'] for step in run['steps']):.0f}",
                _held_out(run["evaluations"][last]),
                after if name == MAIN else "",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _held_out(evaluation: dict[str, Any]) -> str:
    low, high = evaluation["ci95"]
    count = f"{evaluation['successes']} of {evaluation['episodes']}"
    return f"{count} ({100 * low:.0f}-{100 * high:.0f}%)"


def draw(path: Path, runs: dict[str, Any], sampled: dict[str, Any]) -> None:
    """Draw success in training, a line a run, and held-out success with its interval."""
    figure = Figure(figsize=(9.0, 3.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    points = [("base, sampled", sampled["before"], "grey")]
    points += [(f"{MAIN}, sampled", sampled["after"], "C0")]
    points += [("base, greedy", runs[MAIN]["evaluations"][0], "grey")]
    for place, (name, run) in enumerate(runs.items()):
        colour = f"C{place}"
        solved = [100 * step["solved"] for step in run["steps"]]
        left.plot(range(1, len(solved) + 1), solved, "o-", color=colour, label=name, markersize=4)
        last = max(run["evaluations"])
        points.append((f"{name}, greedy, step {last}", run["evaluations"][last], colour))
    for place, (_, evaluation, colour) in enumerate(points):
        rate, (low, high) = evaluation["rate"], evaluation["ci95"]
        error = [[100 * (rate - low)], [100 * (high - rate)]]
        right.errorbar(place, 100 * rate, error, fmt="o", color=colour, capsize=4)
    left.set(xlabel="training step", ylabel="success, %", title="training episodes, sampled")
    left.legend(frameon=False, fontsize=8)
    right.set(title="held-out starts, 95% interval", ylim=(0, 100))
    right.set_xticks(range(len(points)), [name for name, _, _ in points], rotation=30, ha="right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main(folder: Path, record: Path, picture: Path) -> str:
    """Write record and picture, and return the table."""
    recipe = yaml.safe_load((folder / MAIN / "recipe.yaml").read_text())
    names = sorted(
        (path.parent.name for path in folder.glob("*/recipe.yaml")), key=lambda n: (n != MAIN, n)
    )
    runs = {name: read_run(folder / name, recipe) for name in names}
    sampled = {name: _evaluation(folder / name / RESULT) for name in SAMPLED}
    content = {"recipe": recipe, "runs": runs, "sampled": sampled}
    record.write_text(json.dumps(content, indent=1) + "\n")
    draw(picture, runs, sampled)
    return table(runs, sampled)


if __name__ == "__main__":
    sys.stdout.write(main(*map(Path, sys.argv[1:])) + "\n")
