"""The rewards that a benchmark measures: read from arguments or a file, checked, constructed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydantic import Field

from verl_vla.config.plain_values import require_plain
from verl_vla.config.schema import parse, section
from verl_vla.core.errors import ConfigError
from verl_vla.core.text import nearest, shorten
from verl_vla.core.yaml_files import parse_yaml, read_yaml
from verl_vla.rewards import (
    Floats,
    RewardResult,
    StatelessReward,
    TrajectoryBatch,
    TrajectoryReward,
    load_reward,
    video_need,
)


class ClockReward(StatelessReward):
    """The number of steps of an episode: rises along every success, without any information."""

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score failures by length; a failure as long as the longest episode scores 0.5."""
        steps = batch.num_steps.astype(np.float64)
        # initial: a batch without episodes has no largest value
        return _result(batch, steps, 0.5 * steps / steps.max(initial=1.0))


class RandomReward(StatelessReward):
    """A random number for each episode and length."""

    def __init__(self, seed: int = 0) -> None:
        """Make the reward; ``seed`` decides the numbers."""
        self._seed = seed

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score by a random number that depends on the episode only, not on the batch."""
        keys = zip(batch.episode_id.tolist(), batch.num_steps.tolist(), strict=True)
        drawn = np.array([np.random.default_rng([self._seed, *key]).random() for key in keys])
        return _result(batch, drawn, drawn)


def _result(batch: TrajectoryBatch, progress: Floats, quality: Floats) -> RewardResult:
    return RewardResult(
        score=np.where(batch.success, 1.0, quality).astype(np.float32),
        progress=progress.astype(np.float32),
        status=tuple("success" if solved else "shaped" for solved in batch.success),
    )


CLOCK, RANDOM, ORACLE = "clock", "random", "oracle"
CONTROLS = (CLOCK, RANDOM, ORACLE)
"""Labels of the controls, which are always measured."""


@section("")
class RewardSpec:
    """A reward as a recipe would name it."""

    reward: str
    """A file of ``rewards/``, an entry point, or ``path/to/file.py:ClassName``."""
    reward_args: dict[str, Any] = Field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One reward of the table."""

    label: str
    reward: TrajectoryReward
    is_control: bool


def read_rewards(words: str, arguments: Sequence[str]) -> dict[str, RewardSpec]:
    """Read the rewards to measure, by label.

    Args:
        words: ``name,label=name,...``, where a name without a label is its own label; or a YAML
            file of ``label: {reward: name, reward_args: {...}}``.
        arguments: ``label.key=value``, deeper keys joined by dots, values as in YAML. They are
            added to those of the file.

    Raises:
        ConfigError: a file that is no such mapping, a label that is given twice or belongs to a
            control, or an argument of a reward that is not listed.
    """
    specs = _read_file(Path(words)) if words.endswith((".yaml", ".yml")) else _read_words(words)
    for label in specs:
        if label in CONTROLS:
            raise ConfigError(
                f"{label!r} is always measured, as a control; leave it out, or label it otherwise "
                f"(mine={label})"
            )
    for word in arguments:
        name, equals, value = word.partition("=")
        label, _, key = name.partition(".")
        if not equals or not key:
            raise ConfigError(f"{word!r} is no argument; write LABEL.KEY=VALUE")
        if label not in specs:
            raise ConfigError(f"there is no reward {label!r}; {nearest(label, list(specs))}")
        where = f"--reward-args {shorten(word)}"
        made = parse_yaml(value, where, "write a value of YAML, e.g. 0.5 or [1, 2]")
        require_plain(made, f"--reward-args {label}.{key}")
        _put(specs[label].reward_args, key, made)
    return specs


def make_entries(specs: Mapping[str, RewardSpec], seed: int) -> list[Entry]:
    """Construct the rewards, followed by the controls.

    Args:
        specs: rewards by label.
        seed: random seed of the rewards.

    Raises:
        ConfigError: a reward cannot be constructed; the message names its label and the reason.
    """
    made = [
        Entry(label=label, reward=_make(label, spec, seed), is_control=False)
        for label, spec in specs.items()
    ]
    controls = {
        CLOCK: ClockReward(),
        RANDOM: RandomReward(seed),
        ORACLE: load_reward(ORACLE, {}),
    }
    return made + [
        Entry(label=label, reward=reward, is_control=True) for label, reward in controls.items()
    ]


def _make(label: str, spec: RewardSpec, seed: int) -> TrajectoryReward:
    try:
        reward = load_reward(spec.reward, spec.reward_args, seed=seed)
        # for its error: frames that are less than a step apart
        video_need(reward)
        return reward
    except ConfigError as error:
        raise ConfigError(
            f"{label}: {error} (here an argument is written --reward-args {label}.KEY=VALUE)"
        ) from error


def _read_words(words: str) -> dict[str, RewardSpec]:
    specs: dict[str, RewardSpec] = {}
    for word in words.split(","):
        label, equals, name = word.partition("=")
        if not label or (equals and not name):
            raise ConfigError(f"--rewards is {words!r}; write NAME,LABEL=NAME,... or a .yaml file")
        if label in specs:
            raise ConfigError(
                f"{label!r} stands twice in --rewards; give each its own label, as in "
                f"a={name or label},b={name or label}"
            )
        specs[label] = RewardSpec(reward=name if equals else label)
    return specs


def _read_file(file: Path) -> dict[str, RewardSpec]:
    if not file.is_file():
        raise ConfigError(f"--rewards is {str(file)!r}, but there is no such file; check the path")
    content: object = read_yaml(file, object, "correct the file")
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{file} must hold a mapping of LABEL: {{reward: NAME}}")
    specs: dict[str, RewardSpec] = {}
    for label, values in cast("dict[object, object]", content).items():
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: {label} is {values!r}; write {{reward: NAME}}")
        specs[str(label)] = parse(RewardSpec, cast("dict[str, Any]", values), str(label))
    return specs


def _put(arguments: dict[str, Any], key: str, value: Any) -> None:
    """Set a nested key."""
    *path, last = key.split(".")
    for part in path:
        inner = arguments.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key} is set, but {part} is {inner!r}, which has no keys")
        arguments = cast("dict[str, Any]", inner)
    arguments[last] = value
