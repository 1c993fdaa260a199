"""Validation of a checkpoint folder, with one finding for each known kind of fault.

No model is loaded: sizes and dtypes come from the files' headers, weights are read one at a time,
and the model that they are compared with is built on the meta device, without memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from verl_vla.core.errors import ConfigError
from verl_vla.policies.checkpoint import read_render_size, read_tokenizer
from verl_vla.policies.checks import Finding, build_empty, describe_weights, look
from verl_vla.policies.normalization import (
    load_proprio_stats,
    load_statistics,
    require_usual_mask,
)
from verl_vla.policies.openvla_oft.checkpoint import (
    read_config,
    read_image_statistics,
    refuse_regression_head,
)
from verl_vla.policies.openvla_oft.configuration import OpenVLAOFTConfig
from verl_vla.policies.openvla_oft.modelling import OpenVLAOFTModel, require_bidirectional
from verl_vla.policies.preprocessing import EMPTY_PIECE

NORM_EPSILON = 1e-6
"""Epsilon of the language model's norms in every OpenVLA checkpoint. Their config.json does not
have it, and Llama 2's is 1e-5."""
LEAST_ACTION_MASS = 0.5
"""Smallest probability of all action ids together for a head that was trained on action tokens."""


def examine(
    folder: str | Path, unnorm_key: str | None = None, *, reads_values: bool = True
) -> list[Finding]:
    """Check everything that a checkpoint folder must hold.

    Args:
        folder: folder of the checkpoint.
        unnorm_key: key of the action statistics to use; see `load_statistics`.
        reads_values: whether to read all weights too, one at a time, to see that they are finite.

    Returns:
        One finding per subject. If ``config.json`` is wrong, that is the only finding, since
        nothing else can be checked.
    """
    try:
        model = build_empty(folder, partial(OpenVLAOFTModel, read_config(folder)))
    except ConfigError as error:
        return [Finding(subject="architecture", says=str(error), is_fault=True)]
    config = model.config
    subjects: dict[str, Callable[[], str]] = {
        "architecture": partial(_architecture, model),
        "attention": partial(_attention, model),
        "norm epsilon": partial(_norm_epsilon, folder, config),
        "weights": partial(describe_weights, folder, model, reads_values=reads_values),
        "action head": partial(_head, folder),
        "action statistics": partial(_statistics, folder, config, unnorm_key),
        "token ids": partial(_token_ids, folder, config),
        "images": partial(_images, folder, config),
    }
    return [look(subject, describe) for subject, describe in subjects.items()]


def check_adapters(folder: str | Path, lora_rank: int, has_kl: bool) -> None:
    """Accept any adapters: a checkpoint brings none, and without them it is the reference."""


def judge_action_mass(mass: torch.Tensor) -> Finding:
    """Return a finding on whether the head was trained on action tokens.

    Args:
        mass: [B, T], result of `OpenVLAOFTModel.action_mass` on real images.
    """
    mean = mass.mean().item()
    says = f"{100 * mean:.1f}% of the probability is on the action ids ({len(mass)} images)"
    # a NaN fails every comparison, so it must not be the good case
    is_fault = not mean >= LEAST_ACTION_MASS
    if is_fault:
        says += (
            f", less than {100 * LEAST_ACTION_MASS:.0f}%: the language model was not trained to "
            "say action tokens; fine-tune it on action tokens first"
        )
    return Finding(subject="action mass", says=says, is_fault=is_fault)


def _architecture(model: OpenVLAOFTModel) -> str:
    config = model.config
    towers = " and ".join(
        f"{tower.depth - 1} of {tower.depth} blocks of {tower.hidden_size}"
        for tower in config.towers
    )
    language = config.language
    parameters = sum(weight.numel() for weight in model.parameters())
    return (
        f"OpenVLA-OFT, {parameters / 1e6:,.2f} M parameters: vision {towers}, language model "
        f"{language.num_hidden_layers} layers of {language.hidden_size}; "
        f"{config.chunk_length} actions of {config.action_dim} values at a time"
    )


def _attention(model: OpenVLAOFTModel) -> str:
    require_bidirectional(model)
    backend = model.config.language._attn_implementation  # pyright: ignore[reportPrivateUsage]
    return f"in both directions ({backend})"


def _norm_epsilon(folder: str | Path, config: OpenVLAOFTConfig) -> str:
    epsilon = config.language.rms_norm_eps
    if epsilon != NORM_EPSILON:
        raise ConfigError(
            f"{folder}: text_config.rms_norm_eps is {epsilon}, but OpenVLA was trained with "
            f"{NORM_EPSILON}; remove the entry from config.json"
        )
    return f"{epsilon}"


def _head(folder: str | Path) -> str:
    refuse_regression_head(folder)
    return "no regression head beside the weights"


def _statistics(folder: str | Path, config: OpenVLAOFTConfig, unnorm_key: str | None) -> str:
    statistics = load_statistics(folder, unnorm_key, config.normalization)
    require_usual_mask(statistics)
    found = {"an action": (len(statistics), config.action_dim)}
    if config.use_proprio:
        ranges = load_proprio_stats(folder, unnorm_key, config.normalization)
        found["proprio"] = (len(ranges), config.proprio_dim)
    for what, (num_ranges, size) in found.items():
        if num_ranges != size:
            raise ConfigError(
                f"{folder}: '{statistics.key}' has ranges of {num_ranges} values, {what} has "
                f"{size}; take the statistics of the fine-tuning data"
            )
    proprio = f", {config.proprio_dim} of proprio" if config.use_proprio else ""
    return f"'{statistics.key}', {len(statistics)} values{proprio}"


def _token_ids(folder: str | Path, config: OpenVLAOFTConfig) -> str:
    tokenizer = read_tokenizer(folder)
    language = config.language
    empty = tokenizer.convert_tokens_to_ids(EMPTY_PIECE)
    for name, id_, wanted in (
        ("bos", tokenizer.bos_token_id, language.bos_token_id),
        ("eos", tokenizer.eos_token_id, language.eos_token_id),
        ("pad", tokenizer.pad_token_id, language.pad_token_id),
    ):
        if id_ != wanted:
            raise ConfigError(
                f"{folder}: {name} is {id_} in the tokenizer and {wanted} in config.json; take "
                "both from one checkpoint"
            )
    last = config.first_action_id + config.n_action_bins - 1
    return (
        f"actions {config.first_action_id} to {last}, begin {language.bos_token_id}, stop "
        f"{config.stop_id}, padding {tokenizer.pad_token_id}, empty piece {empty}"
    )


def _images(folder: str | Path, config: OpenVLAOFTConfig) -> str:
    statistics = read_image_statistics(folder, len(config.towers))
    read_render_size(folder)
    means = ", ".join(f"({', '.join(f'{v:.6g}' for v in tower.mean)})" for tower in statistics)
    return (
        f"{config.num_images_in_input} of {config.image_size} px; mean colour of each tower {means}"
    )
