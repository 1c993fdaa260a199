"""Checkpoints that lost a manifest, a folder or their kind: nothing is skipped in silence."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from sudden_end import die, in_a_process_of_its_own

from verl_vla.core.errors import CheckpointError
from verl_vla.trainer import checkpoint
from verl_vla.trainer.checkpoint import (
    MANIFEST,
    complete_steps,
    find_fault,
    newest_valid,
    remove_old,
    step_folder,
    unfinished_folder,
    writing,
)


def write(checkpoints: Path, *steps: int) -> None:
    for step in steps:
        with writing(checkpoints, step) as folder:
            (folder / "actor").mkdir()
            (folder / "actor" / "model.pt").write_bytes(b"weights")


def lose_manifest(checkpoints: Path, step: int) -> None:
    (step_folder(checkpoints, step) / MANIFEST).unlink()


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


def test_a_newest_checkpoint_without_its_manifest_is_reported_and_can_be_saved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1, 2, 3)
    lose_manifest(tmp_path, 2)
    lose_manifest(tmp_path, 3)
    logging.getLogger("verl_vla").propagate = True
    assert newest_valid(tmp_path) == 1
    for step in (2, 3):
        assert f"CORRUPT CHECKPOINT {step_folder(tmp_path, step)}: {MANIFEST} is" in caplog.text
    assert "resuming from step 1. It was renamed to global_step_3_corrupt" in caplog.text
    write(tmp_path, 2, 3)
    assert newest_valid(tmp_path) == 3


def test_without_any_manifest_a_run_stops_and_everything_stays(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    for step in (1, 2):
        lose_manifest(tmp_path, step)
    before = names(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            newest_valid(tmp_path)
        for said in (
            f"no checkpoint in {tmp_path} is valid (step 2: manifest.json is missing; step 1: ",
            "restore one of them, remove the folder to train from the beginning",
        ):
            assert said in str(caught.value)
        assert names(tmp_path) == before


def test_checkpoints_that_are_gone_are_missed(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    for step in (1, 2):
        shutil.rmtree(step_folder(tmp_path, step))
    with pytest.raises(CheckpointError, match="latest names global_step_2, which is not there"):
        newest_valid(tmp_path)
    shutil.rmtree(tmp_path)
    assert newest_valid(tmp_path) is None, "the remedy that is offered"


@pytest.mark.parametrize("cleans", [newest_valid, lambda folder: remove_old(folder, 9)])
def test_what_a_killed_removal_left_is_removed(
    tmp_path: Path, cleans: Callable[[Path], object]
) -> None:
    write(tmp_path, 1, 2, 3)
    # as earlier versions removed a checkpoint: the manifest first
    lose_manifest(tmp_path, 1)
    cleans(tmp_path)
    assert names(tmp_path) == ["global_step_2", "global_step_3", "latest"]


def test_a_removal_that_is_killed_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove() -> int:
        monkeypatch.setattr("shutil.rmtree", die)
        remove_old(tmp_path, keep=1)
        return 0

    write(tmp_path, 1, 2, 3)
    assert in_a_process_of_its_own(remove) == -signal.SIGKILL
    assert names(tmp_path) == ["global_step_2", "global_step_3", "latest", "unfinished"]
    assert newest_valid(tmp_path) == 3
    assert names(tmp_path) == ["global_step_2", "global_step_3", "latest"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"step": 1, "files": {}}, "manifest.json names no file"),
        ({"step": 1}, "files is missing"),
        ({"step": 1, "files": {"actor/model.pt": {"bytes": "7"}}}, "bytes is '7'"),
        ({"step": 1, "files": {"actor/model.pt": {"bytes": 7}}}, "sha256 is missing"),
        (
            {"step": 4, "files": {"a": {"bytes": 1, "sha256": ""}}},
            "manifest.json is that of step 4",
        ),
        ({"step": 1, "files": {"../../a": {"bytes": 1, "sha256": ""}}}, "../../a is missing"),
    ],
)
def test_a_manifest_that_vouches_for_nothing_is_no_manifest(
    tmp_path: Path, content: object, said: str
) -> None:
    write(tmp_path, 1)
    (tmp_path / "a").write_text("a")
    (step_folder(tmp_path, 1) / MANIFEST).write_text(json.dumps(content))
    fault = find_fault(step_folder(tmp_path, 1))
    assert fault is not None
    assert said in fault


def file_for_checkpoint(checkpoints: Path) -> None:
    shutil.rmtree(step_folder(checkpoints, 2))
    step_folder(checkpoints, 2).write_text("a file")


def folder_for(name: str) -> Callable[[Path], None]:
    def replace(checkpoints: Path) -> None:
        file = step_folder(checkpoints, 2) / name
        file.unlink()
        (file / "inner").mkdir(parents=True)

    return replace


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (file_for_checkpoint, "it is a file, and must be a folder"),
        (folder_for(MANIFEST), "is a folder, and must be a file"),
        (folder_for("actor/model.pt"), "actor/model.pt is a folder, and must be a file"),
    ],
)
def test_a_file_for_a_folder_and_the_reverse_make_a_corrupt_checkpoint(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    write(tmp_path, 1, 2)
    damage(tmp_path)
    logging.getLogger("verl_vla").propagate = True
    assert newest_valid(tmp_path) == 1
    assert f"CORRUPT CHECKPOINT {step_folder(tmp_path, 2)}" in caplog.text
    assert said in caplog.text
    write(tmp_path, 2)
    assert newest_valid(tmp_path) == 2


def test_what_lies_where_checkpoints_belong_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a file")
    with pytest.raises(CheckpointError, match=f"{file} is a file, and must be a folder"):
        newest_valid(file)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "unmounted")
    with pytest.raises(CheckpointError, match=f"{link} is a link to .*unmounted, which is not"):
        newest_valid(link)
    checkpoints = tmp_path / "checkpoints"
    write(checkpoints, 1)
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").mkdir()
    with pytest.raises(CheckpointError, match="latest is a folder, and must be a link"):
        newest_valid(checkpoints)


def test_what_lies_where_only_this_program_writes_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "unfinished").write_text("a file")
    (tmp_path / "latest.tmp").mkdir()
    assert newest_valid(tmp_path) == 1
    kept = tmp_path.parent / f"{tmp_path.name}_kept"
    kept.mkdir()
    (kept / "file").touch()
    (tmp_path / "unfinished").symlink_to(kept)
    write(tmp_path, 2)
    assert names(tmp_path) == ["global_step_1", "global_step_2", "latest"]
    assert (kept / "file").exists(), "a link is removed, not what it names"


def test_a_folder_in_the_way_of_a_checkpoint_is_moved_and_not_a_reason_to_fail(
    tmp_path: Path,
) -> None:
    write(tmp_path, 1)
    (step_folder(tmp_path, 2) / "something").mkdir(parents=True)
    write(tmp_path, 2)
    assert newest_valid(tmp_path) == 2
    assert (tmp_path / "global_step_2_corrupt" / "something").is_dir()


def test_a_file_that_cannot_be_read_is_a_fault_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    write(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_sha256", fail)
    path = step_folder(tmp_path, 1) / "actor" / "model.pt"
    assert find_fault(path.parents[1]) == f"{path} cannot be read (Input/output error)"


def test_a_checkpoint_that_is_being_written_is_nobodys_remains(tmp_path: Path) -> None:
    write(tmp_path, 2)
    with writing(tmp_path, 3) as folder:
        assert folder == unfinished_folder(tmp_path, 3)
        assert complete_steps(tmp_path) == [2]
    assert complete_steps(tmp_path) == [2, 3]
