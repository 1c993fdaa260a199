"""Demonstrations that are replayed before they are learned, as openvla's data were."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from recorded_demos import IDLE_AT

from verl_vla.cli import demos
from verl_vla.cli.arguments import parse
from verl_vla.config.choices import CAMERAS
from verl_vla.core.errors import ConfigError
from verl_vla.datasets.libero_reader import demo_file
from verl_vla.datasets.libero_writer import IMAGES, RECORDING
from verl_vla.datasets.rerender import MODEL, Rerendering, rerender, rerender_task
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import LiberoEnv
from verl_vla.envs.libero.suite import libero_suite, make_libero_env

pytestmark = pytest.mark.sim

LIFT = 1
SIZE = 64
CABINET = "wooden_cabinet_1"
DEMOS = ("demo_0", "demo_1", "demo_2")


def task_file(folder: Path, suite: str = "mini", task: int = LIFT) -> Path:
    return demo_file(folder, libero_suite(suite).task(task).name)


def work(source: Path, target: Path, suite: str = "mini") -> Rerendering:
    target.mkdir(exist_ok=True)
    env = EnvConfig(suite=suite, render_size=SIZE)
    return Rerendering(source=source, target=target, env=env, replays=True, filter_noops=True)


@pytest.fixture
def copied(mini_demos: Path, tmp_path: Path) -> Path:
    """A folder with the file of one task, which a test may change."""
    folder = tmp_path / "copied"
    folder.mkdir()
    shutil.copy(task_file(mini_demos), folder)
    return folder


def test_a_replay_executes_what_is_learned_after_the_objects_settled(
    mini_demos: Path, tmp_path: Path
) -> None:
    result = rerender_task(work(mini_demos, tmp_path / "out"), LIFT)
    assert (result.num_found, result.num_kept) == (3, 3)
    env = make_libero_env(EnvConfig(suite="mini", render_size=SIZE))
    simulator = env.simulator(LIFT)
    with h5py.File(task_file(mini_demos)) as before, h5py.File(task_file(tmp_path / "out")) as new:
        assert new["data"].attrs["num_demos"] == 3
        assert new["data"].attrs["total"] == result.num_images
        for name in DEMOS:
            stored, replayed = before[f"data/{name}"], new[f"data/{name}"]
            moving = np.delete(stored["actions"][()], IDLE_AT, axis=0)
            assert np.array_equal(replayed["actions"], moving)
            env.settle(LIFT, stored["states"][0])
            for row, action in enumerate(moving):
                assert np.array_equal(replayed["states"][row], simulator.flat_state())
                if row % 10 == 0:
                    image = simulator.render(CAMERAS[0])[::-1, ::-1]
                    assert np.array_equal(replayed[IMAGES[CAMERAS[0]]][row], image)
                is_solved = simulator.step(action)
            assert is_solved
    env.close()


def test_with_idle_steps_a_replay_is_the_recording(tmp_path: Path) -> None:
    words = (
        f"--suite mini --tasks {LIFT} --episodes-per-task 2 --render-size {SIZE} --num-workers 1"
    )
    recorded, out = tmp_path / "recorded", tmp_path / "out"
    assert demos.run(parse("demos", [*words.split(), "--out", str(recorded)])) == 0
    everything = replace(work(recorded, out), filter_noops=False)
    assert rerender_task(everything, LIFT).num_kept == 2
    with h5py.File(task_file(recorded)) as before, h5py.File(task_file(out)) as after:
        for name in DEMOS[:2]:
            for path in ("actions", "states", "obs/joint_states", IMAGES[CAMERAS[0]]):
                assert np.array_equal(before[f"data/{name}/{path}"], after[f"data/{name}/{path}"])
    # and the expert does not need its idle steps
    assert rerender_task(work(recorded, tmp_path / "moving"), LIFT).num_kept == 2


def test_what_is_not_solved_when_replayed_is_dropped_and_counted(
    copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with h5py.File(task_file(copied), "a") as file:
        file["data/demo_1/actions"][:, 2] *= -1  # up and away
    with caplog.at_level("INFO", logger="verl_vla.datasets.rerender"):
        rerender(work(copied, tmp_path / "out"), [LIFT], workers=1)
    assert "lift_the_red_cube  2 of 3 demonstrations kept, 1 dropped" in caplog.text
    assert "2 of 3 demonstrations are kept, 1 are not solved and dropped" in caplog.text
    with h5py.File(task_file(tmp_path / "out")) as file:
        assert list(file["data"]) == ["demo_0", "demo_2"]
        assert file["data"].attrs["num_demos"] == 2
    rendered = replace(work(copied, tmp_path / "all"), replays=False)
    assert rerender_task(rendered, LIFT).num_kept == 3


def test_a_task_of_which_nothing_is_solved_is_refused(copied: Path, tmp_path: Path) -> None:
    with h5py.File(task_file(copied), "a") as file:
        for name in DEMOS:
            file[f"data/{name}/actions"][:, 2] *= -1
    with pytest.raises(ConfigError, match="none of its 3 .* set demos.images=stored or demos.rep"):
        rerender_task(work(copied, tmp_path / "out"), LIFT)
    assert not task_file(tmp_path / "out").exists()


def test_failures_that_were_recorded_on_purpose_are_not_replayed(
    copied: Path, tmp_path: Path
) -> None:
    biased = work(copied, tmp_path / "out")
    with h5py.File(task_file(copied), "a") as file:
        file["data"].attrs[RECORDING] = json.dumps({"height_error_m": 0.06})
    with pytest.raises(ConfigError, match="--height-error 0.06: .* set demos.images=stored or"):
        rerender(biased, [LIFT], workers=1)
    rerender(replace(biased, replays=False), [LIFT], workers=1)
    assert task_file(biased.target).is_file()


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A file of libero_goal task 0 whose fixtures stand where a third reset puts them, and the
    cabinet's x."""
    folder = tmp_path_factory.mktemp("moved")
    env = make_libero_env(EnvConfig(suite="libero_goal", render_size=SIZE))
    simulator = env.simulator(0)
    state = env.suite.load_init_states(0)[2]
    simulator.begin(state, simulator.fixtures_of_reset(2))
    with h5py.File(task_file(folder, "libero_goal", 0), "w") as file:
        for name in DEMOS[:2]:
            group = file.create_group(f"data/{name}")
            group.attrs[MODEL] = simulator.model_xml()
            group["states"], group["actions"] = state[None], np.zeros((1, 7))
            group["image"] = simulator.render(CAMERAS[0])[::-1, ::-1][None]
    cabinet_x_m = simulator.model.body_pos[simulator.body(CABINET)][0]
    env.close()
    return folder, float(cabinet_x_m)


