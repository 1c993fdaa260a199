"""Construction of a run's parts from its recipe: the only place that chooses classes.

Errors in a recipe are found here, before a process is started.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from verl_vla.config.choices import Split
from verl_vla.config.shared import EnvironmentConfig
from verl_vla.core.episode import Start
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.envs.base import EnvConfig, Suite, simulators_per_process
from verl_vla.envs.libero.egl_devices import render_devices
from verl_vla.envs.libero.suite import LiberoSuite
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.envs.registry import absolute_name, make_env, suite
from verl_vla.policies.base import PolicyShape, Processor
from verl_vla.policies.normalization import NO_NOOPS_SUFFIX, UNNAMED, read_datasets

logger = logging.getLogger(__name__)


PUBLISHED_RENDER_SIZE = 256
"""Render size in pixels; openvla-oft ``experiments/robot/libero/run_libero_eval.py``,
``env_img_res``."""

JOINT_KEY = "libero_4_task_suites"
"""Statistics key of openvla-oft's checkpoint for four suites at once; its ``LIBERO.md``."""
JOINT_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


@contextmanager
def open_simulators(
    env: EnvironmentConfig, config: EnvConfig, shape: PolicyShape
) -> Generator[EnvPool]:
    """Open a pool of simulators, and close it on success and on error."""
    with EnvPool(
        partial(make_env, config),
        num_workers=env.num_workers,
        num_slots=env.num_slots,
        image_shape=shape.image_shape,
        timeout_s=env.timeout_s,
        worker_env={},
        render_devices=render_devices(),
    ) as pool:
        yield pool


