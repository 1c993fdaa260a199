"""A LIBERO suite, or the embedded mini suite, as an `Env`: one episode at a time.

MuJoCo and LIBERO are imported when the first simulator is built, not when this module is.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from verl_vla.config.choices import CAMERAS
from verl_vla.core.episode import GoalReadings, Observation, Outcome
from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.core.image_preprocessing import prepare_image
from verl_vla.core.text import nearest
from verl_vla.envs.base import ChunkResult, EnvConfig, Snapshot
from verl_vla.envs.libero.assets import asset_folder, find_assets, import_libero
from verl_vla.envs.libero.egl_devices import DEVICE_VARIABLE, RENDERERS_ON_GPU
from verl_vla.envs.libero.gl import check_gl
from verl_vla.envs.libero.image_noise import disturb
from verl_vla.envs.libero.memory import available_bytes
from verl_vla.envs.libero.mujoco_version import require_libero_physics
from verl_vla.envs.libero.task import ACTION_DIM, MAX_SAMPLED
from verl_vla.envs.mini import ASSETS, HIDDEN_BODIES

if TYPE_CHECKING:
    from verl_vla.envs.libero.fixtures import FixturePlacement
    from verl_vla.envs.libero.simulator import Simulator, SimulatorState
    from verl_vla.envs.libero.suite import LiberoSuite

logger = logging.getLogger(__name__)

SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""Action of a settling step (openvla-oft ``experiments/robot/libero/libero_utils.py:28``)."""
LIBERO_SPARE_BYTES, MINI_SPARE_BYTES = 4_000_000_000, 1_000_000_000
"""Free memory that is required before one more simulator is kept: two processes may build LIBERO's
largest, 1.8 GB, at the same moment (docs/benchmarks.md, Simulator memory)."""
RECORDED, DEMONSTRATED, EVALUATED = 0, 1, 2
"""Random streams of object placements: the mini suite's files, demonstrations, evaluations."""


@dataclass(slots=True)
class _Episode:
    task_id: int
    step_limit: int
    goals: GoalReadings
    """[G, 3], read at the start and at the end of each chunk."""
    num_steps: int = 0
    has_ended: bool = False


@dataclass(frozen=True, slots=True)
class _Moment:
    simulator: SimulatorState
    goals: GoalReadings
    has_ended: bool


