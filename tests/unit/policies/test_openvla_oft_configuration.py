from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, LlamaConfig

from verl_vla.core.errors import ConfigError
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig, OpenVLAOFTModel, VisionTower

# What a published config.json says of sizes (libero_10, openvla-oft), its remote code included.
PUBLISHED: dict[str, Any] = {
    "arch_specifier": "no-align+fused-gelu-mlp",
    "architectures": ["OpenVLAForActionPrediction"],
    "auto_map": {
        "AutoConfig": "configuration_prismatic.OpenVLAConfig",
        "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
    },
    "image_sizes": [224, 224],
    "model_type": "openvla",
    "n_action_bins": 256,
    "norm_stats": {"some_dataset": {}},
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
    "text_config": {
        "model_type": "llama",
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "torch_dtype": "bfloat16",
    "use_fused_vision_backbone": True,
    "vision_backbone_id": "dinosiglip-vit-so-224px",
}
TOWER = {
    "patch_size": 14,
    "hidden_size": 8,
    "depth": 2,
    "heads": 2,
    "mlp_size": 16,
    "class_token": False,
    "registers": 0,
    "layer_scale": False,
    "attention_pool": False,
}


def write_config(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def small(**changes: Any) -> OpenVLAOFTConfig:
    text = LlamaConfig(vocab_size=448, hidden_size=8, num_attention_heads=2, pad_token_id=0)
    fields: dict[str, Any] = {"text_config": text, "vision_towers": [TOWER], "image_sizes": [28]}
    return OpenVLAOFTConfig(**(fields | changes))


def test_a_published_config_is_read_unchanged(tmp_path: Path) -> None:
    config = OpenVLAOFTConfig.from_pretrained(write_config(tmp_path, PUBLISHED))
    assert config.first_action_id == 31744
    assert config.stop_id == 2
    assert config.num_patches == 256
    assert config.num_action_tokens == 56
    assert config.language.rms_norm_eps == 1e-6  # not Llama 2's 1e-5
    assert config.language.num_hidden_layers == 32
    assert config.language.is_causal is False
    assert [tower.hidden_size for tower in config.towers] == [1024, 1152]
    assert (config.shape.num_views, config.shape.image_size) == (1, 224)


def test_auto_classes_read_it_without_asking_for_remote_code(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(
        write_config(tmp_path, PUBLISHED), trust_remote_code=False, local_files_only=True
    )
    assert type(config) is OpenVLAOFTConfig
    with torch.device("meta"):
        assert type(AutoModel.from_config(config)) is OpenVLAOFTModel


def test_a_saved_config_no_longer_names_remote_code(tmp_path: Path) -> None:
    OpenVLAOFTConfig.from_pretrained(write_config(tmp_path, PUBLISHED)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in saved
    assert saved["timm_model_ids"] == PUBLISHED["timm_model_ids"]
    assert saved["norm_stats"] == PUBLISHED["norm_stats"]


def test_the_defaults_are_the_published_sizes(tmp_path: Path) -> None:
    read = OpenVLAOFTConfig.from_pretrained(write_config(tmp_path, PUBLISHED))
    default = OpenVLAOFTConfig()
    assert default.towers == read.towers
    assert default.shape == read.shape
    assert default.first_action_id == read.first_action_id


def test_spelt_out_towers_survive_saving(tmp_path: Path) -> None:
    config = small(chunk_length=3, action_dim=5, num_images_in_input=2)
    config.save_pretrained(tmp_path)
    again = OpenVLAOFTConfig.from_pretrained(tmp_path)
    assert again.towers == config.towers == (VisionTower(**TOWER),)
    assert again.num_patches == 2 * 4
    assert again.num_action_tokens == 15
    assert again.shape == config.shape
    assert again.language.is_causal is False


def test_towers_may_be_given_as_objects() -> None:
    assert small(vision_towers=[VisionTower(**TOWER)]).towers == small().towers


def test_a_file_cannot_make_the_attention_causal() -> None:
    text = {"vocab_size": 448, "hidden_size": 8, "num_attention_heads": 2, "is_causal": True}
    assert small(text_config=text).language.is_causal is False


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch_specifier": "no-align+gelu-mlp"}, "arch_specifier is 'no-align"),
        ({"use_fused_vision_backbone": True}, "use_fused_vision_backbone is True with 1"),
        ({"timm_override_act_layers": ["quick_gelu"]}, "timm_override_act_layers"),
        ({"vision_towers": None, "timm_model_ids": ["vit_base"]}, "vision_towers"),
        ({"vision_towers": [TOWER] * 3, "image_sizes": [28] * 3}, "3 vision towers"),
        ({"vision_towers": []}, "0 vision towers"),
        ({"vision_towers": [{"depth": 3}]}, "missing .* required"),
        ({"vision_towers": [TOWER | {"width": 3}]}, "unexpected keyword argument 'width'"),
        ({"image_sizes": [28, 28]}, "image_sizes"),
        ({"vision_towers": [TOWER] * 2, "image_sizes": [28, 56]}, "all equal"),
        ({"image_sizes": [30]}, "do not fall into patches"),
        (
            {"vision_towers": [TOWER, TOWER | {"patch_size": 7}], "image_sizes": [28] * 2},
            "share a patch size",
        ),
        ({"n_action_bins": 1}, "n_action_bins is 1"),
        ({"chunk_length": 0}, "chunk_length is 0"),
        ({"num_images_in_input": 0}, "num_images_in_input is 0"),
        ({"n_action_bins": 400}, "first action id would be -16"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        small(**changes)


def test_several_stop_tokens_are_refused() -> None:
    text = LlamaConfig(
        vocab_size=448, hidden_size=8, num_attention_heads=2, eos_token_id=[1, 2], pad_token_id=0
    )
    with pytest.raises(ConfigError, match="exactly one id"):
        small(text_config=text)
