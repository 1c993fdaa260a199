"""What every policy owes a rollout and a learner, asked of each that we have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from verl_vla.core.episode import Observation
from verl_vla.policies.base import Policy, TrainablePolicy
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft import OpenVLAOFTPolicy
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tiny_policy
from verl_vla.policies.registry import load_policy
from verl_vla.policies.scratch_vla import ScratchVLAPolicy
from verl_vla.policies.scratch_vla.tiny import ScratchSizes
from verl_vla.policies.scratch_vla.tiny import build_tiny_policy as build_scratch_policy

INSTRUCTIONS = ["push the cube onto the marker", "lift the cube"]
STATISTICS = ActionStatistics(
    q01=[-0.6, -0.6, -0.6, 0.0, 0.0, 0.0, 0.0],
    q99=[0.7, 0.7, 0.7, 0.0, 0.0, 0.0, 1.0],
    mask=[True] * 6 + [False],
)


def tiny() -> OpenVLAOFTPolicy:
    return build_tiny_policy(INSTRUCTIONS, STATISTICS, sizes=TinySizes(image_size=56))


def fused() -> OpenVLAOFTPolicy:
    sizes = TinySizes(image_size=28, vision_width=24, llm_depth=2, fused=True, num_views=2)
    return build_tiny_policy(INSTRUCTIONS, STATISTICS, sizes=sizes)


def scratch_parallel() -> ScratchVLAPolicy:
    sizes = ScratchSizes(image_size=28, vision_width=24, llm_depth=2, num_towers=2, num_views=2)
    return build_scratch_policy(INSTRUCTIONS, STATISTICS, sizes=sizes)


def scratch_autoregressive() -> ScratchVLAPolicy:
    sizes = ScratchSizes(
        image_size=28, vision_width=24, llm_depth=2, chunk_length=1, decoding="autoregressive"
    )
    return build_scratch_policy(INSTRUCTIONS, STATISTICS, sizes=sizes)


@pytest.fixture(
    params=[tiny, fused, scratch_parallel, scratch_autoregressive],
    ids=lambda build: build.__name__,
    scope="module",
)
def policy(request: pytest.FixtureRequest) -> TrainablePolicy:
    build: Callable[[], TrainablePolicy] = request.param
    return build()


def observe(policy: Policy, count: int) -> list[Observation]:
    rng = np.random.default_rng(0)
    size, views = policy.shape.image_size, policy.shape.num_views
    return [
        Observation(
            image=rng.integers(0, 256, (views, size, size, 3), dtype=np.uint8),
            proprio=np.zeros(8, np.float32),
            instruction=INSTRUCTIONS[index % 2],
        )
        for index in range(count)
    ]


def draw(policy: Policy, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, policy.shape.num_tokens, dtype=torch.float64, generator=generator)


def test_a_chunk_has_the_promised_shapes_and_types(policy: Policy) -> None:
    shape = policy.shape
    chunk = policy.act(observe(policy, 3), draw(policy, 3), temperature=1.6)
    assert chunk.action_tokens.shape == chunk.log_probs.shape == (3, shape.num_tokens)
    assert chunk.action_tokens.dtype == torch.int64 and chunk.log_probs.dtype == torch.float32
    assert not chunk.log_probs.requires_grad
    assert chunk.action_tokens.min() >= 0 and chunk.action_tokens.max() < shape.num_bins
    assert chunk.actions.shape == (3, shape.chunk_length, shape.action_dim)
    assert chunk.actions.dtype == np.float32 and np.isfinite(chunk.actions).all()
    assert [prompt.dtype for prompt in chunk.prompt_ids] == [torch.int64] * 3
    assert len(chunk.prompt_ids[0]) != len(chunk.prompt_ids[1])  # unpadded


def test_noise_is_the_only_randomness(policy: Policy) -> None:
    observations = observe(policy, 2)
    first = policy.act(observations, draw(policy, 2), temperature=1.6)
    torch.manual_seed(99)
    again = policy.act(observations, draw(policy, 2), temperature=1.6)
    other = policy.act(observations, draw(policy, 2, seed=1), temperature=1.6)
    assert torch.equal(first.action_tokens, again.action_tokens) and torch.equal(
        first.log_probs, again.log_probs
    )
    assert not torch.equal(first.action_tokens, other.action_tokens)


def test_a_policy_step_does_not_depend_on_its_batch(policy: Policy) -> None:
    observations, noise = observe(policy, 5), draw(policy, 5)
    together = policy.act(observations, noise, temperature=1.6)
    for row in range(5):
        one = slice(row, row + 1)
        alone = policy.act(observations[one], noise[one], temperature=1.6)
        assert torch.equal(alone.action_tokens, together.action_tokens[one])
        assert torch.allclose(alone.log_probs, together.log_probs[one], atol=1e-4)
        assert np.array_equal(alone.actions, together.actions[one])
        assert torch.equal(alone.prompt_ids[0], together.prompt_ids[row])


def test_greedy_ignores_noise_and_gives_no_probabilities(policy: Policy) -> None:
    observations = observe(policy, 2)
    first = policy.act(observations, draw(policy, 2), temperature=0.0)
    other = policy.act(observations, draw(policy, 2, seed=1), temperature=0.0)
    assert torch.equal(first.action_tokens, other.action_tokens)
    assert torch.equal(first.log_probs, torch.zeros(2, policy.shape.num_tokens))


def test_image_and_instruction_both_matter(policy: Policy) -> None:
    seen = observe(policy, 2)
    noise = draw(policy, 1)
    first = policy.act([seen[0]], noise, temperature=1.0).log_probs
    told = Observation(
        image=seen[0].image, proprio=seen[0].proprio, instruction=seen[1].instruction
    )
    shown = Observation(
        image=seen[1].image, proprio=seen[0].proprio, instruction=seen[0].instruction
    )
    for changed in (told, shown):
        assert not torch.equal(policy.act([changed], noise, temperature=1.0).log_probs, first)


def test_the_learner_sees_the_log_prob_of_the_rollout(policy: TrainablePolicy) -> None:
    observations = observe(policy, 4)
    chunk = policy.act(observations, draw(policy, 4), temperature=1.6)
    images = torch.from_numpy(np.stack([o.image for o in observations]))
    log_probs = policy.log_prob(images, chunk.prompt_ids, chunk.action_tokens, temperature=1.6)
    if isinstance(policy, ScratchVLAPolicy) and policy.model.config.decoding == "autoregressive":
        # one token at a time with kept keys and values: the same sums in another order
        assert (log_probs.detach() - chunk.log_probs).abs().max() < 1e-5
    else:
        assert torch.equal(
            log_probs.detach(), chunk.log_probs
        )  # same layout, same float32 operations
    log_probs.sum().backward()
    assert policy.model.get_input_embeddings().weight.grad is not None
    policy.model.zero_grad()
    hotter = policy.log_prob(images, chunk.prompt_ids, chunk.action_tokens, temperature=3.0)
    assert not torch.allclose(hotter, log_probs)


def test_the_actions_are_those_of_the_bins(policy: TrainablePolicy) -> None:
    chunk = policy.act(observe(policy, 2), draw(policy, 2), temperature=1.6)
    assert np.array_equal(chunk.actions, policy.processor.codec.to_simulator(chunk.action_tokens))
    assert set(np.unique(chunk.actions[..., 6])) <= {-1.0, 1.0}


def test_a_saved_policy_acts_the_same(policy: TrainablePolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path)
    again = load_policy(tmp_path)
    observations, noise = observe(policy, 3), draw(policy, 3)
    first = policy.act(observations, noise, temperature=1.6)
    second = again.act(observations, noise, temperature=1.6)
    assert torch.equal(first.action_tokens, second.action_tokens)
    assert torch.equal(first.log_probs, second.log_probs)
    assert np.array_equal(first.actions, second.actions)


def test_in_bfloat16_it_still_scores_in_float32(policy: TrainablePolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path)
    half = load_policy(tmp_path, torch.bfloat16)
    observations, noise = observe(policy, 2), draw(policy, 2)
    assert half.model.dtype == torch.bfloat16
    chunk = half.act(observations, noise, temperature=1.6)
    images = torch.from_numpy(np.stack([o.image for o in observations]))
    exact = policy.log_prob(images, chunk.prompt_ids, chunk.action_tokens, temperature=1.6)
    assert chunk.log_probs.dtype == torch.float32
    assert (chunk.log_probs - exact).abs().max() < 0.2