class LiberoEnv:
    """Environment of every task of one suite; see `verl_vla.envs.base.Env`."""

    def __init__(self, suite: LiberoSuite, config: EnvConfig) -> None:
        """Check config, MuJoCo, GL and assets; simulators are built when their tasks are played."""
        self.suite = suite
        # called for its check, at the start of a process
        self.suite.step_limit(config.step_limit, task_id=0)
        if not config.cameras:
            raise ConfigError(f"cameras is empty; choose from {', '.join(CAMERAS)}")
        for camera in config.cameras:
            if camera not in CAMERAS:
                raise ConfigError(f"camera {camera!r} is unknown; {nearest(camera, CAMERAS)}")
        require_libero_physics()  # also on nodes that only simulate
        import_libero()
        check_gl()
        self.config = config
        self.assets = find_assets() if self.suite.needs_assets else ASSETS
        self._simulators: OrderedDict[int, Simulator] = OrderedDict()
        self._load_init_states = cache(self.suite.load_init_states)
        self._episode: _Episode | None = None
        self._is_short = False

    def reset(self, task_id: int, init_state_id: int) -> Observation:
        """Start an episode, settle, and return the first observation.

        Ids after those of the recorded init states are starts sampled from the task's regions, each
        with a separate seed.

        Raises:
            ConfigError: there is no such task or init state.
        """
        num_recorded, first_sampled = self.suite.num_recorded(task_id), self.suite.num_init_states
        # a task with fewer recorded states leaves a gap before the sampled ones
        if init_state_id not in (
            *range(num_recorded),
            *range(first_sampled, first_sampled + MAX_SAMPLED),
        ):
            raise ConfigError(
                f"init state {init_state_id} is not in {self.suite.name}; its init states are "
                f"0..{num_recorded - 1}, and {MAX_SAMPLED} more can be sampled, "
                f"from {first_sampled} on"
            )
        if init_state_id >= first_sampled:
            self._require_first(init_state_id)
            return self.reset_to(task_id, self.sample_start(task_id, EVALUATED, init_state_id))
        init_state = self._load_init_states(task_id)[init_state_id]
        if self.config.fixtures == "first":
            return self.reset_to(task_id, init_state)
        # published evaluations play init state i after reset i
        fixtures = self.simulator(task_id).fixtures_of_reset(init_state_id)
        return self.reset_to(task_id, init_state, fixtures)

    def reset_to(
        self,
        task_id: int,
        init_state: npt.NDArray[np.float64],
        fixtures: FixturePlacement | None = None,
    ) -> Observation:
        """Start an episode from any state; settle, return the first observation.

        Args:
            task_id: index of the task.
            init_state: time, positions and velocities, [1 + nq + nv].
            fixtures: placement of the fixtures; None for that of the first reset.
        """
        self.settle(task_id, init_state, fixtures)
        return self.observe()

    def settle(
        self,
        task_id: int,
        init_state: npt.NDArray[np.float64],
        fixtures: FixturePlacement | None = None,
    ) -> None:
        """Start an episode as `reset_to` does and settle, without rendering anything."""
        simulator = self.simulator(task_id)
        if len(init_state) != simulator.state_size:
            raise ConfigError(
                f"an init state of task {task_id} of {self.suite.name} has {len(init_state)} "
                f"values, and its simulator {simulator.state_size}: the file belongs to another "
                f"task; choose other tasks than {task_id}"
            )
        simulator.begin(init_state, fixtures)
        for _ in range(self.config.settle_steps):
            simulator.step(np.array(SETTLE_ACTION))
        limit = self.suite.step_limit(self.config.step_limit, task_id)
        self._episode = _Episode(task_id, limit, simulator.goals())

    def sample_start(self, task_id: int, stream: int, index: int) -> npt.NDArray[np.float64]:
        """Sample a start [1 + nq + nv] from the task's regions, seeded with the arguments."""
        # mixed by numpy, so that neighbouring arguments give unrelated seeds
        seed = np.random.SeedSequence([stream, task_id, index]).generate_state(1)[0]
        return self.simulator(task_id).place_objects(int(seed))

    def step_chunk(self, actions: npt.NDArray[np.float32]) -> ChunkResult:
        """Run ``actions`` [K, 7] open loop until they are used up or the episode ends.

        Raises:
            ContractError: no episode is under way, it has ended, or ``actions`` has a wrong shape.
        """
        episode = self._under_way()
        if actions.ndim != 2 or actions.shape[1] != ACTION_DIM or not len(actions):
            raise ContractError(f"actions must be [K, {ACTION_DIM}], got {list(actions.shape)}")
        if not np.isfinite(actions).all():
            raise ContractError("actions hold a value that is not finite")
        outcome = None
        executed = 0
        frames = [self._render_camera(self.config.cameras[0])] if self._begins_video() else []
        while outcome is None and executed < len(actions):
            outcome = self.step(actions[executed].astype(np.float64))
            executed += 1
            if self._is_in_video():
                frames.append(self._render_camera(self.config.cameras[0]))
        # the newest frame may show this very moment, which need not be rendered again
        newest = frames[-1] if self._is_in_video() else None
        before, episode.goals = episode.goals, self.simulator(episode.task_id).goals()
        has_ended = outcome is not None
        return ChunkResult(
            executed=executed,
            outcome=outcome,
            observation=None if has_ended else self._observe(newest),
            goals=np.stack([before, episode.goals]),
            final_image=self._render(newest) if has_ended and self.config.render_final else None,
            video=self._stack_video(frames),
        )

    def step(self, action: npt.NDArray[np.float64]) -> Outcome | None:
        """Run one action [7] without rendering anything; `step_chunk` calls this."""
        episode = self._under_way()
        solved = self.simulator(episode.task_id).step(action)
        episode.num_steps += 1
        episode.has_ended = solved or episode.num_steps >= episode.step_limit
        if not episode.has_ended:
            return None
        return Outcome.SUCCESS if solved else Outcome.TIMEOUT

    def observe(self) -> Observation:
        """Render the cameras and read the arm, as a policy sees them at this moment."""
        return self._observe(None)

    def _observe(self, first_view: npt.NDArray[np.uint8] | None) -> Observation:
        task_id = self._under_way().task_id
        return Observation(
            image=self._render(first_view),
            proprio=self.simulator(task_id).proprio(),
            instruction=self.suite.task(task_id).instruction,
        )

    def snapshot(self) -> Snapshot:
        """Return this moment of the current episode; it may have ended.

        Raises:
            ContractError: no episode has been started.
        """
        episode = self._current()
        simulator = self.simulator(episode.task_id)
        moment = _Moment(simulator.state, episode.goals, episode.has_ended)
        return Snapshot(task_id=episode.task_id, num_steps=episode.num_steps, state=moment)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from ``snapshot``, which may come from another process."""
        moment: _Moment = snapshot.state
        task_id = snapshot.task_id
        limit = self.suite.step_limit(self.config.step_limit, task_id)
        self.simulator(task_id).state = moment.simulator
        self._episode = _Episode(task_id, limit, moment.goals, snapshot.num_steps, moment.has_ended)

    def simulator(self, task_id: int) -> Simulator:
        """Return the simulator of a task, building it where needed."""
        if task_id not in self._simulators:
            # closed first: the new simulator needs the memory that an old one frees
            while self._simulators and self._must_shrink():
                self._simulators.popitem(last=False)[1].close()
            self._simulators[task_id] = self._build_simulator(task_id)
        # the dictionary is in the order of use, the oldest first
        self._simulators.move_to_end(task_id)
        return self._simulators[task_id]

    def close(self) -> None:
        """Free the simulators."""
        while self._simulators:
            self._simulators.popitem()[1].close()
        self._episode = None

    def _render(self, first_view: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.uint8]:
        """Render the cameras' images [V, H, W, 3], also of an episode that has ended.

        ``first_view`` is what `_render_camera` gave for the first camera, if it was rendered.
        """
        first, *others = self.config.cameras
        images = [self._render_camera(first) if first_view is None else first_view]
        images += [self._render_camera(name) for name in others]
        return np.stack([prepare_image(image, size=self.config.image_size) for image in images])

    def _render_camera(self, name: str) -> npt.NDArray[np.uint8]:
        """Render a camera's image [H, W, 3] as LIBERO's environment returns it."""
        task_id = self._current().task_id
        noise = self.suite.task(task_id).change.noise
        simulator = self.simulator(task_id)
        if not simulator.has_renderer:
            self._make_room_on_gpu()
        image = simulator.render(name)
        # before it is resized: LIBERO-Plus disturbs what its environment returns
        return disturb(image, noise) if noise and name == CAMERAS[0] else image

    def _make_room_on_gpu(self) -> None:
        """Close the renderers that a GPU has no memory for, the least recently used first.

        With software rendering they lie in the host's memory, where building them again would cost
        a second of a core.
        """
        if DEVICE_VARIABLE not in os.environ:
            return
        open_ones = [kept for kept in self._simulators.values() if kept.has_renderer]
        for old in open_ones[: max(0, len(open_ones) + 1 - RENDERERS_ON_GPU)]:
            old.close_renderer()

    def _begins_video(self) -> bool:
        return self.config.video_every > 0 and self._current().num_steps == 0

    def _is_in_video(self) -> bool:
        """Return True where the moment after a step is a frame of the video."""
        every, episode = self.config.video_every, self._current()
        return every > 0 and (episode.has_ended or episode.num_steps % every == 0)

    def _stack_video(self, frames: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8] | None:
        if not self.config.video_every:
            return None
        size = self.config.render_size
        return np.stack(frames) if frames else np.zeros((0, size, size, 3), dtype=np.uint8)

    def _build_simulator(self, task_id: int) -> Simulator:
        from verl_vla.envs.libero.problems import register_pro_objects  # noqa: PLC0415 -- LIBERO, its config
        from verl_vla.envs.libero.rendering import RenderOptions  # noqa: PLC0415 -- MuJoCo reads MUJOCO_GL first
        from verl_vla.envs.libero.simulator import Simulator  # noqa: PLC0415 -- LIBERO, its config
        from verl_vla.envs.mini.problem import register_mini_problem  # noqa: PLC0415 -- LIBERO, its config

        task = self.suite.task(task_id)
        if task.refused is not None:
            raise ConfigError(f"{task.name} of {self.suite.name} cannot be built: {task.refused}")
        look = RenderOptions(self.config.render_size, camera_move=task.change.camera)
        if not self.suite.needs_assets:
            register_mini_problem()
            look = replace(
                look, has_shadows=False, is_antialiased=False, hidden_bodies=HIDDEN_BODIES
            )
        # LIBERO-PRO's tasks name objects that LIBERO knows only once they are registered
        if self.suite.package is not None:
            register_pro_objects()
        with asset_folder(self.assets), task.definition_file() as bddl_file:
            return Simulator(bddl_file, look, task.change)

    def _must_shrink(self) -> bool:
        """Return True where a simulator must be closed before another is built."""
        if len(self._simulators) >= self.config.max_simulators:
            return True
        spare = LIBERO_SPARE_BYTES if self.suite.needs_assets else MINI_SPARE_BYTES
        left = available_bytes()
        if left < spare and not self._is_short:
            self._is_short = True
            logger.warning(
                "%.1f GB of memory are left, so fewer simulators are kept than the %d that "
                "tasks ask for; building one again takes seconds. Fewer "
                "environment.num_workers or num_slots need less",
                left / 1e9,
                self.config.max_simulators,
            )
        return left < spare

    def _require_first(self, init_state_id: int) -> None:
        if self.config.fixtures != "first":
            raise ConfigError(
                f"fixtures is {self.config.fixtures!r}, but init state {init_state_id} is sampled "
                "around the fixtures' first placement; set it to 'first'"
            )

    def _current(self) -> _Episode:
        if self._episode is None:
            raise ContractError("no episode has been started; call reset or restore first")
        return self._episode

    def _under_way(self) -> _Episode:
        episode = self._current()
        if episode.has_ended:
            raise ContractError("the episode has ended; call reset or restore first")
        return episode
