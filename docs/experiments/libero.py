"""Read the runs of docs/experiments/libero.md: a small record, an image and a table.

python docs/experiments/libero.py FOLDER RECORD IMAGE

The folder holds what scripts/reproduce_libero.sh makes: the run `binary`, which played the starts
greedily before training and after it, and the evaluations `before` and `after` of the same policies
on the same starts, sampled. What scripts/ablate_libero.sh adds: runs that began from the same
policy, and `sampled/RUN`, an evaluation like `after` of each. `sampled/binary_step_N` and
`greedy/binary_step_N` are of the main run on its way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.figure import Figure

from verl_vla.core.episode import Outcome
from verl_vla.core.text import differences
from verl_vla.evaluation.compare import RESULT
from verl_vla.runs.metrics import read_metrics
from verl_vla.runs.run_dir import evaluated_steps, evaluation_file

MAIN = "binary"
SAMPLED = {"base": "before", MAIN: "after"}
"""Folders of the main run's evaluations that sample, by the policy's name."""
COUNTS = {"episodes": "training episodes", "simulator_steps": "simulator steps"}
"""What is summed over the steps of a run, and the head of its column."""
ON_ITS_WAY = f"{MAIN}_step_"
UNKNOWN = "\N{EM DASH}"
STEP_VALUES = {
    "env/success_rate": "solved",
    "env/episodes": "episodes",
    "env/steps": "simulator_steps",
    "sampling/groups_played": "groups_played",
    "sampling/groups_kept": "groups_kept",
    "timing_s/step": "seconds",
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
    return {
        "changed": differences(recipe, own, ("out",)),
        "steps": [{name: line[key] for key, name in STEP_VALUES.items()} for line in steps],
        "evaluations": {
            step: _evaluation(evaluation_file(folder, step)) for step in evaluated_steps(folder)
        },
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
        "differing_assets": content["assets"]["differing"],
        "versions": content["versions"],
    }


def table(runs: dict[str, Any], sampled: dict[str, Any]) -> str:
    """Return Markdown, a line for each policy; all began where the main run did."""
    head = ["policy", "changed", "steps", *COUNTS.values(), "greedy", "sampled"]
    lines = [head, ["---"] * len(head)]
    lines.append(["base", "", "0", "0", "0", *_rates(runs[MAIN], 0, sampled["base"])])
    for name, run in runs.items():
        for step, policy in _policies(name, run, sampled):
            counts = [sum(line[what] for line in run["steps"][:step]) for what in COUNTS]
            lines.append(
                [
                    f"`{name}`",
                    "; ".join(run["changed"]),
                    str(step),
                    *(f"{count:.0f}" for count in counts),
                    *_rates(run, step, sampled[policy] if policy in sampled else None),
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _policies(name: str, run: dict[str, Any], sampled: dict[str, Any]) -> list[tuple[int, str]]:
    """The steps after which a run's policy is shown, and that policy's name; the last one last."""
    on_its_way = [policy for policy in sampled if name == MAIN and ON_ITS_WAY in policy]
    stops = sorted((int(policy.removeprefix(ON_ITS_WAY)), policy) for policy in on_its_way)
    return [*stops, (len(run["steps"]), name)]


def _rates(run: dict[str, Any], step: int, sampled: dict[str, Any] | None) -> list[str]:
    """What a policy solved of the held-out starts, greedily and sampled."""
    greedy = run["evaluations"][step] if step in run["evaluations"] else None
    return [UNKNOWN if found is None else _held_out(found) for found in (greedy, sampled)]


def _held_out(evaluation: dict[str, Any]) -> str:
    low, high = evaluation["ci95"]
    count = f"{evaluation['successes']} of {evaluation['episodes']}"
    return f"{count} ({100 * low:.0f}-{100 * high:.0f}%)"


def draw(path: Path, runs: dict[str, Any], sampled: dict[str, Any]) -> None:
    """Draw success in training, a line a run, and held-out success with its interval."""
    figure = Figure(figsize=(11.0, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colours = {name: f"C{place}" for place, name in enumerate(runs)}
    for name, run in runs.items():
        solved = [100 * step["solved"] for step in run["steps"]]
        width = 2.0 if name == MAIN else 1.0
        steps = range(1, len(solved) + 1)
        left.plot(steps, solved, ".-", color=colours[name], label=name, linewidth=width)
    greedy = runs[MAIN]["evaluations"]
    points = [
        ("base, greedy", greedy[0], "black"),
        (f"{MAIN}, greedy", greedy[max(greedy)], colours[MAIN]),
    ]
    points += [(f"{name}, sampled", sampled[name], _colour(name, colours)) for name in sampled]
    for place, (_, evaluation, colour) in enumerate(points):
        rate, (low, high) = evaluation["rate"], evaluation["ci95"]
        error = [[100 * (rate - low)], [100 * (high - rate)]]
        right.errorbar(place, 100 * rate, error, fmt="o", color=colour, capsize=4)
    left.set(xlabel="training step", ylabel="success, %", title="training episodes, sampled")
    left.legend(frameon=False, fontsize=7, ncols=2)
    right.set(title="held-out starts, 95% interval", ylim=(0, 100))
    right.set_xticks(range(len(points)), [name for name, _, _ in points], rotation=40, ha="right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path)


def _colour(policy: str, colours: dict[str, str]) -> str:
    """The colour of a policy's run; the base has none."""
    run = MAIN if ON_ITS_WAY in policy else policy
    return colours[run] if run in colours else "black"


def main(folder: Path, record: Path, image: Path) -> str:
    """Write record and image, and return the table."""
    recipe = yaml.safe_load((folder / MAIN / "recipe.yaml").read_text())
    names = sorted(
        (path.parent.name for path in folder.glob("*/recipe.yaml")), key=lambda n: (n != MAIN, n)
    )
    runs = {name: read_run(folder / name, recipe) for name in names}
    for path in (folder / "greedy").glob(f"{ON_ITS_WAY}*"):
        runs[MAIN]["evaluations"][int(path.name.removeprefix(ON_ITS_WAY))] = _evaluation(
            path / RESULT
        )
    played = {name: folder / own for name, own in SAMPLED.items()}
    played |= {path.name: path for path in sorted((folder / "sampled").glob("*"))}
    sampled = {name: _evaluation(own / RESULT) for name, own in played.items()}
    content = {"recipe": recipe, "runs": runs, "sampled": sampled}
    record.write_text(json.dumps(content, indent=1) + "\n")
    draw(image, runs, sampled)
    return table(runs, sampled)


if __name__ == "__main__":
    sys.stdout.write(main(*map(Path, sys.argv[1:])) + "\n")
