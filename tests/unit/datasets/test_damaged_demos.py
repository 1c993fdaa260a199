"""Demonstration files of anybody: refused before training, by file, demonstration and field."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sft_world import NUM_STEPS, SIZE, TASKS, sft_recipe, write_demos

from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.config.sft import DemoChoice
from verl_vla.core.errors import ConfigError
from verl_vla.datasets.demo_file import LARGEST_ACTION, MOST_STEPS
from verl_vla.datasets.libero_reader import FrameReader, demo_file, read_actions, read_demos
from verl_vla.datasets.rerender import _refuse_biased
from verl_vla.envs.registry import suite
from verl_vla.trainer.sft.run import open_sft_run

MINI = suite("mini")
TASK = TASKS[0]
NAME = "demo_1"
AGENT, WRIST = "obs/agentview_rgb", "obs/eye_in_hand_rgb"
Change = Callable[[Any, Any], None]
"""Damages the group ``data``, given a demonstration of it."""


def put(path: str, value: Any, **options: Any) -> Change:
    """Replace a field of a demonstration."""

    def change(_: Any, episode: Any) -> None:
        if path in episode:
            del episode[path]
        episode.create_dataset(path, data=value, **options)

    return change


def put_at(path: str, index: Any, value: float) -> Change:
    def change(_: Any, episode: Any) -> None:
        episode[path][index] = value

    return change


def drop(path: str) -> Change:
    def change(_: Any, episode: Any) -> None:
        del episode[path]

    return change


def attribute(name: str, value: Any) -> Change:
    def change(data: Any, _: Any) -> None:
        data.attrs[name] = value

    return change


def rename(name: str) -> Change:
    return lambda data, _: data.move(NAME, name)


def scaled(data: Any, episode: Any) -> None:
    episode["actions"][:] *= 1e30


def declared(data: Any, episode: Any) -> None:
    """Terabytes in a few bytes."""
    del episode["actions"]
    episode.create_dataset("actions", shape=(10**10, 7), dtype="f8", chunks=(1000, 7))


def grouped(data: Any, episode: Any) -> None:
    del episode["actions"]
    episode.create_group("actions")


def leading_nowhere(data: Any, episode: Any) -> None:
    del episode["states"]
    episode["states"] = h5py.SoftLink("/data/demo_77/states")


def ungrouped(data: Any, episode: Any) -> None:
    del data[NAME]
    data[NAME] = np.zeros(3)


ACTIONS = np.random.default_rng(0).uniform(-0.5, 0.5, (NUM_STEPS, 7))
IDLE = np.zeros((NUM_STEPS, 7))
IMAGES = np.zeros((NUM_STEPS, SIZE, SIZE, 3), dtype=np.uint8)
DAMAGED: dict[str, tuple[Change, str]] = {
    "demo_x": (rename("demo_x"), r"data holds 'demo_x'; demonstrations are called demo_0"),
    "demo_01": (rename("demo_01"), r"data holds 'demo_01'"),
    "demo_²": (rename("demo_²"), r"data holds 'demo_²'"),
    "no group": (ungrouped, rf"{NAME} is no group of HDF5"),
    "idle": (put("actions", IDLE), rf"{NAME}: its {NUM_STEPS} actions are idle"),
    "no actions": (drop("actions"), rf"{NAME}: its actions are missing"),
    "no steps": (put("actions", ACTIONS[:0]), rf"{NAME}: its actions are none"),
    "group for actions": (grouped, rf"{NAME}: its actions are a group of HDF5"),
    "1-d actions": (
        put("actions", ACTIONS[:, 0]),
        rf"{NAME}: its actions are \[{NUM_STEPS}\], and",
    ),
    "8 values": (
        put("actions", np.zeros((NUM_STEPS, 8))),
        rf"{NAME}: its actions are \[{NUM_STEPS}, 8\], and must be \[T, 7\]",
    ),
    "int8": (
        put("actions", np.ones((NUM_STEPS, 7), dtype=np.int8)),
        rf"{NAME}: its actions are int8, and must be floating-point numbers",
    ),
    "complex": (put("actions", ACTIONS + 0j), rf"{NAME}: its actions are complex128"),
    "text": (put("actions", np.full((NUM_STEPS, 7), b"x")), rf"{NAME}: its actions are \|S1"),
    "terabytes": (declared, rf"{NAME}: its actions are \[10000000000, 7\]"),
    "NaN": (put_at("actions", (4, 2), np.nan), rf"{NAME}: its actions hold .*nan.* at step 4"),
    "infinite": (put_at("actions", (0, 6), np.inf), rf"{NAME}: its actions hold .*inf.* at step 0"),
    "1e30": (scaled, rf"{NAME}: its actions reach .*e\+29 at step \d+, and a simulator's"),
    "gripper 7": (put_at("actions", (5, 6), 7), rf"{NAME}: its actions reach 7 at step 5"),
    "1-d images": (put(AGENT, np.zeros(NUM_STEPS, np.uint8)), rf"its {AGENT} are uint8 \[26\]"),
    "float images": (put(AGENT, IMAGES.astype(np.float32)), rf"its {AGENT} are float32, and must"),
    "int16 images": (put(AGENT, IMAGES.astype(np.uint16)), rf"its {AGENT} are uint16 \[26, 112"),
    "4 channels": (put(AGENT, IMAGES.repeat(2, -1)[..., :4]), rf"its {AGENT} are .*112, 4\]"),
    "oblong": (put(AGENT, IMAGES[:, :90]), rf"its {AGENT} are uint8 \[26, 90, 112, 3\]"),
    "without pixels": (put(AGENT, IMAGES[:, :0, :0]), rf"its {AGENT} have 0 px"),
    "an image short": (put(AGENT, IMAGES[1:]), rf"{NAME} holds 26 actions and 25 images"),
    "no images": (drop(AGENT), rf"{NAME}: its {AGENT} are missing"),
    "two sizes of a demonstration": (put(WRIST, IMAGES[:, :90, :90]), r"images have the heights"),
    "two sizes": (
        put(AGENT, IMAGES[:, :90, :90]),
        rf"{NAME} has images of 90 px, and .*demo_0 of {SIZE}",
    ),
    "no states": (drop("states"), rf"{NAME}: its states are missing"),
    "states of nowhere": (leading_nowhere, rf"{NAME}: its states are missing|is broken"),
    "a state short": (put("states", np.zeros((NUM_STEPS - 1, 12))), r"its states are \[25, 12\]"),
    "narrow states": (put("states", np.zeros((NUM_STEPS, 5))), "too few for time and arm"),
    "NaN states": (put_at("states", (3, 0), np.nan), rf"{NAME}: its states hold .* at step 3"),
    "joints of six": (put("obs/joint_states", ACTIONS[:, :6]), "its obs/joint_states are"),
    "long mask": (put("disturbed", np.zeros(99)), rf"{NAME}: its disturbed are float64"),
    "mask of another length": (put("disturbed", np.zeros(99, bool)), r"its disturbed are \[99\]"),
    "no image rendered": (
        put("rendered", np.zeros(NUM_STEPS, bool)),
        rf"{NAME}: none of its {NUM_STEPS} actions to learn has an image before it",
    ),
    "mask of sevens": (put("rendered", np.full(NUM_STEPS, 7)), "its rendered hold another value"),
    "no JSON": (attribute("problem_info", "{"), r"problem_info is '\{' \(Invalid JSON"),
    "JSON of a list": (attribute("problem_info", "[]"), r"problem_info is '\[\]'"),
    "no sentence": (attribute("problem_info", "{}"), r"problem_info is '\{\}' \(Field required"),
    "a number for problem_info": (attribute("problem_info", 3), "data has no text 'problem_info'"),
}


def damaged(folder: Path, change: Change) -> Path:
    """Write demonstrations of which one is damaged, and return the damaged file."""
    path = demo_file(write_demos(folder), MINI.task(TASK).name)
    with h5py.File(path, "a") as file:
        change(file["data"], file[f"data/{NAME}"])
    return path


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_demonstration_is_refused_by_file_name_and_field(
    tmp_path: Path, change: Change, message: str
) -> None:
    path = damaged(tmp_path, change)
    with pytest.raises(ConfigError, match=message) as caught:
        read_demos(tmp_path, MINI, TASKS, DemoChoice())
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["NaN", "gripper 7", "8 values", "int8", "demo_x"])
def test_the_statistics_of_a_new_policy_are_read_by_the_same_check(
    tmp_path: Path, kind: str
) -> None:
    change, message = DAMAGED[kind]
    damaged(tmp_path, change)
    with pytest.raises(ConfigError, match=message):
        read_actions(tmp_path)


def test_the_command_refuses_before_a_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged(tmp_path / "demos", DAMAGED["NaN"][0])
    out = tmp_path / "run"
    words = ["recipe=sft_mini", f"demos.folder='{tmp_path / 'demos'}'", "demos.images=stored"]
    words += [f"environment.tasks={list(TASKS)}", f"out='{out}'"]
    assert main(["sft", *words]) == EXIT_USAGE
    assert f"{NAME}: its actions hold" in capsys.readouterr().err
    assert not out.exists()


FILES = {
    "text": (b"no HDF5", "is no LIBERO demonstration file or is broken"),
    "empty": (b"", "is no LIBERO demonstration file or is broken"),
    "magic alone": (b"\x89HDF\r\n\x1a\n", "is no LIBERO demonstration file or is broken"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_what_is_no_hdf5_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = demo_file(write_demos(tmp_path), MINI.task(TASK).name)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_demos(tmp_path, MINI, TASKS, DemoChoice())


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = demo_file(write_demos(tmp_path), MINI.task(TASK).name)
    whole = path.read_bytes()
    for end in (len(whole) // 3, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:end])
        with pytest.raises(ConfigError, match="is broken"):
            read_demos(tmp_path, MINI, TASKS, DemoChoice())


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    path = demo_file(write_demos(tmp_path), MINI.task(TASK).name)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError):
        read_demos(tmp_path, MINI, TASKS, DemoChoice())
    with pytest.raises(ConfigError, match="is a pipe or a device"):
        read_actions(tmp_path)


def test_a_file_without_demonstrations_is_refused(tmp_path: Path) -> None:
    path = demo_file(write_demos(tmp_path), MINI.task(TASK).name)
    with h5py.File(path, "w") as file:
        file["other"] = np.zeros(3)
    with pytest.raises(ConfigError, match="holds no group 'data'"):
        read_demos(tmp_path, MINI, TASKS, DemoChoice())
    with h5py.File(path, "w") as file:
        file.create_group("data")
    with pytest.raises(ConfigError, match="holds 0 episodes"):
        read_demos(tmp_path, MINI, TASKS, DemoChoice())


def test_an_image_that_is_damaged_is_named_where_it_is_read(tmp_path: Path) -> None:
    path = demo_file(write_demos(tmp_path), MINI.task(TASK).name)
    [demo, *_], _ = read_demos(tmp_path, MINI, [TASK], DemoChoice())
    with h5py.File(path) as file:
        chunk = file[f"data/{demo.name}/{AGENT}"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    first = chunk.byte_offset
    content[first : first + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(bytes(content))
    reader = FrameReader()
    with pytest.raises(ConfigError, match=rf"{path.name}: {demo.name}: row 0 of its {AGENT} is"):
        reader.read(demo, 0)
    reader.close()


def test_what_is_harmless_is_read(tmp_path: Path) -> None:
    path = demo_file(write_demos(tmp_path), MINI.task(TASK).name)
    with h5py.File(path, "a") as file:
        data, episode = file["data"], file[f"data/{NAME}"]
        put("actions", ACTIONS.astype(np.float32))(data, episode)
        # gone beyond by an action that is not the expert's
        episode["actions"][3] = 3 * LARGEST_ACTION
        episode["disturbed"][3] = 1
        data.attrs["problem_info"] = b'{"language_instruction": ["\\"do it\\""], "other": 1}'
        data.create_group("mask")
    learned, _ = read_demos(tmp_path, MINI, TASKS, DemoChoice(wording="problem_info"))
    assert learned[1].instruction == "do it"
    assert len(learned[1].own_actions) == NUM_STEPS - 1 < MOST_STEPS


def test_a_demonstration_shorter_than_a_chunk_is_named(tmp_path: Path) -> None:
    moving = IDLE.copy()
    moving[4:7, 0] = 0.3
    path = damaged(tmp_path / "demos", put("actions", moving))
    recipe = sft_recipe(tmp_path / "run", tmp_path / "demos", "trainer.eval_every=0")
    with (
        pytest.raises(ConfigError, match=rf"{path.name}: {NAME} has 3 actions.* 8 steps at a time"),
        open_sft_run(recipe),
    ):
        pytest.fail("opened")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "recording is"),
        ("[]", "recording is"),
        ('{"height_error_m": "x"}', "--height-error x"),
    ],
)
def test_damaged_settings_of_a_recording_are_refused(
    tmp_path: Path, settings: str, message: str
) -> None:
    path = damaged(tmp_path, attribute("recording", settings))
    with pytest.raises(ConfigError, match=message):
        _refuse_biased(path)
