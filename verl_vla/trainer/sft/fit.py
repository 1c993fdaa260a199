"""Supervised fine-tuning: the base policy that GRPO starts from.

A policy learns to answer an image with the next K actions of the demonstration, by the
cross-entropy of its 256 action classes. Plain PyTorch in one process, meant for tiny policies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from verl_vla.core.errors import ConfigError
from verl_vla.datasets.action_targets import GRIPPER, HIGH_QUANTILE, LOW_QUANTILE
from verl_vla.datasets.demonstrations import Demonstration
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.policies.base import TrainablePolicy
from verl_vla.policies.normalization import ActionStatistics

STILL_RANGE = 0.01
"""A value whose range is smaller, in simulator units, is held at its median: tokens that choose
among 256 shades of nothing would be all noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTConfig:
    """Options of `fit`."""

    steps: int = 800
    batch_size: int = 24
    """Images per step."""
    lr: float = 2e-3
    """Highest learning rate."""
    warmup_steps: int = 30
    """Steps over which the rate rises linearly; then it falls along a cosine."""
    final_lr: float = 0.02
    """Rate of the last step, of the highest."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 1.0
    """Bound on the gradient's norm."""
    smoothing: float = 4.0
    """Standard deviation, in bins, of the target around the demonstrated bin of a value that
    moves. Neighbouring bins are nearly the same motion: a target that says so is learned faster
    and leaves GRPO something to choose from. 0 asks for the demonstrated bin alone."""
    seed: int = 0
    """Seed of the order of the samples."""

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; set at least 1")
        if self.lr <= 0:
            raise ConfigError(f"lr is {self.lr}; set a positive number")
        for name, value in (("warmup_steps", self.warmup_steps), ("smoothing", self.smoothing)):
            if value < 0:
                raise ConfigError(f"{name} is {value}; set 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Training data of `fit`: F images with their action tokens and instructions."""

    images: Tensor
    """[F, V, H, W, 3] uint8."""
    action_tokens: Tensor
    """[F, T] int64, the classes that command the next K actions."""
    instructions: tuple[str, ...]
    """F sentences."""

    def __len__(self) -> int:
        return len(self.action_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Measurements of one step of `fit`."""

    step: int
    loss: float
    """Mean cross-entropy of the batch's tokens, nats, against the demonstrated bins alone."""
    accuracy: float
    """Share of tokens whose likeliest class is the demonstrated one."""


def action_statistics(demonstrations: Sequence[Demonstration], *, key: str) -> ActionStatistics:
    """Measure the ranges of all recorded actions; the last value is the gripper's.

    Args:
        demonstrations: at least one.
        key: the name that a checkpoint stores the ranges under.
    """
    if not demonstrations:
        raise ConfigError("there are no demonstrations to measure; record some with `demos`")
    actions = np.concatenate([d.actions for d in demonstrations]).astype(np.float64)
    low, high = np.quantile(actions, [LOW_QUANTILE, HIGH_QUANTILE], axis=0)
    still = high - low < STILL_RANGE
    middle = np.median(actions, axis=0)
    mask = np.ones(actions.shape[1], dtype=bool)
    mask[GRIPPER] = False
    # equal ends: the codec then knows that the value does not move (see `soft_targets`)
    low, high = np.where(still, middle, low), np.where(still, middle, high)
    # the gripper is kept in the dataset's convention, 0 closed to 1 open
    low[GRIPPER], high[GRIPPER] = 0.0, 1.0
    return ActionStatistics(q01=low, q99=high, mask=mask, key=key)


def make_samples(demonstrations: Sequence[Demonstration], codec: ActionCodec) -> Samples:
    """Pair every recorded image with the bins of the K actions that the expert took next.

    Raises:
        ConfigError: the demonstrations hold fewer than K actions after an image.
    """
    return Samples(
        images=torch.from_numpy(np.concatenate([d.images for d in demonstrations])),
        action_tokens=codec.from_simulator(
            np.concatenate([_chunks(d, codec.chunk_length) for d in demonstrations])
        ),
        instructions=tuple(d.instruction for d in demonstrations for _ in d.frame_steps),
    )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all tokens, nats.

    Args:
        logits: [n, T, C], one per action class.
        targets: [n, T] bins, or [n, T, C] probabilities.
    """
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))


def soft_targets(action_tokens: Tensor, codec: ActionCodec, smoothing: float) -> Tensor:
    """Spread each bin of a value that moves over its neighbours.

    Args:
        action_tokens: [n, T] int64.
        codec: says which values move; the gripper and still values keep their one bin.
        smoothing: standard deviation, bins.

    Returns:
        [n, T, C] float32 probabilities.
    """
    hard = functional.one_hot(action_tokens, codec.num_bins).float()
    if smoothing == 0:
        return hard
    classes = torch.arange(codec.num_bins, device=action_tokens.device)
    distance = (classes - action_tokens[..., None]).float()
    # a Gaussian around the demonstrated bin, normalised over the bins that exist
    soft = torch.softmax(-(distance**2) / (2 * smoothing**2), dim=-1)
    statistics = codec.statistics
    moves = torch.from_numpy(statistics.mask & (statistics.q01 < statistics.q99))
    return torch.where(
        moves.repeat(codec.chunk_length)[:, None].to(action_tokens.device), soft, hard
    )


def learning_rate(config: SFTConfig, step: int) -> float:
    """Rate of a step, counted from 0.

    >>> config = SFTConfig(steps=100, warmup_steps=10, lr=1.0, final_lr=0.1)
    >>> [round(learning_rate(config, step), 2) for step in (0, 9, 54, 99)]
    [0.1, 1.0, 0.55, 0.1]
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    # 0 at the end of the warm-up, 1 at the last step; max() where all steps are warm-up
    progress = (step + 1 - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    fall = (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * fall)


def fit(policy: TrainablePolicy, samples: Samples, config: SFTConfig) -> Iterator[StepReport]:
    """Train ``policy`` in place, yielding after every step.

    On a CPU the same arguments and number of threads give the same weights.
    """
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    device = policy.model.device
    policy.model.train()
    for step, rows in enumerate(_batches(len(samples), config)):
        optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        prompts = [policy.processor.prompt(samples.instructions[row]) for row in rows]
        action_tokens = samples.action_tokens[rows].to(device)
        logits = policy.logits(samples.images[rows], prompts, action_tokens)
        targets = soft_targets(action_tokens, policy.processor.codec, config.smoothing)
        loss = cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip_grad)
        optimizer.step()
        accuracy = (logits.detach().argmax(-1) == action_tokens).float().mean()
        # without smoothing, so that runs with different smoothing can be compared
        hard_loss = cross_entropy(logits.detach(), action_tokens)
        yield StepReport(step=step + 1, loss=hard_loss.item(), accuracy=accuracy.item())
    policy.model.eval()


def _chunks(demonstration: Demonstration, length: int) -> npt.NDArray[np.float32]:
    """[F, K, A], the actions from each image on."""
    last = int(demonstration.frame_steps[-1]) + length
    if last > len(demonstration.actions):
        raise ConfigError(
            f"the policy acts {length} steps at a time, but only "
            f"{len(demonstration.actions) - last + length} actions follow the last image; record "
            "demonstrations with a longer horizon"
        )
    steps = demonstration.frame_steps[:, None] + np.arange(length)
    return demonstration.actions[steps]


def _batches(num_samples: int, config: SFTConfig) -> Iterator[npt.NDArray[np.int64]]:
    """Rows of every step: all samples in a new order each time round."""
    rng = np.random.default_rng(config.seed)
    waiting = np.zeros(0, dtype=np.int64)
    for _ in range(config.steps):
        # a batch may end one order and begin the next, and may hold more than all samples
        while len(waiting) < config.batch_size:
            waiting = np.concatenate([waiting, rng.permutation(num_samples)])
        yield waiting[: config.batch_size]
        waiting = waiting[config.batch_size :]
