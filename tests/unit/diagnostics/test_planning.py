"""``plan``: what it counts, what it promises, and what really happens."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from verl_vla.cli import arguments
from verl_vla.cli import plan as cli
from verl_vla.cli.explain import explain
from verl_vla.config.choices import GPUS
from verl_vla.config.compose import RECIPES_FOLDER, compose_recipe, load_recipe, recipe_names
from verl_vla.config.grpo import Recipe
from verl_vla.config.schema import parse
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.diagnostics.planning.memory import CUDA_BYTES, FRAGMENTED_SHARE
from verl_vla.diagnostics.planning.plan import make_plan, trace_policy
from verl_vla.diagnostics.planning.remedies import _candidates, find_remedy
from verl_vla.diagnostics.planning.trace import Adapters, build_model, count_weights, trace_model
from verl_vla.envs.registry import suite
from verl_vla.envs.robotwin import RoboTwin
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig

SUITES, REWARDS = ("spatial", "object", "goal", "10", "90"), ("binary", "srpo", "siglip_t")
PROFILES = {"8gpu": "a100-80", "lora_24gb": "a10g", "qlora_24gb": "a10g"}
PUBLISHED = OpenVLAOFTConfig()
NO_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Makes glibc give freed memory back, so that what is measured is what lives."""
BATCH = 4
MB, GB = 1e6, 1e9


