"""What lies between the tables and the model: prompts, pixels and bins of one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from verl_vla.actions import ActionCodec, ActionStatistics, load_statistics, save_statistics
from verl_vla.errors import ConfigError, ContractError
from verl_vla.observations import ImageStatistics, Tokenizer, normalize_image, prompt_ids
from verl_vla.policies.base import PolicyShape
from verl_vla.policies.openvla_oft.checkpoint import (
    read_config,
    read_image_statistics,
    read_tokenizer,
    write_image_statistics,
)
from verl_vla.policies.openvla_oft.configuration import OpenVLAOFTConfig


class OpenVLAOFTProcessor:
    """Turns observations into model inputs and bins into simulator commands.

    Args:
        config: of the model.
        tokenizer: its ids must lie below the config's first action id, padding aside.
        image_statistics: one per vision tower.
        action_statistics: of the data that the model was fine-tuned on.

    Raises:
        ConfigError: if the parts do not belong together.
    """

    def __init__(
        self,
        config: OpenVLAOFTConfig,
        tokenizer: PreTrainedTokenizerFast,
        image_statistics: Sequence[ImageStatistics],
        action_statistics: ActionStatistics,
    ) -> None:
        if len(image_statistics) != len(config.towers):
            raise ConfigError(
                f"there are image statistics of {len(image_statistics)} towers and "
                f"{len(config.towers)} vision towers; give one each"
            )
        self.tokenizer = tokenizer
        self.image_statistics = tuple(image_statistics)
        self.shape: PolicyShape = config.shape
        self.codec = ActionCodec(
            num_bins=config.n_action_bins,
            chunk_length=config.chunk_length,
            action_dim=config.action_dim,
            statistics=action_statistics,
        )
        self._prompts: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, unnorm_key: str | None = None
    ) -> OpenVLAOFTProcessor:
        """Read everything but the weights from a checkpoint folder.

        Args:
            folder: of the checkpoint.
            unnorm_key: which of its action statistics to use; see `load_statistics`.

        Raises:
            ConfigError: names the file that is missing or does not fit.
        """
        config = read_config(folder)
        return cls(
            config,
            read_tokenizer(folder),
            read_image_statistics(folder, len(config.towers)),
            load_statistics(folder, unnorm_key),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that `from_pretrained` reads, beside the model's own."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        write_image_statistics(folder, self.image_statistics, self.shape.image_size)
        save_statistics(folder, self.codec.statistics)

    def prompt(self, instruction: str) -> Tensor:
        """Tokenise the prompt of a task; every task is tokenised once.

        Returns:
            [L] int64; shared between calls, so not to be written to.
        """
        if instruction not in self._prompts:
            self._prompts[instruction] = torch.tensor(
                prompt_ids(cast(Tokenizer, self.tokenizer), instruction)
            )
        return self._prompts[instruction]

    def pixel_values(self, images: npt.NDArray[np.uint8] | Tensor) -> Tensor:
        """Normalise the images of n decisions for every tower.

        Args:
            images: [n, V, H, W, 3] uint8, through `prepare_image`.

        Returns:
            [n, V * towers * 3, H, W] float32, on the device of ``images``.
        """
        pixels = torch.as_tensor(images)
        size = self.shape.image_size
        expected = (self.shape.num_views, size, size, 3)
        if tuple(pixels.shape[1:]) != expected:
            raise ContractError(f"images must be [n, {expected}], got {list(pixels.shape)}")
        return normalize_image(pixels, self.image_statistics).flatten(1, 2)

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
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return ids, mask.long()

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)  # `read_tokenizer` and `build_tokenizer` see to it
        return pad
