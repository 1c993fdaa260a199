from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.policies.openvla_oft.tiny import build_tokenizer
from verl_vla.policies.preprocessing import (
    DINO_STATISTICS,
    OPENVLA_IMAGE_STATISTICS,
    SIGLIP_STATISTICS,
    normalize_image,
    prompt_ids,
)


def test_each_tower_gets_its_own_scale_and_dino_comes_first() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    pixels = normalize_image(image)
    assert pixels.shape == (6, 16, 16) and pixels.dtype == torch.float32
    for tower, statistics in enumerate((DINO_STATISTICS, SIGLIP_STATISTICS)):
        for channel in range(3):
            expected = (image[..., 0].double() / 255 - statistics.mean[channel]) / statistics.std[
                channel
            ]
            got = pixels[3 * tower + channel].double()
            assert torch.allclose(got, expected, atol=1e-6)
    assert OPENVLA_IMAGE_STATISTICS == (DINO_STATISTICS, SIGLIP_STATISTICS)


def test_dino_constants_are_imagenets_in_bfloat16() -> None:
    imagenet = torch.tensor([0.485, 0.456, 0.406, 0.229, 0.224, 0.225])
    rounded = imagenet.bfloat16().float().tolist()
    assert (*DINO_STATISTICS.mean, *DINO_STATISTICS.std) == tuple(rounded)


def test_a_batch_of_views_is_normalised_at_once() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), np.uint8))
    together = normalize_image(images, [SIGLIP_STATISTICS])
    assert together.shape == (2, 3, 3, 8, 8)
    assert torch.equal(together[1, 2], normalize_image(images[1, 2], [SIGLIP_STATISTICS]))


@pytest.mark.parametrize("image", [torch.zeros(8, 8, 3), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_normalising_something_else_is_refused(image: torch.Tensor) -> None:
    with pytest.raises(ContractError, match="uint8"):
        normalize_image(image)


def test_a_prompt_starts_with_bos_and_ends_with_the_empty_piece() -> None:
    tokenizer = build_tokenizer(["lift the cube"])
    ids = prompt_ids(tokenizer, "Lift the CUBE")
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces == [
        *("<s>", "In", ":", "What", "action", "should", "the", "robot", "take", "to"),
        *("lift", "the", "cube", "?", "Out", ":", "▁"),
    ]


def test_the_empty_piece_is_not_added_twice() -> None:
    tokenizer = build_tokenizer(["lift the cube"])
    ends_with_it = build_tokenizer(["lift the cube"])
    ends_with_it.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A ▁", special_tokens=[("<s>", 1), ("▁", 4)]
    )
    expected = prompt_ids(tokenizer, "lift the cube")
    assert prompt_ids(ends_with_it, "lift the cube") == expected


def test_a_tokenizer_without_the_empty_piece_is_refused() -> None:
    tokenizer = build_tokenizer(["lift the cube"])
    backend = tokenizer.backend_tokenizer.to_str().replace("▁", "empty")
    other = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(backend),
        unk_token="<unk>",
        bos_token="<s>",
    )
    with pytest.raises(ConfigError, match="no piece '▁'"):
        prompt_ids(other, "lift the cube")


def test_a_tokenizer_that_adds_no_beginning_is_refused() -> None:
    tokenizer = build_tokenizer(["lift the cube"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(ConfigError, match="add_bos_token"):
        prompt_ids(tokenizer, "lift the cube")


def test_a_task_that_the_tokenizer_cannot_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="every word of 'lift the 立方体'"):
        prompt_ids(build_tokenizer(["lift the cube"]), "lift the 立方体")
