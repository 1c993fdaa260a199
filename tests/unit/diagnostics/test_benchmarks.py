"""What benchmarks compute from what they timed; the timing itself is theirs."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from verl_vla.cli import bench
from verl_vla.cli.arguments import parse
from verl_vla.core.episode import EpisodeSpec
from verl_vla.core.errors import ConfigError
from verl_vla.diagnostics.benchmarks import gpu, page, step, update, video
from verl_vla.diagnostics.benchmarks.env import _compared, compare_resets, moves_of_chunks
from verl_vla.diagnostics.benchmarks.measuring import (
    Seconds,
    ratio,
    record,
    spread,
    take_turns,
    timed,
)
from verl_vla.diagnostics.benchmarks.pool import IdlePolicy, scaling, two_against_one
from verl_vla.diagnostics.benchmarks.rollout import compare
from verl_vla.diagnostics.benchmarks.step_model import (
    CHUNK_CORE_S,
    Load,
    Machine,
    node,
    simplevla_load,
    step_time,
    table_rows,
)
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.fake import FakeEnv, FakeEnvConfig
from verl_vla.envs.libero.memory import sizes_by_task
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.policies.base import PolicyShape
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tokenizer, tiny_config
from verl_vla.policies.registry import load_policy

PROJECT = Path(__file__).resolve().parents[3]
SHAPE = PolicyShape(num_views=1, image_size=32, chunk_length=4, action_dim=7, num_bins=16)


def test_ways_take_turns_and_warm_up_is_not_counted() -> None:
    order: list[str] = []

    def work(name: str) -> Seconds:
        order.append(name)
        return Seconds(len(order), 0.0)

    ways = {name: partial(work, name) for name in ("peer", "ours")}
    taken = take_turns(ways, rounds=2, warm_up=1)
    assert order == ["peer", "ours"] * 3
    assert [s.clock for s in taken["peer"]] == [3, 5]
    assert [s.clock for s in taken["ours"]] == [4, 6]


def test_work_is_timed_by_both_clocks() -> None:
    seconds = timed(lambda: sum(range(200_000)))
    assert seconds.processor > 0
    assert seconds.processor <= seconds.clock + 0.02


def test_medians_and_ratios_pair_by_pair() -> None:
    assert spread([3.0, 1.0, 2.04], 1) == [2.0, 1.0, 3.0]
    assert ratio([10.0, 30.0, 20.0], [1.0, 2.0, 4.0]) == [10.0, 5.0, 15.0]
    found = _compared("chunk", [Seconds(4.0, 2.0)], [Seconds(1.0, 1.0)])
    assert found["chunk_times_faster"] == [2.0, 2.0, 2.0]
    assert found["chunk_times_faster_clock"] == [4.0, 4.0, 4.0]
    assert found["chunk_peer_processor_ms"][0] == 2000


def test_a_reset_is_compared_without_its_first_image_and_with_it() -> None:
    taken = {
        "peer": [Seconds(9.0, 6.0)],
        "settle": [Seconds(1.0, 0.5)],
        "look": [Seconds(2.0, 1.0)],
    }
    found = compare_resets(taken)
    assert found["reset_to_settled_state_times_faster"][0] == 12.0
    assert found["reset_and_first_image_times_faster"][0] == 4.0
    assert found["reset_and_first_image_times_faster_clock"][0] == 3.0


def test_videos_are_compared_with_the_episode_without_one_of_their_round() -> None:
    taken = {
        "no_video": [Seconds(2.0, 1.0), Seconds(8.0, 2.0)],
        "video_every_1": [Seconds(9.0, 4.0), Seconds(9.0, 6.0)],
    }
    found = video.compare(taken)
    assert found["episode_no_video_processor_s"] == [1.5, 1.0, 2.0]
    assert found["episode_video_every_1_clock_s"] == [9.0, 9.0, 9.0]
    assert found["video_every_1_times_slower"] == [3.5, 3.0, 4.0]
    assert "no_video_times_slower" not in found


@pytest.mark.sim
def test_a_video_costs_its_images(capsys: pytest.CaptureFixture[str]) -> None:
    words = "video --suite mini --steps 17 --render-size 64 --image-size 56 --rounds 1 --every 4 1"
    assert bench.run(parse("bench", words.split())) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["bench"], found["steps"]) == ("video", 17)
    often, seldom = (found[f"video_every_{every}_times_slower"][0] for every in (1, 4))
    assert often > seldom > 1


def test_a_record_names_its_command_and_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = record("env", argparse.Namespace(arguments=["env", "--suite", "a b"]), {"x": 1})
    assert found["command"] == "python -m verl_vla bench env --suite 'a b'"
    assert found["conditions"]["OMP_NUM_THREADS"] == "3"
    assert {"commit", "machine", "mujoco"} <= found["conditions"].keys()


@pytest.mark.sim
def test_each_task_of_a_suite_adds_its_simulator() -> None:
    config = EnvConfig(suite="mini", render_size=64, max_simulators=2)
    first, second = sizes_by_task(partial(make_libero_env, config), 2)
    assert 20 < second - first < 400


def test_both_ways_of_a_simulator_get_the_samemoves_of_chunks() -> None:
    one, two = moves_of_chunks(), moves_of_chunks()
    for _ in range(3):
        assert (next(one) == next(two)).all()


def test_one_process_and_two_and_their_waits_are_measured() -> None:
    factory = partial(FakeEnv, FakeEnvConfig(image_size=32, step_limit=8))
    policy = IdlePolicy(SHAPE)
    found = two_against_one(factory, policy, rounds=1, task=0)
    assert found["two_processes_times_one"][0] > 0
    found = scaling(factory, 1, {"idle": policy}, task=0)
    assert found["idle_policy_steps_per_s_1"] > 0
    assert 0 <= found["idle_env_wait_share_1"] <= 1
    specs = [EpisodeSpec(task_id=0, init_state_id=0, group_id=0, episode_id=i) for i in range(4)]
    with EnvPool(
        factory,
        num_workers=1,
        num_slots=4,
        image_shape=(1, 32, 32, 3),
        timeout_s=60.0,
        worker_env={},
    ) as pool:
        found = compare(pool, policy, specs, rounds=1)
    assert found["times_faster"][0] > 0
    assert found["peer_policy_share"] + found["peer_env_wait_share"] <= 1.01


def test_an_update_is_the_same_however_it_is_cut() -> None:
    torch.set_num_threads(1)
    policy = load_policy(PROJECT / "bases" / "mini")
    whole = update.update_of(policy, update.Way(micro_batch_size=4), 4)()
    parts = update.update_of(policy, update.Way(micro_batch_size=3, with_entropy=False), 4)()
    assert whole > 0
    assert parts == pytest.approx(whole, rel=1e-4)
    rates, peak = update.run_way(
        str(PROJECT / "bases" / "mini"),
        update.Way(micro_batch_size=2, with_checkpointing=True),
        2,
        1,
    )
    assert len(rates) == 1
    assert rates[0] > 0
    assert peak > 0.1


def test_a_checkout_brings_its_own_entry_points(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "verl-vla"\n'
        '[project.entry-points."verl.plugins"]\nverl_vla = "verl_vla.of_another_commit"\n'
    )
    step.write_entry_points(tmp_path)
    code = (
        "from importlib.metadata import entry_points\n"
        "print([e.value for e in entry_points(group='verl.plugins') if e.name == 'verl_vla'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "['verl_vla.of_another_commit']"

    (tmp_path / "pyproject.toml").write_text('[project]\nname = "verl-vla"\n')
    with pytest.raises(ConfigError, match="names no platform"):
        step.write_entry_points(tmp_path)


def test_steps_of_two_commits_are_compared_number_by_number() -> None:
    def lines(step_s: float, loss: float) -> list[dict[str, float]]:
        times = {name: step_s for name, _ in step.PARTS.values()}
        first = {"step": 1, "actor/pg_loss": 0.5, "val/x": math.nan, **times, "timing_s/step": 99.0}
        return [first, {"step": 2, "actor/pg_loss": loss, "val/x": math.nan, **times}]

    found = step.compare([lines(4.0, 0.25)], [lines(2.0, 0.25)])
    assert found["step_times_faster"] == 2.0
    assert found["step_then_s"] == [4.0, 4.0, 4.0]
    assert found["numbers_compared"] == 3
    assert found["numbers_that_differ"] == []
    assert step.compare([lines(4.0, 0.25)], [lines(2.0, 0.2)])["numbers_that_differ"] == [
        "actor/pg_loss"
    ]


def test_a_commit_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="worktree add"):
        bench.run(parse("bench", ["step", "--against", "no-such-commit"]))


def test_the_gpu_benchmark_runs_in_small_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = "gpu --size tiny --device cpu --batch 1 2 --update-batch 1 --matmul 64 --repeats 1"
    assert bench.run(parse("bench", words.split())) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["parameters"] < 2e6
    assert found["policy_steps_per_s_2"] > 0
    assert found["lora_update_rows_per_s"] > 0
    assert found["full_update_memory_gib"] is None


def test_rows_that_do_not_fit_are_named_and_the_others_are_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on 24 GB: a large batch and the gradients of all weights need more."""
    real_steps, real_update = gpu.policy_steps, gpu.update

    def steps(clock: Any, model: Any, batch: int, peak: float) -> dict[str, Any]:
        if batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real_steps(clock, model, batch, peak)

    def update(clock: Any, model: Any, rows: int, name: str) -> dict[str, Any]:
        found = real_update(clock, model, rows, name)
        if name == "full_update":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        # the failed row's gradients would leave no room for this one
        assert all(w.grad is None for w in model.parameters() if not w.requires_grad)
        return found

    monkeypatch.setattr(gpu, "policy_steps", steps)
    monkeypatch.setattr(gpu, "update", update)
    words = "gpu --size tiny --device cpu --batch 1 2 4 --update-batch 1 --matmul 64 --repeats 1"
    assert bench.run(parse("bench", words.split())) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["did_not_fit"] == ["policy_steps_2", "full_update"]
    assert found["policy_steps_per_s_1"] > 0
    assert found["policy_steps_per_s_4"] > 0
    assert "policy_steps_per_s_2" not in found
    assert found["lora_update_rows_per_s"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_missing_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="torch finds none"):
        bench.run(parse("bench", ["gpu"]))


