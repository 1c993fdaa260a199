"""A scratch VLA from folders of a language model and of SigLIP, as transformers writes them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scratch_parts import NUM_WORDS, write_language, write_vision
from transformers import (
    AutoModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipModel,
    SiglipVisionConfig,
)

from verl_vla.cli import main
from verl_vla.core.errors import ConfigError
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.registry import examine, load_policy, load_processor, require_valid
from verl_vla.policies.scratch_vla import ScratchVLAConfig, ScratchVLAModel, ScratchVLAPolicy
from verl_vla.policies.scratch_vla.assembly import assemble

INSTRUCTIONS = ["push the cube onto the marker", "lift the cube"]
STATISTICS = ActionStatistics(q01=[-0.6] * 7, q99=[0.7] * 7, mask=[True] * 6 + [False], key="mini")


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language(tmp_path_factory.mktemp("language"), INSTRUCTIONS)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def policy(language: Path, vision: Path) -> ScratchVLAPolicy:
    return assemble(
        language, [vision], STATISTICS, dtype=torch.float32, lora_rank=4, chunk_length=2
    )


def test_everything_but_projector_and_adapters_is_taken_over(
    policy: ScratchVLAPolicy, language: Path, vision: Path
) -> None:
    source = Qwen2ForCausalLM.from_pretrained(language)
    tower = SiglipModel.from_pretrained(vision).vision_model
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = source.model(input_ids=ids).last_hidden_state
        assert torch.equal(policy.model.language_model(input_ids=ids).last_hidden_state, expected)
        pixels = torch.randn(1, 3, 28, 28)
        seen = policy.model.vision_towers[0](pixels).last_hidden_state
        assert torch.equal(seen, tower(pixels).last_hidden_state)


def test_action_rows_begin_as_the_last_words_before_the_padding(
    policy: ScratchVLAPolicy, language: Path
) -> None:
    words = Qwen2ForCausalLM.from_pretrained(language).get_input_embeddings().weight
    assert policy.model.config.first_action_id == NUM_WORDS - 256
    for rows in (policy.model.action_tokens.embedding, policy.model.action_tokens.head):
        assert torch.equal(rows.weight, words[NUM_WORDS - 256 : NUM_WORDS])
        assert rows.weight.requires_grad


def test_the_tower_says_how_it_wants_its_pixels(policy: ScratchVLAPolicy) -> None:
    (statistics,) = policy.processor.image_statistics
    assert statistics.std == (0.5, 0.5, 0.25)


def test_the_folder_is_found_sound_and_read_back(policy: ScratchVLAPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path)
    require_valid(tmp_path)
    assert [f.subject for f in examine(tmp_path)] == [
        "architecture", "action tokens", "weights", "processor",
    ]  # fmt: skip
    assert load_processor(tmp_path).shape == policy.shape
    again, automatic = load_policy(tmp_path).model, AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(automatic) is ScratchVLAModel
    mine = dict(policy.model.named_parameters())
    for model in (again, automatic):
        for name, weight in model.named_parameters():
            assert torch.equal(weight, mine[name]), name
            assert weight.requires_grad == mine[name].requires_grad, name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("config.json", "holds no config.json"),
        ("model.safetensors", "holds neither model.safetensors"),
        ("dataset_statistics.json", "holds no dataset_statistics.json"),
        ("preprocessor_config.json", "holds no preprocessor_config.json"),
    ],
)
def test_a_missing_file_is_a_fault(
    policy: ScratchVLAPolicy, tmp_path: Path, name: str, says: str
) -> None:
    policy.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=says):
        require_valid(tmp_path)


def test_a_folder_of_another_model_is_refused(language: Path, vision: Path) -> None:
    for folder in (language, vision):
        with pytest.raises(ConfigError, match="which cannot be trained here; .*scratch_vla"):
            load_policy(folder)


def test_folders_that_lack_a_part_are_refused(language: Path, vision: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are 0 vision folders"):
        assemble(language, [], STATISTICS)
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        assemble(tmp_path, [vision], STATISTICS)
    with pytest.raises(ConfigError, match=r"lacks \['image_mean', 'image_std'\]"):
        (tmp_path / "preprocessor_config.json").write_text("{}")
        assemble(language, [tmp_path], STATISTICS)


def test_the_command_writes_a_policy(language: Path, vision: Path, tmp_path: Path) -> None:
    (tmp_path / "mini").mkdir()
    with h5py.File(tmp_path / "mini" / "lift_demo.hdf5", "w") as file:
        file["data/demo_0/actions"] = np.random.default_rng(0).uniform(-1, 1, (6, 7))
    words = [
        "new-policy", "--language", str(language), "--vision", str(vision), str(vision),
        "--demos", str(tmp_path / "mini"), "--decoding", "autoregressive",
        "--num-views", "2", "--chunk-length", "1", "--dtype", "float32",
        "--out", str(tmp_path / "new"),
    ]  # fmt: skip
    assert main.main(words) == 0
    policy = load_policy(tmp_path / "new")
    assert policy.shape.num_views == 2 and policy.shape.num_tokens == 7
    assert policy.processor.codec.statistics.key == "mini"
    assert main.main(words) == main.EXIT_USAGE  # never over another policy


def test_the_command_measures_a_folder_of_liberos_files(
    language: Path, vision: Path, tmp_path: Path
) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 7))
    actions[20:30, :6] = 0  # idle
    actions[40:, :6] = 5  # not the expert's
    actions[:, 6] = -1
    with h5py.File(tmp_path / "lift_demo.hdf5", "w") as file:
        file["data/demo_0/actions"] = actions
        file["data/demo_0/disturbed"] = np.arange(50) >= 40
    words = ["new-policy", "--language", str(language), "--vision", str(vision), "--out"]
    words = [*words, str(tmp_path / "new"), "--demos", str(tmp_path)]
    assert main.main(words) == 0
    statistics = load_processor(tmp_path / "new").codec.statistics
    moving = np.delete(actions[:40], np.arange(20, 30), axis=0).astype(np.float32)
    assert statistics.q99[0] == np.quantile(moving[:, 0], 0.99)
    (tmp_path / "lift_demo.hdf5").write_bytes(b"no HDF5")
    assert main.main([*words, "--out", str(tmp_path / "other")]) == main.EXIT_USAGE


def test_the_sizes_of_qwen_3b_with_siglip_so400m() -> None:
    """66.4 M trained weights without the action rows, as the first VLA reports of itself."""
    config = ScratchVLAConfig(
        text_config=Qwen2Config(
            vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
            num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
            num_attention_heads=16, image_size=384, patch_size=14,
        ),
        num_views=2,
        lora_rank=32,
    )  # fmt: skip
    with torch.device("meta"):
        model = ScratchVLAModel(config)

    def count(part: torch.nn.Module, *, trained: bool) -> int:
        return sum(p.numel() for p in part.parameters() if p.requires_grad == trained)

    assert count(model.language_model, trained=False) == 3_085_938_688
    assert count(model.vision_towers, trained=False) == 412_987_248
    assert count(model, trained=True) == 67_473_408
    assert count(model, trained=True) - count(model.action_tokens, trained=True) == 66_424_832
    assert config.num_patches == 2 * 729
