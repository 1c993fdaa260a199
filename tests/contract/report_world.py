"""A run's folder as training leaves it, small and made up, for what reads such folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from verl_vla.core.episode import Outcome
from verl_vla.evaluation.conditions import DECIDES
from verl_vla.runs.episode_log import EpisodeLog
from verl_vla.runs.episode_recorder import video_path, write_video
from verl_vla.runs.metrics import METRICS, SFT_METRICS, MetricsFile
from verl_vla.runs.run_dir import evaluation_record, keep_evaluation

NAMES = {0: "push_the_cube", 6: "lift_the_can"}
GROUP_SIZE = 3


def make_run(folder: Path, *, steps: int = 3, total: int = 5, name: str = "mini") -> Path:
    """A run of ``steps`` training steps out of ``total``; of 0 steps nothing but its recipe."""
    folder.mkdir(parents=True)
    recipe = {
        "seed": 4,
        "reward": "srpo",
        "policy": {"path": "bases/<mini>"},
        "environment": {"suite": name},
        "sampling": {"groups_per_step": 2, "group_size": GROUP_SIZE},
        "trainer": {"total_training_steps": total},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if steps:
        evaluate_run(folder, 0, solved=1)
        for step in range(1, steps + 1):
            add_step(folder, step)
        evaluate_run(folder, steps, solved=3)
    return folder


def add_step(folder: Path, step: int) -> None:
    """What one more training step leaves behind: a mixed group and one that failed."""
    episode_log, lines = EpisodeLog(folder, {"suite": "mini"}), []
    for group, outcomes in enumerate(([0, 1, 1], [1, 1, 2])):
        for member, outcome in enumerate(outcomes):
            episode = 100 * step + 10 * group + member
            crashed = outcome == Outcome.CRASH
            line = {"episode": episode, "task": 6 * group, "init_state": 1, "outcome": outcome}
            line |= {"steps": 20 + member, "crash": "lost" if crashed else None, "step": step}
            line |= {"group": 10 * step + group, "actions": None, "executed": None}
            line |= {
                "score": None if crashed else 1.0 if outcome == 0 else 0.1 * member,
                "progress": [] if crashed else [0.0, 1.0 if outcome == 0 else 0.25 * member],
            }
            lines.append(line)
            if group == 0:
                images = np.full((2, 8, 8, 3), 40 * member, dtype=np.uint8)
                write_video(video_path(folder, episode), images, [8, 8])
    episode_log.append(lines)
    values = {name: 0.5 for name in METRICS if not name.startswith("val/")}
    MetricsFile(folder / "metrics.jsonl").append(
        step, values | {"env/success_rate": 0.2, "env/episodes": 6, "env/crashes": 1}
    )


def make_tuning_run(folder: Path, *, steps: int = 4, total: int = 6) -> Path:
    """A run of fine-tuning: tested at every second step, played once at the end."""
    folder.mkdir(parents=True)
    recipe = {
        "seed": 2,
        "environment": {"suite": "mini"},
        "policy": {"path": None},
        "demos": {"folder": "runs/<demos>"},
        "optimizer": {"lr": 5e-4, "batch_size": 16},
        "trainer": {"total_training_steps": total},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    metrics = MetricsFile(folder / "metrics.jsonl", SFT_METRICS)
    for step in range(1, steps + 1):
        values = {name: 0.5 for name in SFT_METRICS if name.startswith("train/")}
        values |= {"train/accuracy": step / 8, "timing_s/step": 2.0, "timing_s/data": 0.1}
        if step % 2 == 0:
            values |= {"val/loss": 0.7, "val/accuracy": 0.4}
        metrics.append(step, values)
    return folder


def evaluate_run(folder: Path, step: int, *, solved: int) -> Path:
    """An evaluation of eight episodes, of which twice ``solved`` were solved."""
    entries = [
        {
            "episode": i,
            "task": task,
            "init_state": i,
            "outcome": i >= solved,
            "steps": 9,
            "crash": None,
        }
        for task in NAMES
        for i in range(4)
    ]
    conditions = {key: key for key in DECIDES} | {"versions": {"verl": "0.9.1"}}
    conditions["step_limits"] = dict.fromkeys(NAMES.values(), 48)
    record = json.loads(json.dumps(evaluation_record(entries, conditions, NAMES)))
    keep_evaluation(folder, step, record)
    low, high = record["total"]["ci95"]
    MetricsFile(folder / "metrics.jsonl").append(
        step,
        {
            "val/success_rate": record["total"]["rate"],
            "val/episodes": 8,
            "val/ci_low": low,
            "val/ci_high": high,
        },
    )
    return folder
