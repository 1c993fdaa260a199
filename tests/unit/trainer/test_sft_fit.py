"""Supervised fine-tuning: labels, ranges, the loss, and that it fits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from verl_vla.core.errors import ConfigError
from verl_vla.datasets.demonstrations import Demonstration
from verl_vla.policies.action_distribution import entropy
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft import OpenVLAOFTPolicy
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tiny_policy
from verl_vla.trainer.sft.fit import (
    Samples,
    SFTConfig,
    action_statistics,
    cross_entropy,
    fit,
    learning_rate,
    make_samples,
    soft_targets,
)

SIZES = TinySizes(
    image_size=28,
    vision_width=24,
    vision_depth=1,
    vision_heads=2,
    llm_width=32,
    llm_depth=2,
    llm_heads=2,
    llm_mlp=64,
    chunk_length=4,
)
INSTRUCTIONS = ("lift the cube", "push the can to the left")


def demonstration(task_id: int, *, num_frames: int = 4, extra: int = 4) -> Demonstration:
    """Images with a patch that stands for the task, actions that turn with the step."""
    rng = np.random.default_rng(task_id)
    steps = 2 * np.arange(num_frames)
    num_actions = int(steps[-1]) + extra
    actions = np.zeros((num_actions, 7), dtype=np.float32)
    actions[:, :3] = 0.6 * np.sin(np.arange(num_actions)[:, None] + task_id + np.arange(3))
    actions[:, 4] = 0.25
    actions[:, 6] = np.where(np.arange(num_actions) < 5, -1.0, 1.0)
    return Demonstration(
        task_id=task_id,
        instruction=INSTRUCTIONS[task_id],
        images=rng.integers(0, 256, (num_frames, 1, 28, 28, 3), dtype=np.uint8),
        frame_steps=steps,
        actions=actions,
        num_steps=num_actions,
    )


@pytest.fixture
def demonstrations() -> list[Demonstration]:
    return [demonstration(0), demonstration(1)]


def policy_for(demonstrations: list[Demonstration]) -> OpenVLAOFTPolicy:
    statistics = action_statistics(demonstrations, key="mini")
    return build_tiny_policy(INSTRUCTIONS, statistics, sizes=SIZES, seed=0)


def samples_for(demonstrations: list[Demonstration]) -> Samples:
    return make_samples(demonstrations, policy_for(demonstrations).processor.codec)


def test_the_labels_command_the_next_actions(demonstrations: list[Demonstration]) -> None:
    codec = policy_for(demonstrations).processor.codec
    samples = make_samples(demonstrations, codec)
    assert len(samples) == 8
    assert samples.instructions == (INSTRUCTIONS[0],) * 4 + (INSTRUCTIONS[1],) * 4
    commanded = codec.to_simulator(samples.action_tokens)
    cell = (codec.statistics.q99 - codec.statistics.q01) / 255
    for row, (source, frame) in enumerate((d, f) for d in demonstrations for f in range(4)):
        start = int(source.frame_steps[frame])
        wanted = source.actions[start : start + 4].astype(np.float64)
        inside = np.clip(wanted, codec.statistics.q01, codec.statistics.q99)
        assert np.array_equal(samples.images[row], source.images[frame])
        assert (np.abs(commanded[row, :, :6] - inside[:, :6]) <= cell[:6] + 1e-6).all()
        assert np.array_equal(commanded[row, :, 6], wanted[:, 6])


def test_too_short_a_demonstration_is_refused() -> None:
    short = [demonstration(0, extra=3)]
    with pytest.raises(ConfigError, match=r"acts 4 steps .* only 3 actions follow"):
        samples_for(short)


def test_ranges_are_quantiles_and_still_values_are_frozen() -> None:
    rng = np.random.default_rng(0)
    base = demonstration(0)
    actions = rng.uniform(-1, 1, (5000, 7)).astype(np.float32)
    actions[:, 3] = 0.0
    actions[:, 4] = 0.25 + 0.001 * actions[:, 4]
    actions[:, 6] = np.sign(actions[:, 6])
    found = action_statistics([replace(base, actions=actions)], key="mini")
    assert isinstance(found, ActionStatistics)
    assert found.key == "mini"
    assert np.allclose(found.q01[:3], -0.98, atol=0.02)
    assert np.allclose(found.q99[:3], 0.98, atol=0.02)
    assert found.q01[3] == found.q99[3] == 0.0
    assert found.q01[4] == found.q99[4] == pytest.approx(0.25, abs=1e-3)
    assert found.mask.tolist() == [True] * 6 + [False]


def test_no_demonstrations_are_refused() -> None:
    with pytest.raises(ConfigError, match="no demonstrations to measure"):
        action_statistics([], key="mini")


def test_the_loss_is_the_cross_entropy_over_the_action_classes(
    demonstrations: list[Demonstration],
) -> None:
    policy, samples = policy_for(demonstrations), samples_for(demonstrations)
    report = next(fit(policy, samples, SFTConfig(steps=1, batch_size=8, seed=3, smoothing=3.0)))
    untrained = policy_for(demonstrations)
    prompts = [untrained.processor.prompt(words) for words in samples.instructions]
    with torch.no_grad():
        logits = untrained.logits(samples.images, prompts)
        log_probs = untrained.log_prob(
            samples.images, prompts, samples.action_tokens, temperature=1.0
        )
    assert logits.shape == (8, 28, 256)
    assert report.loss == pytest.approx(float(-log_probs.mean()), abs=1e-4)
    assert float(cross_entropy(logits, samples.action_tokens)) == pytest.approx(
        report.loss, abs=1e-4
    )
    uniform = cross_entropy(torch.zeros(2, 3, 256), torch.zeros(2, 3, dtype=torch.int64))
    assert float(uniform) == pytest.approx(math.log(256))


def test_targets_spread_over_neighbouring_motions_only(
    demonstrations: list[Demonstration],
) -> None:
    codec = policy_for(demonstrations).processor.codec
    action_tokens = torch.full((2, 28), 100)
    action_tokens[1, 0] = 0
    soft = soft_targets(action_tokens, codec, 4.0)
    assert torch.allclose(soft.sum(-1), torch.ones(2, 28))
    assert torch.equal(soft.argmax(-1), action_tokens)
    moving = soft[0, 0]
    assert moving[104] / moving[100] == pytest.approx(math.exp(-0.5), rel=1e-4)
    assert moving[96] == moving[104]
    for still in (3, 4, 5, 6):
        assert soft[0, still].max() == 1.0
    assert torch.equal(soft_targets(action_tokens, codec, 0.0).argmax(-1), action_tokens)
    assert soft_targets(action_tokens, codec, 0.0).max(-1).values.min() == 1.0


def test_smoothing_changes_what_is_learned(demonstrations: list[Demonstration]) -> None:
    samples = samples_for(demonstrations)
    entropies: list[float] = []
    for smoothing in (0.0, 8.0):
        policy = policy_for(demonstrations)
        config = SFTConfig(steps=60, batch_size=8, lr=4e-3, warmup_steps=5, smoothing=smoothing)
        list(fit(policy, samples, config))
        prompts = [policy.processor.prompt(words) for words in samples.instructions]
        with torch.no_grad():
            entropies.append(float(entropy(policy.logits(samples.images, prompts), 1.0).mean()))
    assert entropies[1] > entropies[0] + 0.3


def test_it_fits_a_handful_of_samples(demonstrations: list[Demonstration]) -> None:
    policy, samples = policy_for(demonstrations), samples_for(demonstrations)
    config = SFTConfig(steps=250, batch_size=8, lr=4e-3, warmup_steps=10, smoothing=0.0)
    reports = list(fit(policy, samples, config))
    assert [r.step for r in reports] == list(range(1, 251))
    assert reports[0].loss > 4.0
    assert reports[-1].loss < 0.1
    assert reports[-1].accuracy > 0.99
    prompts = [policy.processor.prompt(words) for words in samples.instructions]
    with torch.no_grad():
        answered = policy.logits(samples.images, prompts).argmax(-1)
    assert (answered == samples.action_tokens).float().mean() > 0.99
    assert not policy.model.training


def test_the_same_seed_gives_the_same_weights(demonstrations: list[Demonstration]) -> None:
    samples = samples_for(demonstrations)
    weights: list[torch.Tensor] = []
    for seed in (0, 0, 1):
        policy = policy_for(demonstrations)
        for _ in fit(policy, samples, SFTConfig(steps=3, batch_size=3, seed=seed)):
            pass
        weights.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_never_runs_is_not_trained(demonstrations: list[Demonstration]) -> None:
    policy, samples = policy_for(demonstrations), samples_for(demonstrations)
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    frozen = {n for n, p in policy.model.named_parameters() if not p.requires_grad}
    list(fit(policy, samples, SFTConfig(steps=2, batch_size=4)))
    unchanged = {n for n, p in policy.model.named_parameters() if torch.equal(p, before[n])}
    assert frozen
    assert frozen <= unchanged
    assert len(unchanged) < len(before) / 2


def test_every_sample_is_seen_once_a_round(demonstrations: list[Demonstration]) -> None:
    samples = samples_for(demonstrations)
    policy = policy_for(demonstrations)
    seen: list[bytes] = []
    forward = policy.logits
    policy.logits = lambda images, prompts, action_tokens: (  # type: ignore[method-assign]
        seen.extend(image.numpy().tobytes() for image in images),
        forward(images, prompts, action_tokens),
    )[1]
    list(fit(policy, samples, SFTConfig(steps=8, batch_size=3)))
    assert len(seen) == 24
    assert len(set(seen[:8])) == len(set(seen[8:16])) == len(set(seen[16:])) == 8
    assert seen[:8] != seen[8:16]


def test_the_rate_rises_then_falls() -> None:
    config = SFTConfig(steps=100, warmup_steps=10, lr=2.0, final_lr=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == pytest.approx(2.0)
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert rates[-1] == pytest.approx(0.2)
    assert learning_rate(SFTConfig(steps=5, warmup_steps=0), 0) > 0


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"warmup_steps": -1}, {"smoothing": -1.0}],
)
def test_impossible_knobs_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(SFTConfig(), **change)