def drawn(source: Path, target: Path) -> np.ndarray:
    """The image of the first demonstration, rendered from its state."""
    rerender(replace(work(source, target, "libero_goal"), replays=False), [0], workers=1)
    with h5py.File(task_file(target, "libero_goal", 0)) as file:
        return file[f"data/demo_0/{IMAGES[CAMERAS[0]]}"][0]


def test_fixtures_stand_where_the_model_of_a_demonstration_has_them(
    moved: tuple[Path, float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, _ = moved
    with h5py.File(task_file(source, "libero_goal", 0)) as file:
        recorded = file["data/demo_0/image"][0].astype(float)
    without = tmp_path / "without"
    shutil.copytree(source, without)
    with h5py.File(task_file(without, "libero_goal", 0), "a") as file:
        for name in DEMOS[:2]:
            del file[f"data/{name}"].attrs[MODEL]
    with caplog.at_level("WARNING", logger="verl_vla.datasets.rerender"):
        placed = drawn(source, tmp_path / "placed")
        assert not caplog.text
        elsewhere = drawn(without, tmp_path / "elsewhere")
    assert "holds no model_file, so nothing tells where its fixtures stood" in caplog.text
    # the model has six digits, which may change a pixel on an edge
    assert np.abs(placed - recorded).mean() < 0.05 < np.abs(elsewhere - recorded).mean()


def test_a_model_is_read_to_six_digits(moved: tuple[Path, float]) -> None:
    source, cabinet_x_m = moved
    env: LiberoEnv = make_libero_env(EnvConfig(suite="libero_goal", render_size=SIZE))
    simulator = env.simulator(0)
    with h5py.File(task_file(source, "libero_goal", 0)) as file:
        xml = file["data/demo_0"].attrs[MODEL]
    placement = simulator.fixtures_in(xml, "here")
    simulator.begin(env.suite.load_init_states(0)[0], placement)
    body = simulator.model.body_pos[simulator.body(CABINET)]
    assert body[0] == pytest.approx(cabinet_x_m, abs=1e-6)
    assert np.linalg.norm(placement.quaternion, axis=1) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ConfigError, match="here: its model has no wooden_cabinet_1_main, so it"):
        simulator.fixtures_in(xml.replace("wooden_cabinet_1_main", "other"), "here")
    with pytest.raises(ConfigError, match="here: its model is no XML"):
        simulator.fixtures_in(xml[:-20], "here")
    env.close()


def test_a_demonstration_without_its_model_among_others_is_refused(
    moved: tuple[Path, float], tmp_path: Path
) -> None:
    source = tmp_path / "some"
    shutil.copytree(moved[0], source)
    with h5py.File(task_file(source, "libero_goal", 0), "a") as file:
        del file["data/demo_1"].attrs[MODEL]
    with pytest.raises(ConfigError, match="demo_1 has no attribute model_file, and others"):
        rerender_task(work(source, tmp_path / "out", "libero_goal"), 0)
