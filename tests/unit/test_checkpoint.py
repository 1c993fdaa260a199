"""Which checkpoints are whole, whatever was killed and when."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from verl_vla.errors import ContractError
from verl_vla.trainer.checkpoint import (
    MARKER,
    complete_steps,
    discard_partial,
    load_run_state,
    mark_complete,
    remove_old,
    save_run_state,
    step_folder,
)


def write(checkpoints, step: int, is_complete: bool = True):
    folder = step_folder(checkpoints, step)
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "model.pt").write_bytes(b"weights")
    if is_complete:
        mark_complete(folder, step)
    return folder


def test_a_folder_is_named_as_verl_reads_it(tmp_path):
    assert step_folder(tmp_path, 12).name == "global_step_12"


def test_only_marked_folders_count_and_in_the_order_of_their_steps(tmp_path):
    for step in (10, 2, 9):
        write(tmp_path, step)
    write(tmp_path, 30, is_complete=False)
    assert complete_steps(tmp_path) == [2, 9, 10]


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert complete_steps(tmp_path / "nothing") == []
    assert complete_steps(tmp_path) == []


def test_a_checkpoint_that_somebody_put_aside_is_left_alone(tmp_path):
    write(tmp_path, 20).rename(tmp_path / "global_step_20_best")
    write(tmp_path, 30)
    write(tmp_path, 40)
    assert complete_steps(tmp_path) == [30, 40]
    remove_old(tmp_path, keep=1)
    assert (tmp_path / "global_step_20_best" / "actor" / "model.pt").exists()


def test_the_marker_lists_what_it_vouches_for(tmp_path):
    folder = write(tmp_path, 3)
    assert json.loads((folder / MARKER).read_text()) == {"step": 3, "files": ["actor/model.pt"]}
    assert sorted(p.name for p in folder.iterdir()) == [MARKER, "actor"]


def test_a_marker_that_was_not_yet_in_place_does_not_count(tmp_path):
    folder = write(tmp_path, 3, is_complete=False)
    (folder / f"{MARKER}.tmp").write_text("{}")
    assert complete_steps(tmp_path) == []


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_stay(tmp_path, keep, left):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    remove_old(tmp_path, keep)
    assert complete_steps(tmp_path) == left
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"global_step_{step}" for step in left]


def test_partial_checkpoints_do_not_push_whole_ones_out(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2, is_complete=False)
    remove_old(tmp_path, keep=1)
    assert complete_steps(tmp_path) == [1]


def test_a_removal_that_is_cut_short_leaves_no_whole_looking_folder(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)

    def die(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove_old(tmp_path, keep=1)
    assert complete_steps(tmp_path) == [2]


def test_what_a_killed_process_left_is_removed(tmp_path):
    folder = write(tmp_path, 1, is_complete=False)
    discard_partial(folder)
    assert not folder.exists()
    discard_partial(folder)


def test_the_state_of_a_run_comes_back_as_it_was(tmp_path):
    state = {
        "num_drawn": 24,
        "reward": {"mean": torch.tensor([1.5, 2.0]), "seen": [1, "a", None], "by_task": {0: 0.5}},
    }
    save_run_state(tmp_path, state)
    again = load_run_state(tmp_path)
    assert torch.equal(again["reward"].pop("mean"), state["reward"].pop("mean"))
    assert again == state


@pytest.mark.parametrize("value", [np.zeros(3), np.float32(1), Path("here")])
def test_a_state_that_could_not_be_read_back_is_refused_when_it_is_written(tmp_path, value):
    with pytest.raises(ContractError, match="change the reward's state_dict"):
        save_run_state(tmp_path, {"num_drawn": 1, "reward": {"x": value}})
