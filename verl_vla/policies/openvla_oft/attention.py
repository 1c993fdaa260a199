"""Which attention back ends OpenVLA-OFT may run on: those that look in both directions."""

from __future__ import annotations

from transformers.utils.import_utils import is_flash_attn_2_available

from verl_vla.core.errors import ConfigError

FLASH_ATTENTION = "flash_attention_2"
BIDIRECTIONAL_ATTENTION = ("sdpa", "eager", FLASH_ATTENTION)
"""Back ends of transformers 5 that honour ``is_causal=False`` with and without padding. The first
two read it from the mask, flash attention from the flag that the config and every ``self_attn``
carry (``integrations/flash_attention.py``); it cuts padding out by the same mask."""


def require_bidirectional_backend(backend: str | None) -> None:
    """Refuse a back end that would be causal without a word, or that this machine does not have.

    Raises:
        ConfigError: says which back ends there are, or what is missing.
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
        ConfigError: names what is missing.
    """
    if backend == FLASH_ATTENTION and not is_flash_attn_2_available():
        raise ConfigError(
            f"attn_implementation is '{FLASH_ATTENTION}', which needs a CUDA device and the "
            "package flash-attn, and one of them is missing here; install it (the extra gpu), or "
            "choose sdpa"
        )
