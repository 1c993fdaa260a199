"""Replay of recorded demonstrations, to render their images at another size.

LIBERO's files hold images of 128 px; published policies were fine-tuned on 256. As openvla does
(``experiments/robot/libero/regenerate_libero_dataset.py``), the recorded actions are executed again
from the first recorded state, and only demonstrations that LIBERO's success test calls solved after
the last action are kept: of LIBERO-10's 500, openvla's data keep 379. Where idle steps are left
out, they are left out of the execution too, after ten steps in which the objects settle.

Unlike there, cabinets, stoves and racks stand where the demonstration's ``model_file`` has them;
openvla's data have them where a reset puts them, up to 1.7 cm from where the hand reaches.

Without a replay every recorded state is set in the simulator and rendered. Such an image shows the
state itself; one that is rendered while stepping is up to two of robosuite's 25 physics steps
older.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import numpy.typing as npt

from verl_vla.core.errors import ConfigError
from verl_vla.core.signals import end_with_parent
from verl_vla.core.text import format_seconds
from verl_vla.datasets.action_targets import moving_steps
from verl_vla.datasets.demo_file import JOINTS, MODEL, DemoFile, DemoReader, Node, open_demos
from verl_vla.datasets.libero_reader import demo_file
from verl_vla.datasets.libero_writer import DISTURBED, IMAGES, PARTIAL_SUFFIX
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import SETTLE_ACTION, LiberoEnv
from verl_vla.envs.libero.suite import libero_suite, make_libero_env

if TYPE_CHECKING:
    from verl_vla.envs.libero.fixtures import FixturePlacement
    from verl_vla.envs.libero.simulator import Simulator

logger = getLogger(__name__)

RGB = 3
INSTEAD = "set demos.images=stored or demos.replay=false"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerendering:
    """Source, target and cameras of a rerendering."""

    source: Path
    """Folder of LIBERO's files."""
    target: Path
    """Folder of the files with the new images; they hold actions, states, joints and images."""
    env: EnvConfig
    """Environment whose ``cameras`` are rendered, at its ``render_size``."""
    replays: bool
    """True to execute the recorded actions, and to keep what is solved then; False to render the
    recorded states."""
    filter_noops: bool
    """True to execute no idle step; see `moving_steps`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerendered:
    """Result of one task."""

    num_found: int
    """Number of demonstrations in the file."""
    num_kept: int
    num_images: int
    """Number of rows; each has an image of every camera."""
    has_models: bool
    """False where the file does not say where its fixtures stood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demo:
    """One recorded episode, or what is executed of it."""

    rows: npt.NDArray[np.int64]
    """[T], indices in the file of the actions below."""
    actions: npt.NDArray[np.float64]
    states: npt.NDArray[np.float64]
    """[rows of the file, 1 + nq + nv]"""
    fixtures: FixturePlacement | None
    """None for the placement of the first reset."""


def rerender(work: Rerendering, tasks: Sequence[int], *, workers: int) -> None:
    """Render the files of ``tasks`` that do not exist yet, one task per process at a time.

    Raises:
        ConfigError: a file's states or model do not fit its task, its failures were recorded on
            purpose, or none of its demonstrations is solved when replayed.
    """
    chosen = libero_suite(work.env.suite)
    missing = [t for t in tasks if not demo_file(work.target, chosen.task(t).name).is_file()]
    if not missing:
        return
    if work.replays:
        for task in missing:
            _refuse_biased(demo_file(work.source, chosen.task(task).name))
    work.target.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    results: list[Rerendered] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        futures = [pool.submit(rerender_task, work, task) for task in missing]
        for task, future in zip(missing, futures, strict=True):
            results.append(future.result())
            spent = time.perf_counter() - began
            left = spent / len(results) * (len(missing) - len(results))
            count = f"{len(results)}/{len(missing)}"
            _report(results[-1], f"{count}  {chosen.task(task).name}", format_seconds(left))
    found, kept = (sum(getattr(r, n) for r in results) for n in ("num_found", "num_kept"))
    if work.replays:
        logger.info(
            "replayed: %d of %d demonstrations are kept, %d are not solved and dropped",
            kept,
            found,
            found - kept,
        )


def _report(result: Rerendered, name: str, left: str) -> None:
    logger.info(
        "rendered again: %s  %d of %d demonstrations kept, %d dropped  %d images  left %s",
        name,
        result.num_kept,
        result.num_found,
        result.num_found - result.num_kept,
        result.num_images,
        left,
    )
    if not result.has_models:
        logger.warning(
            "%s: the file holds no %s, so nothing tells where its fixtures stood; they stand where "
            "the first reset of an environment puts them, up to 2 cm away",
            name,
            MODEL,
        )


def _refuse_biased(path: Path) -> None:
    """Refuse a recording of this project whose expert fails on purpose."""
    with open_demos(path) as file:
        recording = file.recording()
    if recording is None:
        return
    if "height_error_m" in recording and recording["height_error_m"] != 0:
        error_m = recording["height_error_m"]
        raise ConfigError(
            f"{path} was recorded with --height-error {error_m}: its failures are there on "
            f"purpose, and a replay would drop them; {INSTEAD}"
        )


