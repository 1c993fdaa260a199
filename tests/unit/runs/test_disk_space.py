"""Disk space of a run, asked for before it starts."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from verl_vla.cli import plan
from verl_vla.cli.arguments import parse
from verl_vla.config.compose import load_recipe
from verl_vla.config.grpo import Recipe
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import free_bytes
from verl_vla.envs.registry import suite
from verl_vla.policies.base import PolicyShape
from verl_vla.runs.disk_space import (
    GB,
    WeightCount,
    count_stored,
    disk_bytes,
    require_disk_space,
)

SPATIAL = suite("libero_spatial")
SHAPE = PolicyShape(num_views=1, image_size=224, chunk_length=8, action_dim=7, num_bins=256)
PUBLISHED = 7_541_000_000
Usage = namedtuple("Usage", "total used free")


def recipe(*words: str) -> Recipe:
    return load_recipe(["recipe=libero", *words])


def needed(chosen: Recipe, trained: int = PUBLISHED) -> dict[str, int]:
    return disk_bytes(chosen, WeightCount(PUBLISHED, trained), SHAPE, SPATIAL)


def test_three_checkpoints_of_120_gb_for_all_weights() -> None:
    """Two are kept, and the third is complete before the first is removed."""
    parts = needed(recipe("profile=8gpu"))
    assert parts["checkpoints"] == pytest.approx(3 * 120.6 * GB, rel=1e-3)
    assert 0.05 < parts["videos"] / GB < 1
    assert 0.05 < parts["episode log"] / GB < 1


@pytest.mark.parametrize(
    ("words", "checkpoints"),
    [
        ("trainer.keep_checkpoints=1", 2),
        ("trainer.save_every=0", 1),
        ("trainer.total_training_steps=40 trainer.save_every=20", 2),
        ("trainer.total_training_steps=30 trainer.save_every=20 trainer.keep_checkpoints=5", 2),
    ],
)
def test_no_more_checkpoints_than_are_written_and_kept(words: str, checkpoints: int) -> None:
    parts = needed(recipe("profile=8gpu", *words.split()))
    assert parts["checkpoints"] == pytest.approx(checkpoints * 120.6 * GB, rel=1e-3)


def test_of_adapters_only_the_export_is_large() -> None:
    """bfloat16 weights, and float32 adapters with two moments."""
    parts = needed(recipe("profile=lora_24gb"), trained=40_000_000)
    assert parts["checkpoints"] == 3 * (2 * PUBLISHED + 12 * 40_000_000)


def test_episodes_and_videos_grow_with_what_is_kept() -> None:
    one, four = (needed(recipe(f"trainer.keep_groups={kept}")) for kept in (1, 4))
    assert four["videos"] == 4 * one["videos"]
    assert four["episode log"] > one["episode log"]
    assert needed(recipe("trainer.keep_groups=0"))["videos"] == 0


def test_stored_weights_and_a_bound_of_their_adapters_are_counted() -> None:
    layout = {"a.weight": ((4, 6), "BF16"), "a.bias": ((4,), "BF16")}
    full = recipe("profile=8gpu").policy
    assert count_stored(layout, full) == WeightCount(28, 28)
    adapted = replace(full, lora_rank=2)
    assert count_stored(layout, adapted) == WeightCount(28 + 20, 20)


def test_a_disk_that_is_too_small_is_refused_with_the_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Path] = []

    def usage(folder: Path) -> Usage:
        asked.append(folder)
        return Usage(0, 0, 10 * GB)

    monkeypatch.setattr("shutil.disk_usage", usage)
    folder = tmp_path / "not" / "there"
    require_disk_space(folder, {"checkpoints": int(10 * GB)})
    with pytest.raises(ConfigError) as caught:
        require_disk_space(folder, {"checkpoints": int(11 * GB), "videos": int(2 * GB)})
    assert str(caught.value) == (
        f"out is {folder}, where 10.0 GB are free, and the run needs up to 13.0 GB more (in all: "
        "checkpoints 11.0 GB, videos 2.0 GB); choose out=FOLDER on a larger disk, or a smaller "
        "trainer.keep_checkpoints"
    )
    assert free_bytes(folder) == 10 * GB
    assert {*asked} == {tmp_path}


def test_a_resumed_run_needs_only_what_is_not_written_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0, 0, 100))
    checkpoints = tmp_path / "checkpoints"
    for name in ("global_step_4/policy", "unfinished/global_step_5", "global_step_3_corrupt"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "file").write_bytes(b"x" * 50)
    (checkpoints / "latest").symlink_to("global_step_4")
    require_disk_space(tmp_path, {"checkpoints": 200})
    with pytest.raises(ConfigError, match="needs up to"):
        require_disk_space(tmp_path, {"checkpoints": 201})


def test_the_plan_shows_the_disk_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=libero", "suite=mini", "profile=two_cores", "policy.path=bases/mini"]
    plan.run(parse("plan", words))
    printed = capsys.readouterr().out
    table = printed.split("disk of the run's folder, GB\n")[1].splitlines()
    assert [line.split()[0] for line in table[:4]] == [
        "checkpoints",
        "episode",
        "videos",
        "together",
    ]
