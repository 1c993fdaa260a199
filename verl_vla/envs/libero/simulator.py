"""One MuJoCo simulator of one task, which can be put into any state.

Importing this module imports MuJoCo, robosuite and LIBERO: call
`verl_vla.envs.libero.assets.import_libero` first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
from robosuite.controllers import load_controller_config
from robosuite.utils.transform_utils import convert_quat, quat2axisangle

from verl_vla.core.episode import GoalReadings
from verl_vla.envs.libero.controller import ArmControl, ArmState
from verl_vla.envs.libero.controller_kernels import Floats
from verl_vla.envs.libero.fixtures import FixturePlacement, FixtureSampler
from verl_vla.envs.libero.goals import GoalMeter
from verl_vla.envs.libero.problems import CONTROLLER, build_problem, seeded, trim_heap
from verl_vla.envs.libero.rendering import Renderer, RenderOptions
from verl_vla.envs.libero.scene_change import UNCHANGED, SceneChange

PHYSICS_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
"""State that MuJoCo's next step depends on, including the solver's warm start."""
UNSEEN_SUBSTEPS = 2
"""Number of last physics steps of a control step that an observation misses; see `ObservedState`.
"""


@dataclass(frozen=True, slots=True)
class ObservedState:
    """The state that an observation shows, which is slightly before the end of a step.

    robosuite samples its observables once in a step's 25 physics steps. After LIBERO's protocol, a
    reset and an init state, that is in the 24th, with every body where the 23rd left it. An
    observation made from this state equals a stock environment's, to the bit.
    """

    qpos: Floats
    """[nq] joint positions after 23 physics steps, from which every body's pose follows."""
    fingers_m: Floats
    """[2] the gripper's joints after 24 physics steps."""
    arm_rad: Floats
    """[7] the arm's joints after 24 physics steps."""
    site_alpha: Floats
    """[nsite] opacity of the sites, e.g. the flame of a burner."""


@dataclass(frozen=True, slots=True)
class ObservedRobot:
    """The robot's state as an observation shows it."""

    hand_m: Floats
    """[3] position of the point between the fingertips."""
    hand_quaternion: Floats
    """[4] orientation (x, y, z, w)"""
    hand_rad: Floats
    """[3] orientation as axis times angle."""
    fingers_m: Floats
    """[2] the gripper's joints."""
    arm_rad: Floats
    """[7] the arm's joints."""


@dataclass(frozen=True, slots=True)
class SimulatorState:
    """The complete state of a simulator at one moment, valid in any process."""

    physics: Floats
    """`PHYSICS_STATE` in MuJoCo's layout."""
    arm: ArmState
    seen: ObservedState
    fixtures: FixturePlacement


