"""Which checkpoints are whole, whatever was killed and when, and what is done about the others."""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_disk import small_disk
from sudden_end import die, in_a_process_of_its_own

from verl_vla.cli.main import EXIT_CHECKPOINT, main
from verl_vla.core.errors import CheckpointError, ContractError
from verl_vla.trainer import checkpoint
from verl_vla.trainer.checkpoint import (
    MANIFEST,
    complete_steps,
    find_fault,
    load_run_state,
    newest_valid,
    remove_old,
    save_run_state,
    step_folder,
    writing,
)


def write(checkpoints: Path, step: int, weights: bytes = b"weights") -> Path:
    with writing(checkpoints, step) as folder:
        (folder / "actor").mkdir()
        (folder / "actor" / "model.pt").write_bytes(weights)
        (folder / "state.json").write_text("{}")
    return step_folder(checkpoints, step)


def test_a_folder_is_named_as_verl_reads_it(tmp_path):
    assert step_folder(tmp_path, 12).name == "global_step_12"


def test_only_whole_folders_count_and_in_the_order_of_their_steps(tmp_path):
    for step in (10, 2, 9):
        write(tmp_path, step)
    step_folder(tmp_path, 30).mkdir()
    assert complete_steps(tmp_path) == [2, 9, 10]


def test_a_run_without_checkpoints_has_none(tmp_path):
    for checkpoints in (tmp_path, tmp_path / "nothing"):
        assert complete_steps(checkpoints) == []
        assert newest_valid(checkpoints) is None


def test_a_checkpoint_that_was_quarantined_is_left_alone(tmp_path):
    write(tmp_path, 20).rename(tmp_path / "global_step_20_best")
    write(tmp_path, 30)
    write(tmp_path, 40)
    assert complete_steps(tmp_path) == [30, 40]
    remove_old(tmp_path, keep=1)
    assert (tmp_path / "global_step_20_best" / "actor" / "model.pt").exists()


def test_the_manifest_vouches_for_every_file(tmp_path):
    folder = write(tmp_path, 3)
    content = json.loads((folder / MANIFEST).read_text())
    assert content["step"] == 3
    assert content["files"] == {
        "actor/model.pt": {
            "bytes": 7,
            # printf weights | sha256sum
            "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
        },
        "state.json": {
            "bytes": 2,
            # printf {} | sha256sum
            "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        },
    }
    assert find_fault(folder) is None


def test_nothing_is_seen_of_a_checkpoint_before_it_is_whole(tmp_path):
    write(tmp_path, 1)
    with writing(tmp_path, 2) as folder:
        (folder / "model.pt").write_bytes(b"half")
        assert complete_steps(tmp_path) == [1]
        assert (tmp_path / "latest").readlink() == Path("global_step_1")
    assert complete_steps(tmp_path) == [1, 2]
    assert (tmp_path / "latest").readlink() == Path("global_step_2")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["global_step_1", "global_step_2", "latest"]


@pytest.mark.parametrize(
    ("moment", "newest"), [("body", 1), ("_hash_all", 1), ("_point_latest", 2)]
)
def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, moment, newest
):
    def save_and_die():
        if moment != "body":
            monkeypatch.setattr(checkpoint, moment, die)
        with writing(tmp_path, 2) as folder:
            (folder / "model.pt").write_bytes(b"half")
            if moment == "body":
                die()

    write(tmp_path, 1)
    assert in_a_process_of_its_own(save_and_die) == -signal.SIGKILL
    assert newest_valid(tmp_path) == newest
    assert (tmp_path / "latest").readlink() == Path(f"global_step_{newest}")
    write(tmp_path, 3)
    assert complete_steps(tmp_path)[-2:] == [newest, 3]
    assert not (tmp_path / "unfinished").exists()


def flip_a_bit(folder: Path) -> None:
    file = folder / "actor" / "model.pt"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)


