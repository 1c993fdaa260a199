"""V-JEPA 2 encoder, with the model of transformers: features of clips instead of single images.

Images are prepared by the video processor that lies beside the weights: for published ones, the
shorter side is resized to 8/7 of the model's size, and the middle is cut out.

Attention spans the complete clip, so padding would change every token. Therefore only episodes of
equal length share a forward pass: the features of an episode do not depend on the lengths of the
others in the batch. A clip is never repeated to fill a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import VJEPA2Model, VJEPA2VideoProcessor
from transformers.models.auto.configuration_auto import AutoConfig

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.core.tables import pick_by_time
from verl_vla.rewards.encoders.base import (
    Batch,
    BatchedEncoder,
    Features,
    Images,
    check_positive,
)
from verl_vla.rewards.encoders.network import (
    AUTO,
    describe_processor,
    pretrained_network,
    read_processor,
    require_folder,
)

MODEL_TYPE = "vjepa2"
PROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
"""Names of a video processor's file, the newer first."""

ThinBy = Literal["time", "content"]


class Vjepa2Encoder(BatchedEncoder):
    """An encoder that averages the patch tokens of each tubelet: one row for every two frames."""

    def __init__(
        self,
        path: str,
        *,
        max_frames: int = 64,
        thin_by: ThinBy = "time",
        dtype: str = "bfloat16",
        device: str = AUTO,
        batch_size: int = 1,
    ) -> None:
        """Check the folder; the weights are read when first needed. The predictor is never run.

        Args:
            path: a local folder, or a name on the hub such as ``facebook/vjepa2-vitl-fpc64-256``.
            max_frames: most frames of one clip; longer episodes are thinned.
            thin_by: ``time``: at equal steps of time, as the model was trained; ``content``: by
                `pick_by_content`.
            dtype: dtype of the computation.
            device: name of a torch device, or ``auto``.
            batch_size: clips per forward pass. One of 64 frames at 384 px has 18,432 tokens, which
                occupy a GPU.

        Raises:
            ConfigError: no such weights, another kind of model, no video processor for its size, or
                an unknown way to thin.
        """
        if thin_by not in ("time", "content"):
            raise ConfigError(f"thin_by is {thin_by!r}; choose 'time' or 'content'")
        check_positive(max_frames=max_frames)
        folder = require_folder(path, "V-JEPA 2")
        config: Any = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if config.model_type != MODEL_TYPE:
            raise ConfigError(f"{path} holds a {config.model_type}; encoder vjepa2 needs V-JEPA 2")
        read = partial(VJEPA2VideoProcessor.from_pretrained, folder, local_files_only=True)
        self._processor = read_processor(folder, PROCESSOR_FILES, "V-JEPA 2", read)
        self._size = int(config.crop_size)
        self._tubelet = int(config.tubelet_size)
        self._patches = (self._size // int(config.patch_size)) ** 2
        self._width = int(config.hidden_size)
        self._max_frames = max_frames
        self._thin_by: ThinBy = thin_by
        probe = self._pixels(torch.zeros(1, 3, self._size, self._size, dtype=torch.uint8))
        height, width = probe.shape[-2:]
        if (height, width) != (self._size, self._size):
            raise ConfigError(
                f"the video processor in {path} makes images of {height} x {width} px; the model "
                f"takes {self._size} x {self._size}: fetch the file of this model"
            )
        self._network = pretrained_network(
            folder, VJEPA2Model, config, "V-JEPA 2", dtype=dtype, device=device
        )
        description = {
            "preprocessing": describe_processor(self._processor),
            "dtype": dtype,
            "max_frames": max_frames,
            "thin_by": thin_by,
        }
        super().__init__("vjepa2", description, self._network, batch_size=batch_size)

    def split(self, frames: Sequence[Images]) -> list[Batch]:
        """Put clips of equal length together, the longest first."""
        by_length: dict[int, list[tuple[int, npt.NDArray[np.int64]]]] = {}
        for index, episode in enumerate(frames):
            rows = self._choose(episode)
            if len(rows):
                by_length.setdefault(len(rows), []).append((index, rows))
        # processes that share the batches then end at about the same time
        return [
            by_length[length][start : start + self.batch_size]
            for length in sorted(by_length, reverse=True)
            for start in range(0, len(by_length[length]), self.batch_size)
        ]

    def compute(self, images: Sequence[Images]) -> list[Features]:
        """Map clips [T, H, W, 3] of equal length to [T / tubelet, D]."""
        return list(self._embed(np.stack(images)))

    def _choose(self, episode: Images) -> npt.NDArray[np.int64]:
        """Thin a long episode, and fill the last tubelet by repeating the last frame."""
        if self._thin_by == "time":
            kept = pick_by_time(len(episode), self._max_frames)
        else:
            kept = pick_by_content(episode, self._max_frames)
        # transformers would drop a last frame without a partner
        return np.append(kept, np.repeat(kept[-1:], -len(kept) % self._tubelet))

    def _pixels(self, channels_first: Tensor) -> Tensor:
        """Resize, crop and normalise [n, 3, H, W]; return [n, 3, size, size] float32."""
        made: Any = self._processor(channels_first, return_tensors="pt")
        return made["pixel_values_videos"][0]

    @torch.inference_mode()
    def _embed(self, clips: npt.NDArray[np.uint8]) -> Features:
        num, length = clips.shape[:2]
        frames = torch.from_numpy(clips.reshape(num * length, *clips.shape[2:]))
        channels_first = frames.to(self._network.device).movedim(-1, 1)
        # only the pixels of the computation's dtype live on beside the activations
        pixels = self._pixels(channels_first).to(self._network.dtype)
        video = pixels.view(num, length, *pixels.shape[1:])
        # without the predictor, which a plain forward pass would run too
        tokens = self._network.module.get_vision_features(video)  # pyright: ignore[reportCallIssue]
        # the grid of positions comes from the config, so another size would run and be wrong
        expected = (num, length // self._tubelet * self._patches, self._width)
        if tuple(tokens.shape) != expected:
            raise ContractError(f"V-JEPA 2 gave {list(tokens.shape)}, not {list(expected)}")
        # tokens are in the order of time: [n, tubelets, patches, D]
        tubelets = tokens.view(num, length // self._tubelet, self._patches, self._width)
        return tubelets.float().mean(dim=2).cpu().numpy()


def pick_by_content(episode: Images, num_frames: int) -> npt.NDArray[np.int64]:
    """Choose frames at equal steps of accumulated image change, not of time.

    Long idle spans then take up few frames. The first and last frame are always kept.

    Args:
        episode: [T, H, W, 3].
        num_frames: largest number of frames to choose.

    Returns:
        Indices in order without duplicates; all indices of an episode that is not longer.
    """
    if len(episode) <= num_frames:
        return np.arange(len(episode))
    # int16: a difference of bytes would wrap around
    change = np.abs(np.diff(episode.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    # a small share of time is added, so that images that never change are still thinned evenly
    position = np.cumsum(np.concatenate([[0.0], change + 1e-6 * max(float(change.max()), 1.0)]))
    wanted = np.linspace(0, position[-1], num_frames)
    # the nearest frame to each wanted position; idle spans give the same one again
    return np.unique(np.abs(position[None, :] - wanted[:, None]).argmin(axis=1))
