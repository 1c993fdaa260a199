"""The arm's controller: robosuite's OSC_POSE and Panda gripper, without their bookkeeping.

The arithmetic is robosuite 1.4.0's (`controllers/osc.py`, `controllers/base_controller.py`,
`models/grippers/panda_gripper.py`), operation by operation and through the same compiled functions,
so the torques agree to the bit. What is left out decides nothing: look-ups by name, second forward
passes over an unchanged state, histories that nobody reads, new arrays where old ones will do.
Matrices keep robosuite's memory order (Fortran's), which chooses the compiled function.

Importing this module imports robosuite: call `verl_vla.envs.assets.import_libero` first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
from robosuite.utils.control_utils import (
    nullspace_torques,
    opspace_matrices,
    orientation_error,
    set_goal_orientation,
)

from verl_vla.errors import ContractError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ArmState:
    """What the controller remembers between two steps."""

    goal_pos: Floats
    """[3] m, where the gripper is drawn to."""
    goal_ori: Floats
    """[3, 3] rotation matrix; kept while actions do not rotate."""
    gripper: Floats
    """[2] -1..1, the opening that the two fingers are driven to."""
    has_moved: bool
    """False until the first step after a reset; see `ArmControl.begin`."""


@dataclass(frozen=True, slots=True)
class _Kinematics:
    """The arm at one moment: views of MuJoCo's memory, or buffers that `_read` fills."""

    ee_pos: Floats
    ee_ori: Floats
    ee_pos_vel: Floats
    ee_ori_vel: Floats
    joint_pos: Floats
    joint_vel: Floats
    jac_pos: Floats
    jac_ori: Floats
    jac_full: Floats
    mass_matrix: Floats


