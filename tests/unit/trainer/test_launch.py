"""What Ray's workers are told when a run is launched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from verl_vla.config.compose import load_recipe
from verl_vla.core.allocator import VARIABLES
from verl_vla.rewards import load_reward
from verl_vla.rewards.encoders.base import BATCHES_A_RANK
from verl_vla.trainer.grpo import launch


def asked_of_ray(
    monkeypatch: pytest.MonkeyPatch, *words: str, reward: str = "binary", **arguments: Any
) -> dict[str, Any]:
    """What Ray is started with; no cluster is started."""
    asked: list[Any] = []
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setattr(launch, "get_ppo_ray_runtime_env", lambda _: {"env_vars": {}})
    monkeypatch.setattr(launch.ray, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(launch.ray, "shutdown", lambda: None)
    run: Any = SimpleNamespace(
        recipe=load_recipe(["recipe=quickstart", *words]), reward=load_reward(reward, arguments)
    )
    with launch._ray_cluster(run, OmegaConf.create({})):
        pass
    (options,) = asked
    return options


def variables_of_ranks(monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, str]:
    """Environment variables that Ray is asked to give to ranks."""
    return asked_of_ray(monkeypatch, *words)["runtime_env"]["env_vars"]


def test_ray_has_room_for_the_batches_of_an_encoder(monkeypatch) -> None:
    words = "cluster.ranks_per_node=3"
    plain = asked_of_ray(monkeypatch, words)["object_store_memory"]
    towers = {"encoder": "policy_towers", "encoder_args": {"path": "bases/mini"}}
    encoding = asked_of_ray(monkeypatch, words, reward="knn_align", **towers)
    here = asked_of_ray(monkeypatch, words, reward="knn_align", encoder="pixels")
    assert plain == here["object_store_memory"] == launch.OBJECT_STORE_BYTES
    each = BATCHES_A_RANK * launch.ENCODER_BATCH_BYTES
    assert encoding["object_store_memory"] == plain + 3 * each


def test_segments_are_expandable_on_ranks_with_a_gpu_alone(monkeypatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    asked = variables_of_ranks(monkeypatch, "cluster.device=cuda")
    assert asked["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert not set(VARIABLES) & set(variables_of_ranks(monkeypatch, "cluster.device=cpu"))


def test_a_users_own_setting_reaches_the_ranks(monkeypatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    asked = variables_of_ranks(monkeypatch, "cluster.device=cuda")
    assert asked["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:512"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in asked
