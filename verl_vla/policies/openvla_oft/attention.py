"""Check that OpenVLA-OFT runs on an attention back end that can be bidirectional."""

from __future__ import annotations

from transformers.utils.import_utils import is_flash_attn_2_available

from verl_vla.core.errors import ConfigError

FLASH_ATTENTION = "flash_attention_2"
BIDIRECTIONAL_ATTENTION = ("sdpa", "eager", FLASH_ATTENTION)
"""Back ends of transformers 5 that obey ``is_causal=False`` with and without padding. The first two
read it from the mask, flash attention from the flag of the config and of every ``self_attn``
(``integrations/flash_attention.py``); it removes padding by the same mask."""


def require_bidirectional_backend(backend: str | None) -> None:
    """Refuse a back end that would silently be causal, or that this machine does not have.

    Raises:
        ConfigError: the back end is unsuitable; names the suitable ones, or what is missing.
    """
    if backend not in BIDIRECTIONAL_ATTENTION:
        raise ConfigError(
            f"attn_implementation is '{backend}'; OpenVLA-OFT needs attention in both directions, "
            f"which is ensured for {BIDIRECTIONAL_ATTENTION}: choose one of them"
        )
    require_backend(backend)


def require_backend(backend: str | None) -> None:
    """Refuse a back end that this machine does not have.

    Without this check transformers would look for a substitute on a hub.

    Raises:
        ConfigError: a CUDA device or a package is missing.
    """
    if backend == FLASH_ATTENTION and not is_flash_attn_2_available():
        raise ConfigError(
            f"attn_implementation is '{FLASH_ATTENTION}', which needs a CUDA device and the "
            "package flash-attn, and one of them is missing here; install it (the extra gpu), or "
            "choose sdpa"
        )
