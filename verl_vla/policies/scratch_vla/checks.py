"""Validation of a scratch VLA's folder; no model is loaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from verl_vla.core.errors import ConfigError
from verl_vla.policies.checks import Finding, build_empty, describe_weights, look
from verl_vla.policies.normalization import require_usual_mask
from verl_vla.policies.scratch_vla.configuration import ScratchVLAConfig, read_config
from verl_vla.policies.scratch_vla.modelling import ScratchVLAModel
from verl_vla.policies.scratch_vla.processor import ScratchVLAProcessor


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
        config = read_config(folder)
        model = build_empty(folder, partial(ScratchVLAModel, config))
    except ConfigError as error:
        return [Finding(subject="architecture", says=str(error), is_fault=True)]
    return [
        look("architecture", partial(_architecture, model)),
        look("action tokens", partial(_action_tokens, config)),
        look("weights", partial(describe_weights, folder, model, reads_values=reads_values)),
        look("processor", partial(_processor, folder, unnorm_key)),
    ]


def check_adapters(folder: str | Path, lora_rank: int, has_kl: bool) -> None:
    """Refuse new adapters beside those of the folder, and adapters where KL needs a reference.

    Raises:
        ConfigError: the adapters are not compatible; gives the reason.
    """
    rank = read_config(folder).lora_rank
    if rank > 0:
        raise ConfigError(
            f"policy.lora_rank is {lora_rank}, but {folder} has adapters of rank {rank} already, "
            "which are trained; set policy.lora_rank=null"
        )
    if has_kl:
        raise ConfigError(
            f"policy.lora_rank is {lora_rank} and loss.kl.coefficient is above 0, but {folder} is "
            "a scratch VLA, which without its adapters is not the reference policy, since its "
            "projector is trained too; set one of them to null or 0"
        )


def _architecture(model: ScratchVLAModel) -> str:
    config = model.config
    towers = " and ".join(
        f"{tower.num_hidden_layers} blocks of {tower.hidden_size}" for tower in config.towers
    )
    language = config.language
    weights = list(model.parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    return (
        f"scratch VLA, {sum(weight.numel() for weight in weights) / 1e6:,.2f} M parameters, of "
        f"which {trained / 1e6:,.2f} M are trained: vision {towers}, {language.model_type} "
        f"{language.num_hidden_layers} layers of {language.hidden_size}; {config.decoding} "
        f"decoding, {config.chunk_length} actions of {config.action_dim} values at a time"
    )


def _action_tokens(config: ScratchVLAConfig) -> str:
    first = config.first_action_id
    assert first is not None
    return (
        f"ids {first} to {first + config.n_action_bins - 1} of {config.language.vocab_size}, rows "
        f"{config.action_rows}"
    )


def _processor(folder: str | Path, unnorm_key: str | None) -> str:
    processor = ScratchVLAProcessor.from_pretrained(folder, unnorm_key)
    require_usual_mask(processor.codec.statistics)
    return (
        f"{len(processor.tokenizer)} pieces, padding {processor.tokenizer.pad_token_id}; "
        f"{processor.shape.num_views} images of {processor.shape.image_size} px; statistics "
        f"'{processor.codec.statistics.key}'"
    )
