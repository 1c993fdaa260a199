"""The arm's controller: robosuite's OSC_POSE and Panda gripper, without their bookkeeping.

The arithmetic is robosuite 1.4.0's (`controllers/osc.py`, `controllers/base_controller.py`,
`models/grippers/panda_gripper.py`), operation by operation and through the same compiled functions,
so the torques agree to the bit. Left out is work without effect: look-ups by name, second forward
passes over an unchanged state, histories that are never read, new arrays where old ones can be
reused, and Python between two physics steps (`verl_vla.envs.libero.controller_kernels`).

Importing this module imports robosuite: call `verl_vla.envs.libero.assets.import_libero` first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from robosuite.utils.control_utils import set_goal_orientation

from verl_vla.core.errors import ContractError
from verl_vla.envs.libero.controller_kernels import (
    Arm,
    ControllerTarget,
    Floats,
    Kinematics,
    Physics,
    apply_torques,
    command,
    read,
    warm_up,
)


@dataclass(frozen=True, slots=True)
class ArmState:
    """State of the controller that lasts from one step to the next."""

    goal_pos: Floats
    """[3] m, target position of the gripper."""
    goal_ori: Floats
    """[3, 3] rotation matrix, target orientation; unchanged while actions do not rotate."""
    gripper: Floats
    """[2] -1..1, target opening of the two fingers."""
    has_moved: bool
    """False until the first step after a reset; see `ArmControl.begin`."""


class ArmControl:
    """Controller that turns actions [7] into actuator commands, 500 times a second."""

    def __init__(self, robot: Any) -> None:
        """Take the parameters of a robosuite robot whose environment has just been reset."""
        controller, sim = robot.controller, robot.sim
        self._model: mujoco.MjModel = sim.model._model
        self._data: mujoco.MjData = sim.data._data
        # an action of 1: 0.05 m, 0.5 rad (osc_pose.json)
        self._scale: Floats = np.abs(controller.output_max - controller.output_min) / np.abs(
            controller.input_max - controller.input_min
        )
        # the two fingers move against each other
        self._finger_speed = np.array([-1.0, 1.0]) * robot.gripper.speed
        self._finger_drive = np.zeros(2)
        joints = _neighbours(controller.qvel_index)
        self._arm = self._take_over(robot, joints)
        self._at_reset = Kinematics(
            # robosuite makes new arrays at each update, so nothing writes to these after the reset
            controller.ee_pos,
            controller.ee_ori_mat,
            controller.ee_pos_vel,
            controller.ee_ori_vel,
            controller.joint_pos,
            controller.joint_vel,
            controller.J_pos,
            controller.J_ori,
            controller.J_full,
            controller.mass_matrix,
        )
        self._goal_at_reset = (controller.goal_pos, controller.goal_ori)
        site = int(sim.model.site_name2id(controller.eef_name))
        num_speeds = self._model.nv
        self._physics = Physics(
            # addresses for C: `_model` and `_data` keep alive what they point to
            model=self._model._address,
            data=self._data._address,
            site=site,
            first_joint=joints.start,
            end_joint=joints.stop,
            jac_pos=np.zeros((3, num_speeds)),
            jac_ori=np.zeros((3, num_speeds)),
            full_mass=np.zeros((num_speeds, num_speeds)),
            inertia=self._data.qM,
            qvel=self._data.qvel,
        )
        self._now = self._watch(site, _neighbours(controller.qpos_index), joints)
        self.begin()

    def begin(self) -> None:
        """Set the controller's state to the one that robosuite leaves after a reset.

        robosuite reads the arm's pose at the reset and not again when an init state is set, so the
        first torque of an episode is computed from the pose of the reset. This is reproduced, since
        published numbers were made with it; after the settling steps it has no visible effect.
        """
        self._goal_pos, self._goal_ori = self._goal_at_reset
        self._gripper = np.zeros(2)
        self._has_moved = False

    @property
    def state(self) -> ArmState:
        """State from which the controller can be resumed."""
        return ArmState(
            np.array(self._goal_pos),
            np.array(self._goal_ori),
            np.array(self._gripper),
            self._has_moved,
        )

    @state.setter
    def state(self, state: ArmState) -> None:
        self._goal_pos, self._goal_ori = state.goal_pos, state.goal_ori
        # a copy: `command` writes to it, and a snapshot may be restored again
        self._gripper, self._has_moved = np.array(state.gripper), state.has_moved

    def start(self, action: Floats) -> None:
        """Set the target of ``action`` [7] and follow it for one physics step."""
        # the controls go between the halves: the first computes the pose, the second moves on
        mujoco.mj_step1(self._model, self._data)
        warm_up(self._physics)
        # before the first step nothing has been read, see `begin`
        if self._has_moved:
            read(self._physics, self._now)
        now = self._now if self._has_moved else self._at_reset
        self._set_goal(action[:6], now)
        # by its sign alone, as in robosuite's PandaGripper.format_action
        self._finger_drive = self._finger_speed * np.sign(action[6])
        self._has_moved = True
        command(now, self._arm, self._target)
        mujoco.mj_step2(self._model, self._data)

    def run_substeps(self, substeps: int) -> None:
        """Follow the same action for ``substeps`` more physics steps."""
        apply_torques(substeps, self._physics, self._now, self._arm, self._target)

    @property
    def _target(self) -> ControllerTarget:
        return ControllerTarget(self._goal_pos, self._goal_ori, self._gripper, self._finger_drive)

    def _set_goal(self, action: Floats, now: Kinematics) -> None:
        # both ranges are symmetric (osc_pose.json), so robosuite's offsets are 0
        delta = np.clip(action, -1.0, 1.0) * self._scale
        # no rotation asked for: the last target stays, which the arm may not have reached yet
        if not all(math.isclose(value, 0.0) for value in delta[3:]):
            self._goal_ori = set_goal_orientation(delta[3:], now.ee_ori)
        self._goal_pos = now.ee_pos + delta[:3]

    def _take_over(self, robot: Any, joints: slice) -> Arm:
        controller, names = robot.controller, robot.gripper.actuators
        fingers = _neighbours([robot.sim.model.actuator_name2id(name) for name in names])
        closed, opened = self._model.actuator_ctrlrange[fingers].T
        return Arm(
            kp_pos=controller.kp[:3],
            kp_ori=controller.kp[3:],
            kd_pos=controller.kd[:3],
            kd_ori=controller.kd[3:],
            initial_joint=controller.initial_joint,
            least_torque=robot.torque_limits[0],
            largest_torque=robot.torque_limits[1],
            # robosuite's `grip_action`: -1..1 becomes the range of each actuator
            finger_bias=0.5 * (opened + closed),
            finger_weight=0.5 * (opened - closed),
            # views: MuJoCo fills bias and reads controls in place
            bias=self._data.qfrc_bias[joints],
            joint_ctrl=self._data.ctrl[_neighbours(robot._ref_joint_actuator_indexes)],
            finger_ctrl=self._data.ctrl[fingers],
        )

    def _watch(self, site: int, positions: slice, joints: slice) -> Kinematics:
        num_joints = joints.stop - joints.start
        return Kinematics(
            self._data.site_xpos[site],
            self._data.site_xmat[site].reshape(3, 3),
            np.zeros(3),
            np.zeros(3),
            self._data.qpos[positions],
            self._data.qvel[joints],
            np.zeros((3, num_joints), order="F"),
            np.zeros((3, num_joints), order="F"),
            np.zeros((6, num_joints), order="F"),
            np.zeros((num_joints, num_joints), order="F"),
        )


def _neighbours(indices: Sequence[int]) -> slice:
    """Return consecutive indices as a slice, since numpy makes a view of a slice, not a copy."""
    first, last = int(indices[0]), int(indices[-1])
    if list(indices) != list(range(first, last + 1)):
        raise ContractError(f"joints or actuators {list(indices)} of the arm are not neighbours")
    return slice(first, last + 1)
