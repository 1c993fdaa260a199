"""The clipped loss, against a double loop written from the formula and against veRL's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, kl_penalty

from verl_vla.config.grpo import ClipRange, KLConfig
from verl_vla.core.errors import ConfigError
from verl_vla.rl.loss import divergence, executed_mask, policy_loss, trajectory_weight

CHUNK, DIM = 3, 2
TOKENS = CHUNK * DIM
CLIP = ClipRange()


@dataclass(frozen=True)
class Batch:
    """Policy steps of ``num_trajectories`` trajectories, one after the other."""

    log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    advantage: torch.Tensor
    executed: torch.Tensor
    trajectory: np.ndarray
    num_trajectories: int

    @property
    def mask(self) -> torch.Tensor:
        return executed_mask(self.executed, chunk_length=CHUNK, action_dim=DIM)

    @property
    def weight(self) -> torch.Tensor:
        steps = np.bincount(self.trajectory, weights=self.executed.numpy())[self.trajectory]
        return trajectory_weight(
            torch.tensor(steps, dtype=torch.int64),
            action_dim=DIM,
            num_trajectories=self.num_trajectories,
        )

    def loss(self, rows=slice(None), clip: ClipRange = CLIP):
        """Parts of the loss over some rows, and the gradient of ``log_probs`` there."""
        log_probs = self.log_probs[rows].clone().requires_grad_()
        parts = policy_loss(
            log_probs,
            self.old_log_probs[rows],
            self.advantage[rows],
            self.mask[rows],
            self.weight[rows],
            clip,
        )
        (gradient,) = torch.autograd.grad(parts.loss, log_probs)
        return parts, gradient


def make_batch(lengths: list[int], seed: int) -> Batch:
    """Trajectories of these numbers of policy steps; the last chunk of each is cut short."""
    rng = np.random.default_rng(seed)
    trajectory = np.repeat(np.arange(len(lengths)), lengths)
    is_last = np.append(trajectory[1:] != trajectory[:-1], True)
    executed = np.where(is_last, rng.integers(1, CHUNK + 1, len(trajectory)), CHUNK)
    advantage = rng.choice([-1.3, 0.0, 0.7], len(lengths))[trajectory]
    old_log_probs = -rng.exponential(2.0, (len(trajectory), TOKENS))
    return Batch(
        log_probs=torch.tensor(old_log_probs + rng.normal(0, 0.4, old_log_probs.shape)),
        old_log_probs=torch.tensor(old_log_probs),
        advantage=torch.tensor(advantage),
        executed=torch.tensor(executed),
        trajectory=trajectory,
        num_trajectories=len(lengths),
    )


batches = st.builds(
    make_batch, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 10**6)
)


def loss_by_hand(batch: Batch, clip: ClipRange) -> float:
    """PPO (arXiv:1707.06347, 7): token mean in a trajectory, then mean over trajectories."""
    total = 0.0
    for trajectory in range(batch.num_trajectories):
        token_losses = []
        for row in np.flatnonzero(batch.trajectory == trajectory):
            gain = float(batch.advantage[row])
            for token in range(int(batch.executed[row]) * DIM):
                ratio = math.exp(
                    float(batch.log_probs[row, token] - batch.old_log_probs[row, token])
                )
                bounded = min(max(ratio, 1 - clip.low), 1 + clip.high)
                token_losses.append(-min(ratio * gain, bounded * gain))
        total += sum(token_losses) / len(token_losses)
    return total / batch.num_trajectories


@given(batches, st.floats(0.05, 0.9), st.floats(0.05, 0.9))
@settings(max_examples=60)
def test_it_is_the_formula(batch, low, high):
    clip = ClipRange(low=low, high=high)
    parts, _ = batch.loss(clip=clip)
    assert parts.loss.item() == pytest.approx(loss_by_hand(batch, clip), rel=1e-5, abs=1e-9)


@given(batches)
@settings(max_examples=40)
def test_it_is_what_verl_computes_without_its_third_bound(batch):
    """veRL knows one row per trajectory, so the policy steps of each stand side by side there."""
    longest = int(np.bincount(batch.trajectory).max())
    rows = {
        name: torch.zeros(batch.num_trajectories, longest * TOKENS, dtype=torch.float64)
        for name in ("log_probs", "old_log_probs", "advantage", "mask")
    }
    for row, trajectory in enumerate(batch.trajectory):
        first = TOKENS * int((batch.trajectory[:row] == trajectory).sum())
        place = (int(trajectory), slice(first, first + TOKENS))
        rows["log_probs"][place], rows["old_log_probs"][place] = (
            batch.log_probs[row],
            batch.old_log_probs[row],
        )
        rows["advantage"][place], rows["mask"][place] = batch.advantage[row], batch.mask[row]
    config = OmegaConf.create(
        {
            "clip_ratio": 0.2,
            "clip_ratio_low": CLIP.low,
            "clip_ratio_high": CLIP.high,
            "clip_ratio_c": 1e9,
            "global_batch_info": {},
        }
    )
    theirs, _ = compute_policy_loss_vanilla(
        rows["old_log_probs"],
        rows["log_probs"],
        rows["advantage"],
        rows["mask"],
        loss_agg_mode="seq-mean-token-mean",
        config=config,
    )
    parts, _ = batch.loss()
    assert parts.loss.item() == pytest.approx(float(theirs), rel=1e-5, abs=1e-7)


@given(batches, st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=60)
def test_any_split_into_micro_batches_gives_the_same_sum_and_gradient(batch, size, seed):
    whole, gradient = batch.loss()
    order = torch.tensor(np.random.default_rng(seed).permutation(len(batch.log_probs)))
    pieces = [(rows, *batch.loss(rows)) for rows in order.split(size)]
    assert sum(p.loss.item() for _, p, _ in pieces) == pytest.approx(whole.loss.item(), abs=1e-9)
    for rows, _, piece_gradient in pieces:
        torch.testing.assert_close(piece_gradient, gradient[rows])
    for name in ("num_tokens", "num_clipped_low", "num_clipped_high"):
        assert sum(int(getattr(p, name)) for _, p, _ in pieces) == int(getattr(whole, name))
    assert float(sum(p.ratio_sum for _, p, _ in pieces)) == pytest.approx(float(whole.ratio_sum))
    assert max(float(p.ratio_deviation) for _, p, _ in pieces) == float(whole.ratio_deviation)


@given(batches)
@settings(max_examples=40)
def test_a_long_trajectory_weighs_as_much_as_a_short_one(batch):
    per_token = batch.mask * batch.weight[:, None]
    for trajectory in range(batch.num_trajectories):
        share = float(per_token[torch.tensor(batch.trajectory == trajectory)].sum())
        assert share == pytest.approx(1 / batch.num_trajectories, rel=1e-5)


@pytest.mark.parametrize(
    ("log_ratio", "gain", "moves", "low", "high"),
    [
        (0.0, 1.0, True, 0, 0),
        (math.log(1.27), 1.0, True, 0, 0),
        (math.log(1.29), 1.0, False, 0, 1),
        (math.log(1.29), -1.0, True, 0, 0),
        (math.log(0.81), -1.0, True, 0, 0),
        (math.log(0.79), -1.0, False, 1, 0),
        (math.log(0.79), 1.0, True, 0, 0),
        (math.log(0.5), 0.0, False, 0, 0),
        (math.log(2.0), 0.0, False, 0, 0),
        (3.0, -1.0, True, 0, 0),
    ],
)
def test_the_gradient_stops_where_a_bound_is_crossed(log_ratio, gain, moves, low, high):
    """The last case is a ratio of 20 with a negative advantage: no dual clip stops it."""
    log_probs = torch.tensor([[log_ratio]], requires_grad=True)
    parts = policy_loss(
        log_probs,
        torch.zeros(1, 1),
        torch.tensor([gain]),
        torch.ones(1, 1, dtype=torch.bool),
        torch.ones(1),
        CLIP,
    )
    (gradient,) = torch.autograd.grad(parts.loss, log_probs)
    expected = -gain * math.exp(log_ratio) if moves else 0.0
    assert float(gradient) == pytest.approx(expected, rel=1e-5)
    assert (int(parts.num_clipped_low), int(parts.num_clipped_high)) == (low, high)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["log_probs", "old_log_probs"])
def test_tokens_that_never_ran_touch_neither_value_nor_gradient(junk, name):
    batch = make_batch([2, 3], seed=0)
    clean, clean_gradient = batch.loss()
    getattr(batch, name)[~batch.mask] = junk
    parts, gradient = batch.loss()
    assert parts.loss.item() == clean.loss.item()
    for field in ("num_tokens", "ratio_sum", "ratio_deviation", "num_clipped_low"):
        assert float(getattr(parts, field)) == float(getattr(clean, field))
    assert torch.equal(gradient, clean_gradient)
    assert (gradient[~batch.mask] == 0).all()


def test_junk_behind_the_mask_does_not_reach_the_weights_through_a_softmax():
    """A class that is impossible has logit -inf; its log-prob is -inf where nothing ran."""
    logits = torch.tensor([[[0.3, -math.inf], [0.1, 0.2]]], requires_grad=True)
    log_probs = torch.log_softmax(logits, -1)[..., 1]
    parts = policy_loss(
        log_probs,
        torch.tensor([[-1.0, -0.7]]),
        torch.ones(1),
        torch.tensor([[False, True]]),
        torch.ones(1),
        CLIP,
    )
    (gradient,) = torch.autograd.grad(parts.loss, logits)
    assert torch.isfinite(gradient).all()
    assert (gradient[0, 0] == 0).all() and (gradient[0, 1] != 0).all()


def test_a_row_without_a_mask_adds_nothing():
    """veRL fills a batch up with such rows until it divides."""
    batch = make_batch([2], seed=1)
    parts = policy_loss(
        batch.log_probs,
        batch.old_log_probs,
        batch.advantage,
        torch.zeros_like(batch.mask),
        batch.weight,
        CLIP,
    )
    assert parts.loss.item() == 0
    assert int(parts.num_tokens) == 0
    assert float(parts.ratio_deviation) == 0


def test_the_sums_are_over_executed_tokens():
    batch = make_batch([3, 1], seed=2)
    parts, _ = batch.loss()
    ratio = (batch.log_probs - batch.old_log_probs).exp()[batch.mask]
    assert int(parts.num_tokens) == int(batch.executed.sum()) * DIM
    assert float(parts.ratio_sum) == pytest.approx(float(ratio.sum()))
    assert float(parts.ratio_deviation) == pytest.approx(float((ratio - 1).abs().max()))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 3))
def test_the_mask_covers_whole_actions_from_the_first(executed, action_dim):
    mask = executed_mask(torch.tensor(executed), chunk_length=5, action_dim=action_dim)
    for row, ran in zip(mask.tolist(), executed, strict=True):
        assert row == [True] * (ran * action_dim) + [False] * ((5 - ran) * action_dim)


@pytest.mark.parametrize("name", ["low", "high"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.0])
def test_an_impossible_bound_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"loss\.clip\.{name} is {value}; .* e\.g\. 0\.2"):
        ClipRange(**{name: value})


@given(batches)
@settings(max_examples=40)
def test_the_divergence_is_verls_low_variance_estimate(batch):
    ours = divergence(batch.log_probs, batch.old_log_probs, batch.mask)
    theirs = kl_penalty(batch.log_probs, batch.old_log_probs, "low_var_kl")
    torch.testing.assert_close(ours, theirs * batch.mask)
    assert (ours >= 0).all()


def test_the_mean_divergence_of_sampled_bins_is_the_divergence():
    """Weighted by the current policy's own probabilities, the estimate is exact."""
    current, start = (torch.log_softmax(torch.tensor(x), 0) for x in ([1.0, 0.2, -2], [0.3, 0, 1]))
    sampled = divergence(current[None], start[None], torch.ones(1, 3, dtype=torch.bool))[0]
    exact = (current.exp() * (current - start)).sum()
    assert float((current.exp() * sampled).sum()) == pytest.approx(float(exact))
    assert divergence(start[None], start[None], torch.ones(1, 3, dtype=torch.bool)).sum() == 0


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
def test_the_divergence_pulls_back_by_the_ratio_and_only_where_something_ran(junk):
    log_probs = torch.tensor([[-1.0, -2.0, junk]], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[-1.5, -0.5, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    (gradient,) = torch.autograd.grad(divergence(log_probs, start, mask).sum(), log_probs)
    assert gradient[0].tolist() == pytest.approx([1 - math.exp(-0.5), 1 - math.exp(1.5), 0])


def test_the_kl_term_is_off_unless_it_is_asked_for_and_never_negative():
    assert not KLConfig().is_on
    assert KLConfig(coefficient=0.01).is_on
    with pytest.raises(ConfigError, match=r"loss\.kl\.coefficient is -0\.1; set 0 for no KL term"):
        KLConfig(coefficient=-0.1)
