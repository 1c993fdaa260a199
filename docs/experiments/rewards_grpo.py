"""Read what rewards_grpo.sh has trained: a table, and docs/images/rewards_grpo.png.

python docs/experiments/rewards_grpo.py FOLDER IMAGE
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

from verl_vla.core.episode import Outcome
from verl_vla.core.success_rate import SuccessRate
from verl_vla.rewards.benchmark.statistics import Estimate, estimate
from verl_vla.runs.metrics import read_metrics
from verl_vla.runs.run_dir import evaluation_file

BASELINE = "binary"
RESAMPLES = 2000
LAST_STEP = 4
"""The training step after which held-out episodes were played."""

mpl.use("Agg")


@dataclass(frozen=True, slots=True)
class Arm:
    """The runs of one reward, a row of each array for each seed."""

    solved: np.ndarray
    """[seeds, starts] bool, held out, at the end; the starts are the same in every run."""
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
        solved=np.stack([_outcomes(seed) for seed in seeds]),
        trained=column("env/success_rate"),
        episodes=column("env/episodes"),
        simulator_steps=column("env/steps"),
    )


def _outcomes(run: Path) -> np.ndarray:
    content = json.loads(evaluation_file(run, LAST_STEP).read_text())
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
        if arm.solved.shape != first.solved.shape:
            raise ValueError(f"{name} and {BASELINE} were judged on other starts")


def gain(arm: Arm, baseline: Arm) -> Estimate:
    """Mean gain in held-out success over the baseline, start by start and seed by seed.

    The interval comes from drawing starts; what another three seeds would give is not in it.
    """
    gained = arm.solved.astype(float) - baseline.solved
    num_seeds, num_starts = gained.shape
    start = np.tile(np.arange(num_starts), num_seeds)
    flat = gained.ravel()
    return estimate(lambda rows: float(flat[rows].mean()), start, seed=0, resamples=RESAMPLES)


def table(arms: dict[str, Arm]) -> str:
    """Return Markdown, a line for each reward."""
    head = [
        "reward",
        "by seed",
        "all seeds (95%)",
        f"less `{BASELINE}` (95%)",
        "solved in training",
        "simulator steps",
    ]
    lines = [head, ["---"] * len(head)]
    for name, arm in arms.items():
        total = SuccessRate(successes=int(arm.solved.sum()), episodes=arm.solved.size, crashes=0)
        low, high = total.ci95
        found = gain(arm, arms[BASELINE])
        change = f"{100 * found.value:+.0f} ({100 * found.low:+.0f}, {100 * found.high:+.0f})"
        lines.append(
            [
                f"`{name}`",
                ", ".join(f"{100 * rate:.0f}" for rate in arm.solved.mean(axis=1)),
                f"{100 * total.rate:.0f}% ({100 * low:.0f}-{100 * high:.0f})",
                "" if name == BASELINE else change,
                f"{100 * arm.trained.mean():.0f}%",
                f"{arm.simulator_steps.sum(axis=1).mean():.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(path: Path, arms: dict[str, Arm]) -> None:
    """Draw training success, mean over seeds, and held-out success at the end, a dot a seed."""
    figure = Figure(figsize=(9.0, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (name, arm) in enumerate(arms.items()):
        colour = f"C{place}"
        steps = np.arange(1, arm.trained.shape[1] + 1)
        left.plot(steps, 100 * arm.trained.mean(axis=0), "o-", color=colour, label=name)
        rates = 100 * arm.solved.mean(axis=1)
        right.plot(np.full(len(rates), place), rates, "o", color=colour, alpha=0.5)
        right.plot([place - 0.25, place + 0.25], [rates.mean()] * 2, color=colour)
    left.set(xlabel="training step", ylabel="success, %", title="training episodes, sampled")
    left.set_xticks(steps)
    left.legend(frameon=False)
    right.set(title=f"held-out, greedy, after step {LAST_STEP}", ylim=(0, 100))
    right.set_xticks(range(len(arms)), list(arms), rotation=15)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main(folder: Path, image: Path) -> str:
    """Check, draw and return the table."""
    names = sorted(path.name for path in folder.iterdir() if any(path.glob("seed*")))
    names.sort(key=lambda name: name != BASELINE)
    arms = {name: read_arm(folder / name) for name in names}
    check_equal(arms)
    draw(image, arms)
    return table(arms)


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    sys.stdout.write(main(Path(arguments[0]), Path(arguments[1])) + "\n")
