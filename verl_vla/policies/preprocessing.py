"""Normalisation of images and tokenisation of prompts, as in the policy's fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from verl_vla.core.errors import ConfigError, ContractError

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
"""Prompt template of openvla-oft's `get_vla_action`; the instruction is in lower case."""
EMPTY_PIECE = "▁"
"""The piece that ends every prompt: a word boundary with no word, id 29871 in Llama's vocabulary.
OpenVLA was trained with it, and the logits of its first action token are read at it."""


@dataclass(frozen=True)
class ImageStatistics:
    """Normalization of one vision tower's pixels: ``(value / 255 - mean) / std``, by channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


DINO_STATISTICS = ImageStatistics(
    mean=(0.484375, 0.455078125, 0.40625), std=(0.228515625, 0.2236328125, 0.224609375)
)
"""ImageNet's constants rounded to bfloat16, as in the published preprocessor_config.json."""
SIGLIP_STATISTICS = ImageStatistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
OPENVLA_IMAGE_STATISTICS = (DINO_STATISTICS, SIGLIP_STATISTICS)


class Tokenizer(Protocol):
    """The part of a tokenizer that a prompt needs; every `PreTrainedTokenizerFast` has it."""

    @property
    def bos_token_id(self) -> int | None:
        """The id that starts a prompt."""
        ...

    @property
    def unk_token_id(self) -> int | None:
        """The id of a piece that is not in the vocabulary."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, special tokens included."""
        ...

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        """Return the id of one piece, or `unk_token_id`."""
        ...


def normalize_image(
    image: Tensor, statistics: Sequence[ImageStatistics] = OPENVLA_IMAGE_STATISTICS
) -> Tensor:
    """Normalise an image once for each vision tower.

    Args:
        image: [..., H, W, 3] uint8, on any device.
        statistics: one entry per tower, in the order of the towers.

    Returns:
        [..., 3 * towers, H, W] float32, on the device of ``image``.

    Raises:
        ContractError: if ``image`` is not uint8 with three channels last.
    """
    if image.dtype != torch.uint8 or image.dim() < 3 or image.shape[-1] != 3:
        raise ContractError(
            f"an image must be uint8 [..., H, W, 3], got {image.dtype} {list(image.shape)}"
        )
    # [..., H, W, 3] -> [..., 3, H, W]
    share = image.movedim(-1, -3).float() / 255
    towers = [
        (share - share.new_tensor(s.mean).view(3, 1, 1)) / share.new_tensor(s.std).view(3, 1, 1)
        for s in statistics
    ]
    return torch.cat(towers, dim=-3)


def prompt_ids(tokenizer: Tokenizer, instruction: str) -> list[int]:
    """Tokenise the prompt of a task.

    The first id is the tokenizer's beginning of sequence, which its ``encode`` must add. The last
    one is `EMPTY_PIECE`, added unless the tokenizer has added it; its id is looked up by the piece,
    so any tokenizer with that piece in its vocabulary can be used.

    Returns:
        L ids.

    Raises:
        ConfigError: the tokenizer lacks the piece, adds no beginning, or does not know a word.
    """
    # by its piece: the number is another one in another vocabulary
    empty = tokenizer.convert_tokens_to_ids(EMPTY_PIECE)
    if empty is None or empty == tokenizer.unk_token_id:
        raise ConfigError(
            f"the tokenizer has no piece '{EMPTY_PIECE}', with which every OpenVLA prompt ends; "
            "use the tokenizer.json of the checkpoint"
        )
    ids = list(tokenizer.encode(PROMPT.format(instruction=instruction.lower())))
    if not ids or ids[0] != tokenizer.bos_token_id:
        raise ConfigError(
            f"the tokenizer starts a prompt with {ids[:1]}, not with its beginning of sequence "
            f"{tokenizer.bos_token_id}; image patches are put behind that token: set add_bos_token"
        )
    if tokenizer.unk_token_id in ids:
        raise ConfigError(
            f"the tokenizer does not know every word of '{instruction}', so the policy could not "
            "tell it from another task; build the tokenizer with this instruction"
        )
    return ids if ids[-1] == empty else [*ids, empty]
