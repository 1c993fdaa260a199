"""Settle LIBERO's own environment and write down where its objects come to rest.

``PYTHONPATH=FOLDER python tests/golden/settle_stock.py OUT.json SUITE/TASK ... --states I ...``,
where ``pip install --target FOLDER --no-deps mujoco==2.3.7`` put LIBERO's MuJoCo: nothing of ours
takes part in the physics. Written are positions [N, 3] in m and quaternions [N, 4], w first, of all
free bodies after ten steps with an open, resting gripper.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.assets import asset_folder, find_assets, import_libero
from verl_vla.envs.libero.env import SETTLE_ACTION
from verl_vla.envs.libero.suite import libero_suite

SETTLE_STEPS = EnvConfig().settle_steps
DECIMALS = 9
"""A nanometre."""


def settle(suite_name: str, task_id: int, states: list[int]) -> dict[str, Any]:
    import_libero()
    from libero.libero.envs.env_wrapper import ControlEnv  # noqa: PLC0415 -- after its config

    suite = libero_suite(suite_name)
    recorded = suite.load_init_states(task_id)
    with asset_folder(find_assets()):
        env = ControlEnv(
            bddl_file_name=str(suite.task(task_id).bddl_file),
            has_offscreen_renderer=False,
            use_camera_obs=False,
            ignore_done=True,
        )
        env.seed(0)
        env.reset()
    model, data = env.sim.model, env.sim.data
    free = np.flatnonzero(np.asarray(model.jnt_type) == mujoco.mjtJoint.mjJNT_FREE)
    bodies = np.asarray(model.jnt_bodyid)[free]
    poses: dict[str, Any] = {}
    for state in states:
        env.set_init_state(recorded[state])
        for _ in range(SETTLE_STEPS):
            env.step(list(SETTLE_ACTION))
        poses[str(state)] = {
            "pos": np.round(data.body_xpos[bodies], DECIMALS).tolist(),
            "quat": np.round(data.body_xquat[bodies], DECIMALS).tolist(),
        }
    env.close()
    return {"names": [model.body_id2name(body) for body in bodies], "states": poses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("tasks", nargs="+", metavar="SUITE/TASK")
    parser.add_argument("--states", type=int, nargs="+", required=True)
    options = parser.parse_args()
    settled = {}
    for task in options.tasks:
        suite_name, task_id = task.split("/")
        settled[task] = settle(suite_name, int(task_id), options.states)
    provenance = {
        "what": "tests/golden/settle_stock.py: LIBERO's own environment, settled; m, w first",
        "command": "PYTHONPATH=FOLDER python tests/golden/settle_stock.py "
        f"{options.out} {' '.join(options.tasks)} --states {' '.join(map(str, options.states))}",
        "mujoco": mujoco.__version__,
        "settle_steps": SETTLE_STEPS,
    }
    text = json.dumps({"provenance": provenance, "tasks": settled}, indent=None)
    options.out.write_text(text.replace('"libero_', '\n"libero_') + "\n")


if __name__ == "__main__":
    main()
