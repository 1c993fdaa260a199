"""The checkpoint before the first training step: who sees it, and what is said where it fails."""

from __future__ import annotations

import gc
import logging
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ray.exceptions import ActorDiedError
from small_disk import small_disk
from sudden_end import die, in_a_process_of_its_own

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.runs.disk_space import written_bytes
from verl_vla.trainer import checkpoint
from verl_vla.trainer.checkpoint import (
    MANIFEST,
    complete_steps,
    find_fault,
    newest_valid,
    remove_old,
    step_folder,
    writing,
)
from verl_vla.trainer.grpo.save_check import check_save

MIB = 2**20
DISK = {"checkpoints": 3 * 4 * MIB, "videos": 1}
Usage = namedtuple("Usage", "total used free")


def write(mib: int = 1) -> Callable[[Path], None]:
    """Return what writes two files, of ``mib`` in all."""

    def save(folder: Path) -> None:
        (folder / "actor").mkdir()
        torch.save(torch.zeros(mib * MIB // 4), folder / "actor" / "model.pt")
        (folder / "state.json").write_text("{}")

    return save


def check(checkpoints: Path, save=None, load=lambda folder: None) -> None:
    check_save(checkpoints, save=save or write(), load=load, disk=DISK, most_checkpoints=3)


def refusal(checkpoints: Path, **how) -> str:
    """What is said where it fails; its frames, which keep files open, are gone then."""
    with pytest.raises(ConfigError) as caught:
        check(checkpoints, **how)
    said = str(caught.value)
    del caught
    gc.collect()
    return said


def test_it_is_complete_when_it_is_loaded_no_step_to_anybody_and_gone_after_it(
    tmp_path, caplog
) -> None:
    logging.getLogger("verl_vla").propagate = True
    caplog.set_level("INFO", logger="verl_vla")
    checkpoints = tmp_path / "checkpoints"
    loaded: list[Path] = []

    def load(folder: Path) -> None:
        assert folder.name == "global_step_0", "veRL reads a step from the name"
        assert (folder / MANIFEST).is_file()
        assert find_fault(folder) is None
        assert complete_steps(checkpoints) == []
        assert not (checkpoints / "latest").is_symlink()
        remove_old(checkpoints, keep=1)
        # a run that is started again needs no more room for it
        assert written_bytes(tmp_path) > MIB
        loaded.append(folder)

    check(checkpoints, load=load)
    assert not loaded[0].exists()
    assert list(checkpoints.iterdir()) == []
    assert newest_valid(checkpoints) is None
    assert "checkpoint check: 0.00 GB, planned at most 0.00, were written in 0s, " in caplog.text


@pytest.mark.parametrize("when", ["save", "load"])
def test_what_a_kill_leaves_of_it_is_removed_at_the_next_start(tmp_path, when) -> None:
    def killed() -> int:
        def save(folder: Path) -> None:
            write()(folder)
            if when == "save":
                die()

        check(tmp_path, save=save, load=die)
        return 0

    assert in_a_process_of_its_own(killed) == -signal.SIGKILL
    assert (tmp_path / "unfinished" / "global_step_0" / "state.json").exists()
    assert complete_steps(tmp_path) == []
    assert newest_valid(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    with writing(tmp_path, 1) as folder:
        write()(folder)
    assert newest_valid(tmp_path) == 1


def test_a_disk_that_is_too_small_is_named_with_its_bytes(tmp_path) -> None:
    checkpoints = tmp_path / "checkpoints"
    with small_disk(checkpoints, mib=2):
        said = refusal(checkpoints, save=write(mib=4))
        assert said.startswith(
            f"trainer.check_save: a checkpoint could not be written to {checkpoints} before the "
            "first training step ("
        )
        assert ": 0.00 GB of at most 0.00 GB were written, and 0.00 GB were left. " in said
        assert "Make room, lift a quota, or choose out=FOLDER on another disk. " in said
        assert list(checkpoints.iterdir()) == [], "what was written takes up the room"
        check(checkpoints)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), ActorDiedError()],
)
def test_a_memory_that_is_too_small_is_told_from_a_disk(tmp_path, error) -> None:
    def load(folder: Path) -> None:
        raise error

    said = refusal(tmp_path, load=load)
    assert f"a checkpoint could not be read back from {tmp_path} before" in said
    assert "Run verl-vla plan with the same words" in said
    assert "choose out=FOLDER" not in said
    assert not (tmp_path / "unfinished").exists()


def test_files_that_change_on_the_disk_are_found(tmp_path, monkeypatch) -> None:
    seal = checkpoint.seal

    def seal_and_lose(folder: Path, step: int) -> None:
        seal(folder, step)
        (folder / "state.json").write_text("[]")

    monkeypatch.setattr(checkpoint, "seal", seal_and_lose)
    assert "(state.json has another SHA-256 than when it was written)" in refusal(tmp_path)


def test_a_state_that_cannot_be_saved_is_the_fault_of_its_code(tmp_path) -> None:
    def save(folder: Path) -> None:
        raise ContractError("change the reward's state_dict")

    with pytest.raises(ContractError, match="state_dict"):
        check(tmp_path, save=save)
    assert not (tmp_path / "unfinished").exists()


def test_room_for_one_is_not_room_for_all_that_are_kept(tmp_path, monkeypatch) -> None:
    """Another process may have written since the run was started."""
    size = 4 * MIB
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0, 0, 2 * size))
    said = refusal(tmp_path / "checkpoints", save=write(mib=4))
    assert f"out is {tmp_path}, where 0.0 GB are free, and the run needs up to 0.0 GB more" in said


def test_a_checkpoint_of_a_step_stays(tmp_path) -> None:
    with writing(tmp_path, 1) as folder:
        write()(folder)
    check(tmp_path)
    assert newest_valid(tmp_path) == 1
    assert find_fault(step_folder(tmp_path, 1)) is None
