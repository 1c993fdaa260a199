"""What a policy must look like to a rollout, to a learner and to evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from verl_vla.core.episode import Observation
from verl_vla.core.tables import ActionChunk
from verl_vla.policies import action_distribution
from verl_vla.policies.action_codec import ActionCodec


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyShape:
    """The sizes that the rest of the system must agree with; all of them from the checkpoint."""

    num_views: int
    image_size: int
    """Height and width of an observation image, pixels."""
    chunk_length: int
    """K, actions per policy step."""
    action_dim: int
    """A, values per action."""
    num_bins: int
    """Classes per action token."""
    proprio_dim: int = 0
    """P, proprio values that it reads; 0 where it reads none."""

    @property
    def num_tokens(self) -> int:
        """T, action tokens per policy step."""
        return self.chunk_length * self.action_dim

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        """(V, H, W, 3), the images of one observation."""
        return (self.num_views, self.image_size, self.image_size, 3)


def observed_proprio(observations: Sequence[Observation]) -> Tensor:
    """[n, P] float32, of n observations."""
    return torch.from_numpy(np.stack([o.proprio for o in observations]))


class Policy(Protocol):
    """Chooses action chunks."""

    @property
    def shape(self) -> PolicyShape:
        """Sizes of what goes in and what comes out."""
        ...

    def act(
        self, observations: Sequence[Observation], noise: Tensor, *, temperature: float
    ) -> ActionChunk:
        """Choose one chunk for each of the ``n`` observations.

        Args:
            observations: n of them; their order is the order of the answer.
            noise: [n, T] float64, uniform in [0, 1); the only source of randomness, so the same
                observation and noise give the same bins in whatever batch they arrive.
            temperature: of the categorical distribution; 0 takes the most likely bin and
                ignores ``noise``.
        """
        ...


class Processor(Protocol):
    """Turns observations into model inputs and bins into simulator commands."""

    render_size: int | None
    """Of the camera images that the policy was fine-tuned on, px; None if unknown."""

    @property
    def shape(self) -> PolicyShape:
        """Sizes of what goes in and what comes out."""
        ...

    @property
    def codec(self) -> ActionCodec:
        """Between bins and commands."""
        ...

    def prompt(self, instruction: str) -> Tensor:
        """Tokenise the prompt of a task: [L] int64, not to be written to."""
        ...

    def pixel_values(self, images: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """Normalise [n, V, H, W, 3] uint8 for the vision towers: float32, the model's layout."""
        ...

    def model_inputs(self, images: Tensor, proprio: Tensor | None) -> dict[str, Tensor]:
        """What a model sees of n policy steps: ``pixel_values``, and ``proprio`` where it reads it.

        Args:
            images: [n, V, H, W, 3] uint8.
            proprio: [n, P] float32 as observed; may be None where the policy reads none.
        """
        ...

    def collate(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pad n prompts [L] on the right: ids and mask, [n, longest L] int64 each."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write everything of a checkpoint but config and weights."""
        ...


class TrainablePolicy(Policy, Protocol):
    """A policy in this process, whose choices can be scored and whose weights can be changed."""

    @property
    def model(self) -> PreTrainedModel:
        """Its ``forward``, which FSDP wraps, answers `ActionLogits`.

        It takes what `Processor.model_inputs` makes, ``input_ids``, ``attention_mask``, and
        ``action_tokens`` to score or an `ActionSampler`; and ``with_nll``, true where
        ``action_tokens`` are demonstrated.
        """
        ...

    @property
    def processor(self) -> Processor:
        """Of the same checkpoint."""
        ...

    def logits(
        self,
        images: Tensor,
        prompts: Sequence[Tensor],
        action_tokens: Tensor,
        *,
        proprio: Tensor | None = None,
    ) -> Tensor:
        """Score every bin of every token, given the tokens before it; differentiable.

        Args:
            images: [n, V, H, W, 3] uint8.
            prompts: n tensors [L] int64.
            action_tokens: [n, T] int64, recorded or demonstrated; a policy that chooses all tokens
                at once ignores them.
            proprio: [n, P] float32 as observed, for a policy that reads it.

        Returns:
            [n, T, C] float32, on the model's device.
        """
        ...

    def log_prob(
        self,
        images: Tensor,
        prompts: Sequence[Tensor],
        action_tokens: Tensor,
        *,
        temperature: float,
        proprio: Tensor | None = None,
    ) -> Tensor:
        """[n, T] float32 nats of recorded ``action_tokens``, at their sampling temperature."""
        ...

    def action_mass(
        self, images: Tensor, prompts: Sequence[Tensor], *, proprio: Tensor | None = None
    ) -> Tensor:
        """[n, T] float32, how much of all probability falls on action ids; 0 to 1."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `verl_vla.policies.registry.load_policy` reads."""
        ...


@dataclass
class ActionLogits(ModelOutput):
    """What a model answers.

    Args:
        logits: [B, T, C] float32, column ``k`` scores bin ``k``.
        action_tokens: [B, T] int64, what a `ActionSampler` chose; None where bins were scored.
        nll: [B, N] float32 nats, how unlikely the demonstrated tokens are among all that the model
            can say: T action tokens, and the stop behind them where it has one. None unless asked
            for.
    """

    logits: Tensor | None = None
    action_tokens: Tensor | None = None
    nll: Tensor | None = None


class ActionSampler:
    """Turns logits into bins, as many tokens at a time as a decoding has.

    An object of its own because FSDP casts every float tensor among a model's inputs, inside
    tuples and dataclasses too, to the type of the weights: noise of eight bits chooses badly.

    Args:
        noise: [n, T] float64, uniform in [0, 1).
        temperature: 0 takes the most likely bin and ignores ``noise``.
    """

    def __init__(self, noise: Tensor, temperature: float) -> None:
        self._noise = noise
        self._temperature = temperature

    def choose(self, logits: Tensor, first: int = 0) -> Tensor:
        """Choose the bins of ``t`` neighbouring tokens.

        Args:
            logits: [n, t, C] float32.
            first: index of the first of them in the chunk.

        Returns:
            [n, t] int64.
        """
        noise = self._noise[:, first : first + logits.shape[1]]
        return action_distribution.sample(logits, noise, self._temperature)

    def log_prob(self, logits: Tensor, action_tokens: Tensor) -> Tensor:
        """[n, T] float32 nats of what was chosen; zeros where play is greedy."""
        if self._temperature == 0:
            return torch.zeros_like(action_tokens, dtype=torch.float32)
        return action_distribution.log_prob(logits, action_tokens, self._temperature)
