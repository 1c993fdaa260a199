"""Read what rewards_grpo.sh has trained: a table, and docs/images/rewards_grpo.png.

python docs/experiments/rewards_grpo.py FOLDER PICTURE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from verl_vla.evaluation import SuccessRate
from verl_vla.metrics import read_metrics
from verl_vla.reward_bench.statistics import Estimate, estimate
from verl_vla.types import Outcome

BASELINE = "binary"
RESAMPLES = 2000
JUDGED_AT = (2, 4)
"""Training steps after which held-out episodes were played."""

mpl.use("Agg")


@dataclass(frozen=True, slots=True)
class Arm:
    """The runs of one reward, a row of each array for each seed."""

    solved: dict[int, np.ndarray]
    """By training step, [seeds, starts] bool; the starts are the same in every run."""
    trained: np.ndarray
    """[seeds, steps], success of the training episodes, sampled."""
    episodes: np.ndarray
    """[seeds, steps], training episodes played."""
    simulator_steps: np.ndarray
    """[seeds, steps]"""


def read_arm(folder: Path) -> Arm:
    """Read the seeds of one reward."""
    seeds = sorted(folder.glob("seed*"))
    lines = [read_metrics(seed / "metrics.jsonl") for seed in seeds]

    def column(name: str) -> np.ndarray:
        return np.array([[line[name] for line in run] for run in lines])

    return Arm(
        solved={step: np.stack([_outcomes(seed, step) for seed in seeds]) for step in JUDGED_AT},
        trained=column("rollout/success_rate"),
        episodes=column("rollout/episodes"),
        simulator_steps=column("rollout/steps"),
    )


def _outcomes(run: Path, step: int) -> np.ndarray:
    content = json.loads((run / "evaluations" / f"step_{step}.json").read_text())
    return np.array([episode["outcome"] == Outcome.SUCCESS for episode in content["episodes"]])


def check_equal(arms: dict[str, Arm]) -> None:
    """Make sure that the runs can be compared.

    Raises:
        ValueError: a run played more episodes than another, or was judged on other starts.
    """
    first = arms[BASELINE]
    for name, arm in arms.items():
        if not np.array_equal(arm.episodes, first.episodes):
            raise ValueError(f"{name} trained on {arm.episodes}, {BASELINE} on {first.episodes}")
        for step in JUDGED_AT:
            if arm.solved[step].shape != first.solved[step].shape:
                raise ValueError(f"{name} and {BASELINE} were judged on other starts")


def difference(arm: Arm, baseline: Arm, step: int) -> Estimate:
    """Mean gain in success over the baseline, start by start and seed by seed.

    The interval comes from drawing starts; what another three seeds would give is not in it.
    """
    gain = arm.solved[step].astype(float) - baseline.solved[step]
    num_seeds, num_starts = gain.shape
    start = np.tile(np.arange(num_starts), num_seeds)
    flat = gain.ravel()
    return estimate(lambda rows: float(flat[rows].mean()), start, seed=0, resamples=RESAMPLES)


def table(arms: dict[str, Arm]) -> str:
    """Return Markdown, a line for each reward."""
    head = ["reward"]
    for step in JUDGED_AT:
        head += [f"after {step} steps, by seed", "all seeds (95%)", f"less `{BASELINE}` (95%)"]
    head += ["simulator steps"]
    lines = [head, ["---"] * len(head)]
    for name, arm in arms.items():
        cells = [f"`{name}`"]
        for step in JUDGED_AT:
            solved = arm.solved[step]
            cells.append(", ".join(f"{100 * rate:.0f}" for rate in solved.mean(axis=1)))
            total = SuccessRate(successes=int(solved.sum()), episodes=solved.size, crashes=0)
            low, high = total.ci95
            cells.append(f"{100 * total.rate:.0f}% ({100 * low:.0f}-{100 * high:.0f})")
            gain = difference(arm, arms[BASELINE], step)
            is_itself = name == BASELINE
            ends = f"({100 * gain.low:+.0f}, {100 * gain.high:+.0f})"
            cells.append("" if is_itself else f"{100 * gain.value:+.0f} {ends}")
        cells.append(f"{arm.simulator_steps.sum(axis=1).mean():.0f}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(path: Path, arms: dict[str, Arm]) -> None:
    """Draw training and held-out success: the mean over seeds, and each seed as a thin line."""
    figure = Figure(figsize=(9.0, 3.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for index, (name, arm) in enumerate(arms.items()):
        colour = f"C{index}"
        steps = np.arange(1, arm.trained.shape[1] + 1)
        held_out = np.stack([arm.solved[step].mean(axis=1) for step in JUDGED_AT], axis=1)
        for axes, x, rates in ((left, steps, arm.trained), (right, JUDGED_AT, held_out)):
            axes.plot(x, 100 * rates.T, color=colour, linewidth=0.5, alpha=0.5)
            axes.plot(x, 100 * rates.mean(axis=0), color=colour, marker="o", label=name)
    left.set(xlabel="training step", ylabel="success, %", title="training episodes, sampled")
    right.set(xlabel="training step", title="held-out, greedy", ylim=(0, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xticks(steps)
    right.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def main(folder: Path, picture: Path) -> str:
    """Check, draw and return the table."""
    names = sorted(path.name for path in folder.iterdir() if any(path.glob("seed*")))
    names.sort(key=lambda name: name != BASELINE)
    arms = {name: read_arm(folder / name) for name in names}
    check_equal(arms)
    draw(picture, arms)
    return table(arms)


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    sys.stdout.write(main(Path(arguments[0]), Path(arguments[1])) + "\n")
