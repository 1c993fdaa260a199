"""Random small folders that a scratch VLA is put together from, as transformers writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipConfig, SiglipModel

from verl_vla.policies.openvla_oft.tiny import build_tokenizer

NUM_WORDS, NUM_PADDING = 300, 40


def write_language(folder: Path, instructions: Sequence[str]) -> Path:
    """Write a random Qwen2 with a tied head, whose vocabulary ends in padding."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=NUM_WORDS + NUM_PADDING,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[NUM_WORDS:] = 0.01
    model.save_pretrained(folder)
    build_tokenizer(instructions).save_pretrained(folder)
    return folder


def write_vision(folder: Path) -> Path:
    """Write a random SigLIP, both halves of it, as the published folders are."""
    half = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(1)
    SiglipModel(
        SiglipConfig(
            vision_config=half | {"num_attention_heads": 3, "image_size": 28, "patch_size": 14},
            text_config=half | {"num_attention_heads": 3, "vocab_size": 50},
        )
    ).save_pretrained(folder)
    content = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder
