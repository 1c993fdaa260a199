"""Weights on disk: each rank's share of what is trained, and a policy that is written whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from thread_ranks import ThreadRanks
from torch import nn

from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.policies.registry import load_model, load_policy, load_processor
from verl_vla.trainer.engine.weights import (
    checkpoint_contents,
    load_trained,
    save_trained,
    trained,
    write_policy,
)

BASE = PROJECT_FOLDER / "bases" / "mini"


def test_a_frozen_base_is_no_part_of_a_checkpoint() -> None:
    assert checkpoint_contents(has_adapters=True) == ["optimizer", "extra"]
    assert checkpoint_contents(has_adapters=False) == ["model", "optimizer", "extra"]


def make_module(value: float) -> nn.Module:
    """Two trained weights of different shapes around a frozen one."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    module[1].requires_grad_(False)
    for weight in module.parameters():
        nn.init.constant_(weight, value)
    return module


def test_each_rank_reads_what_it_wrote_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = ThreadRanks(2)
    group.stand_in(monkeypatch)

    def work(rank: int) -> Any:
        def save_and_load() -> nn.Module:
            save_trained(make_module(float(rank + 1)), str(tmp_path))
            other = make_module(9.0)
            load_trained(other, str(tmp_path))
            return other

        return save_and_load

    for rank, module in enumerate(group.run(work(0), work(1))):
        assert {float(w.mean()) for w in trained(module)} == {rank + 1.0}
        assert {float(w.mean()) for w in module[1].parameters()} == {9.0}
        assert len(trained(module)) == 4
    names = [f"trained_world_size_2_rank_{rank}.pt" for rank in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_checkpoint_of_other_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = ThreadRanks(1)
    group.stand_in(monkeypatch)

    def work() -> None:
        save_trained(make_module(1.0)[:1], str(tmp_path))
        load_trained(make_module(2.0), str(tmp_path))

    with pytest.raises(ValueError, match="zip"):
        group.run(work)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_first_rank_writes_a_policy_that_can_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None
) -> None:
    # the rank that does not write moves first
    group = ThreadRanks(2, first=1)
    group.stand_in(monkeypatch)
    processor = load_processor(BASE)
    if dtype is not None:
        (tmp_path / "deep" / "first").mkdir(parents=True)

    def work(folder: str) -> Any:
        model = load_model(str(BASE), dtype=torch.float32, attn_implementation="sdpa")

        def write() -> set[str]:
            write_policy(
                model, processor, tmp_path / "deep" / folder, is_quantized=False, dtype=dtype
            )
            return {path.name for path in (tmp_path / "deep" / "first").iterdir()}

        return write

    first, second = group.run(work("first"), work("second"))
    assert first == second >= {"config.json", "model.safetensors"}, "it is whole on every rank"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["first"]
    right = load_policy(BASE).model.state_dict()
    saved = load_file(tmp_path / "deep" / "first" / "model.safetensors")
    assert saved.keys() == right.keys()
    for name, weight in right.items():
        assert torch.equal(saved[name], weight if dtype is None else weight.to(dtype))
    policy = load_policy(tmp_path / "deep" / "first")
    assert policy.processor.shape == processor.shape
    assert policy.model.config.architectures == ["OpenVLAOFTModel"]
    assert str(policy.model.config.dtype).removeprefix("torch.") == "float32"