def test_operations_grow_with_the_weights_that_every_token_meets() -> None:
    def model_of(depth: int) -> gpu.OpenVLAOFTModel:
        tokenizer = build_tokenizer(["lift the cube"])
        return gpu.OpenVLAOFTModel(tiny_config(tokenizer, TinySizes(llm_depth=depth))).eval()

    small, large = model_of(1), model_of(3)
    config = small.config
    tokens = config.num_patches + gpu.PROMPT_TOKENS + config.num_action_tokens + 1
    added = sum(p.numel() for p in large.parameters()) - sum(p.numel() for p in small.parameters())
    assert gpu.flops(large) - gpu.flops(small) == pytest.approx(2 * added * tokens, rel=0.1)


LOAD = Load(
    episodes=512, step_limit=512, chunk_length=8, share_played=0.5, rounds=1.5, share_kept=0.6
)
MACHINE = Machine(
    num_gpus=8,
    policy_steps_per_gpu_s=32.0,
    rows_per_gpu_s=8.0,
    num_cores=96,
    chunk_core_s=0.15,
    transfer_bytes_per_s=2e8,
    bytes_per_row=1.5e5,
)


def test_the_time_of_a_step_follows_from_its_parts() -> None:
    assert LOAD.policy_steps == 512 * 64 * 0.5 * 1.5
    assert LOAD.rows == LOAD.policy_steps * 0.6
    found = step_time(LOAD, MACHINE)
    assert found.deciding_s == LOAD.policy_steps / 256
    assert found.simulating_s == pytest.approx(LOAD.policy_steps * 0.15 / 96)
    assert found.update_s == LOAD.rows / 64
    assert found.rollout_s == max(found.deciding_s, found.simulating_s)
    assert found.total_s == found.rollout_s + found.transfer_s + found.update_s
    assert found.bottleneck == "update"


