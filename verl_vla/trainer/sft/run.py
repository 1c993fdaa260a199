"""From a fine-tuning recipe to the parts of a run, checked before a process is started."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from verl_vla.config.choices import CAMERAS, SUITES
from verl_vla.config.sft import SFTRecipe
from verl_vla.core.episode import Start
from verl_vla.core.errors import ConfigError
from verl_vla.datasets.action_targets import measure_statistics
from verl_vla.datasets.libero_reader import Demo, read_demos
from verl_vla.datasets.rerender import Rerendering, rerender
from verl_vla.datasets.sft_dataset import DemoSamples
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.suite import libero_suite
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.policies.base import Processor
from verl_vla.policies.normalization import (
    NO_NOOPS_SUFFIX,
    STATISTICS_FILE,
    ActionStatistics,
    load_statistics,
    save_statistics,
)
from verl_vla.policies.registry import (
    check_adapters,
    find_architecture,
    load_processor,
    require_valid,
)
from verl_vla.rl.setup import (
    PUBLISHED_RENDER_SIZE,
    env_config,
    find_policy,
    open_simulators,
    starts,
    task_ids,
)
from verl_vla.runs.run_dir import open_run_dir

logger = logging.getLogger(__name__)

MAY_CHANGE = (
    "out",
    "trainer",
    "evaluation",
    "demos.num_loaders",
    "environment.num_workers",
    "environment.num_slots",
    "environment.timeout_s",
)
"""Parts of a recipe that may differ when a run is resumed; anything else would make the second
half of the curve another experiment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTRun:
    """A checked recipe and the parts made from it; every rank has a copy."""

    recipe: SFTRecipe
    folder: Path
    policy_folder: Path
    """The policy that the run starts from, with the statistics of the demonstrations."""
    render_size: int
    """Size of the training images before they are prepared for the policy, pixels."""
    env_config: EnvConfig
    """Configuration of every simulator."""
    train: tuple[Demo, ...]
    held_out: tuple[Demo, ...]
    starts: tuple[Start, ...]
    """Held-out starts of the closed-loop evaluations."""
    task_names: dict[int, str]

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def load_processor(self) -> Processor:
        """Load the processor of the policy, for images of ``render_size``."""
        return _load_processor(self.policy_folder, self.render_size)

    def samples(self, processor: Processor) -> DemoSamples:
        """Return the training samples."""
        recipe = self.recipe
        return _samples(self.train, processor, recipe.seed if recipe.demos.augment else None)

    def held_out_samples(self, processor: Processor) -> DemoSamples:
        """Return the samples of the open-loop test."""
        return _samples(self.held_out, processor, None)

    @contextmanager
    def open_simulators(self, processor: Processor) -> Generator[EnvPool]:
        """Open the simulators of the closed-loop evaluations."""
        with open_simulators(self.recipe.environment, self.env_config, processor.shape) as pool:
            yield pool


@contextmanager
def open_sft_run(recipe: SFTRecipe) -> Generator[SFTRun]:
    """Check ``recipe``, claim its folder, read the demonstrations and lay down the first policy.

    Raises:
        ConfigError: anything about the recipe or the demonstrations that cannot work.
    """
    env, choice = recipe.environment, recipe.demos.choice
    chosen = libero_suite(env.suite)
    tasks = task_ids(chosen, env.tasks)
    source = Path(recipe.demos.folder).expanduser().resolve()
    # what is wrong with the recipe is found before the folder is made
    held_out_starts = (
        starts(
            chosen, tasks, recipe.evaluation.states, per_task=recipe.evaluation.episodes_per_task
        )
        if recipe.trainer.eval_every
        else ()
    )
    train, held_out = read_demos(source, chosen, tasks, choice)
    if recipe.policy.path is None:
        find_architecture(recipe.policy.architecture)
    else:
        find_policy(recipe.policy.path)
    if recipe.demos.images == "rerendered" or recipe.trainer.eval_every:
        chosen.require_simulator()
    folder = Path(recipe.out).expanduser().resolve()
    with open_run_dir(folder, recipe.as_dict(), MAY_CHANGE):
        cameras = _check_policy(recipe, folder, _statistics(recipe, train))
        render_size = train[0].render_size
        if recipe.demos.images == "rerendered":
            work = _rerendering(recipe, source, folder, cameras)
            rerender(work, tasks, workers=env.num_workers)
            # again: with the images that were rendered, of what the replay has kept
            train, held_out = read_demos(work.target, chosen, tasks, choice)
            render_size = work.env.render_size
        policy_folder = _first_policy(recipe, folder / "first_policy", _statistics(recipe, train))
        run = SFTRun(
            recipe=recipe,
            folder=folder,
            policy_folder=policy_folder,
            render_size=render_size,
            env_config=env_config(env, _load_processor(policy_folder, render_size)),
            train=tuple(train),
            held_out=tuple(held_out),
            starts=held_out_starts,
            task_names={task: chosen.tasks[task].name for task in tasks},
        )
        _check_samples(run)
        yield run


