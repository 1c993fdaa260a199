"""Encoders: frozen networks that turn the pictures of an episode into features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from verl_vla.config import nearest
from verl_vla.encoders.pixels import PixelEncoder
from verl_vla.encoders.policy_towers import PolicyTowersEncoder
from verl_vla.encoders.transformer import Dinov2Encoder, SiglipEncoder
from verl_vla.encoders.vjepa2 import Vjepa2Encoder
from verl_vla.errors import ConfigError
from verl_vla.reward import FeatureExtractor

ENCODERS: dict[str, Callable[..., FeatureExtractor]] = {
    "pixels": PixelEncoder,
    "dinov2": Dinov2Encoder,
    "siglip": SiglipEncoder,
    "vjepa2": Vjepa2Encoder,
    "policy_towers": PolicyTowersEncoder,
}


def make_encoder(name: str, arguments: Mapping[str, Any]) -> FeatureExtractor:
    """Make the encoder that a recipe names.

    Args:
        name: a key of `ENCODERS`.
        arguments: passed to its constructor by keyword; checked against its signature.

    Raises:
        ConfigError: no such encoder, an argument it does not know or misses, or what its own
            constructor refuses.
    """
    if name not in ENCODERS:
        raise ConfigError(f"encoder is {name!r}; {nearest(name, list(ENCODERS))}")
    known = inspect.signature(ENCODERS[name]).parameters
    for key in arguments:
        if key not in known:
            raise ConfigError(
                f"encoder {name!r} has no argument {key!r}; {nearest(key, list(known))}"
            )
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in arguments:
            raise ConfigError(f"encoder {name!r} needs {key!r}; set reward_args.encoder_args.{key}")
    return ENCODERS[name](**arguments)