def small_config(width: int = 384, depth: int = 4, **others) -> OpenVLAOFTConfig:
    tower = {
        "patch_size": 14,
        "hidden_size": width // 2,
        "depth": 3,
        "heads": 4,
        "mlp_size": 2 * width,
        "class_token": False,
        "registers": 0,
        "layer_scale": False,
        "attention_pool": False,
    }
    return OpenVLAOFTConfig(
        text_config=LlamaConfig(
            vocab_size=1024,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=depth,
            num_attention_heads=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        vision_towers=[tower],
        image_sizes=[112],
        **others,
    )


TINY = small_config(width=32, depth=2)


@pytest.fixture(scope="module")
def lora_trace():
    """Of the published policy as the profiles for 24 GB hold it."""
    return trace_policy(load_recipe(["recipe=libero", "profile=lora_24gb"]).policy, PUBLISHED)


@pytest.mark.parametrize(
    ("adapters", "total", "trained"),
    [
        # The published checkpoint; the last block of each tower and what follows it never run.
        (None, 7_541_237_184, 7_541_237_184 - 43_080_480),
        # PEFT's count for the language model's linear layers at openvla-oft's rank.
        (Adapters(rank=32, alpha=16, targets="language_model"), 7_621_191_104, 79_953_920),
    ],
)
def test_the_published_policy_is_counted(adapters, total, trained):
    counts = count_weights(build_model(PUBLISHED, torch.bfloat16, adapters))
    assert counts["trained"] == trained
    assert counts["trained"] + counts["frozen"] == total
    assert counts["layer"] >= 202_383_360  # one layer of Llama-2-7B


def test_the_published_policy_takes_the_operations_that_were_counted_by_hand(lora_trace):
    assert lora_trace.forward_flops == pytest.approx(4.94e12, rel=0.02)
    # forward, forward again and the gradients of the activations
    assert 2.8 < lora_trace.training_flops / lora_trace.forward_flops < 3


@pytest.mark.parametrize(
    ("profile", "limit", "passes"),
    [("lora_24gb", 22 * GB, 2.85), ("qlora_24gb", 20 * GB, 1.95), ("8gpu", 64 * GB, 3.0)],
)
def test_a_profile_stays_below_its_budget_of_memory_and_operations(profile, limit, passes):
    recipe = load_recipe(["recipe=libero", f"profile={profile}"])
    gpu = GPUS["a100-80" if profile == "8gpu" else "a10g"]
    plan = make_plan(recipe, PUBLISHED, gpu)
    assert recipe.optimizer.micro_batch_size >= 4
    assert plan.device.peak < min(limit, 0.95 * gpu.memory_bytes)
    assert plan.fits
    # below 2 with adapters: frozen towers run once, and nothing is computed backward in them
    assert plan.trace.training_flops / plan.trace.forward_flops < passes
    # the row of the page, rounded as there
    text = (PROJECT_FOLDER / "docs" / "performance.md").read_text()
    (row,) = [line for line in text.splitlines() if line.endswith("|") and f"(`{profile}`)" in line]
    tflop, printed, gigabytes = map(float, row.split("|")[3:6])
    assert tflop == pytest.approx(plan.trace.training_flops / 1e12, abs=0.06)
    assert printed == pytest.approx(plan.trace.training_flops / plan.trace.forward_flops, abs=0.06)
    assert gigabytes == pytest.approx(plan.trace.training_bytes / plan.trace.batch / GB, abs=0.006)


RENDERER = 440_000_000
"""docs/benchmarks.md, Simulator memory."""


@pytest.mark.parametrize(
    ("words", "renderers"),
    [
        (["profile=8gpu"], 8 * RENDERER),
        (["profile=lora_24gb"], 4 * RENDERER),
        (["profile=8gpu", "environment.num_workers=9"], 2 * RENDERER),
        (["profile=8gpu", "suite=mini", "policy.path=bases/mini"], 8 * 100_000_000),
        (["profile=8gpu", "cluster.address=auto", "cluster.env_nodes=2"], 0),
    ],
)
def test_the_renderers_of_simulators_take_memory_of_their_gpu(words, renderers):
    recipe = load_recipe(["recipe=libero", *words])
    plan = make_plan(recipe, TINY, GPUS["a10g"])
    assert plan.device.outside["renderers of simulators"] == renderers
    tensors = plan.device.allocated(plan.device.largest) + plan.device.fragmented
    assert plan.device.peak == tensors + CUDA_BYTES + renderers
    # they decide whether it fits
    assert not replace(plan, gpu=replace(GPUS["a10g"], memory_bytes=plan.device.peak - 1)).fits


def test_a_plan_is_within_15_percent_of_what_a_small_policy_takes(tmp_path):
    """The real model, FSDP2 and AdamW in a process of its own, and the bytes that it grew by."""
    config = small_config()
    config.save_pretrained(tmp_path)
    program = Path(__file__).with_name("one_update.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), str(BATCH)],
        env=os.environ | NO_HEAP | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.splitlines()[-1])
    recipe = load_recipe(["recipe=quickstart"])
    trace = trace_model(config, dtype=torch.float32, batch=BATCH)
    plan = make_plan(recipe, config, None)
    activations = plan.device.phases["update"]["activations"]
    planned = plan.device.allocated("update") - activations + trace.training_bytes
    assert planned == pytest.approx(measured, rel=0.15), f"{planned / MB:.0f} {measured / MB:.0f}"


def test_what_a_pass_needs_grows_evenly_with_its_policy_steps():
    one, four = (trace_model(TINY, dtype=torch.float32, batch=batch) for batch in (4, 16))
    assert four.training_bytes / 4 == pytest.approx(one.training_bytes, rel=0.05)
    assert four.training_flops == pytest.approx(one.training_flops, rel=0.05)


def test_a_trace_is_made_once():
    assert trace_model(TINY, dtype=torch.float32) is trace_model(
        small_config(width=32, depth=2), dtype=torch.float32
    )


def test_recomputing_takes_less_memory_and_more_operations():
    plain = trace_model(small_config(width=64), dtype=torch.float32)
    again = trace_model(small_config(width=64), dtype=torch.float32, checkpointing=True)
    assert again.training_bytes < plain.training_bytes / 2
    assert again.training_flops > 1.2 * plain.training_flops


@pytest.mark.parametrize(
    ("chosen", "reward", "profile"), list(itertools.product(SUITES, REWARDS, PROFILES))
)
def test_every_recipe_composes_explains_and_plans(chosen, reward, profile):
    words = ["recipe=libero", f"suite={chosen}", f"reward={reward}", f"profile={profile}"]
    composition = compose_recipe(words, RECIPES_FOLDER)
    recipe = parse(Recipe, composition.values)
    assert recipe.environment.suite == f"libero_{chosen}"
    assert recipe.reward == reward
    assert all(meaning for *_, meaning in explain(recipe, composition))
    plan = make_plan(recipe, TINY, GPUS[PROFILES[profile]])
    assert plan.fits
    assert plan.policy_steps == recipe.sampling.groups_per_step * 8 * 64
    assert plan.total_seconds > 0
    assert sum(plan.host.values()) > 0


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - {"libero", "robotwin"}))
def test_every_other_recipe_plans(name):
    recipe = load_recipe([f"recipe={name}"])
    plan = make_plan(recipe, cli.policy_config(recipe)[0], None)
    assert plan.fits
    assert not plan.seconds
    assert plan.host["learning"] == plan.device.peak


