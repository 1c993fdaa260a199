"""Processor that all token-action policies share: prompts, pixels and bins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.policies.base import PolicyShape
from verl_vla.policies.checkpoint import write_image_statistics
from verl_vla.policies.normalization import ActionStatistics, NormalizationStats, save_statistics
from verl_vla.policies.preprocessing import ImageStatistics, normalize_image


class TokenProcessor(ABC):
    """Conversion of observations into model inputs and of bins into simulator commands.

    Args:
        shape: sizes of the policy.
        tokenizer: tokenizer with a padding token.
        image_statistics: one entry per vision tower.
        action_statistics: statistics of the data that the model was fine-tuned on.
        render_size: size of the camera images of that data, pixels; None if unknown.
        proprio_stats: statistics of the same data, for a policy that reads proprio.

    Raises:
        ConfigError: if the statistics are for another number of action or proprio values.
    """

    def __init__(
        self,
        shape: PolicyShape,
        tokenizer: PreTrainedTokenizerFast,
        image_statistics: Sequence[ImageStatistics],
        action_statistics: ActionStatistics,
        render_size: int | None,
        proprio_stats: NormalizationStats | None = None,
    ) -> None:
        num_ranges = 0 if proprio_stats is None else len(proprio_stats)
        if num_ranges != shape.proprio_dim:
            raise ConfigError(
                f"there are ranges of {num_ranges} proprio values, the policy reads "
                f"{shape.proprio_dim}; choose the statistics of its data"
            )
        self.proprio_stats = proprio_stats
        self.render_size = render_size
        self.tokenizer = tokenizer
        self.image_statistics = tuple(image_statistics)
        self.shape = shape
        self.codec = ActionCodec(
            num_bins=shape.num_bins,
            chunk_length=shape.chunk_length,
            action_dim=shape.action_dim,
            statistics=action_statistics,
        )
        self._prompts: dict[str, Tensor] = {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all files of a checkpoint except config and weights."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        write_image_statistics(
            folder, self.image_statistics, self.shape.image_size, self.render_size
        )
        save_statistics(folder, self.codec.statistics, self.proprio_stats)

    def prompt(self, instruction: str) -> Tensor:
        """Tokenise the prompt of a task; the result is cached.

        Returns:
            [L] int64; shared between calls, so it must not be written to.
        """
        # the same few instructions come back at each policy step
        if instruction not in self._prompts:
            self._prompts[instruction] = torch.tensor(self._tokenize(instruction))
        return self._prompts[instruction]

    def pixel_values(self, images: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """Normalise the images of n policy steps for every tower.

        Args:
            images: [n, V, H, W, 3] uint8, made by `prepare_image`.

        Returns:
            [n, V * towers * 3, H, W] float32, on the device of ``images``.
        """
        pixels = torch.as_tensor(images)
        size = self.shape.image_size
        expected = (self.shape.num_views, size, size, 3)
        if tuple(pixels.shape[1:]) != expected:
            raise ContractError(f"images must be [n, {expected}], got {list(pixels.shape)}")
        # [n, V, towers * 3, H, W] -> [n, V * towers * 3, H, W]
        return normalize_image(pixels, self.image_statistics).flatten(1, 2)

    def model_inputs(self, images: Tensor, proprio: Tensor | None) -> dict[str, Tensor]:
        """See `verl_vla.policies.base.Processor.model_inputs`; on the device of ``images``.

        Raises:
            ContractError: the policy reads proprio, and it is None or has another shape.
        """
        inputs = {"pixel_values": self.pixel_values(images)}
        if self.proprio_stats is None:
            return inputs
        expected = [len(images), self.shape.proprio_dim]
        if proprio is None or list(proprio.shape) != expected:
            found = None if proprio is None else list(proprio.shape)
            raise ContractError(f"proprio must be {expected}, got {found}")
        ranged = torch.from_numpy(self.proprio_stats.normalize(proprio.cpu().numpy()))
        return inputs | {"proprio": ranged.float().to(inputs["pixel_values"].device)}

    def collate(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pad prompts on the right.

        Args:
            prompts: n tensors [L].

        Returns:
            Ids and attention mask, [n, longest L] int64 each.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.nn.utils.rnn.pad_sequence(
            list(prompts), batch_first=True, padding_value=self._pad_id
        )
        # by length, since the padding id may be a word too
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return ids, mask.long()

    @abstractmethod
    def _tokenize(self, instruction: str) -> list[int]:
        """Return the ids of a task's prompt."""

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)  # `read_tokenizer` and `build_tokenizer` ensure it
        return pad