CORRUPTIONS = [
    (flip_a_bit, "actor/model.pt has another SHA-256"),
    (lambda folder: os.truncate(folder / "actor" / "model.pt", 3), "has 3 bytes instead of 7"),
    (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    (lambda folder: os.truncate(folder / MANIFEST, 40), "manifest.json cannot be read"),
    (lambda folder: (folder / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
]


@pytest.mark.parametrize(("corrupt", "fault"), CORRUPTIONS)
def test_a_corrupt_checkpoint_is_quarantined_with_a_warning_and_the_one_before_used(
    tmp_path, caplog, corrupt, fault
):
    for step in (1, 2):
        write(tmp_path, step)
    corrupt(step_folder(tmp_path, 2))
    logging.getLogger("verl_vla").propagate = True
    assert newest_valid(tmp_path) == 1
    assert f"CORRUPT CHECKPOINT {step_folder(tmp_path, 2)}" in caplog.text
    assert fault in caplog.text
    assert "resuming from step 1" in caplog.text
    assert (tmp_path / "latest").readlink() == Path("global_step_1")
    assert (tmp_path / "global_step_2_corrupt").is_dir()
    write(tmp_path, 2)
    assert newest_valid(tmp_path) == 2


def test_of_several_missing_files_the_first_by_name_is_told(tmp_path):
    with writing(tmp_path, 1) as folder:
        for number in range(30):
            (folder / f"shard_{number:02}.pt").write_bytes(b"weights")
    for file in step_folder(tmp_path, 1).glob("shard_*"):
        file.unlink()
    assert find_fault(step_folder(tmp_path, 1)) == "shard_00.pt is missing"


def test_a_run_does_not_begin_again_because_its_checkpoints_are_corrupt(tmp_path):
    for step in (1, 2):
        flip_a_bit(write(tmp_path, step))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint .* is valid \(step 2: .*step 1"):
            newest_valid(tmp_path)


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_stay(tmp_path, keep, left):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    remove_old(tmp_path, keep)
    assert complete_steps(tmp_path) == left
    folders = sorted(p.name for p in tmp_path.iterdir() if not p.is_symlink())
    assert folders == [f"global_step_{step}" for step in left]


def test_a_removal_that_is_cut_short_leaves_no_whole_looking_folder(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        remove_old(tmp_path, keep=1)
    assert complete_steps(tmp_path) == [2]


def save_floats(checkpoints: Path, step: int, mib: int) -> None:
    with writing(checkpoints, step) as folder:
        torch.save(torch.zeros(mib * 2**18), folder / "model.pt")


def refusal(save: Callable[[], None]) -> str:
    """Why ``save`` failed; its frames, which keep files open, are gone then."""
    with pytest.raises(CheckpointError) as caught:
        save()
    said = str(caught.value)
    del caught
    gc.collect()  # the frames refer to each other
    return said


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    with small_disk(checkpoints, mib=3):
        save_floats(checkpoints, 1, mib=1)
        said = refusal(lambda: save_floats(checkpoints, 2, mib=4))
        assert f"the checkpoint of step 2 could not be written to {checkpoints}" in said
        assert "0 MiB were left there). That of step 1 is whole." in said
        assert newest_valid(checkpoints) == 1
        assert not (checkpoints / "unfinished").exists(), "what was written takes up the room"
        save_floats(checkpoints, 2, mib=1)
        assert newest_valid(checkpoints) == 2


def test_a_file_that_the_system_refuses_ends_the_command_with_its_own_code(
    tmp_path, monkeypatch, capfd
):
    def save(words):
        with writing(tmp_path, 1) as folder:
            (folder / "model.pt").write_bytes(bytes(2**21))

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        monkeypatch.setattr("verl_vla.cli.recipes.run", save)
        return main(["recipes"])

    assert in_a_process_of_its_own(limited) == EXIT_CHECKPOINT
    said = capfd.readouterr().err
    assert "stopped: the checkpoint of step 1 could not be written" in said
    assert "File too large" in said
    assert "There is no other. Remove the cause" in said
    assert "Traceback" not in said


def test_the_state_of_a_run_comes_back_as_it_was(tmp_path):
    state = {
        "num_groups_sampled": 24,
        "reward": {"mean": torch.tensor([1.5, 2.0]), "seen": [1, "a", None], "by_task": {0: 0.5}},
    }
    save_run_state(tmp_path, state)
    again = load_run_state(tmp_path)
    assert torch.equal(again["reward"].pop("mean"), state["reward"].pop("mean"))
    assert again == state


@pytest.mark.parametrize("value", [np.zeros(3), np.float32(1), Path("here")])
def test_a_state_that_could_not_be_read_back_is_refused_when_it_is_written(tmp_path, value):
    with (
        pytest.raises(ContractError, match="change the reward's state_dict"),
        writing(tmp_path, 1) as folder,
    ):
        save_run_state(folder, {"num_groups_sampled": 1, "reward": {"x": value}})
    assert complete_steps(tmp_path) == []


def test_all_of_a_checkpoint_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    """A power cut at any moment leaves a manifest with all that it names, or none."""
    events: list[tuple[str, str]] = []
    sync, rename, replace = os.fsync, Path.rename, Path.replace

    def place(path: str | Path) -> str:
        return str(Path(path).relative_to(tmp_path.parent)).replace(tmp_path.name, "top", 1)

    def noting_sync(descriptor: int) -> None:
        events.append(("sync", place(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    def noting_rename(path: Path, target: Path) -> Path:
        events.append(("rename", place(target)))
        return rename(path, target)

    def noting_replace(path: Path, target: Path) -> Path:
        events.append(("link", place(target)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(Path, "rename", noting_rename)
    monkeypatch.setattr(Path, "replace", noting_replace)
    write(tmp_path, 7)
    unfinished = "top/unfinished/global_step_7"
    content = ["actor", "actor/model.pt", "state.json"]
    assert sorted(events[:3]) == [("sync", f"{unfinished}/{name}") for name in content]
    assert events[3:] == [
        ("sync", f"{unfinished}/{MANIFEST}"),
        ("sync", unfinished),
        ("rename", "top/global_step_7"),
        ("sync", "top"),
        ("link", "top/latest"),
        ("sync", "top"),
    ]
    assert not (tmp_path / "unfinished").exists()


def test_what_a_killed_process_left_is_removed_before_anything_is_written(tmp_path):
    left = tmp_path / "unfinished" / "global_step_1"
    left.mkdir(parents=True)
    (left / "half.pt").write_bytes(b"half")
    with writing(tmp_path, 1) as folder:
        assert folder == left
        assert list(folder.iterdir()) == []
        (folder / "model.pt").write_bytes(b"weights")
    (tmp_path / "unfinished" / "global_step_2").mkdir(parents=True)
    assert newest_valid(tmp_path) == 1
    assert not (tmp_path / "unfinished").exists()


def test_a_link_that_was_cut_short_is_made_again(tmp_path):
    (tmp_path / "latest.tmp").symlink_to("nowhere")
    write(tmp_path, 1)
    assert (tmp_path / "latest").readlink() == Path("global_step_1")
    assert not (tmp_path / "latest.tmp").is_symlink()


def test_a_fault_of_the_reward_is_not_said_to_be_one_of_the_disk(tmp_path):
    with pytest.raises(ContractError, match="the reward's fault"), writing(tmp_path, 1):
        raise ContractError("the reward's fault")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError("no room"), r"of step 1 .*\(no room; \d+ MiB were left there"),
        (OSError("a\nlast line\n"), r"\(last line; "),
        (OSError(), r"\(OSError\(\); .*There is no other"),
    ],
)
def test_why_nothing_was_written_is_said_in_a_line(tmp_path, error, says):
    with pytest.raises(CheckpointError, match=says), writing(tmp_path, 1):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_second_quarantine_takes_the_place_of_the_first(tmp_path):
    write(tmp_path, 1)
    for content in (b"first", b"again"):
        flip_a_bit(write(tmp_path, 2, content))
        assert newest_valid(tmp_path) == 1
    kept = (tmp_path / "global_step_2_corrupt" / "actor" / "model.pt").read_bytes()
    assert kept[:3] == b"aga"


def test_files_of_any_size_are_hashed_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "HASH_BLOCK", 3)
    manifest = json.loads((write(tmp_path, 3) / MANIFEST).read_text())
    weights = manifest["files"]["actor/model.pt"]
    assert weights["sha256"].startswith("9a129038d9a00aed")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with (
        pytest.raises(CheckpointError, match="step 1 could not be written .*Not a directory"),
        writing(tmp_path / "checkpoints", 1),
    ):
        pass


def test_files_are_closed_again(tmp_path):
    write(tmp_path, 1)
    before = os.listdir("/proc/self/fd")
    write(tmp_path, 2)
    assert newest_valid(tmp_path) == 2
    assert len(os.listdir("/proc/self/fd")) == len(before)
