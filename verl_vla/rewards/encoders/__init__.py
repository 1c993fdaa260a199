"""Encoders: frozen networks that turn the images of an episode into features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from verl_vla.core.errors import ConfigError
from verl_vla.core.plugins import import_file
from verl_vla.core.text import nearest
from verl_vla.rewards import FeatureExtractor
from verl_vla.rewards.encoders.base import BatchedEncoder
from verl_vla.rewards.encoders.pixels import PixelEncoder
from verl_vla.rewards.encoders.policy_towers import PolicyTowersEncoder
from verl_vla.rewards.encoders.process import EncoderProcess
from verl_vla.rewards.encoders.transformer import Dinov2Encoder, SiglipEncoder
from verl_vla.rewards.encoders.vjepa2 import Vjepa2Encoder
from verl_vla.rewards.loading import pick_class

ENCODERS: dict[str, Callable[..., FeatureExtractor]] = {
    "pixels": PixelEncoder,
    "dinov2": Dinov2Encoder,
    "siglip": SiglipEncoder,
    "vjepa2": Vjepa2Encoder,
    "policy_towers": PolicyTowersEncoder,
}
OWN_PROCESS = "own_process"
"""Name of an argument that every encoder takes; true runs the encoder in a separate process."""
PLUGIN = ".py:"
"""Part of the name of an encoder that is a class in a file."""
DEVICE = "device"
"""Name of the argument of encoders with a network that says where it is computed."""


def make_encoder(name: str, arguments: Mapping[str, Any]) -> FeatureExtractor:
    """Construct the encoder that a recipe names.

    Args:
        name: a key of `ENCODERS`, or ``path/to/file.py:ClassName``.
        arguments: passed to its constructor by keyword, all but `OWN_PROCESS`; checked against its
            signature.

    Raises:
        ConfigError: no such encoder, an unknown or missing argument, or an argument that the
            constructor rejects.
    """
    make = _find_encoder(name)
    known = inspect.signature(make).parameters
    own = {key: value for key, value in arguments.items() if key != OWN_PROCESS}
    for key in own:
        if key not in known:
            raise ConfigError(
                f"encoder {name!r} has no argument {key!r}; {nearest(key, [*known, OWN_PROCESS])}"
            )
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in own:
            raise ConfigError(f"encoder {name!r} needs {key!r}; set reward_args.encoder_args.{key}")
    name, own = _anywhere(name, own)
    if OWN_PROCESS in arguments and arguments[OWN_PROCESS]:
        return EncoderProcess(partial(make_encoder, name, own))
    encoder = make(**own)
    if isinstance(encoder, BatchedEncoder) and DEVICE in known:
        # what asks for the processor stays there
        asked = own[DEVICE] if DEVICE in own else known[DEVICE].default
        encoder.remake = partial(_remake, name, own, stays=asked == "cpu")
    return encoder


def _find_encoder(name: str) -> Callable[..., FeatureExtractor]:
    if name in ENCODERS:
        return ENCODERS[name]
    if PLUGIN not in name:
        raise ConfigError(
            f"encoder is {name!r}; {nearest(name, list(ENCODERS))}; an encoder of your own is "
            "path/to/file.py:ClassName"
        )
    file, class_name = name.rsplit(":", 1)
    return pick_class(import_file(Path(file)), Path(file), class_name)


def _anywhere(name: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Make paths absolute, since other processes may work in other folders."""
    if PLUGIN in name:
        name = str(Path(name).expanduser().absolute())
    given = dict(arguments)
    # otherwise a name on the hub, or a mistake that the encoder reports as it was written
    if "path" in given and Path(given["path"]).expanduser().exists():
        given["path"] = str(Path(given["path"]).expanduser().absolute())
    return name, given


def _remake(name: str, arguments: Mapping[str, Any], device: str, *, stays: bool) -> Any:
    return make_encoder(name, {**arguments, DEVICE: "cpu" if stays else device})
