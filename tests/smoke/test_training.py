"""The whole system: veRL's trainer, Ray, real physics, the embedded policy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import PROJECT, SECRET, TrainingRun

from verl_vla.actions import load_statistics
from verl_vla.cli.main import EXIT_COLD_START, EXIT_LEARNER_LOST, EXIT_STARVED
from verl_vla.envs.assets import assets_available
from verl_vla.envs.suites import suite
from verl_vla.errors import EXIT_SIGNAL
from verl_vla.metrics import METRICS, OPEN_FAMILIES, is_reproducible, read_metrics
from verl_vla.policies.openvla_oft.tiny import build_tiny_policy
from verl_vla.trainer.checkpoint import complete_steps, step_folder

pytestmark = [pytest.mark.smoke, pytest.mark.sim]

EQUAL_UPDATE = 1e-5
"""How far one rank's first update may be from that of two: float32 sums in another order."""

RATIO_TOLERANCE = 1e-3
"""The first mini-batch is scored by the weights that acted."""


def reproducible(folder: Path) -> list[dict[str, float]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if is_reproducible(k)} for line in lines]


def weights(run: TrainingRun, step: int) -> dict[str, torch.Tensor]:
    folder = step_folder(run.folder / "checkpoints", step) / "policy"
    return load_file(folder / "model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_a_run_reports_every_declared_metric(whole_run: TrainingRun) -> None:
    lines = read_metrics(whole_run.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    seen = set().union(*lines) - {"step"}
    assert set(METRICS) <= seen
    assert all(name in METRICS or name.startswith(OPEN_FAMILIES) for name in seen)
    assert (whole_run.folder / "curve.png").stat().st_size > 0


def test_rollout_and_update_agree_on_the_log_probs(whole_run: TrainingRun) -> None:
    for line in read_metrics(whole_run.folder / "metrics.jsonl"):
        assert abs(line["actor/ratio_first"] - 1) < RATIO_TOLERANCE
        assert line["actor/ratio_first_deviation"] < RATIO_TOLERANCE


def test_a_training_step_moves_the_weights(whole_run: TrainingRun) -> None:
    base = load_file(PROJECT / "bases" / "mini" / "model.safetensors")
    moved = weights(whole_run, 1)
    assert largest_difference(base, moved) > EQUAL_UPDATE


def learner_of(run: subprocess.Popen[str]) -> int:
    """Process id of the Ray worker that learns for ``run``."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and run.pid in ancestors(int(folder.name)):
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            if title.startswith("ray::") and "WorkerDict" in title:
                return int(folder.name)
    raise AssertionError("the run has no learner")


def ancestors(pid: int) -> list[int]:
    found: list[int] = []
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:  # it has ended meanwhile
            return found
        pid = int(stat.rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def test_a_run_that_ends_in_every_way_goes_on_as_if_nothing_had_happened(
    whole_run: TrainingRun, small_words: list[str], tmp_path: Path
) -> None:
    run = TrainingRun(tmp_path / "run", small_words)
    checkpoints = run.folder / "checkpoints"

    # somebody asks for the end while the first step is played
    process = run.start_until((run.folder / "gate.json").exists)
    process.send_signal(signal.SIGTERM)
    said = run.await_end(process, EXIT_SIGNAL + signal.SIGTERM)
    assert "stopped: SIGTERM after step 1; the same command goes on from there" in said
    assert "Traceback" not in said
    assert complete_steps(checkpoints) == [1]

    # a learner dies
    process = run.start_until(lambda: complete_steps(checkpoints)[-1:] == [2])
    os.kill(learner_of(process), signal.SIGKILL)
    said = run.await_end(process, EXIT_LEARNER_LOST)
    assert "stopped: a learner process died" in said
    newest = complete_steps(checkpoints)[-1]
    assert f"goes on from the checkpoint of step {newest}" in said

    # the trainer dies while it saves
    unfinished = checkpoints / "unfinished" / f"global_step_{newest + 1}"
    run.kill_when(lambda: unfinished.exists() or complete_steps(checkpoints)[-1] > newest)

    # the newest checkpoint is not what was written
    newest = complete_steps(checkpoints)[-1]
    (file,) = step_folder(checkpoints, newest).glob("actor/optim*.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = run.finish()
    assert f"CORRUPT CHECKPOINT {step_folder(checkpoints, newest)}" in said
    assert f"going on from step {newest - 1}" in said

    assert reproducible(run.folder) == reproducible(whole_run.folder)
    assert largest_difference(weights(run, 4), weights(whole_run, 4)) == 0


def test_a_run_writes_down_no_secret(whole_run: TrainingRun) -> None:
    files = [path for path in whole_run.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def test_two_ranks_make_the_same_first_update_as_one(
    whole_run: TrainingRun, small_words: list[str], tmp_path: Path
) -> None:
    run = TrainingRun(
        tmp_path / "run",
        [*small_words, "cluster.ranks_per_node=2", "trainer.total_training_steps=1"],
    )
    run.finish()
    assert largest_difference(weights(run, 1), weights(whole_run, 1)) < EQUAL_UPDATE
    one, two = (read_metrics(r.folder / "metrics.jsonl")[0] for r in (whole_run, run))
    for name in ("rollout/success_rate", "rollout/steps", "groups/kept"):
        assert one[name] == two[name]


def test_the_embedded_policy_learns(tmp_path: Path) -> None:
    run = TrainingRun(
        tmp_path / "run",
        ["recipe=quickstart", "trainer.total_training_steps=4", "trainer.save_every=0"],
    )
    run.finish()
    before, after = (
        json.loads((run.folder / "evaluations" / f"step_{step}.json").read_text())["total"]
        for step in (0, 4)
    )
    assert before["episodes"] >= 100
    # Beyond chance: the interval of the trained policy lies above the rate of the base.
    assert after["ci95"][0] > before["rate"], (before, after)


@pytest.mark.skipif(not assets_available(), reason="LIBERO's assets are not on this machine")
def test_one_update_on_real_libero_spatial(tmp_path: Path) -> None:
    run = TrainingRun(
        tmp_path / "run",
        [
            "recipe=libero_spatial_tiny",
            "trainer.total_training_steps=1",
            "environment.tasks=[0]",
            "environment.step_limit=24",
            "sampling.groups_per_step=1",
        ],
    )
    run.finish()
    (line,) = read_metrics(run.folder / "metrics.jsonl")
    assert line["rollout/episodes"] == 2
    assert line["rollout/crashes"] == 0
    assert line["rollout/steps"] == 48
    assert line["eval/episodes"] == 1


def test_a_run_that_cannot_learn_stops_and_says_why(tmp_path: Path) -> None:
    run = TrainingRun(
        tmp_path / "run",
        [
            "recipe=quickstart",
            "environment.tasks=[1]",
            "environment.step_limit=2",
            "gate.mode=off",
            "sampling.groups_per_step=2",
            "sampling.group_size=2",
            "sampling.max_rounds=2",
            "trainer.eval_before=false",
        ],
    )
    said = run.finish(EXIT_STARVED)
    assert "4 groups (8 episodes) were played in 2 rounds, 0 episodes solved, 8 failed" in said
    assert "too hard for this policy" in said


def test_a_policy_that_never_succeeds_is_not_trained(tmp_path: Path) -> None:
    task = suite("mini").tasks[0]
    statistics = load_statistics(PROJECT / "bases" / "mini", "mini")
    build_tiny_policy([task.instruction], statistics).save_pretrained(tmp_path / "untrained")
    run = TrainingRun(
        tmp_path / "run",
        [
            "recipe=quickstart",
            f"policy.path='{tmp_path / 'untrained'}'",
            "environment.tasks=[0]",
            "environment.step_limit=16",
            "gate.episodes=4",
            "trainer.eval_before=false",
        ],
    )
    said = run.finish(EXIT_COLD_START)
    assert "sampled at temperature 0.8 it solved 0 of 4 training episodes" in said
    assert f"{task.name}: greedy 0 of 4, sampled 0 of 4" in said
    assert "Fine-tune the policy further on demonstrations" in said
    kept = json.loads((run.folder / "gate.json").read_text())
    assert not kept["passed"]
    assert kept["sampled"]["tasks"][task.name]["successes"] == 0
    assert not (run.folder / "metrics.jsonl").exists()
    assert complete_steps(run.folder / "checkpoints") == []
