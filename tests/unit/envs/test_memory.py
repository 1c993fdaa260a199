"""The memory that a machine or its control group leaves, and that a process takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from verl_vla.envs.libero.memory import available_bytes, unique_set_size

GIB = 1 << 30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text(
        f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {32 << 20} kB\n"
    )
    return tmp_path


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")
    return folder


def test_a_machine_without_limits_offers_what_the_kernel_says(proc: Path) -> None:
    assert available_bytes(proc, proc / "none") == 32 * GIB


def test_a_container_offers_what_its_limit_leaves(proc: Path) -> None:
    stat = f"anon 5\ninactive_file {GIB}"
    group = write(proc / "v2", max=8 * GIB, current=7 * GIB, stat=stat)
    assert available_bytes(proc, group) == 2 * GIB


def test_a_container_without_a_limit_is_the_machine(proc: Path) -> None:
    group = write(proc / "v2", max="max", current=7 * GIB, stat="inactive_file 0")
    assert available_bytes(proc, group) == 32 * GIB


def test_a_group_of_version_1_is_read_too(proc: Path) -> None:
    files = {"limit_in_bytes": 4 * GIB, "usage_in_bytes": 3 * GIB}
    write(proc / "v1" / "memory", **files, stat="total_inactive_file 0")
    assert available_bytes(proc, proc / "v1") == GIB


def test_more_used_than_allowed_is_none_left(proc: Path) -> None:
    group = write(proc / "v2", max=GIB, current=2 * GIB, stat="inactive_file 0")
    assert available_bytes(proc, group) == 0


def test_a_kernel_that_does_not_say_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")
    with pytest.raises(ValueError, match="MemAvailable"):
        available_bytes(tmp_path, tmp_path)


def test_this_machine_has_some() -> None:
    assert 0 < available_bytes() < 1 << 50


def test_the_limit_of_a_batch_job_is_found_by_its_path(proc: Path) -> None:
    (proc / "self").mkdir()
    (proc / "self" / "cgroup").write_text("0::/slurm/job_7/step_0\n")
    job = proc / "groups" / "slurm" / "job_7"
    write(job, max=16 * GIB, current=6 * GIB, stat="inactive_file 0")
    write(job / "step_0", max="max", current=6 * GIB, stat="inactive_file 0")
    assert available_bytes(proc, proc / "groups") == 10 * GIB


def test_a_job_of_version_1_is_found_by_its_path(proc: Path) -> None:
    (proc / "self").mkdir()
    (proc / "self" / "cgroup").write_text("4:cpu,cpuacct:/other\n3:memory:/job\n0::/\n")
    files = {"limit_in_bytes": 4 * GIB, "usage_in_bytes": GIB}
    write(proc / "groups" / "memory" / "job", **files, stat=f"total_inactive_file {GIB}")
    assert available_bytes(proc, proc / "groups") == 4 * GIB


def test_the_unique_set_size_counts_private_pages_alone() -> None:
    rollup = "55d0-7ffe ---p 00000000 00:00 0 [rollup]\nRss: 900 kB\nShared_Clean: 500 kB\n"
    rollup += "Private_Clean: 100 kB\nPrivate_Dirty: 300 kB\nSwap: 7 kB\n"
    assert unique_set_size(rollup) == 400 * 1024