def _statistics(recipe: SFTRecipe, train: Sequence[Demo]) -> ActionStatistics:
    """Measure the statistics of the actions that are learned."""
    suffix = NO_NOOPS_SUFFIX if recipe.demos.choice.filter_noops else ""
    return measure_statistics(
        [demo.own_actions for demo in train], key=recipe.environment.suite + suffix
    )


def _check_policy(recipe: SFTRecipe, folder: Path, statistics: ActionStatistics) -> tuple[str, ...]:
    """Find faults of the policy before anything is rendered, and return the cameras of its views.

    The statistics may still change: a replay drops demonstrations.
    """
    with TemporaryDirectory(dir=folder) as draft:
        policy_folder = _first_policy(recipe, Path(draft) / "policy", statistics)
        require_valid(policy_folder)
        check_adapters(policy_folder, recipe.policy.lora_rank, has_kl=False)
        return CAMERAS[: load_processor(policy_folder).shape.num_views]


def _rerendering(
    recipe: SFTRecipe, source: Path, folder: Path, cameras: tuple[str, ...]
) -> Rerendering:
    env = recipe.environment
    render_size = PUBLISHED_RENDER_SIZE if env.render_size is None else env.render_size
    return Rerendering(
        source=source,
        target=folder / f"demos_{render_size}px",
        env=EnvConfig(suite=env.suite, render_size=render_size, cameras=cameras, max_simulators=1),
        replays=recipe.demos.replay,
        filter_noops=recipe.demos.choice.filter_noops,
    )


def _first_policy(recipe: SFTRecipe, folder: Path, statistics: ActionStatistics) -> Path:
    """Make the folder of the policy that the run starts from, or check the one that is there."""
    if folder.exists():
        before = load_statistics(folder, statistics.key)
        # the statistics define what an action token means, so other ones make other labels
        same = all(
            np.array_equal(getattr(before, name), getattr(statistics, name))
            for name in ("q01", "q99", "mask")
        )
        if not same:
            raise ConfigError(
                f"{folder} was made for other demonstrations than {recipe.demos.folder} holds now; "
                "restore them to resume, or choose another out=FOLDER"
            )
        return folder
    partial = folder.with_suffix(".partial")
    if partial.exists():
        shutil.rmtree(partial)
    if recipe.policy.path is None:
        # the words of every suite, so that any of them can be played with these weights
        words = [task.instruction for name in SUITES for task in libero_suite(name).tasks]
        architecture = find_architecture(recipe.policy.architecture)
        architecture.build_tiny(words, statistics, seed=recipe.seed).save_pretrained(partial)
    else:
        partial.mkdir()
        for path in find_policy(recipe.policy.path).iterdir():
            if path.is_file() and path.name != STATISTICS_FILE:
                (partial / path.name).symlink_to(path)  # gigabytes that nobody changes
        save_statistics(partial, statistics)
    # renamed when complete, so a folder that is there can be trusted
    partial.replace(folder)
    return folder


def _samples(
    demos: tuple[Demo, ...], processor: Processor, augment_seed: int | None
) -> DemoSamples:
    return DemoSamples(
        demos,
        processor.codec,
        image_size=processor.shape.image_size,
        num_views=processor.shape.num_views,
        augment_seed=augment_seed,
    )


def _load_processor(folder: Path, render_size: int) -> Processor:
    processor = load_processor(folder)
    processor.render_size = render_size
    return processor


def _check_samples(run: SFTRun) -> None:
    """Find what would stop a rank, as long as nothing has been started."""
    processor = run.load_processor()
    # before the samples are made, where a demonstration has lost its name
    for demo in run.train + run.held_out:
        if len(demo.actions) < processor.codec.chunk_length:
            raise ConfigError(
                f"{demo.label} has {len(demo.actions)} actions to learn, but the policy acts "
                f"{processor.codec.chunk_length} steps at a time; leave the demonstration out"
            )
    samples = run.samples(processor)
    batch = run.recipe.optimizer.batch_size
    if len(samples) < batch:
        raise ConfigError(
            f"the demonstrations make {len(samples)} samples, fewer than optimizer.batch_size, "
            f"{batch}; set a smaller batch or learn more episodes"
        )
    num_views = processor.shape.num_views
    for demo in run.train + run.held_out:
        # for its error: a word that the tokenizer does not know
        processor.prompt(demo.instruction)
        if len(demo.cameras) < num_views:
            raise ConfigError(
                f"the policy takes {num_views} images, but {demo.name} of {demo.file} has images "
                f"of {' and '.join(demo.cameras)} alone; set demos.images=rerendered"
            )
    logger.info(
        "%d episodes, %d samples to learn; %d episodes held out",
        len(run.train),
        len(samples),
        len(run.held_out),
    )
