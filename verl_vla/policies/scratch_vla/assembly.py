"""Assembly of a new scratch VLA from a language model's folder and one or two SigLIP folders.

The memory of fine-tuning Qwen2.5-3B with SigLIP-so400m at 384 px: two cameras, batch 8, LoRA of
rank 32, trained action rows, gradient checkpointing. Weights are counted on the meta device by
``tests/unit/policies/test_scratch_vla_assembly.py``, the rest is arithmetic; nothing was measured
on a GPU. A sequence has 2 x 729 patches, about 40 words and 55 action tokens: 1,553 positions. GB
are 1e9 bytes.

    language model, frozen, bfloat16        3,085,938,688 weights                    6.17 GB
    SigLIP, frozen, bfloat16                  412,987,248 weights                    0.83 GB
    adapters, projector, action rows           67,473,408 weights, float32 weight,
                                                          gradient and two moments   1.08 GB
    inputs of 36 layers                       8 x 1,553 x 2,048, bfloat16            1.83 GB
    activations of one layer, and gradient    8 x 1,553 x 49,920, bfloat16, twice    2.48 GB
    together                                                                        12.39 GB

Without gradient checkpointing the activations of all 36 layers are kept, 44.7 GB. A learner that
keeps the frozen weights in float32, as `train` does, needs 7.0 GB more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, SiglipVisionModel

from verl_vla.core.errors import ConfigError
from verl_vla.policies.checkpoint import CONFIG_FILE, IMAGE_FILE, read_tokenizer, require_file
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.preprocessing import ImageStatistics
from verl_vla.policies.scratch_vla.action_tokens import find_first_action_id
from verl_vla.policies.scratch_vla.configuration import ScratchVLAConfig
from verl_vla.policies.scratch_vla.modelling import ScratchVLAModel
from verl_vla.policies.scratch_vla.policy import ScratchVLAPolicy
from verl_vla.policies.scratch_vla.processor import ScratchVLAProcessor

ADAPTED = ".base_layer."
"""Part that PEFT inserts into the name of a weight that has an adapter."""
NUM_BINS = 256


def assemble(
    language: str | Path,
    vision: Sequence[str | Path],
    statistics: ActionStatistics,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **choices: Any,
) -> ScratchVLAPolicy:
    """Assemble a policy; projector and adapters are new, all other weights are copied.

    Args:
        language: folder of a causal language model, with its tokenizer.
        vision: folders of one or two SigLIP models with the same image and patch size.
        statistics: statistics of the actions that it is to be trained on.
        dtype: dtype of all weights.
        seed: seed of the new weights; the process's random state is not changed.
        choices: fields of `ScratchVLAConfig` that are not read from the folders.

    Raises:
        ConfigError: a file is missing, the parts do not fit, or the vocabulary is too small.
    """
    if not 1 <= len(vision) <= 2:
        raise ConfigError(f"there are {len(vision)} vision folders; give one or two")
    require_file(language, CONFIG_FILE, "the sizes of the language model")
    source: Any = AutoModelForCausalLM.from_pretrained(
        str(language), dtype=dtype, local_files_only=True, trust_remote_code=False
    )
    image_statistics = [_image_statistics(folder) for folder in vision]
    towers = [
        SiglipVisionModel.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
        for folder in vision
    ]
    embedding = source.get_input_embeddings().weight
    first = find_first_action_id(embedding, NUM_BINS)
    config = ScratchVLAConfig(
        text_config=source.config,
        vision_config=towers[0].config,
        second_vision_config=towers[1].config if len(towers) > 1 else None,
        first_action_id=first,
        n_action_bins=NUM_BINS,
        **choices,
    )
    # no devices: weights are drawn on the CPU, and a look at a GPU would start CUDA here
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ScratchVLAModel(config)
    nn.Module.to(model, dtype)
    _take_over(model.language_model, source.base_model)
    for new, tower in zip(model.vision_towers, towers, strict=True):
        _take_over(new, tower)
    if config.action_rows == "trained":
        rows, head = slice(first, first + NUM_BINS), model.action_tokens.head
        assert head is not None  # only with frozen_tied are there no separate rows
        with torch.no_grad():
            model.action_tokens.embedding.weight.copy_(embedding[rows])
            head.weight.copy_(source.get_output_embeddings().weight[rows])
    tokenizer = read_tokenizer(language)
    processor = ScratchVLAProcessor(config, tokenizer, image_statistics, statistics)
    return ScratchVLAPolicy(model, processor)


def _take_over(new: nn.Module, source: nn.Module) -> None:
    """Copy all weights of ``source`` to ``new``, even where ``new`` has an adapter on them.

    Raises:
        ConfigError: ``source`` lacks a weight of ``new``, adapters excepted.
    """
    stored = source.state_dict()
    # a weight with an adapter has PEFT's name in the new model and its own in the source
    names = {name: name.replace(ADAPTED, ".") for name in new.state_dict()}
    found = {name: stored[origin] for name, origin in names.items() if origin in stored}
    missing = [name for name in names if name not in found and "lora_" not in name]
    if missing:
        raise ConfigError(
            f"{type(source).__name__} lacks {len(missing)} weights, first {missing[:3]}; its "
            "folder does not hold the model that its config.json describes"
        )
    new.load_state_dict(found, strict=False)


def _image_statistics(folder: str | Path) -> ImageStatistics:
    path = require_file(folder, IMAGE_FILE, "how the tower wants its pixels")
    content = json.loads(path.read_text(encoding="utf-8"))
    missing = [name for name in ("image_mean", "image_std") if name not in content]
    if missing:
        raise ConfigError(f"{path} lacks {missing}; take the file that came with the tower")
    return ImageStatistics(mean=tuple(content["image_mean"]), std=tuple(content["image_std"]))
