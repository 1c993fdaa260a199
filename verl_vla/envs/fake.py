"""A two-dimensional stand-in for LIBERO: no MuJoCo, no GPU, the same contract.

A white dot starts at a position that the init state decides and must reach a square whose position
and colour the task decides. The image shows everything needed, so a policy can learn the tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verl_vla.core.episode import GoalReadings, Observation, Outcome
from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.envs.base import ChunkResult, Snapshot

ACTION_DIM, PROPRIO_DIM = 7, 8
"""Default sizes, those of LIBERO."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The goal of a task: the position and colour of a square."""

    name: str
    place: tuple[float, float]
    """Position (right, up) in a field that reaches from -1 to 1."""
    rgb: tuple[int, int, int]


TARGET_DISTANCE = 0.6
"""Distance of every target from the middle, along each axis."""

TARGETS = (
    Target(name="red", place=(TARGET_DISTANCE, TARGET_DISTANCE), rgb=(220, 40, 40)),
    Target(name="green", place=(-TARGET_DISTANCE, TARGET_DISTANCE), rgb=(40, 200, 60)),
    Target(name="blue", place=(-TARGET_DISTANCE, -TARGET_DISTANCE), rgb=(50, 80, 230)),
    Target(name="yellow", place=(TARGET_DISTANCE, -TARGET_DISTANCE), rgb=(230, 210, 40)),
)
"""Targets, one per task."""

GROUND_RGB = (40, 40, 48)
DOT_RGB = (255, 255, 255)

