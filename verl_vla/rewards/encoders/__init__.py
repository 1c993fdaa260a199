"""Encoders: frozen networks that turn the images of an episode into features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from verl_vla.core.errors import ConfigError
from verl_vla.core.text import nearest
from verl_vla.rewards import FeatureExtractor
from verl_vla.rewards.encoders.pixels import PixelEncoder
from verl_vla.rewards.encoders.policy_towers import PolicyTowersEncoder
from verl_vla.rewards.encoders.process import EncoderProcess
from verl_vla.rewards.encoders.transformer import Dinov2Encoder, SiglipEncoder
from verl_vla.rewards.encoders.vjepa2 import Vjepa2Encoder

ENCODERS: dict[str, Callable[..., FeatureExtractor]] = {
    "pixels": PixelEncoder,
    "dinov2": Dinov2Encoder,
    "siglip": SiglipEncoder,
    "vjepa2": Vjepa2Encoder,
    "policy_towers": PolicyTowersEncoder,
}
OWN_PROCESS = "own_process"
"""Name of an argument that every encoder takes; true runs the encoder in a separate process."""


def make_encoder(name: str, arguments: Mapping[str, Any]) -> FeatureExtractor:
    """Construct the encoder that a recipe names.

    Args:
        name: a key of `ENCODERS`.
        arguments: passed to its constructor by keyword, all but `OWN_PROCESS`; checked against its
            signature.

    Raises:
        ConfigError: no such encoder, an unknown or missing argument, or an argument that the
            constructor rejects.
    """
    if name not in ENCODERS:
        raise ConfigError(f"encoder is {name!r}; {nearest(name, list(ENCODERS))}")
    known = inspect.signature(ENCODERS[name]).parameters
    own = {key: value for key, value in arguments.items() if key != OWN_PROCESS}
    for key in own:
        if key not in known:
            raise ConfigError(
                f"encoder {name!r} has no argument {key!r}; {nearest(key, [*known, OWN_PROCESS])}"
            )
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in own:
            raise ConfigError(f"encoder {name!r} needs {key!r}; set reward_args.encoder_args.{key}")
    make = partial(ENCODERS[name], **own)
    return EncoderProcess(make) if OWN_PROCESS in arguments and arguments[OWN_PROCESS] else make()
