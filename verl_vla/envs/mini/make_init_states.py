"""Write the mini suite's init states: ``python -m verl_vla.envs.mini.make_init_states [FOLDER]``.

The files are part of the package, and this command writes the same bytes again. Each start is one
sample of LIBERO's placement samplers from the regions of the task's BDDL file, with a separate
seed, so the states differ from each other and from those that `sample_init_state` returns.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import DEMONSTRATED, RECORDED, LiberoEnv
from verl_vla.envs.libero.suite import MINI_INIT_STATES, libero_suite, make_libero_env


def main(folder: Path) -> None:
    """Write one file per task into ``folder``."""
    env = make_libero_env(EnvConfig(suite="mini"))
    for task_id, task in enumerate(env.suite.tasks):
        states = [env.sample_start(task_id, RECORDED, i) for i in range(MINI_INIT_STATES)]
        np.savez_compressed(folder / f"{task.name}.npz", states=np.stack(states))
    env.close()


def sample_init_state(env: LiberoEnv, task_id: int, seed: int) -> npt.NDArray[np.float64]:
    """Sample a start [1 + nq + nv] that is in no split; the same seed gives the same start."""
    return env.sample_start(task_id, DEMONSTRATED, seed)


if __name__ == "__main__":
    target = (
        sys.argv[1] if len(sys.argv) > 1 else libero_suite("mini").tasks[0].init_states_file.parent
    )
    main(Path(target))
