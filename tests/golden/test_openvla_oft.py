"""Numbers of the original code: openvla-oft, its transformers fork, timm 0.9.10, TensorFlow 2.15.

They lie in a folder beside the checkout; where it is absent these tests skip.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from verl_vla.core.errors import ConfigError
from verl_vla.core.image_preprocessing import prepare_image, prepare_images
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.policies.checkpoint import read_tokenizer
from verl_vla.policies.normalization import load_statistics
from verl_vla.policies.openvla_oft import (
    OpenVLAOFTConfig,
    OpenVLAOFTModel,
    OpenVLAOFTPolicy,
    OpenVLAOFTProcessor,
)
from verl_vla.policies.preprocessing import OPENVLA_IMAGE_STATISTICS, prompt_ids

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden"
TINY = GOLDEN / "tiny_openvla_oft"
METADATA = GOLDEN / "checkpoint_metadata"

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the numbers of the originals are not beside this checkout"
)


@pytest.fixture(scope="module")
def model() -> OpenVLAOFTModel:
    return OpenVLAOFTModel.from_pretrained(TINY)


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    return load_file(TINY / "outputs.safetensors")


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    """The two prompts of the golden outputs, with the empty token that the original appends."""
    stored: dict[str, Any] = json.loads((TINY / "prompts.json").read_text())
    return [torch.tensor([*ids, 29871]) for ids in stored["input_ids_without_29871"]]


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "image_pipeline.npz") as stored:
        return dict(stored)


def test_vision_features_and_projection(model: OpenVLAOFTModel, outputs: dict[str, Tensor]) -> None:
    features = model.vision_backbone(outputs["pixel_values"])
    assert (features - outputs["vision_features"]).abs().max() < 1e-5
    assert (model.projector(features) - outputs["projected"]).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_logits_of_each_prompt_alone(
    model: OpenVLAOFTModel, outputs: dict[str, Tensor], prompts: list[Tensor], backend: str
) -> None:
    model.set_attn_implementation(backend)
    for row, prompt in enumerate(prompts):
        pixels = outputs["pixel_values"][row : row + 1]
        logits = model.action_logits(pixels, prompt.unsqueeze(0))
        assert (logits[0] - outputs[f"action_logits_{row}"]).abs().max() < 1e-5


def test_logits_of_prompts_of_different_lengths(
    model: OpenVLAOFTModel, outputs: dict[str, Tensor], prompts: list[Tensor]
) -> None:
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=32000)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(p)] for p in prompts])).long()
    assert not mask.all()
    logits = model.action_logits(outputs["pixel_values"], ids, mask)
    for row in range(2):
        assert (logits[row] - outputs[f"action_logits_{row}"]).abs().max() < 1e-5


BFLOAT16_ROUNDING = 2**-8
"""Relative error of rounding to bfloat16, which has 8 significant bits."""


@torch.no_grad()
def test_in_bfloat16_it_errs_no_more_than_the_original(
    outputs: dict[str, Tensor], prompts: list[Tensor]
) -> None:
    """The original's head is bfloat16 too; both errors are those of log-probs at T = 1.6."""
    half = OpenVLAOFTModel.from_pretrained(TINY, dtype=torch.bfloat16)
    hidden: list[Tensor] = []
    half.language_model.model.register_forward_hook(
        lambda *call: hidden.append(call[2].last_hidden_state)
    )
    first_id = half.config.first_action_id
    for row, prompt in enumerate(prompts):
        logits = half.action_logits(outputs["pixel_values"][row : row + 1], prompt.unsqueeze(0))
        first = half.config.num_patches + len(prompt) - 1
        of_all = half.language_model.lm_head(hidden[row][:, first : first + 56])
        originals = of_all[0, :, first_id : first_id + 256].float()
        exact = (outputs[f"action_logits_{row}"] / 1.6).log_softmax(-1)
        ours, theirs = (
            ((these / 1.6).log_softmax(-1) - exact).abs() for these in (logits[0], originals)
        )
        assert 0 < ours.mean() <= theirs.mean() < 0.01
        # the order of sums, which a processor chooses, can move a single token by one rounding
        rounding = BFLOAT16_ROUNDING * exact.abs().max()
        assert ours.max() <= theirs.max() + rounding
        assert theirs.max() < 0.07 + rounding