def test_tables_stand_between_their_lines_and_nothing_else_moves(tmp_path: Path) -> None:
    records = tmp_path / "benchmarks"
    records.mkdir()
    kept = {"bench": "x", "command": "c", "a": [2, 1, 3], "b": None, "conditions": {"cores": 2}}
    (records / "x.json").write_text(json.dumps(kept))
    file = tmp_path / "benchmarks.md"
    file.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    assert bench.run(parse("bench", ["page", "--docs", str(tmp_path)])) == 0
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| a | 2 (1 to 3) |\n| b | not measured |" in text
    file.write_text("no lines")
    with pytest.raises(ConfigError, match="put them back"):
        bench.run(parse("bench", ["page", "--docs", str(tmp_path)]))


def test_the_page_holds_what_the_records_say() -> None:
    text = (page.DOCS / "benchmarks.md").read_text()
    assert page.with_tables(text, page.read_records(page.DOCS / "benchmarks")) == text


def test_the_performance_page_says_what_the_model_computes() -> None:
    text = (page.DOCS / "performance.md").read_text()
    for row in table_rows():
        assert row in text
    half = step_time(simplevla_load(0.5), node("8 x A100"))
    assert half.total_s < step_time(simplevla_load(1.0), node("8 x A100")).total_s
    kept = json.loads((page.DOCS / "benchmarks" / "env_libero_spatial.json").read_text())
    assert kept["chunk_ours_processor_ms"][0] / 1000 == pytest.approx(CHUNK_CORE_S, rel=0.1)