START_REACH = 0.25
"""Largest distance of a dot's start from the middle, along each axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeEnvConfig:
    """Sizes and difficulty of the stand-in.

    With the defaults, actions sampled evenly from -1..1 in chunks of 8 solve one episode in six,
    and heading straight for the target takes at most 4 steps.
    """

    image_size: int = 32
    """Height and width of an image, pixels."""
    num_views: int = 1
    """Number of images per observation; each is the one before it, turned by 90 degrees."""
    step_limit: int = 24
    """Number of steps after which an episode has failed."""
    stride: float = 0.15
    """Distance that an action of 1 moves the dot."""
    tolerance: float = 0.3
    """Largest distance from the target, along each axis, that counts as solved."""
    num_init_states: int = 100
    """Number of recorded starts per task."""
    action_dim: int = ACTION_DIM
    """Number of values of an action; the first two move the dot right and up, the others are not
    used."""
    proprio_dim: int = PROPRIO_DIM
    """Number of proprio values; the first two are the dot's position, the others are zero."""
    render_final: bool = False
    """Render an image after the last step too."""
    video_every: int = 0
    """Steps between two frames of a video; see `verl_vla.envs.base.EnvConfig`."""

    def __post_init__(self) -> None:
        for name in ("num_views", "step_limit", "stride", "tolerance", "num_init_states"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; set a positive number")
        for name in ("action_dim", "proprio_dim"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name} is {getattr(self, name)}; the dot needs at least 2")
        if self.image_size < 8:
            raise ConfigError(f"image_size is {self.image_size}; the dot needs at least 8 pixels")
        if self.tolerance >= TARGET_DISTANCE - START_REACH:
            raise ConfigError(
                f"tolerance is {self.tolerance}, so some starts would be solved already; set less "
                f"than {TARGET_DISTANCE - START_REACH}"
            )


class FakeEnv:
    """Environment of a field with a dot and a target; see `verl_vla.envs.base.Env`."""

    def __init__(self, config: FakeEnvConfig) -> None:
        self._config = config
        self._task_id = 0
        self._num_steps = 0
        self._place = np.zeros(2)
        self._is_over = True

    def reset(self, task_id: int, init_state_id: int) -> Observation:
        """Put the dot at the position of the init state."""
        if not 0 <= task_id < len(TARGETS):
            raise ConfigError(f"task_id is {task_id}; the fake suite has 0..{len(TARGETS) - 1}")
        if not 0 <= init_state_id < self._config.num_init_states:
            last = self._config.num_init_states - 1
            raise ConfigError(f"init_state_id is {init_state_id}; the fake suite has 0..{last}")
        # seeded by its ids, so that a start is the same in every process
        rng = np.random.default_rng([task_id, init_state_id])
        self._place = rng.uniform(-START_REACH, START_REACH, size=2)
        self._task_id, self._num_steps, self._is_over = task_id, 0, False
        return self._observe()

    def step_chunk(self, actions: npt.NDArray[np.float32]) -> ChunkResult:
        """Move the dot by each action, until it has reached the target or the step limit."""
        if self._is_over:
            raise ContractError("the episode has ended; reset or restore first")
        width = self._config.action_dim
        if actions.ndim != 2 or actions.shape[1] != width or not len(actions):
            raise ContractError(
                f"actions must be [K, {width}] with K >= 1, got {list(actions.shape)}"
            )
        before = self._goals()
        executed, outcome = 0, None
        every, frames = self._config.video_every, list[npt.NDArray[np.uint8]]()
        if every and self._num_steps == 0:
            frames.append(self._render()[0])
        while outcome is None and executed < len(actions):
            outcome = self._step(actions[executed])
            executed += 1
            if every and (outcome is not None or self._num_steps % every == 0):
                frames.append(self._render()[0])
        self._is_over = outcome is not None
        return ChunkResult(
            executed=executed,
            outcome=outcome,
            observation=None if self._is_over else self._observe(),
            goals=np.stack([before, self._goals()]),
            final_image=self._render() if self._is_over and self._config.render_final else None,
            video=np.stack(frames) if frames else (self._render()[:0] if every else None),
        )

    def snapshot(self) -> Snapshot:
        """Return the dot's position and the number of steps."""
        if self._is_over:
            raise ContractError("the episode has ended; there is nothing to continue")
        return Snapshot(task_id=self._task_id, num_steps=self._num_steps, state=self._place.copy())

    def restore(self, snapshot: Snapshot) -> None:
        """Put the dot back to the position in ``snapshot``."""
        self._task_id, self._num_steps = snapshot.task_id, snapshot.num_steps
        self._place, self._is_over = snapshot.state.copy(), False

    def close(self) -> None:
        """Do nothing, since there is nothing to free."""

    def _step(self, action: npt.NDArray[np.float32]) -> Outcome | None:
        move = self._config.stride * np.clip(action[:2].astype(np.float64), -1, 1)
        self._place = np.clip(self._place + move, -1, 1)
        self._num_steps += 1
        if self._distance() <= self._config.tolerance:
            return Outcome.SUCCESS
        return Outcome.TIMEOUT if self._num_steps >= self._config.step_limit else None

    def _distance(self) -> float:
        return float(np.abs(self._place - TARGETS[self._task_id].place).max())

    def _goals(self) -> GoalReadings:
        """Return the readings [1, 3]; the dot is both gripper and object, so its reach is 0."""
        distance = self._distance()
        holds = float(distance <= self._config.tolerance)
        return np.array([[0.0, distance, holds]], dtype=np.float32)

    def _observe(self) -> Observation:
        proprio = np.zeros(self._config.proprio_dim, dtype=np.float32)
        proprio[:2] = self._place
        return Observation(
            image=self._render(),
            proprio=proprio,
            instruction=f"move the dot to the {TARGETS[self._task_id].name} square",
        )

    def _render(self) -> npt.NDArray[np.uint8]:
        size = self._config.image_size
        image = np.empty((size, size, 3), dtype=np.uint8)
        image[...] = GROUND_RGB
        target = TARGETS[self._task_id]
        _fill_square(image, np.array(target.place), self._config.tolerance, target.rgb)
        # a pixel is 2 / size of the field, so the dot is two pixels wide
        _fill_square(image, self._place, 2 / size, DOT_RGB)
        return np.stack([np.rot90(image, turns) for turns in range(self._config.num_views)])


def _fill_square(
    image: npt.NDArray[np.uint8],
    place: npt.NDArray[np.float64],
    reach: float,
    rgb: tuple[int, int, int],
) -> None:
    """Paint ``place`` +- ``reach`` of the field [-1, 1] x [-1, 1]; up is up in the image."""
    size = len(image)
    # rows of an image count downwards
    corners = np.array([place - reach, place + reach]) * (1, -1)
    low, high = np.sort((corners + 1) / 2 * size, axis=0).round().astype(int).clip(0, size)
    image[low[1] : high[1], low[0] : high[0]] = rgb
