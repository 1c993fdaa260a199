"""From a recipe to the parts of a run: the one place that chooses classes.

Everything that can be wrong with a recipe is found here, before a process is started.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from verl_vla.album import Album
from verl_vla.conditions import conditions, played_in
from verl_vla.envs.base import EnvConfig, Split, Suite, simulators_per_process
from verl_vla.envs.pool import EnvPool
from verl_vla.envs.suites import LiberoSuite, absolute_name, make_env, suite
from verl_vla.errors import ConfigError
from verl_vla.evaluation import Evaluation, episode_entries
from verl_vla.extras import require_extras
from verl_vla.policies.base import PolicyShape, Processor
from verl_vla.policies.loading import check_adapters, load_processor, require_sound
from verl_vla.policies.openvla_oft.attention import require_backend
from verl_vla.recipe import EnvironmentConfig, Recipe
from verl_vla.reward import TrajectoryReward, load_reward, looks_at_pictures
from verl_vla.run_folder import claimed_folder, evaluated_steps, evaluation_record, keep_evaluation
from verl_vla.sampling import Start

logger = logging.getLogger(__name__)

PROJECT_FOLDER = Path(__file__).resolve().parent.parent

PUBLISHED_RENDER_SIZE = 256
"""Pixels; openvla-oft ``experiments/robot/libero/run_libero_eval.py``, ``env_img_res``."""

MAY_CHANGE = (
    "out",
    "trainer",
    "evaluation",
    "gate",
    "cluster.address",
    "cluster.env_nodes",
    "environment.num_workers",
    "environment.timeout_s",
)
"""Parts of a recipe that may differ when a run is resumed; anything else would make the second
half of the curve another experiment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A checked recipe and the parts made from it."""

    recipe: Recipe
    folder: Path
    policy_folder: Path
    processor: Processor
    env_config: EnvConfig
    """Of every simulator."""
    simulators: EnvPool | None
    """On this machine; None where nodes of a Ray cluster simulate."""
    reward: TrajectoryReward
    training_starts: tuple[Start, ...]
    evaluation_starts: tuple[Start, ...]
    task_names: dict[int, str]

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.folder / "checkpoints"

    def open_album(self) -> Album:
        """What is kept of the training episodes."""
        header = played_in(self.env_config, self.task_names)
        return Album(self.folder, header, self.processor.codec, self.recipe.trainer.keep_groups)

    def was_evaluated(self, step: int) -> bool:
        """Whether the evaluation after a training step is kept."""
        return step in evaluated_steps(self.folder)

    def keep_evaluation(self, step: int, result: Evaluation) -> None:
        """Write one evaluation of the run, with the outcome of each of its episodes."""
        config = self.recipe.evaluation
        given = conditions(
            self.env_config,
            self.task_names,
            states=config.states,
            temperature=config.temperature,
            seed=self.recipe.seed,
        )
        entries = episode_entries(result.trajectories)
        keep_evaluation(self.folder, step, evaluation_record(entries, given, self.task_names))


@contextmanager
def open_run(recipe: Recipe) -> Generator[Run]:
    """Check ``recipe``, claim its folder, start the simulators, and end them afterwards.

    Raises:
        ConfigError: anything about the recipe that cannot work, before a process is started.
    """
    env = recipe.environment
    chosen = suite(env.suite)
    tasks = task_ids(chosen, env.tasks)
    policy_folder = find_policy(recipe.policy.path)
    require_backend(recipe.policy.attention)
    require_sound(policy_folder, recipe.policy.unnorm_key)
    check_adapters(policy_folder, recipe.policy.lora_rank, has_kl=recipe.loss.kl.is_on)
    require_extras(
        {"policy.quantization": recipe.policy.quantization, "optimizer.name": recipe.optimizer.name}
    )
    for logger_name in recipe.trainer.loggers:
        require_extras({"trainer.loggers": logger_name})
    processor = load_processor(policy_folder, recipe.policy.unnorm_key)
    reward = load_reward(recipe.reward, recipe.reward_args, seed=recipe.seed)
    config = replace(env_config(env, processor), draw_ending=looks_at_pictures(reward))
    chosen.require_simulator()
    training = starts(chosen, tasks, "train")
    evaluated = starts(
        chosen, tasks, recipe.evaluation.states, per_task=recipe.evaluation.episodes_per_task
    )
    folder = Path(recipe.out).expanduser().resolve()
    is_elsewhere = recipe.cluster.env_nodes > 0
    here = nullcontext() if is_elsewhere else open_simulators(env, config, processor.shape)
    with claimed_folder(folder, recipe.as_dict(), MAY_CHANGE), here as simulators:
        yield Run(
            recipe=recipe,
            folder=folder,
            policy_folder=policy_folder,
            processor=processor,
            env_config=config,
            simulators=simulators,
            reward=reward,
            training_starts=training,
            evaluation_starts=evaluated,
            task_names={task: chosen.tasks[task].name for task in tasks},
        )


@contextmanager
def open_simulators(
    env: EnvironmentConfig, config: EnvConfig, shape: PolicyShape
) -> Generator[EnvPool]:
    """A pool of simulators that is closed whatever happens."""
    with EnvPool(
        partial(make_env, config),
        num_workers=env.num_workers,
        num_slots=env.num_slots,
        image_shape=shape.image_shape,
        timeout_s=env.timeout_s,
        worker_env={},
    ) as pool:
        yield pool


def find_policy(path: str) -> Path:
    """The folder of a checkpoint: as given, or relative to the project's root."""
    for folder in (Path(path), PROJECT_FOLDER / path):
        if (folder / "config.json").is_file():
            return folder.resolve()
    raise ConfigError(
        f"policy.path is {path!r}, but there is no config.json in {Path(path).resolve()}; "
        "name the folder of a checkpoint"
    )