class ArmControl:
    """Turns actions [7] into actuator commands, 500 times a second."""

    def __init__(self, robot: Any) -> None:
        """Take over from a robosuite robot whose environment has just been reset."""
        controller, sim = robot.controller, robot.sim
        self._model: mujoco.MjModel = sim.model._model
        self._data: mujoco.MjData = sim.data._data
        self._site = int(sim.model.site_name2id(controller.eef_name))
        self._joints = _neighbours(controller.qvel_index)
        self._kp_pos, self._kp_ori = controller.kp[:3], controller.kp[3:]
        self._kd_pos, self._kd_ori = controller.kd[:3], controller.kd[3:]
        self._scale: Floats = np.abs(controller.output_max - controller.output_min) / np.abs(
            controller.input_max - controller.input_min
        )
        self._initial_joint = controller.initial_joint
        self._least_torque, self._largest_torque = robot.torque_limits
        fingers = _neighbours([sim.model.actuator_name2id(n) for n in robot.gripper.actuators])
        self._arm_ctrl: Floats = self._data.ctrl[_neighbours(robot._ref_joint_actuator_indexes)]
        self._finger_ctrl: Floats = self._data.ctrl[fingers]
        self._arm_bias: Floats = self._data.qfrc_bias[self._joints]
        closed, opened = self._model.actuator_ctrlrange[fingers].T
        self._finger_bias, self._finger_weight = 0.5 * (opened + closed), 0.5 * (opened - closed)
        self._finger_speed = np.array([-1.0, 1.0]) * robot.gripper.speed
        self._at_reset = _Kinematics(
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
        self._jac_pos, self._jac_ori = np.zeros((2, 3, self._model.nv))
        self._full_mass = np.zeros((self._model.nv, self._model.nv))
        self._inertia, self._qvel = self._data.qM, self._data.qvel
        self._now = self._watch(_neighbours(controller.qpos_index))
        self.begin()

    def begin(self) -> None:
        """Forget everything: the controller as robosuite leaves it after a reset.

        robosuite reads the arm's pose at the reset and not again when an init state is set, so the
        first torque of an episode is computed from the pose of the reset. Kept, because published
        numbers were made with it; with settling steps nothing of it can be seen.
        """
        self._goal_pos, self._goal_ori = self._goal_at_reset
        self._gripper = np.zeros(2)
        self._has_moved = False

    @property
    def state(self) -> ArmState:
        """What must be kept to go on from here."""
        return ArmState(
            np.array(self._goal_pos),
            np.array(self._goal_ori),
            np.array(self._gripper),
            self._has_moved,
        )

    @state.setter
    def state(self, state: ArmState) -> None:
        self._goal_pos, self._goal_ori = state.goal_pos, state.goal_ori
        self._gripper, self._has_moved = state.gripper, state.has_moved

    def start(self, action: Floats) -> None:
        """Take up ``action`` [7] and follow it for one physics step."""
        mujoco.mj_step1(self._model, self._data)
        now = self._read() if self._has_moved else self._at_reset
        self._set_goal(action[:6], now)
        self._finger_drive = self._finger_speed * np.sign(action[6])
        self._has_moved = True
        self._command(now)
        mujoco.mj_step2(self._model, self._data)

    def go_on(self, substeps: int) -> None:
        """Follow the same action for ``substeps`` more physics steps."""
        for _ in range(substeps):
            mujoco.mj_step1(self._model, self._data)
            self._command(self._read())
            mujoco.mj_step2(self._model, self._data)

    def _set_goal(self, action: Floats, now: _Kinematics) -> None:
        delta = np.clip(action, -1.0, 1.0) * self._scale
        if not all(math.isclose(value, 0.0) for value in delta[3:]):
            self._goal_ori = set_goal_orientation(delta[3:], now.ee_ori)
        self._goal_pos = now.ee_pos + delta[:3]

    def _command(self, now: _Kinematics) -> None:
        torques = self._torques(now)
        self._arm_ctrl[:] = np.minimum(
            np.maximum(torques, self._least_torque), self._largest_torque
        )
        self._gripper = np.minimum(np.maximum(self._gripper + self._finger_drive, -1.0), 1.0)
        self._finger_ctrl[:] = self._finger_bias + self._finger_weight * self._gripper

    def _torques(self, now: _Kinematics) -> Floats:
        force = (self._goal_pos - now.ee_pos) * self._kp_pos + -now.ee_pos_vel * self._kd_pos
        turn = orientation_error(self._goal_ori, now.ee_ori)
        torque = turn * self._kp_ori + -now.ee_ori_vel * self._kd_ori
        _, lambda_pos, lambda_ori, nullspace = opspace_matrices(
            now.mass_matrix, now.jac_full, now.jac_pos, now.jac_ori
        )
        wrench = np.concatenate([np.dot(lambda_pos, force), np.dot(lambda_ori, torque)])
        torques = np.dot(now.jac_full.T, wrench) + self._arm_bias
        return torques + nullspace_torques(
            now.mass_matrix, nullspace, self._initial_joint, now.joint_pos, now.joint_vel
        )

    def _watch(self, positions: slice) -> _Kinematics:
        num_joints = self._joints.stop - self._joints.start
        return _Kinematics(
            self._data.site_xpos[self._site],
            self._data.site_xmat[self._site].reshape(3, 3),
            np.zeros(3),
            np.zeros(3),
            self._data.qpos[positions],
            self._data.qvel[self._joints],
            np.zeros((3, num_joints), order="F"),
            np.zeros((3, num_joints), order="F"),
            np.zeros((6, num_joints), order="F"),
            np.zeros((num_joints, num_joints), order="F"),
        )

    def _read(self) -> _Kinematics:
        now, jac_pos, jac_ori = self._now, self._jac_pos, self._jac_ori
        mujoco.mj_jacSite(self._model, self._data, jac_pos, jac_ori, self._site)
        mujoco.mj_fullM(self._model, self._full_mass, self._inertia)
        np.dot(jac_pos, self._qvel, out=now.ee_pos_vel)
        np.dot(jac_ori, self._qvel, out=now.ee_ori_vel)
        now.jac_pos[:] = now.jac_full[:3] = jac_pos[:, self._joints]
        now.jac_ori[:] = now.jac_full[3:] = jac_ori[:, self._joints]
        now.mass_matrix[:] = self._full_mass[self._joints, self._joints]
        return now


def _neighbours(indices: Sequence[int]) -> slice:
    """Where the joints or actuators of one part lie, as a slice, which numpy need not copy."""
    first, last = int(indices[0]), int(indices[-1])
    if list(indices) != list(range(first, last + 1)):
        raise ContractError(f"joints or actuators {list(indices)} of the arm are not neighbours")
    return slice(first, last + 1)
