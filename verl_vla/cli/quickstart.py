"""Train a base, show the result.

Writes ``summary.json``, ``metrics.jsonl``, ``curve.png`` and ``before_after.mp4``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from verl_vla.cli.arguments import QUICKSTARTS
from verl_vla.cli.train import improve
from verl_vla.config.compose import load_recipe
from verl_vla.config.grpo import Recipe
from verl_vla.core.episode import Outcome, Start
from verl_vla.core.provenance import provenance
from verl_vla.core.text import format_seconds
from verl_vla.evaluation.evaluate import EVALUATION_STREAM
from verl_vla.policies.registry import load_policy
from verl_vla.rl.rollout import NoiseSource
from verl_vla.runs.metrics import read_metrics
from verl_vla.runs.plots import success_table, text_curve
from verl_vla.runs.run_dir import evaluated_steps, evaluation_file
from verl_vla.runs.video import record_videos, sampler_of, write_side_by_side
from verl_vla.trainer import checkpoint
from verl_vla.trainer.grpo.run import Run, open_run

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    """Train, then print a table and a curve."""
    recipe = load_recipe(recipe_overrides(options))
    began = time.perf_counter()
    with open_run(recipe) as opened:
        logger.info("run folder %s", opened.folder)
        improve(opened)
    wall_s = time.perf_counter() - began
    _show(opened, wall_s)
    return 0


def recipe_overrides(options: argparse.Namespace) -> list[str]:
    """Return the recipe of the suite and the overrides that the options stand for."""
    seed = 0 if options.seed is None else options.seed
    recipe = QUICKSTARTS[options.suite]
    out = f"runs/{recipe}_seed{seed}" if options.out is None else options.out
    # quoted, since Hydra's grammar reads some characters of a path as its own
    overrides = [f"recipe={recipe}", f"seed={seed}", f"out='{out}'"]
    if options.total_training_steps is not None:
        overrides.append(f"trainer.total_training_steps={options.total_training_steps}")
    return overrides


def _show(run: Run, wall_s: float) -> None:
    """Write the results of the run, and print a summary."""
    steps = evaluated_steps(run.folder)[-1]  # below the requested number if all was solved before
    before, after = _evaluation(run, 0), _evaluation(run, steps)
    lines = read_metrics(run.folder / "metrics.jsonl")
    summary = _summary(run.recipe, steps, before, after, lines, _wall_s(run, wall_s))
    policies = run.policy_folder, checkpoint.step_folder(run.checkpoints, steps) / "policy"
    summary["policy_parameters"] = _record_and_count(run, policies, before, after)
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=1))
    rates = [line["env/success_rate"] for line in lines if "env/success_rate" in line]
    logger.info("\n%s\n", success_table(before, after))
    logger.info(
        "training success by step  %s  %.0f%% to %.0f%%",
        text_curve(rates),
        100 * rates[0],
        100 * rates[-1],
    )
    logger.info(
        "%s of training, %d episodes; see curve.png, before_after.mp4 and summary.json in %s",
        format_seconds(summary["wall_s"]),
        summary["episodes_played"],
        run.folder,
    )


def _summary(
    recipe: Recipe,
    steps: int,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    lines: Sequence[Mapping[str, float]],
    wall_s: float,
) -> dict[str, Any]:
    counted = ("rate", "successes", "episodes", "ci95")
    return {
        "suite": recipe.environment.suite,
        "seed": recipe.seed,
        "steps": steps,
        "held_out_before": {name: before["total"][name] for name in counted},
        "held_out_after": {name: after["total"][name] for name in counted},
        "step_limits": before["step_limits"],
        "wall_s": wall_s,
        "episodes_played": int(
            sum(line["env/episodes"] for line in lines if "env/episodes" in line)
        ),
        "verl_version": metadata.version("verl"),
        "versions": provenance(),
    }


def _evaluation(run: Run, step: int) -> dict[str, Any]:
    return json.loads(evaluation_file(run.folder, step).read_text())


def _wall_s(run: Run, wall_s: float) -> float:
    """Return the seconds of training over all processes of this run, and store the sum."""
    file = run.folder / "wall_s.json"
    # a resumed run has trained before, in other processes
    earlier = json.loads(file.read_text()) if file.exists() else 0.0
    file.write_text(json.dumps(earlier + wall_s))
    return earlier + wall_s


def _record_and_count(
    run: Run,
    folders: tuple[Path, Path],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> int:
    """Record the most informative held-out start with both policies; return the parameter count."""
    episode = _informative_episode(before["episodes"], after["episodes"])
    start = Start(task_id=episode["task"], init_state_id=episode["init_state"])
    policies = [load_policy(folder) for folder in folders]
    # the noise of the evaluations, so that the video shows the episodes that they counted
    noise = NoiseSource(seed=run.recipe.seed, stream=EVALUATION_STREAM)
    sample = sampler_of(run.recipe.evaluation.temperature, noise, episode["episode"])
    clips = record_videos(policies, run.env_config, start, sample)
    write_side_by_side(
        run.folder / "before_after.mp4",
        list(zip(("before training", "after training"), clips, strict=True)),
    )
    return sum(p.numel() for p in policies[0].model.parameters())


def _informative_episode(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Return the first episode that failed before and succeeded after training, else the first."""
    pairs = list(zip(before, after, strict=True))
    learned = [
        new
        for old, new in pairs
        if old["outcome"] != Outcome.SUCCESS and new["outcome"] == Outcome.SUCCESS
    ]
    return learned[0] if learned else pairs[0][1]
