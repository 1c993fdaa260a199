"""Frames reach V-JEPA 2 as by its own video processor in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_folders import save_vjepa2, smooth_images
from transformers import VJEPA2Model, VJEPA2VideoProcessor

from verl_vla.core.errors import ConfigError
from verl_vla.rewards.encoders import make_encoder

MEAN, STD = (
    torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)
"""Of torchvision's ImageNet models."""
LEVEL = 1 / 255 / 0.224
"""One of 256 levels in normalised units, of the channel with the smallest deviation: a resize in
integers rounds twice, one in float once."""


def by_hand(video: np.ndarray, crop_size: int) -> torch.Tensor:
    """The model's preprocessing as its authors describe it, in float32."""
    frames = torch.from_numpy(video).permute(0, 3, 1, 2).float()
    shorter = min(video.shape[1:3])
    height, width = (int(int(crop_size * 256 / 224) * side / shorter) for side in video.shape[1:3])
    resized = torch.nn.functional.interpolate(
        frames, (height, width), mode="bilinear", antialias=True, align_corners=False
    )
    top, left = round((height - crop_size) / 2), round((width - crop_size) / 2)
    cropped = resized[..., top : top + crop_size, left : left + crop_size]
    return (cropped / 255 - MEAN) / STD


def smooth_video(num_frames: int, height: int, width: int) -> np.ndarray:
    return smooth_images(num_frames, height, width).numpy()


def noisy_video(num_frames: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(8)
    return rng.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def encoder_of(folder: Path, crop_size: int) -> Any:
    torch.manual_seed(0)
    path = save_vjepa2(folder, crop=crop_size)
    return make_encoder("vjepa2", {"path": path, "dtype": "float32"})


@pytest.mark.parametrize("make", [smooth_video, noisy_video])
@pytest.mark.parametrize(
    ("crop_size", "size"),
    [
        (256, (224, 224)),  # what a policy sees
        (256, (256, 256)),  # what a camera renders
        (384, (256, 256)),  # the paper's model
        (256, (292, 292)),  # needs no resize
        (64, (180, 240)),
    ],
)
def test_frames_are_prepared_as_by_the_models_own_processor(
    tmp_path: Path, make: Any, crop_size: int, size: tuple[int, int]
) -> None:
    video = make(3, *size)
    ours = encoder_of(tmp_path, crop_size)._pixels(video)
    processor = VJEPA2VideoProcessor(crop_size=crop_size)
    frames = torch.from_numpy(video).permute(0, 3, 1, 2)
    theirs = processor(frames, return_tensors="pt")["pixel_values_videos"][0]
    assert ours.shape == (3, 3, crop_size, crop_size)
    assert torch.equal(ours, theirs)
    apart = (ours - by_hand(video, crop_size)).abs()
    assert float(apart.max()) <= 1.01 * LEVEL
    assert float(apart.mean()) <= LEVEL / 2


def test_features_are_those_of_the_processor_and_the_model(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, 64)
    video = smooth_video(6, 72, 72)
    processor = VJEPA2VideoProcessor(crop_size=64)
    frames = torch.from_numpy(video).permute(0, 3, 1, 2)
    pixels = processor(frames, return_tensors="pt")["pixel_values_videos"]
    model = VJEPA2Model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        tokens = model.get_vision_features(pixels)
    expected = tokens.view(3, -1, tokens.shape[-1]).mean(dim=1)
    np.testing.assert_allclose(encoder.encode([video])[0], expected, atol=1e-5)


def test_the_video_processor_is_that_of_the_folder(tmp_path: Path) -> None:
    before = encoder_of(tmp_path, 64)
    processor = VJEPA2VideoProcessor(crop_size=64, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    after = make_encoder("vjepa2", {"path": str(tmp_path), "dtype": "float32"})
    assert before.feature_space != after.feature_space
    video = smooth_video(4, 72, 72)
    assert not np.allclose(before.encode([video])[0], after.encode([video])[0], atol=1e-3)


def test_a_folder_without_its_video_processor_is_refused(tmp_path: Path) -> None:
    encoder_of(tmp_path, 64)
    VJEPA2VideoProcessor(crop_size=32).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="images of 32 x 32 px; the model takes 64 x 64"):
        make_encoder("vjepa2", {"path": str(tmp_path)})
    (tmp_path / "video_preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no video_preprocessor_config\.json"):
        make_encoder("vjepa2", {"path": str(tmp_path)})
