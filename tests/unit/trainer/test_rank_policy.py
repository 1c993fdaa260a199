"""The policy of the first rank when every rank computes a share of each batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sft_world import NotingEngine
from thread_ranks import ThreadRanks

from verl_vla.core.episode import Observation
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.envs.registry import suite
from verl_vla.policies.base import Processor
from verl_vla.policies.registry import load_processor
from verl_vla.trainer.sft.rank_policy import RankPolicy, serve

TEMPERATURE = 0.3


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load_processor(PROJECT_FOLDER / "bases" / "mini")


def observations(processor: Processor, count: int) -> list[Observation]:
    return [
        Observation(
            image=np.full(processor.shape.image_shape, row, dtype=np.uint8),
            proprio=np.zeros(8, dtype=np.float32),
            instruction=suite("mini").tasks[row % 3].instruction,
        )
        for row in range(count)
    ]


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_every_rank_answers_its_share_and_the_answers_are_in_order(
    processor: Processor, monkeypatch: pytest.MonkeyPatch, num_ranks: int, count: int
) -> None:
    group = ThreadRanks(num_ranks)
    group.stand_in(monkeypatch)
    engines: list[Any] = [NotingEngine(processor) for _ in range(num_ranks)]
    seen = observations(processor, count)
    noise = (torch.arange(count, dtype=torch.float64)[:, None] / 100).repeat(1, 56)

    def play() -> Any:
        policy = RankPolicy(engines[0])
        assert policy.shape == processor.shape
        chunks = [policy.act(seen, noise, temperature=TEMPERATURE) for _ in range(2)]
        policy.dismiss()
        return chunks

    others = [lambda engine=engine: serve(engine) for engine in engines[1:]]
    chunk, again = group.run(play, *others)[0]
    assert chunk.action_tokens[:, 0].tolist() == list(range(count))
    assert torch.equal(chunk.action_tokens, again.action_tokens)
    assert torch.allclose(chunk.log_probs, -noise.float())
    assert np.array_equal(chunk.actions, processor.codec.to_simulator(chunk.action_tokens))
    prompts = [processor.prompt(o.instruction) for o in seen]
    assert all(map(torch.equal, chunk.prompt_ids, prompts))
    size = -(-count // num_ranks)
    for rank, engine in enumerate(engines):
        rows = [min(rank + i * num_ranks, count - 1) for i in range(size)]
        assert engine.asked == [(rows, TEMPERATURE)] * 2


def test_a_rank_that_is_dismissed_before_it_is_asked_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = ThreadRanks(2)
    group.stand_in(monkeypatch)
    nothing: Any = SimpleNamespace()
    group.run(lambda: RankPolicy(nothing).dismiss(), lambda: serve(nothing))
