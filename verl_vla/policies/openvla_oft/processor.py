"""Processor of an OpenVLA-OFT checkpoint: prompts, pixels and bins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerFast

from verl_vla.core.errors import ConfigError
from verl_vla.policies.checkpoint import read_render_size, read_tokenizer
from verl_vla.policies.normalization import (
    ActionStatistics,
    NormalizationStats,
    load_proprio_stats,
    load_statistics,
)
from verl_vla.policies.openvla_oft.checkpoint import read_config, read_image_statistics
from verl_vla.policies.openvla_oft.configuration import OpenVLAOFTConfig
from verl_vla.policies.preprocessing import ImageStatistics, Tokenizer, prompt_ids
from verl_vla.policies.processor import TokenProcessor


class OpenVLAOFTProcessor(TokenProcessor):
    """Conversion of observations into model inputs and of bins into simulator commands.

    Args:
        config: configuration of the model.
        tokenizer: tokenizer whose ids, except padding, are below the config's first action id.
        image_statistics: one entry per vision tower.
        action_statistics: statistics of the data that the model was fine-tuned on.
        render_size: size of the camera images of that data, pixels; None if unknown.
        proprio_stats: statistics of the same data, for a policy that reads proprio.

    Raises:
        ConfigError: if the parts do not fit together.
    """

    def __init__(
        self,
        config: OpenVLAOFTConfig,
        tokenizer: PreTrainedTokenizerFast,
        image_statistics: Sequence[ImageStatistics],
        action_statistics: ActionStatistics,
        render_size: int | None = None,
        proprio_stats: NormalizationStats | None = None,
    ) -> None:
        if len(image_statistics) != len(config.towers):
            raise ConfigError(
                f"there are image statistics of {len(image_statistics)} towers and "
                f"{len(config.towers)} vision towers; give one each"
            )
        super().__init__(
            config.shape,
            tokenizer,
            image_statistics,
            action_statistics,
            render_size,
            proprio_stats,
        )

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, unnorm_key: str | None = None
    ) -> OpenVLAOFTProcessor:
        """Load the processor from a checkpoint folder, without reading its weights.

        Args:
            folder: folder of the checkpoint.
            unnorm_key: key of the action statistics to use; see `load_statistics`.

        Raises:
            ConfigError: a file is missing or does not fit; names it.
        """
        config = read_config(folder)
        ranges = load_proprio_stats if config.use_proprio else None
        return cls(
            config,
            read_tokenizer(folder),
            read_image_statistics(folder, len(config.towers)),
            load_statistics(folder, unnorm_key, config.normalization),
            read_render_size(folder),
            ranges and ranges(folder, unnorm_key, config.normalization),
        )

    def _tokenize(self, instruction: str) -> list[int]:
        return prompt_ids(cast(Tokenizer, self.tokenizer), instruction)
