"""Frozen networks of encoders: checked at once, read when they are first needed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from verl_vla.core.errors import ConfigError
from verl_vla.policies import base
from verl_vla.policies.checkpoint import read_weight_layout

DTYPES = base.DTYPES | {"float16": torch.float16}
AUTO = "auto"
"""Name of the device of a GPU where there is one, and of the processor elsewhere."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""Pattern of a model name on the Hugging Face hub, owner and model."""
SAMPLED_WEIGHTS = 1024
"""Values of every weight tensor that enter the name of the feature space, about: fine-tuning moves
all of them, and a thousand are quick to read."""


class FrozenNetwork:
    """A frozen network that is read at its first use, and waits on the host between uses."""

    def __init__(
        self, read: Callable[[torch.dtype], nn.Module], *, dtype: str, device: str
    ) -> None:
        """Check the dtype and the device; nothing is read.

        Args:
            read: function that reads the network, given the dtype of its weights.
            dtype: dtype of the computation, a key of `DTYPES`.
            device: name of a torch device, or `AUTO`.

        Raises:
            ConfigError: the dtype or the device is unknown, or this machine has no such device.
        """
        self.dtype = find_dtype(dtype)
        self.device = find_device(device)
        self._read = read
        self._module: nn.Module | None = None
        self._is_on_device = False

    @property
    def is_read(self) -> bool:
        """True once the weights are in this process."""
        return self._module is not None

    @property
    def weights(self) -> nn.Module:
        """The network, on the host or on its device."""
        if self._module is None:
            self._module = self._read(self.dtype).eval().requires_grad_(False).to(self.dtype)
        return self._module

    @property
    def module(self) -> nn.Module:
        """The network, on its device."""
        if not self._is_on_device:
            self.weights.to(self.device)
            self._is_on_device = True
        return self.weights

    def leave_device(self) -> None:
        """Move the weights to the host until their next use."""
        if self._module is not None:
            self._module.to("cpu")
            self._is_on_device = False


def find_dtype(name: str) -> torch.dtype:
    """Return a dtype that encoders compute in.

    Raises:
        ConfigError: it is not in `DTYPES`.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def find_device(name: str) -> torch.device:
    """Return a device of this machine; no memory of it is touched.

    Raises:
        ConfigError: the name is unknown, or there is no such device here.
    """
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        count: int = torch.get_device_module(device).device_count()
    # AttributeError: a device of torch that is none of a machine, such as "meta"
    except (RuntimeError, AttributeError) as error:
        raise ConfigError(f"device is {name!r}, which cannot be used: {error}") from error
    if (device.index or 0) >= count:
        raise ConfigError(
            f"device is {name!r}, which cannot be used: torch finds {count} of {device.type!r} "
            f"here; set {AUTO} or cpu"
        )
    return device


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
        # no pickles and no code of the repository
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the network fails in too many ways to name
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{path} is no folder here, and cannot be fetched from the hub "
            f"({type(error).__name__}: {reason}); point encoder_args.path at a local folder with "
            f"the weights of {purpose}"
        ) from error


def pretrained_network(
    folder: Path, model: Any, config: Any, purpose: str, *, dtype: str, device: str
) -> FrozenNetwork:
    """Return the network of a folder, after a check that all its weights are there.

    Args:
        folder: folder of the weights.
        model: class of transformers.
        config: its configuration, read from the folder.
        purpose: name of the model, for error messages.
        dtype: dtype of the computation.
        device: name of a torch device, or `AUTO`.

    Raises:
        ConfigError: a file or a weight is missing, cut off or of another shape; or an unknown dtype
            or device.
    """
    network = FrozenNetwork(partial(_read_pretrained, model, folder), dtype=dtype, device=device)
    layout = read_weight_layout(folder)
    # tensors without data: transformers matches the names in the files with those of the model
    stored = {name: torch.empty(shape, device="meta") for name, (shape, _) in layout.items()}
    _, report = model.from_pretrained(
        None,
        config=config,
        state_dict=stored,
        device_map="meta",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # transformers would make them up, differently in every process
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            names = sorted(str(key) for key in report[problem])
            raise ConfigError(
                f"{folder}: {len(names)} {problem.replace('_', ' ')} of {purpose}, first "
                f"{names[:3]}; the weights do not belong to this config.json: fetch both again"
            )
    return network


def _read_pretrained(model: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    return model.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)


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
        # float32, since numpy has no bfloat16
        sample = weight.detach().flatten()[::stride].float().cpu().numpy()
        digest.update(f"{name} {list(weight.shape)}".encode() + sample.tobytes())
    return f"{kind}:{digest.hexdigest()[:16]}"