@pytest.mark.parametrize(("reward", "profile"), list(itertools.product(REWARDS, PROFILES)))
def test_every_recipe_for_two_arms_composes_explains_and_plans(reward, profile):
    words = ["recipe=robotwin", f"reward={reward}", f"profile={profile}"]
    composition = compose_recipe(words, RECIPES_FOLDER)
    recipe = parse(Recipe, composition.values)
    assert all(meaning for *_, meaning in explain(recipe, composition))
    assert recipe.environment.suite.endswith("robotwin.py:RoboTwin")
    plan = make_plan(recipe, small_config(32, 2, **RoboTwin.policy_sizes), GPUS[PROFILES[profile]])
    assert plan.fits
    assert plan.policy_steps == recipe.sampling.groups_per_step * 8 * (200 / 25)
    assert plan.total_seconds > 0


def test_the_published_policy_for_two_arms_is_planned_in_its_own_sizes():
    config, source = cli.policy_config(load_recipe(["recipe=robotwin"]))
    assert "is not here; OpenVLA-OFT as published" in source
    assert (config.shape.num_tokens, config.shape.proprio_dim) == (25 * 14, 14)
    assert config.normalization == "bounds"
    counts = count_weights(build_model(config, torch.bfloat16, None))
    projector = (14 + 1) * 4096 + (4096 + 1) * 4096
    assert counts["trained"] + counts["frozen"] == 7_541_237_184 + projector


def test_shards_shrink_with_the_ranks_and_activations_do_not():
    recipe = load_recipe(["recipe=libero"])
    one = make_plan(recipe, TINY, GPUS["h100"]).device
    two = make_plan(
        load_recipe(["recipe=libero", "cluster.num_nodes=2"]), TINY, GPUS["h100"]
    ).device
    for part in ("weights", "gradients", "optimizer state"):
        assert two.phases["update"][part] == pytest.approx(one.phases["update"][part] / 2, abs=1)
    for part in ("gathered weights", "gradients of a layer", "activations"):
        assert two.phases["update"][part] == one.phases["update"][part]


def test_ranks_that_gather_once_hold_all_weights_while_they_play():
    once, each = (
        make_plan(load_recipe(["recipe=libero", *words]), TINY, GPUS["h100"])
        for words in ([], ["cluster.gather_once=false"])
    )
    more = once.device.allocated("rollout") - each.device.allocated("rollout")
    # 8 ranks, float32 there and bfloat16 here
    whole = 8 * once.device.phases["rollout"]["weights"] / 2
    assert 0 < more < whole
    assert once.device.phases["update"] == each.device.phases["update"]
    one_rank = make_plan(load_recipe(["recipe=libero", "profile=lora_24gb"]), TINY, GPUS["a10g"])
    assert {"cluster.gather_once": False} in list(_candidates(once))
    assert {"cluster.gather_once": False} not in list(_candidates(one_rank))


def test_a_reference_policy_takes_memory_in_every_phase_and_a_forward_pass():
    kl = "loss.kl.coefficient=0.01"
    for words, is_held in ((["profile=8gpu"], True), (["profile=lora_24gb"], False)):
        plain, plan = (
            make_plan(load_recipe(["recipe=libero", *words, *more]), TINY, GPUS["h100"])
            for more in ([], [kl])
        )
        weights = plan.device.phases["build"]["weights"]
        for phase in plain.device.phases:
            more = plan.device.allocated(phase) - plain.device.allocated(phase)
            assert more == pytest.approx(weights if is_held else 0, abs=1), phase
        assert set(plan.device.phases) - set(plain.device.phases) == {"log-probs"}
        assert plain.seconds["log-probs of the reference"] == 0
        assert plan.seconds["log-probs of the reference"] == plan.seconds["rollout: policy"]
        added = plan.total_seconds - plain.total_seconds
        assert added == pytest.approx(plan.seconds["log-probs of the reference"])


@pytest.mark.parametrize(
    ("name", "per_weight"), [("adamw", 8), ("adamw_8bit", 2.03), ("deepspeed_cpu_adam", 0)]
)
def test_an_optimizer_holds_its_state_where_it_says(name, per_weight):
    plan = make_plan(
        load_recipe(["recipe=libero", f"optimizer.name={name}", "cluster.ranks_per_node=1"]),
        TINY,
        GPUS["h100"],
    )
    held = plan.device.phases["update"]
    assert ("optimizer state" in held) == (per_weight > 0)
    assert sum(size for part, size in held.items() if part == "optimizer state") == pytest.approx(
        per_weight * plan.trace.trained, rel=0.01
    )
    assert ("weights, gradients, state" in plan.host) == (per_weight == 0)


