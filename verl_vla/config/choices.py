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

Split = Literal["train", "held_out", "official", "sampled"]
"""Sets of starts: ``official`` is every recorded one, trained on or not, as in published
evaluations; ``sampled`` starts are sampled and recorded nowhere."""

Fixtures = Literal["first", "redrawn"]
"""Placements of LIBERO's cabinets, stoves and racks, which are no part of an init state: ``first``
is that of a new environment, in every episode; ``redrawn`` gives init state i that of the i-th
reset of one environment, as openvla-oft's evaluation plays it."""

CAMERAS = ("agentview", "robot0_eye_in_hand")
"""LIBERO's views that published policies use: third person and wrist."""

SUITES = ("mini", "libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
"""Unperturbed suites."""

SUITES_WITH_EXPERTS = ("mini", "libero_spatial", "libero_object")
"""Suites that `verl_vla.envs.experts` can solve."""

PERTURBED_BASES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
"""Suites that LIBERO-PRO and LIBERO-Plus perturb."""

PRO_AXES = ("swap", "object", "language", "task", "environment")
"""LIBERO-PRO's axes of perturbation."""

PLUS_AXES = ("camera", "robot", "language", "light", "background", "noise", "layout")
"""LIBERO-Plus's axes of perturbation, in the order of the published table."""

ALL_BASES = "libero"
"""Name for all of `PERTURBED_BASES`, under perturbations of LIBERO-Plus."""

PERTURBATIONS = (*PRO_AXES, "plus", *(f"plus_{axis}" for axis in PLUS_AXES))
"""Names of perturbations: LIBERO-PRO's five axes, and LIBERO-Plus's seven, together or one by
one."""
