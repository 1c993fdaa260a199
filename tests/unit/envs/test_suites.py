"""Suites: tasks, splits and step limits, read without a simulator."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from verl_vla.config.choices import CAMERAS, SUITES
from verl_vla.core.errors import ConfigError
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.suite import instruction_of, make_libero_env
from verl_vla.envs.libero.task import MAX_SAMPLED
from verl_vla.envs.registry import step_limit, suite

SIZES = {
    "mini": 7,
    "libero_spatial": 10,
    "libero_object": 10,
    "libero_goal": 10,
    "libero_10": 10,
    "libero_90": 90,
}
LIBERO = [name for name in SUITES if name != "mini"]


@pytest.mark.parametrize("name", SUITES)
def test_every_task_has_its_files_and_a_sentence(name: str) -> None:
    tasks = suite(name).tasks
    assert len(tasks) == SIZES[name]
    assert len({task.name for task in tasks}) == len(tasks)
    for task in tasks:
        assert task.bddl_file.is_file()
        assert task.init_states_file.is_file()
        assert task.instruction == task.instruction.lower()
        assert "_" not in task.instruction
        assert "scene" not in task.instruction


def test_mini_tasks_say_what_their_bddl_files_say() -> None:
    for task in suite("mini").tasks:
        assert f"(:language {task.instruction.capitalize()})" in task.bddl_file.read_text()


def test_the_scene_is_no_part_of_an_instruction() -> None:
    assert instruction_of("STUDY_SCENE1_pick_up_the_book") == "pick up the book"
    assert instruction_of("LIVING_ROOM_SCENE2_put_it_in") == "put it in"
    assert instruction_of("put_the_bowl_on_the_stove") == "put the bowl on the stove"


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("libero_spatial", 220),
        ("libero_object", 280),
        ("libero_goal", 300),
        ("libero_10", 520),
        ("libero_90", 400),
    ],
)
def test_published_limits_are_those_of_openvla_oft(name: str, published: int) -> None:
    assert step_limit(name, "published", 3) == published
    assert step_limit(name, "simplevla", 3) == 512
    assert step_limit(name, 100, 3) == 100


def test_mini_limits_belong_to_tasks_and_fit_whole_chunks() -> None:
    mini = suite("mini")
    limits = [mini.step_limit("published", i) for i in range(len(mini.tasks))]
    assert limits == [48, 64, 80, 96, 64, 64, 48]
    assert all(limit % 8 == 0 for limit in limits)


@pytest.mark.parametrize("limit", [0, -8, "longest", True])
def test_impossible_limits_are_refused(limit: object) -> None:
    with pytest.raises(ConfigError, match="step_limit is"):
        suite("libero_goal").step_limit(limit, 0)  # pyright: ignore[reportArgumentType]


def test_simplevla_never_played_the_mini_suite() -> None:
    with pytest.raises(ConfigError, match="choose 'published' or a number"):
        step_limit("mini", "simplevla", 0)


@pytest.mark.parametrize("name", SUITES)
def test_the_splits_share_nothing_and_leave_nothing_out(name: str) -> None:
    chosen = suite(name)
    train = chosen.init_state_ids(0, "train")
    held_out = chosen.init_state_ids(0, "held_out")
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == list(range(chosen.num_init_states))


@pytest.mark.parametrize("name", ["mini", "libero_spatial"])
def test_drawn_starts_are_no_recorded_ones(name: str) -> None:
    chosen = suite(name)
    assert min(chosen.init_state_ids(0, "sampled")) == chosen.num_init_states
    assert len(chosen.init_state_ids(0, "sampled")) == MAX_SAMPLED


def test_split_rules() -> None:
    assert suite("libero_goal").init_state_ids(2, "held_out") == list(range(4, 50, 5))
    assert suite("mini").init_state_ids(2, "train") == list(range(50))


def test_the_official_states_are_all_of_them_as_in_published_numbers() -> None:
    assert suite("libero_10").init_state_ids(0, "official") == list(range(50))
    assert suite("mini").init_state_ids(0, "official") == list(range(100))


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'libero_spatial'"):
        suite("libero_spacial")
    with pytest.raises(ConfigError, match="did you mean 'held_out'"):
        suite("mini").init_state_ids(0, "heldout")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"its tasks are 0\.\.6"):
        suite("mini").task(7)
    with pytest.raises(ConfigError, match=r"its tasks are 0\.\.89"):
        suite("libero_90").task(-1)


@pytest.mark.parametrize("name", LIBERO)
def test_libero_init_states_are_read_without_running_what_is_in_them(name: str) -> None:
    states = suite(name).load_init_states(0)
    assert states.shape[0] == 50
    assert states.dtype == np.float64
    assert np.isfinite(states).all()


def test_an_init_state_file_with_code_in_it_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    file = tmp_path / "harmful.pruned_init"
    torch.save(Harmful(), file)
    spatial = suite("libero_spatial")
    task = replace(spatial.tasks[0], init_states_file=file)
    with pytest.raises(ConfigError, match=r"harmful\.pruned_init .* asks for"):
        replace(spatial, tasks=(task,)).load_init_states(0)
    assert not (tmp_path / "ran").exists()


def test_a_wrong_or_missing_init_state_file_is_named(tmp_path: Path) -> None:
    mini = suite("mini")
    missing = replace(mini.tasks[0], init_states_file=tmp_path / "none.npz")
    with pytest.raises(ConfigError, match=r"none\.npz is missing"):
        replace(mini, tasks=(missing,)).load_init_states(0)
    np.savez(tmp_path / "few.npz", states=np.zeros((3, 32)))
    few = replace(mini.tasks[0], init_states_file=tmp_path / "few.npz")
    with pytest.raises(ConfigError, match="holds 3 states, not 100"):
        replace(mini, tasks=(few,)).load_init_states(0)


def test_mini_starts_all_differ() -> None:
    for task_id in range(7):
        states = suite("mini").load_init_states(task_id)
        assert len(np.unique(states, axis=0)) == 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"suite": "minni"}, "did you mean 'mini'"),
        ({"step_limit": 0}, "step_limit is 0"),
        ({"step_limit": "simplevla"}, "SimpleVLA-RL never played mini"),
        ({"render_size": 0}, "render_size is 0"),
        ({"image_size": -1}, "image_size is -1"),
        ({"settle_steps": -1}, "settle_steps is -1"),
        ({"max_simulators": 0}, "max_simulators is 0"),
        ({"cameras": ()}, f"choose from {CAMERAS[0]}"),
        ({"cameras": ("agent_view",)}, "did you mean 'agentview'"),
    ],
)
def test_an_impossible_environment_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_libero_env(EnvConfig(**values))  # pyright: ignore[reportArgumentType]


def test_reading_suites_starts_no_simulator() -> None:
    code = (
        "import sys; from verl_vla.envs.base import EnvConfig;"
        "from verl_vla.envs.libero.suite import make_libero_env;"
        "from verl_vla.envs.registry import suite; EnvConfig(suite='libero_10');"
        "suite('libero_10').load_init_states(0);"
        "print([m for m in ('mujoco', 'robosuite', 'libero') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.stdout.strip() == "[]", result.stderr
