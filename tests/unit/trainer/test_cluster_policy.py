"""The policy of a rollout whose model lives in several ranks: equal shares, and their answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import Answer
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from verl_vla.core.episode import Observation
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.envs.registry import suite
from verl_vla.policies.base import Processor
from verl_vla.policies.registry import load_processor
from verl_vla.trainer.grpo import cluster_policy
from verl_vla.trainer.grpo.cluster_policy import ClusterPolicy, padded_rows

RANKS = 4


class Workers:
    """Answer with the noise as bins, so that each row shows whose it is."""

    def __init__(self) -> None:
        self.requests: list[TensorDict] = []

    def sample_actions(self, request: TensorDict) -> Answer:
        self.requests.append(request)
        tokens = (request["noise"] * 100).long()
        answer = {"action_tokens": tokens, "log_probs": -request["noise"].float()}
        return Answer(tu.get_tensordict(answer), list(range(RANKS)))


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load_processor(PROJECT_FOLDER / "bases" / "mini")


def observations(processor: Processor, count: int) -> list[Observation]:
    """Images and proprio that show their row."""
    return [
        Observation(
            image=np.full(processor.shape.image_shape, row, dtype=np.uint8),
            proprio=np.full(8, row, dtype=np.float32),
            instruction=suite("mini").tasks[row].instruction,
        )
        for row in range(count)
    ]


def noise_of(processor: Processor, count: int) -> torch.Tensor:
    width = processor.shape.num_tokens
    return (torch.arange(count, dtype=torch.float64)[:, None] / 100).repeat(1, width)


def test_every_rank_gets_as_many_rows_and_each_row_its_own_answer(processor: Processor) -> None:
    workers = Workers()
    policy = ClusterPolicy(workers, processor, num_ranks=RANKS)
    assert policy.shape == processor.shape
    seen = observations(processor, 5)
    chunk = policy.act(seen, noise_of(processor, 5), temperature=0.7)
    (request,) = workers.requests
    repeated = [0, 1, 2, 3, 4, 4, 4, 4]
    assert request["images"][:, 0, 0, 0, 0].tolist() == repeated
    assert request["proprio"][:, 0].tolist() == repeated
    assert (request["noise"][:, 0] * 100).round().tolist() == repeated
    assert float(request["temperature"]) == 0.7
    prompts = [processor.prompt(o.instruction) for o in seen]
    for row, index in enumerate(repeated):
        ids = request["input_ids"][row][request["attention_mask"][row].bool()]
        assert torch.equal(ids, prompts[index])
    assert chunk.action_tokens[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert chunk.log_probs[:, 0].tolist() == pytest.approx([0, -0.01, -0.02, -0.03, -0.04])
    assert all(map(torch.equal, chunk.prompt_ids, prompts))
    assert np.array_equal(chunk.actions, processor.codec.to_simulator(chunk.action_tokens))


def test_a_request_is_ready_once_every_rank_has_answered(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[int, float]] = []
    num_done = RANKS - 1

    def wait(ranks: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        waits.append((num_returns, timeout))
        return ranks[:num_done], ranks[num_done:]

    monkeypatch.setattr(cluster_policy.ray, "wait", wait)
    policy = ClusterPolicy(Workers(), processor, num_ranks=RANKS)
    pending = policy.request(observations(processor, 4), noise_of(processor, 4), temperature=1.0)
    assert not pending.is_ready(0.25)
    num_done = RANKS
    assert pending.is_ready(0.5)
    assert waits == [(RANKS, 0.25), (RANKS, 0.5)]
    assert len(pending.collect().action_tokens) == 4


@pytest.mark.parametrize(
    ("count", "multiple", "rows"),
    [(1, 1, [0]), (4, 2, [0, 1, 2, 3]), (1, 3, [0, 0, 0]), (5, 3, [0, 1, 2, 3, 4, 4])],
)
def test_the_last_row_fills_up(count: int, multiple: int, rows: list[int]) -> None:
    assert padded_rows(count, multiple) == rows
