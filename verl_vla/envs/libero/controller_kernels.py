"""The inner loop of the arm's controller, compiled: it runs 500 times in a simulated second.

The arithmetic is robosuite's, as described in `verl_vla.envs.libero.controller`. Here it is
machine code, including the calls of MuJoCo's two halves of a physics step, without Python in
between. numba caches the compiled code beside this file or in the user's cache, as it does for
robosuite's functions.

An error inside MuJoCo ends the process instead of raising; the pool counts it as a crash.

Importing this module imports robosuite: call `verl_vla.envs.libero.assets.import_libero` first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding
import mujoco
import numba
import numpy as np
import numpy.typing as npt
from numba import types
from robosuite.utils.control_utils import (
    nullspace_torques,
    opspace_matrices,
    orientation_error,
)

from verl_vla.core.errors import ContractError

Floats = npt.NDArray[np.float64]


class Kinematics(NamedTuple):
    """The arm's state at one moment: views of MuJoCo's memory, or buffers that `read` fills.

    Matrices have robosuite's memory order (Fortran's), which selects the compiled function.
    """

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


class Arm(NamedTuple):
    """Constants of the arm of one model, and views of MuJoCo's memory for its commands."""

    kp_pos: Floats
    kp_ori: Floats
    kd_pos: Floats
    kd_ori: Floats
    initial_joint: Floats
    least_torque: Floats
    largest_torque: Floats
    finger_bias: Floats
    finger_weight: Floats
    bias: Floats
    """View of MuJoCo's bias forces (gravity, Coriolis, centrifugal) on the arm's joints."""
    joint_ctrl: Floats
    """View of the commands to the joints."""
    finger_ctrl: Floats
    """View of the commands to the fingers."""


class ControllerTarget(NamedTuple):
    """The pose and gripper opening that the controller drives to during one control step."""

    goal_pos: Floats
    goal_ori: Floats
    gripper: Floats
    """[2] opening of the fingers, which changes by ``finger_drive`` at every physics step."""
    finger_drive: Floats


class Physics(NamedTuple):
    """A model and its data as arguments of MuJoCo's C functions, and buffers for the results."""

    model: int
    data: int
    site: int
    first_joint: int
    end_joint: int
    jac_pos: Floats
    jac_ori: Floats
    full_mass: Floats
    inertia: Floats
    qvel: Floats


def _load_mujoco() -> None:
    """Make MuJoCo's C functions visible to compiled code, from the library that Python uses."""
    folder = Path(mujoco.__file__).parent
    found = sorted(folder.glob("libmujoco.so*"))
    if len(found) != 1:
        raise ContractError(f"{folder} holds {len(found)} files libmujoco.so*; one is expected")
    llvmlite.binding.load_library_permanently(str(found[0]))


_load_mujoco()
_compiled: Any = numba.njit(cache=True)
# MuJoCo's structures are pointers without a type in numba
_ADDRESS = types.intp
_mj_step1: Any = types.ExternalFunction("mj_step1", types.void(_ADDRESS, _ADDRESS))
_mj_step2: Any = types.ExternalFunction("mj_step2", types.void(_ADDRESS, _ADDRESS))
_mj_fwd_actuation: Any = types.ExternalFunction("mj_fwdActuation", types.void(_ADDRESS, _ADDRESS))
_mj_fwd_acceleration: Any = types.ExternalFunction(
    "mj_fwdAcceleration", types.void(_ADDRESS, _ADDRESS)
)
_mj_fwd_constraint: Any = types.ExternalFunction("mj_fwdConstraint", types.void(_ADDRESS, _ADDRESS))
_mj_jac_site: Any = types.ExternalFunction(
    "mj_jacSite", types.void(_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, types.int32)
)
_mj_full_m: Any = types.ExternalFunction("mj_fullM", types.void(_ADDRESS, _ADDRESS, _ADDRESS))


@_compiled
def command(now: Kinematics, arm: Arm, target: ControllerTarget) -> None:
    """Set the torques that drive the arm towards ``target``, and advance the fingers' target."""
    # kp * error - kd * velocity, with robosuite's signs, so that the rounding is the same
    force = (target.goal_pos - now.ee_pos) * arm.kp_pos + -now.ee_pos_vel * arm.kd_pos
    turn = orientation_error(target.goal_ori, now.ee_ori)
    torque = turn * arm.kp_ori + -now.ee_ori_vel * arm.kd_ori
    # position and rotation apart: ``uncouple_pos_ori`` of LIBERO's controller
    _, lambda_pos, lambda_ori, nullspace = opspace_matrices(
        now.mass_matrix, now.jac_full, now.jac_pos, now.jac_ori
    )
    wrench = np.concatenate((np.dot(lambda_pos, force), np.dot(lambda_ori, torque)))
    # J^T F, and what holds the arm against gravity
    torques = np.dot(now.jac_full.T, wrench) + arm.bias
    # pulls towards the posture of the reset, without moving the hand
    torques = torques + nullspace_torques(
        now.mass_matrix, nullspace, arm.initial_joint, now.joint_pos, now.joint_vel
    )
    arm.joint_ctrl[:] = np.minimum(np.maximum(torques, arm.least_torque), arm.largest_torque)
    target.gripper[:] = np.minimum(np.maximum(target.gripper + target.finger_drive, -1.0), 1.0)
    arm.finger_ctrl[:] = arm.finger_bias + arm.finger_weight * target.gripper


@_compiled
def read(physics: Physics, now: Kinematics) -> None:
    """Fill the buffers of ``now``, after the first half of a physics step."""
    jac_pos, jac_ori = physics.jac_pos, physics.jac_ori
    _mj_jac_site(
        physics.model, physics.data, jac_pos.ctypes.data, jac_ori.ctypes.data, physics.site
    )
    _mj_full_m(physics.model, physics.full_mass.ctypes.data, physics.inertia.ctypes.data)
    # over all joints of the model, as in robosuite's get_site_xvelp
    np.dot(jac_pos, physics.qvel, now.ee_pos_vel)
    np.dot(jac_ori, physics.qvel, now.ee_ori_vel)
    first, end = physics.first_joint, physics.end_joint
    now.jac_pos[:] = now.jac_full[:3] = jac_pos[:, first:end]
    now.jac_ori[:] = now.jac_full[3:] = jac_ori[:, first:end]
    now.mass_matrix[:] = physics.full_mass[first:end, first:end]


@_compiled
def warm_up(physics: Physics) -> None:
    """Solve the constraints twice, between the halves of a physics step.

    robosuite 1.4.0 calls ``mj_forward`` twice before each ``mj_step`` (`environments/base.py`,
    `step`, and `controllers/base_controller.py`, `update`). Neither changes positions or
    velocities, but from MuJoCo 3.0 to 3.3 each leaves its solution as the next solver's start, so
    both belong to the physics. Commands and state are the same in both, so the unconstrained
    acceleration is computed only once.
    """
    model, data = physics.model, physics.data
    _mj_fwd_actuation(model, data)
    _mj_fwd_acceleration(model, data)
    _mj_fwd_constraint(model, data)
    _mj_fwd_constraint(model, data)


@_compiled
def apply_torques(
    substeps: int, physics: Physics, now: Kinematics, arm: Arm, target: ControllerTarget
) -> None:
    """Drive the arm towards ``target`` for ``substeps`` physics steps."""
    for _ in range(substeps):
        _mj_step1(physics.model, physics.data)
        warm_up(physics)
        read(physics, now)
        command(now, arm, target)
        _mj_step2(physics.model, physics.data)