def rerender_task(work: Rerendering, task_id: int) -> Rerendered:
    """Render one file, which gets its name when complete.

    Raises:
        ConfigError: its states or model do not fit the task, or none of its demonstrations is
            solved when replayed.
    """
    env = make_libero_env(work.env)
    path = demo_file(work.target, env.suite.task(task_id).name)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with (
            open_demos(work.source / path.name) as source,
            h5py.File(partial, "w") as target,
        ):
            result = _rerender_file(work, env, task_id, source, target)
    finally:
        env.close()
    if not result.num_kept:
        raise ConfigError(
            f"{work.source / path.name}: none of its {result.num_found} demonstrations is solved "
            f"when replayed; {INSTEAD}"
        )
    partial.replace(path)
    return result


def _rerender_file(
    work: Rerendering, env: LiberoEnv, task_id: int, source: DemoFile, target: Node
) -> Rerendered:
    data = target.create_group("data")
    data.attrs.update(source.data.attrs)
    episodes = {name: source.demo(name) for name in source.names}
    has_models = any(episode.model() is not None for episode in episodes.values())
    simulator = env.simulator(task_id)
    num_kept = num_images = 0
    for name, episode in episodes.items():
        demo = _read(episode, simulator, work, has_models=has_models)
        # without images first: most of the time goes into those
        if work.replays and not _is_solved(demo, simulator, work):
            continue
        _draw_episode(demo, episode, data.create_group(name), simulator, work)
        num_kept += 1
        num_images += len(demo.rows)
    data.attrs["num_demos"], data.attrs["total"] = num_kept, num_images
    # without fixtures there is nothing that the file would have to tell
    is_told = has_models or not simulator.has_fixtures
    return Rerendered(
        num_found=len(episodes), num_kept=num_kept, num_images=num_images, has_models=is_told
    )


def _read(
    source: DemoReader, simulator: Simulator, work: Rerendering, *, has_models: bool
) -> _Demo:
    actions, _ = source.actions()
    states, label = source.states(len(actions)), source.label
    if states.shape[1] != simulator.state_size:
        raise ConfigError(
            f"{label} has states {list(states.shape)}, but a state of its task has "
            f"{simulator.state_size} numbers; record it with the installed LIBERO, or set "
            "demos.images=stored"
        )
    model = source.model()
    if has_models and model is None:
        raise ConfigError(
            f"{label} has no attribute {MODEL}, and others of its file do; fetch the file again, "
            "or set demos.images=stored"
        )
    skips = work.replays and work.filter_noops
    rows = moving_steps(actions) if skips else np.arange(len(actions))
    fixtures = None if model is None else simulator.fixtures_in(model, label)
    return _Demo(rows=rows, actions=actions[rows], states=states, fixtures=fixtures)


def _begin(demo: _Demo, simulator: Simulator, work: Rerendering) -> None:
    """Set the first recorded state."""
    simulator.begin(demo.states[0], demo.fixtures)
    if work.filter_noops:
        for _ in range(work.env.settle_steps):
            simulator.step(np.array(SETTLE_ACTION))


def _is_solved(demo: _Demo, simulator: Simulator, work: Rerendering) -> bool:
    """Execute the actions; return True where the task is solved after the last one."""
    _begin(demo, simulator, work)
    is_solved = False
    for action in demo.actions:
        is_solved = simulator.step(action)
    return is_solved


def _moments(demo: _Demo, simulator: Simulator, work: Rerendering) -> Iterator[None]:
    """Put the simulator into the moment before each of the actions."""
    if not work.replays:
        for row in demo.rows:
            # begin() resets the solver's warm start too, so an image depends on its state alone
            simulator.begin(demo.states[row], demo.fixtures)
            yield
        return
    _begin(demo, simulator, work)
    for action in demo.actions:
        yield
        simulator.step(action)


def _draw_episode(
    demo: _Demo, source: DemoReader, target: Node, simulator: Simulator, work: Rerendering
) -> None:
    target["actions"] = demo.actions
    if source.has(DISTURBED):
        mask = source.mask(DISTURBED, len(demo.states), absent=False)
        target[DISTURBED] = mask[demo.rows].astype(np.uint8)
    shape = (work.env.render_size, work.env.render_size, RGB)
    # one image a chunk, as training reads them
    frames = {
        camera: target.create_dataset(
            IMAGES[camera], shape=(len(demo.rows), *shape), dtype=np.uint8, chunks=(1, *shape)
        )
        for camera in work.env.cameras
    }
    states: list[npt.NDArray[np.float64]] = []
    joints: list[npt.NDArray[np.float64]] = []
    for index, _ in enumerate(_moments(demo, simulator, work)):
        states.append(simulator.flat_state())
        joints.append(simulator.seen_robot().arm_rad)
        for camera in frames:
            # bottom-up and not mirrored, as LIBERO stores images
            frames[camera][index] = simulator.render(camera)[::-1, ::-1]
    target["states"] = np.stack(states)
    # `_is_after_action` finds by them that these images come before their actions
    target[JOINTS] = np.stack(joints)
