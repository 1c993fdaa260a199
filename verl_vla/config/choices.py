"""Names that recipes and commands choose from, without the code behind them.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16"]
DTYPES = get_args(Dtype)

LoraTargets = Literal["language_model", "all-linear"]
"""Layers that get adapters; see `verl_vla.policies.token_model.TokenModel.add_adapters`."""

DECODINGS = ("parallel", "autoregressive")
"""Decoding of action tokens. ``parallel``: all tokens of a chunk at once, without knowing each
other's bins (OpenVLA-OFT, arXiv:2502.19645, section IV). ``autoregressive``: one after the other
(OpenVLA, arXiv:2406.09246)."""

ACTION_ROWS = ("trained", "frozen_tied")
"""Embedding and head of the action tokens. ``trained``: separate, trained weights. ``frozen_tied``:
rows of the language model's tied, frozen vocabulary, which training cannot change."""

PROTOCOLS = ("published",)
"""Evaluation protocols that set suite-wide conditions."""
