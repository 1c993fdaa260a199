"""What a reward plug-in must look like, and how one is found.

A reward sees whole groups of finished trajectories at once, since progress is measured against
sibling successes. It never sees the policy, the trainer or the simulator. Plug-ins are plain
Python files: `rewards/binary.py` is the smallest.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
import numpy.typing as npt

from verl_vla.config import nearest
from verl_vla.errors import ConfigError, ContractError
from verl_vla.types import Trajectories

REWARDS_FOLDER = Path(__file__).resolve().parent.parent / "rewards"
"""Where rewards with a plain name live."""

Need = Literal["frames", "proprio"]
"""What a reward may ask for beyond the outcome: the decision images, or the joint readings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryBatch:
    """Finished trajectories of whole groups; crashed episodes are already gone.

    Dimensions as in `verl_vla.types`; row b of every field is the same episode.
    """

    episode_id: npt.NDArray[np.int64]
    """[B], unique in the run."""
    group_id: npt.NDArray[np.int64]
    """[B], episodes compared with each other."""
    task_key: tuple[str, ...]
    """B strings ``suite/task_id``; features of different tasks must never be compared."""
    init_state_id: npt.NDArray[np.int64]
    """[B], the recorded start within the task."""
    success: npt.NDArray[np.bool_]
    """[B], from the simulator."""
    num_steps: npt.NDArray[np.int64]
    """[B], simulator steps the policy chose."""
    frames: tuple[npt.NDArray[np.uint8], ...] | None
    """B arrays [decisions, V, H, W, 3], what the policy saw; None unless required."""
    proprio: tuple[npt.NDArray[np.float32], ...] | None
    """B arrays [decisions, P]; None unless required."""
    split: Literal["train", "held_out"] = "train"
    """Held-out trajectories are scored but must never change a reward's state."""

    def __len__(self) -> int:
        return len(self.episode_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """One number per episode, and the parts it was made of."""

    score: npt.NDArray[np.float32]
    """[B] finite; what the advantage is computed from."""
    progress: npt.NDArray[np.float32]
    """[B] raw measure of progress before scaling; NaN where unknown."""
    status: tuple[str, ...]
    """B words saying how each score came about, e.g. ``success`` or ``failure``."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """Logged under ``reward/``."""


class TrajectoryReward(Protocol):
    """Scores trajectories. The constructor takes its arguments from the recipe."""

    requires: frozenset[Need]
    """What `TrajectoryBatch` must hold beyond the outcome."""

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Return one score per episode, in the order of the batch."""
        ...

    def update(self, batch: TrajectoryBatch) -> Mapping[str, float]:
        """Learn from a scored training batch (references, heads); return metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive a restart: plain values and tensors, nested as you like."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...


def load_reward(name: str, arguments: Mapping[str, Any]) -> TrajectoryReward:
    """Make the reward that a recipe names.

    Args:
        name: a file of `rewards/` without its ending (its only public class is taken), or
            ``path/to/file.py:ClassName``.
        arguments: passed to the constructor by keyword; checked against its signature.

    Raises:
        ConfigError: no such file or class, an argument the constructor does not know or misses,
            or a class that does not follow `TrajectoryReward`.
    """
    path, class_name = _find(name)
    module = _import_file(path)
    cls = _pick_class(module, path, class_name)
    _check_arguments(cls, name, arguments)
    reward = cls(**arguments)
    _check_protocol(reward, name)
    return cast("TrajectoryReward", reward)


def score(
    reward: TrajectoryReward,
    trajectories: Trajectories,
    *,
    suite: str,
    split: Literal["train", "held_out"],
) -> tuple[TrajectoryBatch, RewardResult]:
    """Score trajectories without crashes and check what came back.

    Raises:
        ContractError: a score is missing, not finite, or of the wrong length.
    """
    batch = _make_batch(trajectories, suite=suite, split=split, requires=reward.requires)
    result = reward(batch)
    name = type(reward).__name__
    per_episode = (len(batch),)
    shapes = (result.score.shape, result.progress.shape, (len(result.status),))
    if any(shape != per_episode for shape in shapes):
        raise ContractError(
            f"{name} returned scores {list(result.score.shape)}, progress "
            f"{list(result.progress.shape)} and {len(result.status)} status words for "
            f"{len(batch)} episodes; it must return one of each per episode"
        )
    broken = ~np.isfinite(result.score)
    if broken.any():
        first = int(np.flatnonzero(broken)[0])
        raise ContractError(
            f"{name} returned {result.score[first]} for episode {batch.episode_id[first]} "
            f"({int(broken.sum())} of {len(batch)} scores are not finite); "
            "a reward that cannot judge an episode must give it a neutral score and say so in "
            "status"
        )
    return batch, result


def _make_batch(
    trajectories: Trajectories,
    *,
    suite: str,
    split: Literal["train", "held_out"],
    requires: frozenset[Need],
) -> TrajectoryBatch:
    episodes, decisions = trajectories.episodes, trajectories.decisions
    if bool(episodes.crashed.any()):
        raise ContractError("a crashed episode reached the reward; select the others first")
    rows = [np.flatnonzero(decisions.episode.numpy() == b) for b in range(len(episodes))]
    image, proprio = decisions.image.numpy(), decisions.proprio.numpy()
    return TrajectoryBatch(
        episode_id=episodes.episode_id.numpy(),
        group_id=episodes.group_id.numpy(),
        task_key=tuple(f"{suite}/{task}" for task in episodes.task_id.tolist()),
        init_state_id=episodes.init_state_id.numpy(),
        success=episodes.success.numpy(),
        num_steps=episodes.num_steps.numpy(),
        frames=tuple(image[r] for r in rows) if "frames" in requires else None,
        proprio=tuple(proprio[r] for r in rows) if "proprio" in requires else None,
        split=split,
    )


def _find(name: str) -> tuple[Path, str | None]:
    if ".py:" in name:
        file, class_name = name.rsplit(":", 1)
        path = Path(file)
        if not path.is_file():
            raise ConfigError(f"reward is {name!r}, but there is no file {file}; check the path")
        return path, class_name
    known = sorted(p.stem for p in REWARDS_FOLDER.glob("*.py") if not p.stem.startswith("_"))
    if name not in known:
        raise ConfigError(
            f"reward is {name!r}, which is no file of rewards/; {nearest(name, known)}; "
            "a reward of your own is path/to/file.py:ClassName"
        )
    return REWARDS_FOLDER / f"{name}.py", None


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"verl_vla_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported; a reward must be a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def _pick_class(module: ModuleType, path: Path, class_name: str | None) -> type[Any]:
    own = {
        name: cls
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__ and not name.startswith("_")
    }
    if class_name is None:
        if len(own) != 1:
            raise ConfigError(
                f"{path.name} has {len(own)} public classes; name one as {path}:ClassName"
            )
        return next(iter(own.values()))
    if class_name not in own:
        raise ConfigError(f"{path} has no class {class_name!r}; {nearest(class_name, list(own))}")
    return own[class_name]


def _check_arguments(cls: type[Any], name: str, arguments: Mapping[str, Any]) -> None:
    found = inspect.signature(cls).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in found)
    named = {p.name: p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    for key in arguments:
        if key not in named and not takes_any:
            raise ConfigError(
                f"reward {name!r} has no argument {key!r}; {nearest(key, list(named))}"
            )
    for key, parameter in named.items():
        if parameter.default is inspect.Parameter.empty and key not in arguments:
            raise ConfigError(f"reward {name!r} needs {key!r}; set reward_args.{key}")


def _check_protocol(reward: object, name: str) -> None:
    wanted: Sequence[str] = ("requires", "__call__", "update", "state_dict", "load_state_dict")
    present = set(dir(reward))
    missing = [member for member in wanted if member not in present]
    if missing:
        raise ConfigError(
            f"reward {name!r} lacks {', '.join(missing)}; "
            "see TrajectoryReward in verl_vla/reward.py"
        )
    needs = cast("TrajectoryReward", reward).requires
    unknown = sorted(set(needs) - set(get_args(Need)))
    if unknown:
        raise ConfigError(
            f"reward {name!r} requires {unknown[0]!r}; {nearest(unknown[0], get_args(Need))}"
        )
