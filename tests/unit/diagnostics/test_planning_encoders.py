"""``plan``: what the encoder of a reward takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from encoder_folders import save_vjepa2

from verl_vla.config.choices import GPUS
from verl_vla.config.compose import load_recipe
from verl_vla.diagnostics.planning.encoding import PUBLISHED as PUBLISHED_ENCODERS
from verl_vla.diagnostics.planning.encoding import encoder_load
from verl_vla.diagnostics.planning.plan import make_plan
from verl_vla.diagnostics.planning.remedies import _smaller_encoder, find_remedy
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig
from verl_vla.policies.registry import load_config
from verl_vla.rewards.encoders import ENCODERS

ROOT = Path(__file__).resolve().parents[3]
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
PUBLISHED, TINY = OpenVLAOFTConfig(), load_config(ROOT / "bases" / "mini")
MB, GB = 1e6, 1e9


def srpo_plan(*words: str, config=TINY):
    return make_plan(load_recipe(["recipe=libero", "reward=srpo", *words]), config, GPUS["a100-80"])


def test_a_clip_takes_the_operations_that_were_counted_by_hand():
    """V-JEPA 2 ViT-g at 384 px: 64 frames in tubelets of 2, patches of 16."""
    plan = srpo_plan()
    recipe = plan.recipe
    load = encoder_load(recipe, TINY, plan.policy_steps)
    assert load is not None
    tokens, width, depth, mlp = 32 * 24 * 24, 1408, 40, 6144
    patches = 2 * tokens * width * (3 * 2 * 16 * 16)
    linear = 2 * tokens * depth * (4 * width**2 + 2 * width * mlp)
    attention = 4 * tokens**2 * width * depth
    assert load.flops / 512 == pytest.approx(patches + linear + attention, rel=0.01)
    assert load.flops / 512 == pytest.approx(114.5e12, rel=0.01)
    # the encoder and the predictor, which is never run
    assert load.weight_bytes / 2 == pytest.approx(1012e6 + 22e6, rel=0.01)
    # of one clip the wide layer of the MLP beside the residual, in 16 bits
    assert tokens * (width + mlp) * 2 < load.batch_bytes < tokens * (width + 4 * mlp) * 2


def test_an_encoder_is_on_the_device_between_rollout_and_update_and_shared_by_ranks():
    plan, plain = srpo_plan(), make_plan(load_recipe(["recipe=libero"]), TINY, GPUS["a100-80"])
    load = encoder_load(plan.recipe, TINY, plan.policy_steps)
    assert load is not None
    phases = plan.device.phases
    assert phases["encoding"] == phases["save"] | {
        "encoder": load.weight_bytes,
        "encoder's batch": load.batch_bytes,
    }
    assert {name: parts for name, parts in phases.items() if name != "encoding"} == dict(
        plain.device.phases
    )
    assert plan.device.outside == plain.device.outside
    # the images of two clips wait for each rank
    waiting = 2 * 64 * 112 * 112 * 3
    assert plan.host["reward's encoder"] == 8 * (load.weight_bytes + waiting)
    assert "reward's encoder" not in plain.host
    seconds = plan.seconds["reward: encoder"]
    assert seconds == pytest.approx(512 * 114.5e12 / (8 * 312e12 * 0.4), rel=0.01)
    assert plan.total_seconds == pytest.approx(plain.total_seconds + seconds)
    assert plain.seconds["reward: encoder"] == 0
    two = srpo_plan("cluster.num_nodes=2")
    assert two.seconds["reward: encoder"] == pytest.approx(seconds / 2)
    assert two.host["reward's encoder"] == plan.host["reward's encoder"]


def test_an_encoder_in_a_process_of_its_own_stays_on_the_first_gpu():
    shared = srpo_plan()
    alone = srpo_plan("reward_args.encoder_args.own_process=true")
    assert "encoding" not in alone.device.phases
    held = sum(shared.device.phases["encoding"][name] for name in ("encoder", "encoder's batch"))
    assert alone.device.outside["reward's encoder"] == held + alone.device.outside["CUDA"]
    assert alone.seconds["reward: encoder"] == 8 * shared.seconds["reward: encoder"]


@pytest.mark.parametrize(
    "words", [["reward_args.encoder_args.device=cpu"], ["profile=two_cores"]], ids=" ".join
)
def test_an_encoder_on_cores_takes_memory_of_the_host_alone(words):
    plan = srpo_plan(*words)
    load = encoder_load(plan.recipe, TINY, plan.policy_steps)
    assert load is not None
    assert "encoding" not in plan.device.phases
    assert plan.seconds["reward: encoder"] == 0
    assert plan.host["reward's encoder"] > load.weight_bytes + load.batch_bytes


@pytest.mark.parametrize(
    ("words", "weights", "per_episode"),
    [
        ([], 1012e6 + 22e6, 1),
        # both towers run, whichever is read
        (["reward=siglip_t"], 304e6 + 428e6, 65),
        # SigLIP so400m with its pooling head
        (["reward=siglip_t", "reward_args.encoder=siglip"], 428e6, 65),
        # ViT-L/14
        (["reward=siglip_t", "reward_args.encoder=dinov2"], 304e6, 65),
    ],
    ids=["V-JEPA 2 ViT-g, 384 px", "towers of the policy", "SigLIP so400m", "DINOv2 ViT-L"],
)
def test_the_page_has_what_an_encoder_takes(words, weights, per_episode, request):
    plan = srpo_plan(*words, config=PUBLISHED)
    load = encoder_load(plan.recipe, PUBLISHED, plan.policy_steps)
    assert load is not None
    assert load.weight_bytes / 2 == pytest.approx(weights, rel=0.02)
    assert plan.policy_steps // 512 + 1 == 65
    tflop = load.flops / 512 / per_episode / 1e12
    what = "a clip" if per_episode == 1 else "an image"
    row = (
        f"| {load.weight_bytes / GB:.2f} | {load.batch_bytes / GB:.2f} | {tflop:.4g} {what} | "
        f"{plan.seconds['reward: encoder']:.0f} |"
    )
    label = request.node.callspec.id
    (shown,) = (line for line in PERFORMANCE.splitlines() if line.startswith(f"| {label}"))
    assert shown.endswith(row)


def test_an_encoder_of_the_users_own_or_without_a_network_is_not_counted():
    for encoder in ("pixels", "own.py:Encoder"):
        words = ["recipe=libero", f"reward_args.encoder='{encoder}'"]
        plan = make_plan(load_recipe(words), TINY, GPUS["h100"])
        assert plan.seconds["reward: encoder"] == 0
        assert "encoding" not in plan.device.phases


def test_the_sizes_of_an_encoder_are_those_of_its_folder(tmp_path):
    path = save_vjepa2(tmp_path / "vjepa")
    plan = srpo_plan(f"reward_args.encoder_args.path='{path}'")
    assert plan.device.phases["encoding"]["encoder"] < MB


@pytest.mark.parametrize("words", [(), ("reward_args.encoder_args.own_process=true",)])
def test_an_encoder_that_is_too_large_gets_smaller_batches_or_cores(words):
    plan = srpo_plan("reward_args.encoder_args.batch_size=8", *words)
    load = encoder_load(plan.recipe, TINY, plan.policy_steps)
    assert load is not None
    found = {}
    for missing in (load.batch_bytes // 4, load.batch_bytes):
        gpu = replace(GPUS["a100-80"], memory_bytes=plan.device.peak - missing)
        changes, changed = find_remedy(replace(plan, gpu=gpu), TINY)
        assert changed.fits
        found |= changes
    assert found == {
        "reward_args.encoder_args.batch_size": 4,
        "reward_args.encoder_args.device": "cpu",
    }
    # what the recipe had set stays
    assert changed.recipe.reward_args["encoder_args"]["batch_size"] == 8


def test_an_encoder_that_does_not_decide_is_left_alone():
    plan = srpo_plan(config=PUBLISHED)
    assert plan.device.largest != "encoding"
    assert list(_smaller_encoder(plan)) == []
    assert list(_smaller_encoder(make_plan(load_recipe(["recipe=libero"]), TINY, None))) == []


def test_every_encoder_with_a_network_is_counted():
    assert set(ENCODERS) == {*PUBLISHED_ENCODERS, "policy_towers", "pixels"}
