"""A dry run of the embedded policy: every phase, and what a machine that is too small says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from verl_vla.cli import arguments
from verl_vla.cli import plan as cli
from verl_vla.config.choices import GPUS
from verl_vla.config.compose import load_recipe
from verl_vla.core.errors import ConfigError
from verl_vla.diagnostics.planning.memory import CUDA_BYTES, RENDERER_BYTES
from verl_vla.diagnostics.planning.plan import make_plan
from verl_vla.envs.registry import suite
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig
from verl_vla.policies.registry import load_config, load_processor
from verl_vla.rl.setup import find_policy
from verl_vla.trainer.dry_run.job import Job, replay, weightless_checkpoint
from verl_vla.trainer.dry_run.phases import Phase, Replay
from verl_vla.trainer.dry_run.shim import shim_is_missing

MB = 10**6
WORDS = ["recipe=libero", "suite=mini", "policy.path=bases/mini"]
KINDS = ["build", "rollout", "update", "optimizer step", "rollout", "save", "export", "resume"]
needs_shim = pytest.mark.skipif(
    shim_is_missing() is not None, reason=f"no dry run here: {shim_is_missing()}"
)


def kinds(result: Replay) -> list[str]:
    """Names of the phases, without those that follow one of the same name."""
    names = [phase.name.split(",")[0] for phase in result.phases]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def job(*words: str) -> Job:
    return Job(
        recipe=load_recipe([*WORDS, *words]),
        policy_folder=find_policy("bases/mini"),
        rollout_rows=4,
        micro_batches=(2, 3),
        prompt_tokens=20,
    )


@cache
def replayed(*words: str) -> Replay:
    """Replay a recipe that several tests look at."""
    return replay(job(*words), 1000 * MB)


@needs_shim
@pytest.mark.parametrize("profile", ["8gpu", "qlora_24gb"])
def test_every_phase_of_a_rank_runs(profile: str) -> None:
    result = replayed(f"profile={profile}")
    assert result.fits
    twice = ["update", "optimizer step"]
    assert kinds(result) == [*KINDS[:2], *twice, *twice, *KINDS[4:]]
    rows = [phase.name for phase in result.phases if phase.name.startswith("update")]
    assert rows == [f"update, step {s}, {n} rows" for s in (1, 2) for n in (2, 3)]
    first, second = (phase for phase in result.phases if phase.name.startswith("rollout"))
    # the second one meets the optimizer's state
    assert second.allocated > first.allocated
    # forward and backward of three rows cost more than forward of four, and of two less than three
    _, three, two = result.worst("rollout"), result.worst("update"), result.phases[2]
    assert three.flops == pytest.approx(1.5 * two.flops, rel=0.01)
    assert three.flops > 2 * first.flops
    for phase in result.phases:
        assert phase.reserved == phase.allocated + phase.fragmented == 1000 * MB - phase.free


@needs_shim
def test_the_reference_policy_of_a_kl_term_is_counted() -> None:
    wanted = job("profile=8gpu", "loss.kl.coefficient=0.1")
    without, result = replayed("profile=8gpu"), replay(wanted, 1000 * MB)
    assert result.fits
    assert kinds(result)[-5:] == ["rollout", "log-probs", *KINDS[5:]]
    planned = make_plan(wanted.recipe, load_config(wanted.policy_folder), GPUS["a100-80"]).device
    for kind in ("build", "rollout", "optimizer step", "save", "export", "resume"):
        more = result.worst(kind).allocated - without.worst(kind).allocated
        # shards of a policy this small are padded
        assert more == pytest.approx(planned.phases[kind]["reference weights"], rel=0.1), kind
    scored = result.worst("log-probs")
    # a forward pass of 3 rows; that of a rollout has 4
    assert scored.flops == pytest.approx(0.75 * result.worst("rollout").flops, rel=0.05)
    assert scored.allocated < planned.allocated("log-probs") * 1.05


@needs_shim
def test_adapters_are_their_own_reference_and_log_probs_are_a_phase() -> None:
    words = ("profile=lora_24gb", "loss.kl.coefficient=0.1", "loss.recompute_log_probs=true")
    wanted = job(*words)
    result = replay(wanted, 1000 * MB)
    assert kinds(result)[-5:] == ["rollout", "log-probs", *KINDS[5:]]
    scored = [phase for phase in result.phases if phase.name.startswith("log-probs")]
    assert len(scored) == 4, "two micro-batches, by the policy and by what it began as"
    planned = make_plan(wanted.recipe, load_config(wanted.policy_folder), GPUS["a10g"]).device
    assert not [parts for parts in planned.phases.values() if "reference weights" in parts]
    assert result.worst("save").allocated < 1.05 * planned.allocated("save")


@needs_shim
def test_a_device_that_is_too_small_ends_in_the_phase_that_does_not_fit(
    capsys, monkeypatch
) -> None:
    small = replace(GPUS["a10g"], memory_bytes=CUDA_BYTES + RENDERER_BYTES + 24 * MB)
    monkeypatch.setitem(GPUS, "a10g", small)
    words = [*WORDS, "profile=8gpu", "environment.num_slots=2", "environment.num_workers=8"]
    assert cli.run(arguments.parse("plan", [*words, "--gpu", "a10g", "--replay"])) == 1
    said = capsys.readouterr().out
    assert "  update, step 1, " in said
    assert "the last phase DID NOT FIT: CUDA out of memory. Tried to allocate" in said
    assert "optimizer step" not in said.split("replayed without a GPU")[1]


def test_ranks_on_cores_and_optimizers_that_compile_are_refused(capsys) -> None:
    with pytest.raises(ConfigError, match="--replay replays what a GPU's memory holds"):
        cli.run(arguments.parse("plan", ["recipe=quickstart", "--replay"]))
    with pytest.raises(ConfigError, match="deepspeed_cpu_adam, which a dry run cannot execute"):
        replay(job("profile=8gpu", "optimizer.name=deepspeed_cpu_adam"), MB)


@pytest.mark.parametrize("name", ["libero_spatial", "verl_vla/envs/robotwin.py:RoboTwin"])
def test_a_policy_that_is_not_here_is_described_without_its_weights(tmp_path, name: str) -> None:
    chosen = suite(name)
    config = OpenVLAOFTConfig(**chosen.policy_sizes)
    folder = weightless_checkpoint(config, chosen, tmp_path / "policy")
    assert not list(folder.glob("*.safetensors"))
    processor = load_processor(folder)
    assert processor.shape == config.shape
    assert processor.codec.statistics.gripper_dims == chosen.gripper_dims


def test_jobs_and_results_are_read_as_they_were_written(tmp_path) -> None:
    wanted = job("profile=qlora_24gb")
    wanted.write(tmp_path / "job.json")
    read = Job.read(tmp_path / "job.json")
    assert read.recipe == wanted.recipe
    assert read.policy_folder == wanted.policy_folder
    assert tuple(read.micro_batches) == wanted.micro_batches
    phase = Phase(name="save", allocated=1, reserved=3, fragmented=2, free=4, host=5, flops=6)
    result = Replay(phases=[phase], out_of_memory="full")
    result.write(tmp_path / "result.json")
    assert Replay.read(tmp_path / "result.json") == result
    assert not result.fits
