"""Processor of a scratch VLA: prompts, pixels and bins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from verl_vla.core.errors import ConfigError
from verl_vla.policies.checkpoint import (
    IMAGE_FILE,
    read_render_size,
    read_tokenizer,
    read_tower_statistics,
    require_file,
)
from verl_vla.policies.normalization import ActionStatistics, load_statistics
from verl_vla.policies.preprocessing import PROMPT, ImageStatistics
from verl_vla.policies.processor import TokenProcessor
from verl_vla.policies.scratch_vla.configuration import ScratchVLAConfig, read_config


class ScratchVLAProcessor(TokenProcessor):
    """Conversion of observations into model inputs and of bins into simulator commands.

    Args:
        config: configuration of the model.
        tokenizer: tokenizer of its language model.
        image_statistics: one entry per vision tower.
        action_statistics: statistics of the data that the model is fine-tuned on.
        render_size: size of the camera images of that data, pixels; None if unknown.

    Raises:
        ConfigError: if the parts do not fit together.
    """

    def __init__(
        self,
        config: ScratchVLAConfig,
        tokenizer: PreTrainedTokenizerFast,
        image_statistics: Sequence[ImageStatistics],
        action_statistics: ActionStatistics,
        render_size: int | None = None,
    ) -> None:
        if len(tokenizer) > config.language.vocab_size:
            raise ConfigError(
                f"the tokenizer knows {len(tokenizer)} pieces, the language model has "
                f"{config.language.vocab_size} rows for them; take both from one folder"
            )
        super().__init__(config.shape, tokenizer, image_statistics, action_statistics, render_size)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, unnorm_key: str | None = None
    ) -> ScratchVLAProcessor:
        """Load the processor from a checkpoint folder, without reading its weights.

        Args:
            folder: folder of the checkpoint.
            unnorm_key: key of the action statistics to use; see `load_statistics`.

        Raises:
            ConfigError: a file is missing or does not fit; names it.
        """
        config = read_config(folder)
        return cls(
            config,
            read_tokenizer(folder),
            read_image_statistics(folder, len(config.towers)),
            load_statistics(folder, unnorm_key),
            read_render_size(folder),
        )

    def _tokenize(self, instruction: str) -> list[int]:
        """Return OpenVLA's prompt with the special pieces that the tokenizer itself adds."""
        ids = list(self.tokenizer.encode(PROMPT.format(instruction=instruction.lower())))
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            raise ConfigError(
                f"the tokenizer does not know every word of '{instruction}', so the policy could "
                "not tell it from another task; build the tokenizer with this instruction"
            )
        return ids


def read_image_statistics(folder: str | Path, num_towers: int) -> tuple[ImageStatistics, ...]:
    """Read the image statistics of every vision tower.

    Raises:
        ConfigError: if the file is missing or there are not as many statistics as towers.
    """
    path = require_file(folder, IMAGE_FILE, "how the towers want their pixels")
    found = read_tower_statistics(path)
    if len(found) != num_towers:
        raise ConfigError(
            f"{path} gives image statistics of {len(found)} towers, the model has {num_towers}; "
            "tvf_normalize_params needs one entry a tower"
        )
    return found
