"""Images reach DINOv2 and SigLIP as by their own processors in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_folders import (
    dinov2_processor,
    save_dinov2,
    save_siglip,
    siglip_processor,
    smooth_images,
)
from PIL import Image
from transformers import Dinov2Model, SiglipVisionModel

from verl_vla.core.errors import ConfigError
from verl_vla.rewards.encoders import make_encoder

PROCESSOR_FILE = "preprocessor_config.json"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LEVEL = 1 / 255
"""One of 256 levels; torchvision's bicubic resize of bytes rounds twice, so 2 levels may differ."""
SIZES = [(224, 224), (256, 256), (180, 240)]
"""What a policy sees, what a camera renders, and an image that is not square."""


def encoder_of(name: str, path: str) -> Any:
    torch.manual_seed(0)
    return make_encoder(name, {"path": path, "dtype": "float32"})


def by_pillow(images: np.ndarray, statistics: Any, resized: Any, crop: int) -> torch.Tensor:
    """The published preprocessing by the library that the models' authors used."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    made = []
    for image in images:
        height, width = resized(*image.shape[:2])
        pixels = np.asarray(
            Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        )
        top, left = (height - crop) // 2, (width - crop) // 2
        cut = torch.from_numpy(pixels.copy())[top : top + crop, left : left + crop]
        made.append((cut.permute(2, 0, 1) / 255 - mean) / std)
    return torch.stack(made)


def resized_plainly(images: np.ndarray, statistics: Any, size: int) -> torch.Tensor:
    """What encoders did before: bilinear, the whole image, whatever its shape."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    plain = torch.nn.functional.interpolate(
        channels_first, (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return (plain.round().clamp(0, 255) / 255 - mean) / std


def theirs(processor: Any, images: np.ndarray) -> torch.Tensor:
    return processor(list(images), return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("size", SIZES)
def test_dinov2_sees_the_middle_of_the_shorter_side_at_256(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    images = smooth_images(3, *size).numpy()
    ours = encoder_of("dinov2", save_dinov2(tmp_path, crop=224)).pixels(images)
    assert ours.shape == (3, 3, 224, 224)
    assert torch.equal(ours, theirs(dinov2_processor(), images))

    def shorter_at_256(height: int, width: int) -> tuple[int, int]:
        return 256 * height // min(size), 256 * width // min(size)

    apart = (ours - by_pillow(images, IMAGENET, shorter_at_256, 224)).abs()
    assert float(apart.max()) <= 2.01 * LEVEL / min(IMAGENET[1])
    assert float(apart.mean()) <= 0.1 * LEVEL / min(IMAGENET[1])
    before = resized_plainly(images, IMAGENET, 224)
    assert float((ours - before).abs().mean()) > 0.1


@pytest.mark.parametrize("side", [224, 384])
@pytest.mark.parametrize("size", SIZES)
def test_siglip_sees_the_whole_image(tmp_path: Path, size: tuple[int, int], side: int) -> None:
    images = smooth_images(3, *size).numpy()
    ours = encoder_of("siglip", save_siglip(tmp_path, size=side)).pixels(images)
    assert ours.shape == (3, 3, side, side)
    assert torch.equal(ours, theirs(siglip_processor(side), images))
    apart = (ours - by_pillow(images, HALF, lambda *_: (side, side), side)).abs()
    assert float(apart.max()) <= 2.01 * LEVEL / HALF[1][0]
    assert float(apart.mean()) <= 0.1 * LEVEL / HALF[1][0]
    # smooth images differ little between two ways to resize the same; noise differs more
    noise = np.random.default_rng(8).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    if size != (side, side):
        own = encoder_of("siglip", str(tmp_path)).pixels(noise)
        assert float((own - resized_plainly(noise, HALF, side)).abs().mean()) > 0.02


def test_features_are_those_of_the_processor_and_the_model(tmp_path: Path) -> None:
    images = smooth_images(4, 40, 56).numpy()
    dino, siglip = save_dinov2(tmp_path / "dino"), save_siglip(tmp_path / "siglip")
    models: list[Any] = [
        Dinov2Model.from_pretrained(dino),
        SiglipVisionModel.from_pretrained(siglip),
    ]
    with torch.no_grad():
        last = models[0].eval()(pixel_values=theirs(dinov2_processor(28), images))
        states = models[1].eval()(
            pixel_values=theirs(siglip_processor(28), images), output_hidden_states=True
        )
    expected = [last.last_hidden_state[:, 1:].mean(1), states.hidden_states[-2].mean(1)]
    for name, path, right in zip(("dinov2", "siglip"), (dino, siglip), expected, strict=True):
        found = encoder_of(name, path).encode([images])[0]
        np.testing.assert_allclose(found, right, atol=1e-5)


@pytest.mark.parametrize(("name", "save"), [("dinov2", save_dinov2), ("siglip", save_siglip)])
def test_the_processor_is_that_of_the_folder_and_part_of_the_feature_space(
    name: str, save: Any, tmp_path: Path
) -> None:
    path = save(tmp_path)
    before = encoder_of(name, path)
    file = tmp_path / PROCESSOR_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    after = encoder_of(name, path)
    images = smooth_images(2, 40, 40).numpy()
    assert not torch.equal(before.pixels(images), after.pixels(images))
    assert before.feature_space != after.feature_space


@pytest.mark.parametrize(("name", "save"), [("dinov2", save_dinov2), ("siglip", save_siglip)])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, f"holds no {PROCESSOR_FILE}, which says how images are prepared for"),
        ("{", "cannot be read"),
        ('{"image_processor_type": "NoSuchProcessor"}', "cannot be read"),
        ('{"auto_map": {"AutoImageProcessor": "own.Processor"}}', "cannot be read"),
    ],
)
def test_a_folder_without_a_processor_is_refused(
    name: str, save: Any, content: str | None, message: str, tmp_path: Path
) -> None:
    path = save(tmp_path)
    (tmp_path / "own.py").write_text("raise AssertionError('code of a folder was run')\n")
    (tmp_path / PROCESSOR_FILE).unlink()
    if content is not None:
        (tmp_path / PROCESSOR_FILE).write_text(content)
    with pytest.raises(ConfigError, match=message):
        encoder_of(name, path)


def test_a_size_that_the_model_cannot_take_is_refused(tmp_path: Path) -> None:
    dino = save_dinov2(tmp_path / "dino", crop=30)
    with pytest.raises(ConfigError, match="images of 30 x 30 px; .* a multiple of 14"):
        encoder_of("dinov2", dino)
    siglip = save_siglip(tmp_path / "siglip", size=28)
    siglip_processor(42).save_pretrained(siglip)
    with pytest.raises(ConfigError, match="images of 42 x 42 px; .* 28 x 28"):
        encoder_of("siglip", siglip)