def most_policy_steps(env: EnvironmentConfig, chosen: Suite, chunk_length: int) -> int:
    """Return the most policy steps of an episode of any task of a recipe."""
    tasks = range(len(chosen.tasks)) if env.tasks is None else env.tasks
    limit = max(chosen.step_limit(env.step_limit, task) for task in tasks)
    # the last chunk may be cut short
    return -(-limit // chunk_length)


def find_policy(path: str) -> Path:
    """Return the folder of a checkpoint: as given, or relative to the project's root."""
    for folder in (Path(path), PROJECT_FOLDER / path):
        if (folder / "config.json").is_file():
            return folder.resolve()
    raise ConfigError(
        f"policy.path is {path!r}, but there is no config.json in {Path(path).resolve()}; "
        "name the folder of a checkpoint"
    )


def task_ids(chosen: Suite, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """Check the chosen tasks against the suite; without a choice return all that can be built."""
    known = range(len(chosen.tasks))
    if wanted is None:
        return _buildable(chosen)
    if not wanted:
        raise ConfigError("environment.tasks is empty; name at least one task, or null for all")
    for task in wanted:
        if task not in known:
            raise ConfigError(
                f"environment.tasks has {task}, but suite {chosen.name!r} has tasks "
                f"0 to {len(known) - 1}; choose among those"
            )
        if task in chosen.refusals:
            raise ConfigError(
                f"environment.tasks has {task}, which cannot be built: {chosen.refusals[task]}; "
                "choose others, or null for all that can be"
            )
    if len(set(wanted)) != len(wanted):
        raise ConfigError(f"environment.tasks is {list(wanted)}; name each task once")
    return tuple(wanted)


def _buildable(chosen: Suite) -> tuple[int, ...]:
    """Return every task of a suite that can be built; log the others, by reason."""
    for reason, number in Counter(chosen.refusals.values()).items():
        logger.warning(
            "%d of %d tasks of %s are left out: %s",
            number,
            len(chosen.tasks),
            chosen.name,
            reason,
        )
    tasks = tuple(task for task in range(len(chosen.tasks)) if task not in chosen.refusals)
    if not tasks:
        raise ConfigError(f"no task of suite {chosen.name!r} can be built here; choose another one")
    return tasks


def env_config(env: EnvironmentConfig, processor: Processor) -> EnvConfig:
    """Build the configuration of a simulator process, and check that it suits the policy."""
    chosen, shape, known = suite(env.suite), processor.shape, processor.render_size
    # the recipe's, else that of the fine-tuning, else openvla-oft's
    render_size = next(s for s in (env.render_size, known, PUBLISHED_RENDER_SIZE) if s is not None)
    if known is not None and render_size != known:
        logger.warning(
            "environment.render_size is %d, but the policy was fine-tuned on images of %d px; "
            "what it sees will look different, and its success rate can be another",
            render_size,
            known,
        )
    if render_size < shape.image_size:
        raise ConfigError(
            f"environment.render_size is {render_size}, but the policy sees images of "
            f"{shape.image_size} px; render at least that large (openvla-oft: 256 for 224)"
        )
    _check_robot(processor, chosen)
    other = describe_other_data(processor.codec.statistics.key, chosen)
    if other is not None:
        logger.warning("%s", other)
    # called for its check; each simulator looks up the limit of its own task
    chosen.step_limit(env.step_limit, task_id=0)
    return EnvConfig(
        suite=absolute_name(env.suite),
        step_limit=env.step_limit,
        render_size=render_size,
        image_size=shape.image_size,
        cameras=chosen.cameras[: shape.num_views],
        max_simulators=simulators_per_process(
            len(chosen.tasks) if env.tasks is None else len(env.tasks), env.num_workers
        ),
    )


def find_unnorm_key(folder: Path, unnorm_key: str | None, chosen: Suite) -> str | None:
    """Return the key of the action statistics to use: as given, else by the suite.

    Args:
        folder: folder of the policy.
        unnorm_key: key that the user names; None leaves the choice to this function.
        chosen: suite that is trained or evaluated.

    Returns:
        None where the folder holds a single entry, none of the suite's, or none at all.
    """
    if unnorm_key is not None:
        return unnorm_key
    try:
        _, datasets = read_datasets(folder)
    except ConfigError:
        return None  # `examine` tells it, with whatever else is wrong with the folder
    found = [key for name in _data_of(chosen) for key in (name, name + NO_NOOPS_SUFFIX)]
    fitting = [key for key in found if key in datasets]
    if len(datasets) == 1 or not fitting:
        return None
    logger.info(
        "statistics %r of %d in %s, by the suite; unnorm_key names another one",
        fitting[0],
        len(datasets),
        folder,
    )
    return fitting[0]


def describe_other_data(key: str, chosen: Suite) -> str | None:
    """Say that statistics are of other data than a suite's; None where they are of the suite's.

    Args:
        key: key of the action statistics.
        chosen: suite that is trained or evaluated.
    """
    if key == UNNAMED or key.removesuffix(NO_NOOPS_SUFFIX) in _data_of(chosen):
        return None
    return (
        f"the action statistics are those of {key!r}, and the suite is {chosen.name!r}: ranges of "
        "another suite or robot make other motions of the same tokens; unnorm_key names the entry"
    )


def _data_of(chosen: Suite) -> tuple[str, ...]:
    """Return the names of data that were recorded in a suite, the likeliest first."""
    names = {chosen.name: None}
    # a perturbed suite is for policies of the suite that it was made from
    if isinstance(chosen, LiberoSuite):
        names |= {task.base.suite: None for task in chosen.tasks if task.base is not None}
    joint = (JOINT_KEY,) if names.keys() & set(JOINT_SUITES) else ()
    return (*names, *joint)


def _check_robot(processor: Processor, chosen: Suite) -> None:
    """Check that a policy's sizes are those of the suite's robot."""
    shape, cameras = processor.shape, chosen.cameras
    if shape.num_views > len(cameras):
        raise ConfigError(
            f"the policy takes {shape.num_views} images, but the environments have "
            f"{len(cameras)} cameras, {' and '.join(cameras)}; use a policy of fewer views"
        )
    if shape.action_dim != chosen.action_dim:
        raise ConfigError(
            f"an action of the policy has {shape.action_dim} values, and one of suite "
            f"{chosen.name!r} has {chosen.action_dim}; use a policy for this robot"
        )
    # 0: the policy reads no proprio
    if shape.proprio_dim not in (0, chosen.proprio_dim):
        raise ConfigError(
            f"the policy reads {shape.proprio_dim} proprio values, and suite {chosen.name!r} has "
            f"{chosen.proprio_dim}; use a policy for this robot"
        )
    statistics = processor.codec.statistics
    if statistics.gripper_dims != chosen.gripper_dims:
        raise ConfigError(
            f"statistics '{statistics.key}' leave the values {list(statistics.gripper_dims)} of an "
            f"action as they are, and the grippers of suite {chosen.name!r} are at "
            f"{list(chosen.gripper_dims)}: the mask must be false there and nowhere else"
        )


def starts(
    chosen: Suite,
    tasks: Sequence[int],
    split: Split,
    *,
    per_task: int | None = None,
) -> tuple[Start, ...]:
    """Return all starts of a split, or the first ``per_task`` of each task.

    A task that records fewer init states than the others of its suite gives all that it has.
    """
    if split == "sampled" and per_task is None:
        raise ConfigError(
            "starts are to be sampled, and nothing says how many a task; set "
            "evaluation.episodes_per_task, or --episodes-per-task of eval, e.g. to 100"
        )
    found: list[Start] = []
    for task in tasks:
        states = chosen.init_state_ids(task, split)
        own = isinstance(chosen, LiberoSuite) and chosen.tasks[task].num_init_states is not None
        has_fewer = own and split != "sampled"
        if per_task is not None and per_task > len(states) and not has_fewer:
            raise ConfigError(
                f"evaluation.episodes_per_task is {per_task}, but task {task} of "
                f"{chosen.name!r} has {len(states)} {split} init states; set at most that"
            )
        found += [Start(task_id=task, init_state_id=s) for s in states[:per_task]]
    return tuple(found)