def test_the_buffer_holds_each_image_twice():
    plan = make_plan(load_recipe(["recipe=libero"]), TINY, GPUS["h100"])
    assert plan.host["rollout buffer"] == pytest.approx(2 * 32_768 * 112 * 112 * 3, rel=0.1)


def test_a_remedy_is_the_first_that_fits():
    recipe = load_recipe(["recipe=libero", "optimizer.micro_batch_size=64"])
    config = TINY
    plan = make_plan(recipe, config, GPUS["a10g"])
    assert plan.fits
    needed = replace(GPUS["a10g"], memory_bytes=plan.device.peak - 1)
    changes, changed = find_remedy(replace(plan, gpu=needed), config)
    assert changes == {"policy.gradient_checkpointing": True}
    assert changed.device.peak < plan.device.peak
    hopeless = replace(GPUS["a10g"], memory_bytes=1)
    assert find_remedy(replace(plan, gpu=hopeless), config) is None


def test_fewer_simulators_are_a_remedy_where_they_keep_up_with_the_policy(lora_trace):
    words = ["recipe=libero", "profile=lora_24gb", "environment.num_workers=16"]
    plan = make_plan(load_recipe(words), PUBLISHED, GPUS["a10g"])
    assert not plan.fits
    changes, changed = find_remedy(plan, PUBLISHED)
    assert changes == {"environment.num_workers": 8}
    assert changed.total_seconds == plan.total_seconds
    # a policy this small waits for its simulators
    small = make_plan(load_recipe(words), TINY, GPUS["a10g"])
    assert not [changes for changes in _candidates(small) if "environment.num_workers" in changes]


def test_step_limits_decide_how_long_a_round_can_be():
    recipe = load_recipe(["recipe=libero", "environment.step_limit=published"])
    assert suite("libero_spatial").step_limit("published", 0) == 220
    assert make_plan(recipe, TINY, GPUS["h100"]).policy_steps == 512 * 28


def test_the_command_says_whether_it_fits_and_what_to_change(capsys, monkeypatch):
    monkeypatch.setitem(GPUS, "a10g", replace(GPUS["a10g"], memory_bytes=int(1.98 * GB)))
    words = ["recipe=libero", "policy.path=bases/mini", "profile=two_cores"]
    assert cli.run(arguments.parse("plan", [*words, "--gpu", "a100-80", "--num-nodes", "2"])) == 0
    said = capsys.readouterr().out
    assert "ranks: 2 x 1\n" in said
    assert "of 85.9 GB of an A100 80 GB: fits" in said
    assert "together" in said
    assert cli.run(arguments.parse("plan", [*words, "--gpu", "a10g", "cluster.device=cuda"])) == 1
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said
    assert "It would with policy.gradient_checkpointing=true" in said


def test_fragments_are_counted_with_the_setting_that_is_assumed(capsys, monkeypatch):
    words = ["recipe=libero", "policy.path=bases/mini", "profile=two_cores", "cluster.device=cuda"]
    shares = {}
    for own, is_expandable in ((None, True), ("garbage_collection_threshold:0.8", False)):
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
        monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
        if own is not None:
            monkeypatch.setenv("PYTORCH_ALLOC_CONF", own)
        device = make_plan(load_recipe(words), TINY, GPUS["a10g"]).device
        shares[is_expandable] = device.fragmented / device.allocated(device.largest)
        assert device.peak > device.allocated(device.largest) + device.fragmented
        assert "renderers of simulators" in device.outside
        cli.run(arguments.parse("plan", [*words, "--gpu", "a10g"]))
        said = capsys.readouterr().out
        assert f"assumed of PyTorch's allocator: {own or 'expandable_segments:True'}\n" in said
    assert shares == pytest.approx(FRAGMENTED_SHARE, rel=0.01)


def test_a_gpu_must_be_named_unless_the_recipe_has_none(capsys):
    with pytest.raises(ConfigError, match="which GPU"):
        cli.run(arguments.parse("plan", ["recipe=libero"]))
    assert cli.run(arguments.parse("plan", ["recipe=quickstart"])) == 0
    assert "time on cores is not planned" in capsys.readouterr().out