def test_decoded_actions(
    model: OpenVLAOFTModel, outputs: dict[str, Tensor], prompts: list[Tensor]
) -> None:
    """The original takes the likeliest of all ids; an id that is no action counts as bin 0."""
    codec = ActionCodec(256, 8, 7, load_statistics(METADATA))
    hidden: list[Tensor] = []
    hook = model.language_model.model.register_forward_hook(
        lambda *call: hidden.append(call[2].last_hidden_state)
    )
    for row, prompt in enumerate(prompts):
        model.action_logits(outputs["pixel_values"][row : row + 1], prompt.unsqueeze(0))
        first = model.config.num_patches + len(prompt) - 1
        all_ids = model.language_model.lm_head(hidden[row][:, first : first + 56]).argmax(-1)
        action_tokens = (all_ids - model.config.first_action_id).clamp(min=0)
        assert np.array_equal(
            codec.unnormalize(codec.decode(action_tokens))[0], outputs[f"actions_{row}"]
        )
    hook.remove()


def test_the_tiny_model_has_no_statistics_so_it_makes_no_policy(model: OpenVLAOFTModel) -> None:
    assert model.config.first_action_id == 31744
    with pytest.raises(ConfigError, match=r"holds no"):
        OpenVLAOFTPolicy.from_pretrained(TINY)


def test_key_names_and_bytes_of_a_published_checkpoint() -> None:
    index = json.loads((METADATA / "model.safetensors.index.json").read_text())
    config = OpenVLAOFTConfig.from_pretrained(METADATA)
    with torch.device("meta"):
        state = OpenVLAOFTModel(config).state_dict()
    assert set(state) == set(index["weight_map"])
    num_bytes = sum(tensor.numel() for tensor in state.values()) * torch.bfloat16.itemsize
    assert num_bytes == index["metadata"]["total_size"]


def test_a_published_folder_gives_a_processor() -> None:
    processor = OpenVLAOFTProcessor.from_pretrained(METADATA, unnorm_key="libero_10")
    assert processor.image_statistics == OPENVLA_IMAGE_STATISTICS
    assert processor.codec.statistics.key == "libero_10_no_noops"
    assert processor.codec.statistics.q01[1] == -0.7741071581840515
    ids, mask = processor.collate([processor.prompt("turn on"), processor.prompt("turn on it")])
    assert ids[0, -1] == 32000 and mask[0, -1] == 0


def test_prompt_ids_of_libero() -> None:
    tokenizer = read_tokenizer(METADATA)
    stored: dict[str, list[int]] = json.loads((GOLDEN / "prompt_token_ids.json").read_text())
    assert len(stored) == 20
    for name, expected in stored.items():
        assert prompt_ids(tokenizer, name.split("|")[1]) == expected


@pytest.mark.parametrize("name", ["full", "wrist", "fig0", "fig1"])
def test_images_have_tensorflows_bytes(images: dict[str, np.ndarray], name: str) -> None:
    render = images[f"{name}/render"]
    assert np.array_equal(prepare_image(render), images[f"{name}/cropped"])
    resized = prepare_image(render, crop_area=1.0)
    assert np.array_equal(resized, images[f"{name}/resized"])
    without_jpeg = prepare_image(render, crop_area=1.0, jpeg=False)
    assert np.array_equal(without_jpeg, images[f"{name}/resized_without_jpeg"])


def test_a_batch_of_images_too(images: dict[str, np.ndarray]) -> None:
    names = ("full", "wrist")
    renders = np.stack([images[f"{name}/render"] for name in names])
    cropped = np.stack([images[f"{name}/cropped"] for name in names])
    assert np.array_equal(prepare_images(renders), cropped)
