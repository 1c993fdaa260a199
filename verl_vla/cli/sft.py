"""``sft``: fine-tune a policy on demonstrations.

``sft recipe=NAME key=value ...`` learns from LIBERO's files, in as many processes as there are
GPUs; ``sft --demos FILE --out DIR ...`` trains a tiny policy from scratch on a file of `demos`.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from verl_vla.cli.train import start_training
from verl_vla.config.sft import load_sft_recipe
from verl_vla.core.errors import ConfigError
from verl_vla.datasets.demonstrations import Demonstration, DemonstrationFile
from verl_vla.envs.libero.suite import SUITES
from verl_vla.envs.registry import suite
from verl_vla.policies.base import TrainablePolicy
from verl_vla.policies.openvla_oft import tiny as tiny_openvla_oft
from verl_vla.policies.scratch_vla import tiny as tiny_scratch_vla
from verl_vla.policies.scratch_vla.configuration import DECODINGS
from verl_vla.trainer.sft.fit import SFTConfig, StepReport, action_statistics, fit, make_samples
from verl_vla.trainer.sft.run import open_sft_run

logger = logging.getLogger(__name__)

ARCHITECTURES = ("openvla_oft", "scratch_vla")
SHOW_EVERY = 20
"""Steps between lines on the console."""


def run(arguments: Sequence[str]) -> int:
    """Fit, say how it goes, and write a checkpoint folder."""
    if any(argument.startswith("recipe=") for argument in arguments):
        return _run_recipe(arguments)
    options = _parser().parse_args(arguments)
    config = SFTConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        smoothing=options.smoothing,
        seed=options.seed,
    )
    if options.threads < 1:
        raise ConfigError(f"--threads is {options.threads}; set at least 1")
    torch.set_num_threads(options.threads)
    with DemonstrationFile(Path(options.demos)) as file:
        demonstrations = _chosen(file, options.tasks, options.per_task)
        key, render_size = file.suite, file.render_size
    policy = _new_policy(options, demonstrations, key, render_size)
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
    """Carry out a recipe; the same command again resumes."""
    with open_sft_run(load_sft_recipe(arguments)) as opened:
        logger.info("run folder %s", opened.folder)
        start_training(opened, kind="sft")
    return 0


def _parser() -> argparse.ArgumentParser:
    config = SFTConfig()
    parser = argparse.ArgumentParser(prog="python -m verl_vla sft", description=__doc__)
    add = parser.add_argument
    add("--demos", required=True, help="file that `demos` wrote")
    add("--architecture", choices=ARCHITECTURES, default=ARCHITECTURES[0])
    add("--decoding", choices=DECODINGS, help="of scratch_vla: parallel if not given")
    add(
        "--chunk-length",
        type=int,
        help="of scratch_vla: actions of one policy step, 8 if not given",
    )
    add("--tasks", type=int, nargs="+", help="task ids to learn; all in the file if not given")
    add("--per-task", type=int, help="demonstrations of each task to use; all if not given")
    add("--steps", type=int, default=config.steps, help="optimizer steps")
    add("--batch-size", type=int, default=config.batch_size, help="images per step")
    add("--lr", type=float, default=config.lr, help="highest learning rate")
    add("--smoothing", type=float, default=config.smoothing, help="of the targets, in bins")
    add("--seed", type=int, default=0, help="of the weights and of the order of the images")
    add("--threads", type=int, default=1, help="of this process; part of what decides the result")
    add("--out", required=True, help="checkpoint folder to write")
    return parser


def _new_policy(
    options: argparse.Namespace,
    demonstrations: Sequence[Demonstration],
    key: str,
    render_size: int,
) -> TrainablePolicy:
    """Build an untrained tiny policy for what the demonstrations show."""
    _, num_views, image_size, _, _ = demonstrations[0].images.shape
    # the words of every suite, so that any of them can be played with these weights
    instructions = [task.instruction for name in SUITES for task in suite(name).tasks]
    statistics = action_statistics(demonstrations, key=key)
    chosen = {
        name: value
        for name, value in (("decoding", options.decoding), ("chunk_length", options.chunk_length))
        if value is not None
    }
    if options.architecture == "scratch_vla":
        return tiny_scratch_vla.build_tiny_policy(
            instructions,
            statistics,
            sizes=tiny_scratch_vla.ScratchSizes(
                image_size=image_size, num_views=num_views, render_size=render_size, **chosen
            ),
            seed=options.seed,
        )
    if chosen:
        raise ConfigError(
            f"{sorted(chosen)} can be chosen for scratch_vla alone, and --architecture is "
            f"{options.architecture}; leave them out or choose --architecture scratch_vla"
        )
    return tiny_openvla_oft.build_tiny_policy(
        instructions,
        statistics,
        sizes=tiny_openvla_oft.TinySizes(
            image_size=image_size, num_views=num_views, render_size=render_size
        ),
        seed=options.seed,
    )


def _chosen(
    file: DemonstrationFile, tasks: Sequence[int] | None, per_task: int | None
) -> list[Demonstration]:
    """The first ``per_task`` demonstrations of each task."""
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
    for report in reports:
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
