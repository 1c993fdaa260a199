"""Fine-tune a policy on demonstrations.

``sft recipe=NAME key=value ...`` trains on LIBERO's files, with one process per GPU. ``sft --demos
FILE --out DIR ...`` trains a tiny policy from scratch on a file of `demos`.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from verl_vla.cli.train import start_training
from verl_vla.config.choices import ARCHITECTURES
from verl_vla.config.sft import load_sft_recipe
from verl_vla.core.errors import ConfigError
from verl_vla.datasets.demonstrations import Demonstration, DemonstrationFile
from verl_vla.envs.names import SUITES
from verl_vla.envs.registry import suite
from verl_vla.policies.base import TrainablePolicy
from verl_vla.policies.openvla_oft import tiny as tiny_openvla_oft
from verl_vla.policies.scratch_vla import tiny as tiny_scratch_vla
from verl_vla.runs.terminal import track
from verl_vla.trainer.sft.fit import SFTConfig, StepReport, action_statistics, fit, make_samples
from verl_vla.trainer.sft.run import open_sft_run

logger = logging.getLogger(__name__)

SHOW_EVERY = 20
"""Number of steps between two lines on the console."""


def run(options: argparse.Namespace) -> int:
    """Train with progress lines, and write a checkpoint folder."""
    if options.overrides:
        return _run_recipe(options.overrides)
    for name in ("demos", "out"):
        if vars(options)[name] is None:
            raise ConfigError(
                f"--{name} is missing; name a recipe, as in recipe=sft_libero, or set --demos and "
                "--out to make a tiny policy from scratch"
            )
    names = ("steps", "batch_size", "lr", "smoothing", "seed")
    # what was not given keeps the default of `SFTConfig`
    config = SFTConfig(**{n: vars(options)[n] for n in names if vars(options)[n] is not None})
    threads = 1 if options.threads is None else options.threads
    if threads < 1:
        raise ConfigError(f"--threads is {threads}; set at least 1")
    # threads share out sums, whose order and rounding then depend on their number
    torch.set_num_threads(threads)
    with DemonstrationFile(Path(options.demos)) as file:
        demonstrations = _chosen(file, options.tasks, options.per_task)
        key, render_size = file.suite, file.render_size
    policy = _new_policy(options, demonstrations, key, render_size, config.seed)
    samples = make_samples(demonstrations, policy.processor.codec)
    logger.info(
        "%.2f M parameters, %d demonstrations, %d images",
        sum(p.numel() for p in policy.model.parameters()) / 1e6,
        len(demonstrations),
        len(samples),
    )
    _show(fit(policy, samples, config), config.steps)
    policy.save_pretrained(options.out)
    logger.info("written to %s", options.out)
    return 0


def _run_recipe(arguments: Sequence[str]) -> int:
    """Run a recipe; the same command resumes it."""
    with open_sft_run(load_sft_recipe(arguments)) as opened:
        logger.info("run folder %s", opened.folder)
        start_training(opened, kind="sft")
    return 0


def _new_policy(
    options: argparse.Namespace,
    demonstrations: Sequence[Demonstration],
    key: str,
    render_size: int,
    seed: int,
) -> TrainablePolicy:
    """Build an untrained tiny policy that fits the demonstrations' images and actions."""
    _, num_views, image_size, _, _ = demonstrations[0].images.shape
    # the words of every suite, so that the policy's tokenizer can encode all their instructions
    instructions = [task.instruction for name in SUITES for task in suite(name).tasks]
    statistics = action_statistics(demonstrations, key=key)
    chosen = {
        name: value
        for name, value in (("decoding", options.decoding), ("chunk_length", options.chunk_length))
        if value is not None
    }
    architecture = ARCHITECTURES[0] if options.architecture is None else options.architecture
    if architecture == "scratch_vla":
        return tiny_scratch_vla.build_tiny_policy(
            instructions,
            statistics,
            sizes=tiny_scratch_vla.ScratchSizes(
                image_size=image_size, num_views=num_views, render_size=render_size, **chosen
            ),
            seed=seed,
        )
    if chosen:
        raise ConfigError(
            f"{sorted(chosen)} can be chosen for scratch_vla alone, and --architecture is "
            f"{architecture}; leave them out or choose --architecture scratch_vla"
        )
    return tiny_openvla_oft.build_tiny_policy(
        instructions,
        statistics,
        sizes=tiny_openvla_oft.TinySizes(
            image_size=image_size, num_views=num_views, render_size=render_size
        ),
        seed=seed,
    )


def _chosen(
    file: DemonstrationFile, tasks: Sequence[int] | None, per_task: int | None
) -> list[Demonstration]:
    """Return the first ``per_task`` demonstrations of each task."""
    by_task: dict[int, list[Demonstration]] = {}
    for demonstration in file:
        by_task.setdefault(demonstration.task_id, []).append(demonstration)
    for task in tasks or ():
        if task not in by_task:
            raise ConfigError(f"--tasks has {task}, but the file holds tasks {sorted(by_task)}")
    if per_task is not None and per_task < 1:
        raise ConfigError(f"--per-task is {per_task}; set at least 1")
    wanted = sorted(by_task) if tasks is None else tasks
    return [demonstration for task in wanted for demonstration in by_task[task][:per_task]]


def _show(reports: Iterable[StepReport], total: int) -> None:
    began = time.perf_counter()
    recent: list[StepReport] = []
    for report in track(reports, "steps", total):
        recent.append(report)
        if report.step % SHOW_EVERY == 0 or report.step == total:
            logger.info(
                "step %4d/%d  loss %.3f  accuracy %4.1f%%  %.0f s",
                report.step,
                total,
                sum(r.loss for r in recent) / len(recent),
                100 * sum(r.accuracy for r in recent) / len(recent),
                time.perf_counter() - began,
            )
            recent.clear()
