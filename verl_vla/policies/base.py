"""Interface of a policy for rollouts, learners and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types of `verl_vla.config.choices.DTYPES`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyShape:
    """The sizes of a policy that the rest of the system must match, read from its checkpoint."""

    num_views: int
    image_size: int
    """Height and width of an observation image, pixels."""
    chunk_length: int
    """K, number of actions per policy step."""
    action_dim: int
    """A, number of values per action."""
    num_bins: int
    """C, number of classes per action token."""
    proprio_dim: int = 0
    """P, number of proprio values that the policy reads; 0 where it reads none."""

    @property
    def num_tokens(self) -> int:
        """T, number of action tokens per policy step."""
        return self.chunk_length * self.action_dim

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        """(V, H, W, 3), shape of the images of one observation."""
        return (self.num_views, self.image_size, self.image_size, 3)


def observed_proprio(observations: Sequence[Observation]) -> Tensor:
    """Stack the proprio of n observations: [n, P] float32."""
    return torch.from_numpy(np.stack([o.proprio for o in observations]))


class Policy(Protocol):
    """A policy that samples action chunks."""

    @property
    def shape(self) -> PolicyShape:
        """Sizes of the policy's inputs and outputs."""
        ...

    def act(
        self, observations: Sequence[Observation], noise: Tensor, *, temperature: float
    ) -> ActionChunk:
        """Sample one chunk for each of the ``n`` observations.

        Args:
            observations: n observations; the result has the same order.
            noise: [n, T] float64, uniform in [0, 1); the only source of randomness, so the same
                observation and noise give the same bins in every batch.
            temperature: temperature of the categorical distribution; 0 takes the most likely bin
                and ignores ``noise``.
        """
        ...


class PendingChunk(Protocol):
    """One action chunk for each of some observations, while a policy computes them."""

    def is_ready(self, timeout_s: float) -> bool:
        """Wait at most ``timeout_s``; return True once `collect` need not wait."""
        ...

    def collect(self) -> ActionChunk:
        """Wait for the chunks and return them."""
        ...


@runtime_checkable
class AsyncPolicy(Policy, Protocol):
    """A policy that computes elsewhere, so that its caller need not wait for it."""

    def request(
        self, observations: Sequence[Observation], noise: Tensor, *, temperature: float
    ) -> PendingChunk:
        """Begin to sample one chunk for each observation; the arguments are those of `act`."""
        ...


class Processor(Protocol):
    """Conversion of observations into model inputs and of bins into simulator commands."""

    render_size: int | None
    """Size of the camera images that the policy was fine-tuned on, px; None if unknown."""

    @property
    def shape(self) -> PolicyShape:
        """Sizes of the policy's inputs and outputs."""
        ...

    @property
    def codec(self) -> ActionCodec:
        """Codec between bins and simulator commands."""
        ...

    def prompt(self, instruction: str) -> Tensor:
        """Tokenise the prompt of a task; return [L] int64, which must not be written to."""
        ...

    def pixel_values(self, images: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """Normalise [n, V, H, W, 3] uint8 for the vision towers; return float32, model layout."""
        ...

    def model_inputs(self, images: Tensor, proprio: Tensor | None) -> dict[str, Tensor]:
        """Return a model's ``pixel_values`` for n policy steps, and ``proprio`` where it reads it.

        Args:
            images: [n, V, H, W, 3] uint8.
            proprio: [n, P] float32 as observed; may be None where the policy reads none.
        """
        ...

    def collate(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pad n prompts [L] on the right; return ids and mask, [n, longest L] int64 each."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all files of a checkpoint except config and weights."""
        ...


class ModelConfig(Protocol):
    """Configuration of an architecture's model, a `PreTrainedConfig` of transformers."""

    @property
    def shape(self) -> PolicyShape:
        """Sizes of the policy's inputs and outputs."""
        ...

    @property
    def towers(self) -> Sequence[object]:
        """Configurations of the vision towers that see every view."""
        ...

    def to_json_string(self) -> str:
        """Return the content as JSON."""
        ...


class TrainablePolicy(Policy, Protocol):
    """A policy in this process whose actions can be scored and whose weights can be trained."""

    @property
    def model(self) -> PreTrainedModel:
        """The model, whose ``forward``, which FSDP wraps, returns `ActionLogits`.

        Its arguments are the results of `Processor.model_inputs`, ``input_ids``,
        ``attention_mask``, and ``action_tokens`` to score or an `ActionSampler`; and ``with_nll``,
        true where ``action_tokens`` are demonstrated.
        """
        ...

    @property
    def processor(self) -> Processor:
        """The processor of the same checkpoint."""
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
            action_tokens: [n, T] int64, recorded or demonstrated; a policy that decodes all tokens
                in parallel ignores them.
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
        """Return the log-probs, [n, T] float32 nats, of recorded ``action_tokens``.

        ``temperature`` is the one that they were sampled at.
        """
        ...

    def action_mass(
        self, images: Tensor, prompts: Sequence[Tensor], *, proprio: Tensor | None = None
    ) -> Tensor:
        """Return the share of all probability that is on action ids, [n, T] float32, 0 to 1."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `verl_vla.policies.registry.load_policy` reads."""
        ...


@dataclass
class ActionLogits(ModelOutput):
    """Output of a model.

    Args:
        logits: [B, T, C] float32, column ``k`` scores bin ``k``.
        action_tokens: [B, T] int64, sampled by an `ActionSampler`; None where bins were scored.
        nll: [B, N] float32 nats, negative log-likelihood of the demonstrated tokens over the
            model's complete vocabulary: T action tokens, and the stop token where it has one. None
            without ``with_nll``.
    """

    logits: Tensor | None = None
    action_tokens: Tensor | None = None
    nll: Tensor | None = None


class ActionSampler:
    """Sampler of bins from logits, for any number of tokens at a time.

    The noise is inside an opaque object because FSDP casts every float tensor among a model's
    inputs, also inside tuples and dataclasses, to the dtype of the weights, and bfloat16 has too
    few bits for noise.

    Args:
        noise: [n, T] float64, uniform in [0, 1).
        temperature: sampling temperature; 0 takes the most likely bin and ignores ``noise``.
    """

    def __init__(self, noise: Tensor, temperature: float) -> None:
        self._noise = noise
        self._temperature = temperature

    def sample(self, logits: Tensor, first: int = 0) -> Tensor:
        """Sample the bins of ``t`` neighbouring tokens.

        Args:
            logits: [n, t, C] float32.
            first: index of the first of them in the chunk.

        Returns:
            [n, t] int64.
        """
        # noise belongs to a position of the chunk, whether tokens come one by one or all at once
        noise = self._noise[:, first : first + logits.shape[1]]
        return action_distribution.sample(logits, noise, self._temperature)

    def log_prob(self, logits: Tensor, action_tokens: Tensor) -> Tensor:
        """Return the sampled tokens' log-probs, [n, T] float32 nats; zeros where greedy."""
        if self._temperature == 0:
            return torch.zeros_like(action_tokens, dtype=torch.float32)
        return action_distribution.log_prob(logits, action_tokens, self._temperature)