class Simulator:
    """One task's physics, success test and cameras; independent of episodes."""

    def __init__(
        self, bddl_file: Path, look: RenderOptions, change: SceneChange = UNCHANGED
    ) -> None:
        """Build the task as ``env.seed(0); env.reset()`` leaves it in published evaluations."""
        with seeded(0):
            self._env = build_problem(bddl_file, change)
            self._fixtures = FixtureSampler(self._env, np.random.get_state(legacy=False))
        self._model: mujoco.MjModel = self._env.sim.model._model
        self._data: mujoco.MjData = self._env.sim.data._data
        # the gripper's force and torque sensors are never read, and no state depends on them
        self._model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
        # an image shows an earlier moment, see `ObservedState`, and leaves the present one alone
        self._shown = mujoco.MjData(self._model)
        self._robot: Any = self._env.robots[0]
        self._finger_index: list[int] = self._robot._ref_gripper_joint_pos_indexes
        self._arm_index: list[int] = self._robot._ref_joint_pos_indexes
        self._arm = ArmControl(self._robot)
        self._goal_meter = GoalMeter(self._env)
        # 25: a control step of 1/20 s in physics steps of 1/500 s, counted as robosuite does
        self._substeps = int(self._env.control_timestep / self._env.model_timestep)
        self._start = self._physics()
        self._seen = self._see()
        self._look = look
        self._renderer: Renderer | None = None
        trim_heap()

    def begin(self, init_state: Floats, fixtures: FixturePlacement | None = None) -> None:
        """Start over from a recorded init state.

        Args:
            init_state: time, positions and velocities, [1 + nq + nv].
            fixtures: placement of the fixtures; None for that of the first reset.
        """
        self._fixtures.placement = self._fixtures.first if fixtures is None else fixtures
        # the solver's warm start too: a start does not depend on the episode before it
        mujoco.mj_setState(self._model, self._data, self._start, PHYSICS_STATE)
        self._env.sim.set_state_from_flattened(init_state)
        self._arm.begin()
        # forward pass and post-processing as in LIBERO's `regenerate_obs_from_state`
        mujoco.mj_forward(self._model, self._data)
        self._env._post_process()
        self._seen = self._see()

    def step(self, action: Floats) -> bool:
        """Run one control step (1/20 s); return True where LIBERO considers the task solved."""
        self._env._post_process()  # switches lights that follow a joint
        self._arm.start(action)
        # start() has made one of them
        self._arm.run_substeps(self._substeps - UNSEEN_SUBSTEPS - 1)
        # step 23 of 25: every body is shown where it is now
        before = self._see()
        self._arm.run_substeps(1)
        # step 24: robosuite samples the joints one step later than the bodies
        self._seen = replace(before, fingers_m=self._fingers(), arm_rad=self._arm_joints())
        self._arm.run_substeps(UNSEEN_SUBSTEPS - 1)
        return bool(self._env._check_success())

    @property
    def state(self) -> SimulatorState:
        """The complete state at this moment."""
        return SimulatorState(
            self._physics(), self._arm.state, self._seen, self._fixtures.placement
        )

    @state.setter
    def state(self, state: SimulatorState) -> None:
        self._fixtures.placement = state.fixtures
        mujoco.mj_setState(self._model, self._data, state.physics, PHYSICS_STATE)
        mujoco.mj_forward(self._model, self._data)
        # a forward pass moves the warm start, on which the last bits of the next step depend
        mujoco.mj_setState(self._model, self._data, state.physics, PHYSICS_STATE)
        self._arm.state = state.arm
        self._seen = state.seen

    def render(self, camera: str) -> npt.NDArray[np.uint8]:
        """Render the `ObservedState` through a camera; see `Renderer.render`."""
        if self._renderer is None:
            self._renderer = Renderer(self._model, self._look)
        self._show()
        return self._renderer.render(self._shown, camera)

    def proprio(self) -> npt.NDArray[np.float32]:
        """Return [8]: position (m), orientation (axis-angle, rad), two fingers (m), as observed."""
        seen = self.seen_robot()
        return np.concatenate([seen.hand_m, seen.hand_rad, seen.fingers_m]).astype(np.float32)

    def seen_robot(self) -> ObservedRobot:
        """Return the robot of the `ObservedState`."""
        self._show()
        position = np.array(self._shown.site_xpos[self._robot.eef_site_id])
        body = self._model.body(self._robot.robot_model.eef_name).id
        quaternion = convert_quat(np.array(self._shown.xquat[body]), to="xyzw")
        turn = quat2axisangle(quaternion)
        return ObservedRobot(position, quaternion, turn, self._seen.fingers_m, self._seen.arm_rad)

    def goals(self) -> GoalReadings:
        """Measure how far each goal of the task is, [G, 3]; see `Reading`."""
        return self._goal_meter.read(self.gripper_position())

    def place_objects(self, seed: int) -> Floats:
        """Sample a start [1 + nq + nv] from the task's regions; the current episode is lost.

        Cabinets and stoves are part of the model, not of the state, and stand where the first reset
        puts them. An object sampled on one of them is off its middle by the offset that was sampled
        for the fixture, up to 0.01 m.
        """
        # before too: a sample must not depend on the episode before it
        self._fixtures.placement = self._fixtures.first
        with seeded(seed):
            self._env.reset()
        # a reset also moves the fixtures, and those are no part of a state
        self._fixtures.placement = self._fixtures.first
        return self.flat_state()

    def fixtures_of_reset(self, index: int) -> FixturePlacement:
        """Return where a stock environment's reset puts the fixtures, counted from 0.

        The current episode is lost.
        """
        return self._fixtures.of_reset(index)

    def fixtures_in(self, model_xml: str, label: str) -> FixturePlacement:
        """Return where the fixtures stand in a model's XML; see `FixtureSampler.read`."""
        return self._fixtures.read(model_xml, label)

    @property
    def has_fixtures(self) -> bool:
        """True for a task with cabinets, stoves or racks."""
        return bool(len(self._fixtures.first.position_m))

    @property
    def state_size(self) -> int:
        """Number of values of an init state: 1 + nq + nv."""
        return 1 + self._model.nq + self._model.nv

    def flat_state(self) -> Floats:
        """Return time, positions and velocities [1 + nq + nv], as in LIBERO's init-state files."""
        return self._env.sim.get_state().flatten()

    def model_xml(self) -> str:
        """Return the model's XML, as in robosuite's files."""
        return self._env.sim.model.get_xml()

    @property
    def controller(self) -> dict[str, Any]:
        """Settings of robosuite's arm controller."""
        return load_controller_config(default_controller=CONTROLLER)

    @property
    def problem(self) -> dict[str, str]:
        """The entries of LIBERO's ``get_problem_info``, and the environment's class name."""
        parsed = self._env.parsed_problem
        return {
            "env_name": type(self._env).__name__,
            "problem_name": parsed["problem_name"],
            "domain_name": "robosuite",
            "language_instruction": " ".join(parsed["language_instruction"]),
        }

    @property
    def model(self) -> mujoco.MjModel:
        """MuJoCo's model. This and all below is for scripted experts, not for policies."""
        return self._model

    @property
    def data(self) -> mujoco.MjData:
        """MuJoCo's data at this moment; read-only."""
        return self._data

    @property
    def goal(self) -> list[list[str]]:
        """Goal of the task: predicates with their objects or places, all of which must hold."""
        return self._env.parsed_problem["goal_state"]

    @property
    def gripper_site(self) -> int:
        """Number of the site between the fingertips."""
        return self._robot.eef_site_id

    def gripper_position(self) -> Floats:
        """Return the point between the fingertips, [3] m."""
        return np.array(self._data.site_xpos[self._robot.eef_site_id])

    def gripper_rotation(self) -> Floats:
        """Return a rotation matrix [3, 3]: the fingers move along x, the hand points along z."""
        return np.array(self._data.site_xmat[self._robot.eef_site_id]).reshape(3, 3)

    def body(self, name: str) -> int:
        """Return the number of the body of an object or fixture of the task."""
        return self._env.obj_body_id[name]

    def has_site(self, name: str) -> bool:
        """Return True if a place of the task is a site."""
        return name in self._env.object_sites_dict

    def object_position(self, name: str) -> Floats:
        """Return the position of an object of the task, [3] m."""
        return np.array(self._data.xpos[self.body(name)])

    @property
    def has_renderer(self) -> bool:
        """True from the first image on, until `close_renderer`."""
        return self._renderer is not None

    def close_renderer(self) -> None:
        """Free the GL context with its textures; the next image makes another."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def close(self) -> None:
        """Free the renderer and the model."""
        self.close_renderer()
        self._env.close()

    def _see(self) -> ObservedState:
        # copies: the images are rendered later, when the data have moved on
        alpha = np.array(self._model.site_rgba[:, 3])
        return ObservedState(np.array(self._data.qpos), self._fingers(), self._arm_joints(), alpha)

    def _show(self) -> None:
        # LIBERO lights a burner by the opacity of a site, which is in the model, not in the state
        self._model.site_rgba[:, 3] = self._seen.site_alpha
        self._shown.qpos[:] = self._seen.qpos
        mujoco.mj_kinematics(self._model, self._shown)
        mujoco.mj_comPos(self._model, self._shown)  # cameras and lights that follow a body
        mujoco.mj_camlight(self._model, self._shown)

    def _fingers(self) -> Floats:
        # a list as index makes a copy, so it does not move on with the data
        return self._data.qpos[self._finger_index]

    def _arm_joints(self) -> Floats:
        return self._data.qpos[self._arm_index]

    def _physics(self) -> Floats:
        state = np.empty(mujoco.mj_stateSize(self._model, PHYSICS_STATE))
        mujoco.mj_getState(self._model, self._data, state, PHYSICS_STATE)
        return state
