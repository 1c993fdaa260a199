"""Names that recipes and commands choose from, without the code behind them; kinds of GPUs.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
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

MOST_SEED = 2**31 - 1
"""Largest seed: one that torch, numpy and veRL take, also after a rank is added."""
MOST_PROCESSES = 1024
"""Most processes of one kind on one machine; the largest machines have fewer cores."""
MOST_PX = 4096
"""Largest side of an image, pixels; policies see 224, and LIBERO's textures have 1,024."""
MOST_SLOTS = 1 << 16
"""Most episodes that run at the same time."""
MOST_EPISODES = 1_000_000
"""Most episodes of one round or recording."""
MOST_STEPS = 1_000_000
"""Largest step limit; LIBERO's longest is 520."""

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Kind of GPU of a rank."""

    name: str
    memory_bytes: int
    """Memory as ``nvidia-smi`` reports it, which is less than the name says."""
    bf16_flops: float
    """Peak FLOPs per second of dense matrix products with float32 accumulation; data sheet."""


GPUS = {
    "a100-80": Gpu(name="A100 80 GB", memory_bytes=81_920 * MIB, bf16_flops=312e12),
    "a100-40": Gpu(name="A100 40 GB", memory_bytes=40_960 * MIB, bf16_flops=312e12),
    "a10g": Gpu(name="A10G 24 GB", memory_bytes=23_028 * MIB, bf16_flops=70e12),
    "h100": Gpu(name="H100 SXM 80 GB", memory_bytes=81_559 * MIB, bf16_flops=989e12),
    "h200": Gpu(name="H200 141 GB", memory_bytes=143_771 * MIB, bf16_flops=989e12),
    "rtx4090": Gpu(name="RTX 4090 24 GB", memory_bytes=24_564 * MIB, bf16_flops=165e12),
}
"""Kinds of GPUs that a recipe can be planned for, by the name that ``--gpu`` takes."""
