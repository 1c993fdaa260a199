"""Run episodes in vla-eval's LIBERO benchmark and record what a policy would see.

``python vla_eval_libero.py FOLDER``: reads ``question.json``, a list of episodes (suite, task,
init_state, actions), and writes ``answer.npz``: of episode N ``N/agentview`` and ``N/wrist`` at the
start and after every `IMAGE_EVERY` actions, ``N/states`` and ``N/done`` after each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from verl_vla.envs.libero.assets import asset_folder, find_assets, import_libero

IMAGE_SIZE = 128
"""Pixels; half of vla-eval's own."""
IMAGE_EVERY = 10
"""Actions. A software renderer takes longer for one image than MuJoCo for ten control steps."""


class SilentRecorder:
    """Takes what a benchmark reports beside its results."""

    def record_video(self, frame: np.ndarray) -> None: ...

    def record_step(self, **fields: object) -> None: ...


def render_seldom() -> None:
    """Let robosuite render at every `IMAGE_EVERY` control steps and hand out black images else.

    Its timing and physics stay as they are. The last of the ten settling steps is among them.
    """
    # after the settings that importing LIBERO first makes
    from libero.libero.envs.env_wrapper import ControlEnv  # noqa: PLC0415
    from robosuite.utils.binding_utils import MjSim  # noqa: PLC0415

    set_init_state, step, render = ControlEnv.set_init_state, ControlEnv.step, MjSim.render
    steps = 0

    def begin(env: Any, init_state: np.ndarray) -> Any:
        nonlocal steps
        steps = 0
        return set_init_state(env, init_state)

    def count(env: Any, action: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(env, action)

    def render_or_not(sim: Any, width: int, height: int, **how: Any) -> np.ndarray:
        if steps and steps % IMAGE_EVERY == 0:
            return render(sim, width=width, height=height, **how)
        return np.zeros((height, width, 3), np.uint8)

    ControlEnv.set_init_state, ControlEnv.step, MjSim.render = begin, count, render_or_not


def benchmark_of(suite: str) -> Any:
    from vla_eval.benchmarks.libero import benchmark as module  # noqa: PLC0415 -- see `main`

    module.LIBERO_ENV_RESOLUTION = IMAGE_SIZE
    benchmark = module.LIBEROBenchmark(
        suite, env_seed=0, send_wrist_image=True, send_state=True, quat_no_antipodal=True
    )
    benchmark._recorder = SilentRecorder()
    return benchmark


def run_episode(benchmark: Any, episode: dict[str, Any]) -> dict[str, Any]:
    task = benchmark.get_tasks()[episode["task"]]
    init_state = np.array(episode["init_state"])
    benchmark._task_suite.get_task_init_states = lambda _: [init_state]
    if benchmark._env is not None:
        # Each reset places the fixtures anew, up to 17 mm apart, and an init state does not hold
        # them. Ours stand where the first reset after the seed puts them, in every episode. (Where
        # a drawer or option is to start elsewhere, a rebuilt model draws more numbers: not here.)
        benchmark._env.seed(benchmark.env_seed)
    with asset_folder(find_assets()):  # a reset builds the model anew
        views, done = [benchmark.make_obs(benchmark.reset(task), task)], [False]
    for action in episode["actions"]:
        result = benchmark.step({"actions": action})
        views.append(benchmark.make_obs(result.obs, task))
        done.append(bool(result.done))
    images = [view["images"] for view in views[::IMAGE_EVERY]]
    return {
        "agentview": np.stack([image["agentview"] for image in images]),
        "wrist": np.stack([image["wrist"] for image in images]),
        "states": np.stack([view["states"] for view in views]),
        "done": np.array(done),
    }


def main(folder: Path) -> None:
    import_libero()  # before anything that imports LIBERO or robosuite
    render_seldom()
    benchmarks: dict[str, Any] = {}
    answer = {}
    for number, episode in enumerate(json.loads((folder / "question.json").read_text())):
        suite = episode["suite"]
        if suite not in benchmarks:
            benchmarks[suite] = benchmark_of(suite)
        found = run_episode(benchmarks[suite], episode)
        answer |= {f"{number}/{name}": values for name, values in found.items()}
    for benchmark in benchmarks.values():
        benchmark.cleanup()
    np.savez(folder / "answer.npz", **answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
