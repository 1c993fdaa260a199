"""A tiny scratch VLA, with a random Qwen2 and a random SigLIP, that can be trained on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Qwen2Config, SiglipVisionConfig

from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft.tiny import POSITION_STD, WEIGHT_STD, build_tokenizer
from verl_vla.policies.preprocessing import SIGLIP_STATISTICS
from verl_vla.policies.scratch_vla.configuration import ScratchVLAConfig
from verl_vla.policies.scratch_vla.modelling import ScratchVLAModel
from verl_vla.policies.scratch_vla.policy import ScratchVLAPolicy
from verl_vla.policies.scratch_vla.processor import ScratchVLAProcessor


@dataclass(frozen=True, kw_only=True)
class ScratchSizes:
    """Sizes of a tiny model. The defaults are the tiny OpenVLA-OFT's, which is known to learn."""

    image_size: int = 112
    render_size: int | None = None
    """Size of the camera images that the policy will be trained on, pixels."""
    patch_size: int = 14
    num_views: int = 1
    num_towers: int = 1
    vision_width: int = 72
    vision_depth: int = 2
    vision_heads: int = 3
    llm_width: int = 96
    llm_depth: int = 4
    llm_heads: int = 4
    llm_key_heads: int = 2
    llm_mlp: int = 256
    num_bins: int = 256
    chunk_length: int = 8
    action_dim: int = 7
    decoding: str = "parallel"
    action_rows: str = "trained"
    lora_rank: int = 0


def tiny_config(num_words: int, sizes: ScratchSizes) -> ScratchVLAConfig:
    """Return the configuration of a model whose action ids directly follow ``num_words`` words."""
    tower = SiglipVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_depth,
        num_attention_heads=sizes.vision_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
    )
    return ScratchVLAConfig(
        text_config=Qwen2Config(
            vocab_size=num_words + sizes.num_bins,
            hidden_size=sizes.llm_width,
            intermediate_size=sizes.llm_mlp,
            num_hidden_layers=sizes.llm_depth,
            num_attention_heads=sizes.llm_heads,
            num_key_value_heads=sizes.llm_key_heads,
            tie_word_embeddings=True,
            initializer_range=WEIGHT_STD,
        ),
        vision_config=tower,
        second_vision_config=tower.to_dict() if sizes.num_towers > 1 else None,
        decoding=sizes.decoding,
        action_rows=sizes.action_rows,
        first_action_id=num_words,
        n_action_bins=sizes.num_bins,
        num_views=sizes.num_views,
        chunk_length=sizes.chunk_length,
        action_dim=sizes.action_dim,
        lora_rank=sizes.lora_rank,
        train_vision=True,
        initializer_range=WEIGHT_STD,
    )


def build_tiny_policy(
    instructions: Sequence[str],
    statistics: ActionStatistics,
    *,
    sizes: ScratchSizes = ScratchSizes(),
    seed: int = 0,
) -> ScratchVLAPolicy:
    """Build an untrained policy for the given tasks.

    Args:
        instructions: instructions of the tasks, whose words get pieces of the tokenizer.
        statistics: statistics of the actions that it is to be trained on.
        sizes: sizes of the model.
        seed: seed of the weights; the process's random state is not changed.
    """
    tokenizer = build_tokenizer(instructions)
    config = tiny_config(len(tokenizer), sizes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = ScratchVLAModel(config)
        for tower in model.vision_towers:
            tower.get_parameter("embeddings.position_embedding.weight").normal_(std=POSITION_STD)
    image_statistics = [SIGLIP_STATISTICS] * len(config.towers)
    processor = ScratchVLAProcessor(
        config, tokenizer, image_statistics, statistics, sizes.render_size
    )
    return ScratchVLAPolicy(model, processor)
