"""A GRPO run: a checked recipe and the parts made from it, ready to train."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from verl_vla.config.grpo import Recipe
from verl_vla.core.episode import Start
from verl_vla.core.plugins import require_extras
from verl_vla.core.success_rate import episode_entries
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.envs.registry import suite
from verl_vla.evaluation.conditions import conditions, played_in, sampling_of
from verl_vla.evaluation.during_training import EvaluationKind, evaluation_kinds
from verl_vla.evaluation.evaluate import Evaluation
from verl_vla.policies.base import Processor
from verl_vla.policies.openvla_oft.modelling import require_backend
from verl_vla.policies.registry import check_adapters, load_processor, require_valid
from verl_vla.policies.weight_files import read_weight_layout
from verl_vla.rewards import TrajectoryReward, load_reward, looks_at_images, video_need
from verl_vla.rl.setup import (
    env_config,
    find_policy,
    find_unnorm_key,
    open_simulators,
    starts,
    task_ids,
)
from verl_vla.runs.disk_space import count_stored, disk_bytes, require_disk_space
from verl_vla.runs.metrics import read_metrics
from verl_vla.runs.run_dir import evaluation_record, keep_evaluation, open_run_dir
from verl_vla.runs.run_recorder import RunRecorder
from verl_vla.runs.tracking import require_trackers

MAY_CHANGE = (
    "out",
    "trainer",
    "evaluation",
    "cold_start",
    "cluster.address",
    "cluster.env_nodes",
    "environment.num_workers",
    "environment.timeout_s",
    "reward_timeout_s",
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
    """Configuration of every simulator."""
    simulators: EnvPool | None
    """Pool of this machine; None where nodes of a Ray cluster simulate."""
    reward: TrajectoryReward
    training_starts: tuple[Start, ...]
    evaluation_starts: tuple[Start, ...]
    """Starts of every evaluation."""
    evaluation_kinds: tuple[EvaluationKind, ...]
    task_names: dict[int, str]
    disk: Mapping[str, int]
    """Most bytes of the run's folder, part by part."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def open_recorder(self) -> RunRecorder:
        """Return the recorder of the run."""
        trainer = self.recipe.trainer
        return RunRecorder(
            self.folder,
            played_in(self.env_config, self.task_names)
            | {"sampling": sampling_of(self.recipe.sampling.temperature)},
            self.processor.codec,
            groups_per_step=trainer.keep_groups,
            total_steps=trainer.total_training_steps,
        )

    def was_evaluated(self, step: int) -> bool:
        """Return true where every evaluation after a training step is complete."""
        # by the metrics, which are written last: a record alone may be one of two
        return any(
            line["step"] == step and "val/success_rate" in line
            for line in read_metrics(self.folder / "metrics.jsonl")
        )

    def keep_evaluation(self, step: int, kind: EvaluationKind, result: Evaluation) -> None:
        """Write one evaluation of the run, with the outcome of each of its episodes."""
        given = conditions(
            self.env_config,
            self.task_names,
            states=self.recipe.evaluation.states,
            temperature=kind.temperature,
            seed=self.recipe.seed,
        )
        entries = episode_entries(result.trajectories)
        record = evaluation_record(entries, given, self.task_names)
        keep_evaluation(self.folder, step, record, kind.suffix)


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
    unnorm_key = find_unnorm_key(policy_folder, recipe.policy.unnorm_key, chosen)
    require_valid(policy_folder, unnorm_key)
    check_adapters(policy_folder, recipe.policy.lora_rank, has_kl=recipe.loss.kl.is_on)
    require_extras(
        {"policy.quantization": recipe.policy.quantization, "optimizer.name": recipe.optimizer.name}
    )
    for logger_name in recipe.trainer.loggers:
        require_extras({"trainer.loggers": logger_name})
    require_trackers(recipe.trainer.loggers)
    processor = load_processor(policy_folder, unnorm_key)
    reward = load_reward(recipe.reward, recipe.reward_args, seed=recipe.seed)
    # the image after the last step is rendered only for a reward that looks at it
    video = video_need(reward)
    config = replace(
        env_config(env, processor),
        render_final=looks_at_images(reward),
        video_every=0 if video is None else video.every,
    )
    # this may download LIBERO's assets, so what is wrong with the recipe is found first
    chosen.require_simulator()
    training = starts(chosen, tasks, "train")
    evaluated = starts(
        chosen, tasks, recipe.evaluation.states, per_task=recipe.evaluation.episodes_per_task
    )
    folder = Path(recipe.out).expanduser().resolve()
    weights = count_stored(read_weight_layout(policy_folder), recipe.policy)
    disk = disk_bytes(recipe, weights, processor.shape, chosen)
    require_disk_space(folder, disk)
    # where nodes of the cluster simulate, no simulator runs on this machine
    is_elsewhere = recipe.cluster.env_nodes > 0
    here = nullcontext() if is_elsewhere else open_simulators(env, config, processor.shape)
    # the folder first: a second process that wants it must not start simulators
    with open_run_dir(folder, recipe.as_dict(), MAY_CHANGE), here as simulators:
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
            evaluation_kinds=evaluation_kinds(recipe, len(evaluated)),
            task_names={task: chosen.tasks[task].name for task in tasks},
            disk=disk,
        )
