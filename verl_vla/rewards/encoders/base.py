"""Base classes of image encoders: batches, dtype, device, and a name for the feature space."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import snapshot_download
from torch import nn

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.policies import base
from verl_vla.rewards.base import HasEncoder, TrajectoryReward

Images = npt.NDArray[np.uint8]
"""Images [T, H, W, 3] of one view of one episode, in the order of its policy steps."""
Features = npt.NDArray[np.float32]
"""Features [T, D] of one episode."""

DTYPES = base.DTYPES | {"float16": torch.float16}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""Pattern of a model name on the Hugging Face hub, owner and model."""
SAMPLED_WEIGHTS = 1024
"""Values of every weight tensor that enter the name of the feature space, about: fine-tuning moves
all of them, and a thousand are quick to read."""


class BatchedEncoder:
    """An encoder that computes in batches, which a caller can track."""

    def __init__(self) -> None:
        self.track: Callable[[Sequence[Any]], Iterable[Any]] = iter
        """Iterator over the batches of one call of ``encode``."""


def track_batches(
    reward: TrajectoryReward, track: Callable[[Sequence[Any]], Iterable[Any]]
) -> None:
    """Let ``track`` iterate over the batches of a reward's encoder; not in another process."""
    if isinstance(reward, HasEncoder) and isinstance(reward.encoder, BatchedEncoder):
        reward.encoder.track = track


class ImageEncoder(BatchedEncoder, ABC):
    """An encoder of single images: features of an episode do not depend on others in the batch."""

    def __init__(self, *, batch_size: int, feature_space: str) -> None:
        """Set the batch size and the name of the feature space.

        Args:
            batch_size: images per forward pass.
            feature_space: see `name_space`.

        Raises:
            ConfigError: ``batch_size`` is below 1.
        """
        super().__init__()
        check_positive(batch_size=batch_size)
        self._batch_size = batch_size
        self._feature_space = feature_space

    @property
    def feature_space(self) -> str:
        """Name of weights, layer and preprocessing; features of two spaces are never compared."""
        return self._feature_space

    def encode(self, frames: Sequence[Images]) -> list[Features]:
        """Map episodes [T, H, W, 3], ragged in T, to [T, D].

        Raises:
            ContractError: images that are not uint8 [T, H, W, 3].
        """
        check_images(frames)
        lengths = [len(episode) for episode in frames]
        filled = [episode for episode in frames if len(episode)]
        if not filled:
            return [np.zeros((0, 0), dtype=np.float32) for _ in frames]
        # all episodes together: short ones would leave most of a batch empty
        images = np.concatenate(filled)
        parts = [
            self.embed(images[start : start + self._batch_size])
            for start in self.track(range(0, len(images), self._batch_size))
        ]
        rows = np.concatenate(parts).astype(np.float32)
        # an episode without images gets no rows
        return np.split(rows, np.cumsum(lengths)[:-1])

    @abstractmethod
    def embed(self, images: Images) -> Features:
        """Map n images [n, H, W, 3] to [n, D]."""


class FrozenNetwork:
    """A frozen network on its device."""

    def __init__(self, module: nn.Module, *, dtype: str, device: str) -> None:
        """Freeze ``module`` and move it.

        Args:
            module: network of the encoder; it is not trained after this.
            dtype: dtype of the computation, a key of `DTYPES`.
            device: name of a torch device.

        Raises:
            ConfigError: the dtype or the device is unknown.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
        try:
            self.device = torch.device(device)
            self.module = module.eval().requires_grad_(False).to(self.device, DTYPES[dtype])
        # AssertionError: torch was built without CUDA
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device is {device!r}, which cannot be used: {error}") from error
        self.dtype = DTYPES[dtype]


def check_positive(**values: int) -> None:
    """Check that values are at least 1.

    Raises:
        ConfigError: a value is below 1; the message names it.
    """
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; set at least 1")


def check_images(frames: Sequence[Images]) -> None:
    """Check that the images of every episode are uint8 [T, H, W, 3].

    Raises:
        ContractError: they are not; the message names the episode's index.
    """
    for index, episode in enumerate(frames):
        if episode.dtype != np.uint8 or episode.ndim != 4 or episode.shape[3] != 3:
            raise ContractError(
                f"images of episode {index} must be uint8 [T, H, W, 3], got {episode.dtype} "
                f"{list(episode.shape)}"
            )


def require_folder(path: str, purpose: str) -> Path:
    """Return the folder of a model's weights: a local one, or a cached download from the hub.

    Args:
        path: a local folder as save_pretrained writes it, or a name on the Hugging Face hub.
        purpose: name of the model, for error messages.

    Raises:
        ConfigError: there is no such folder, and the name cannot be fetched from the hub.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    # a folder that exists is what the user means, so the hub is not asked
    if folder.exists() or not HUB_NAME.fullmatch(path):
        raise ConfigError(
            f"{path} holds no config.json; point encoder_args.path at a local folder with the "
            f"weights of {purpose}, as save_pretrained writes it, or name one on the hub"
        )
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the network fails in too many ways to name
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{path} is no folder here, and cannot be fetched from the hub "
            f"({type(error).__name__}: {reason}); point encoder_args.path at a local folder with "
            f"the weights of {purpose}"
        ) from error


def read_processor(
    folder: Path, files: Sequence[str], purpose: str, read: Callable[[], Any]
) -> Any:
    """Read the processor that lies beside a model's weights: its resize, crop and normalisation.

    Args:
        folder: folder of the weights.
        files: names that its file may have, the usual one first.
        purpose: name of the model, for error messages.
        read: function that reads it with transformers.

    Raises:
        ConfigError: there is no such file, or transformers cannot read it.
    """
    if not any((folder / file).is_file() for file in files):
        # a default would be right for one size of the model and wrong for another
        raise ConfigError(
            f"{folder} holds no {files[0]}, which says how images are prepared for {purpose}; "
            "fetch it from where the weights are from"
        )
    try:
        return read()
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{files[0]} in {folder} cannot be read ({type(error).__name__}: {reason}); fetch it "
            "again from where the weights are from"
        ) from error


def describe_processor(processor: Any) -> dict[str, Any]:
    """Return what a processor of transformers does, as plain values for `name_space`."""
    return json.loads(processor.to_json_string())


def name_space(kind: str, description: Mapping[str, Any], module: nn.Module | None = None) -> str:
    """Return the name of a feature space: encoders that differ in any part have different names.

    Args:
        kind: readable name of the kind of encoder.
        description: layer, preprocessing, dtype; plain values.
        module: network whose weights are part of the name.
    """
    # sorted: the order of the keys is no part of the space
    digest = hashlib.sha256(json.dumps(dict(description), sort_keys=True).encode())
    for name, weight in module.state_dict().items() if module is not None else ():
        # every weight, but not every value of it
        stride = max(1, weight.numel() // SAMPLED_WEIGHTS)
        sample = weight.detach().flatten()[::stride].float().cpu().numpy()
        digest.update(f"{name} {list(weight.shape)}".encode() + sample.tobytes())
    return f"{kind}:{digest.hexdigest()[:16]}"