def task_ids(chosen: Suite, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The tasks to play, checked against the suite; all that can be built where none are given."""
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
    """Every task of a suite that can be built; the others are told, by reason."""
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
    """What a simulator process needs to know."""
    chosen, shape, known = suite(env.suite), processor.shape, processor.render_size
    render_size = next(s for s in (env.render_size, known, PUBLISHED_RENDER_SIZE) if s is not None)
    if known is not None and render_size != known:
        logger.warning(
            "environment.render_size is %d, but the policy was fine-tuned on pictures of %d px; "
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


def _check_robot(processor: Processor, chosen: Suite) -> None:
    """Make sure that a policy's sizes are those of the robot that it is to move."""
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
    if shape.proprio_dim not in (0, chosen.proprio_dim):
        raise ConfigError(
            f"the policy reads {shape.proprio_dim} proprio values, and suite {chosen.name!r} has "
            f"{chosen.proprio_dim}; use a policy for this robot"
        )
    statistics = processor.codec.statistics
    if statistics.grippers != chosen.grippers:
        raise ConfigError(
            f"statistics '{statistics.key}' leave the values {list(statistics.grippers)} of an "
            f"action as they are, and the grippers of suite {chosen.name!r} are at "
            f"{list(chosen.grippers)}: the mask must be false there and nowhere else"
        )


def starts(
    chosen: Suite,
    tasks: Sequence[int],
    split: Split,
    *,
    per_task: int | None = None,
) -> tuple[Start, ...]:
    """All starts of a split, or the first ``per_task`` of each task.

    A task that records fewer init states than the others of its suite has all of its own.
    """
    if split == "drawn" and per_task is None:
        raise ConfigError(
            "starts shall be drawn, and nothing says how many a task; set "
            "evaluation.episodes_per_task, or --episodes of eval, e.g. to 100"
        )
    found: list[Start] = []
    for task in tasks:
        states = chosen.init_state_ids(task, split)
        own = isinstance(chosen, LiberoSuite) and chosen.tasks[task].num_init_states is not None
        has_fewer = own and split != "drawn"
        if per_task is not None and per_task > len(states) and not has_fewer:
            raise ConfigError(
                f"evaluation.episodes_per_task is {per_task}, but task {task} of "
                f"{chosen.name!r} has {len(states)} {split} init states; set at most that"
            )
        found += [Start(task_id=task, init_state_id=s) for s in states[:per_task]]
    return tuple(found)
