from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.policies.checkpoint import read_tokenizer, write_image_statistics
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft import (
    OpenVLAOFTModel,
    OpenVLAOFTPolicy,
    OpenVLAOFTProcessor,
    register_auto_classes,
)
from verl_vla.policies.openvla_oft.checkpoint import read_config, read_image_statistics
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tiny_policy
from verl_vla.policies.preprocessing import (
    DINO_STATISTICS,
    OPENVLA_IMAGE_STATISTICS,
    SIGLIP_STATISTICS,
)

INSTRUCTIONS = ["push the cube onto the marker", "lift the cube"]
STATISTICS = ActionStatistics(
    q01=[-0.6, -0.6, -0.6, 0.0, 0.0, 0.0, 0.0],
    q99=[0.7, 0.7, 0.7, 0.0, 0.0, 0.0, 1.0],
    mask=[True] * 6 + [False],
    key="mini_no_noops",
)
FUSED = TinySizes(image_size=28, vision_width=24, llm_width=32, llm_depth=1, fused=True)


@pytest.fixture(scope="module")
def policy() -> OpenVLAOFTPolicy:
    return build_tiny_policy(INSTRUCTIONS, STATISTICS, sizes=FUSED)


@pytest.fixture
def folder(policy: OpenVLAOFTPolicy, tmp_path: Path) -> Path:
    policy.save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_holds_everything_by_its_published_name(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
        "dataset_statistics.json",
    }


def test_the_parts_are_read_back_as_they_were(folder: Path, policy: OpenVLAOFTPolicy) -> None:
    processor = OpenVLAOFTProcessor.from_pretrained(folder, "mini")
    assert processor.shape == policy.shape
    assert processor.image_statistics == OPENVLA_IMAGE_STATISTICS
    assert processor.codec.statistics.key == "mini_no_noops"
    for instruction in INSTRUCTIONS:
        assert torch.equal(processor.prompt(instruction), policy.processor.prompt(instruction))
    action_tokens = torch.arange(56).unsqueeze(0) * 4
    commands = processor.codec.to_simulator(action_tokens)
    assert np.array_equal(commands, policy.processor.codec.to_simulator(action_tokens))


def test_auto_classes_load_it(folder: Path, policy: OpenVLAOFTPolicy) -> None:
    register_auto_classes()  # a second time does no harm
    edit(folder / "config.json", auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"})
    assert AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type == "openvla"
    model = AutoModel.from_pretrained(folder, trust_remote_code=False)
    assert type(model) is OpenVLAOFTModel
    for one, other in zip(model.parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_model_loads_an_export_in_shards_with_equal_logits(
    folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    trained = OpenVLAOFTPolicy.from_pretrained(folder, dtype=dtype)
    export = tmp_path / "export"
    trained.model.save_pretrained(export, max_shard_size="50KB")
    trained.processor.save_pretrained(export)
    assert len(list(export.glob("model-*-of-*.safetensors"))) > 1
    model = AutoModel.from_pretrained(export, dtype="auto", trust_remote_code=False)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 6, 28, 28, generator=generator)
    ids, mask = trained.processor.collate([trained.processor.prompt(i) for i in INSTRUCTIONS])
    with torch.no_grad():
        logits = model.action_logits(pixels, ids, mask)
        assert torch.equal(logits, trained.model.action_logits(pixels, ids, mask))
    again = OpenVLAOFTProcessor.from_pretrained(export)
    action_tokens = torch.arange(56).unsqueeze(0) * 4
    commands = trained.processor.codec.to_simulator(action_tokens)
    assert np.array_equal(again.codec.to_simulator(action_tokens), commands)


def test_a_program_needs_one_import_to_load_it(folder: Path) -> None:
    """In a process of its own: neither trust_remote_code nor a question on stdin."""
    program = (
        "import verl_vla.policies.openvla_oft\n"
        "from transformers import AutoModel\n"
        f"print(type(AutoModel.from_pretrained({str(folder)!r})).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "OpenVLAOFTModel"


def test_a_checkpoint_without_statistics_gives_a_model_but_no_policy(folder: Path) -> None:
    (folder / "dataset_statistics.json").unlink()
    OpenVLAOFTModel.from_pretrained(folder)
    with pytest.raises(ConfigError, match=r"holds no dataset_statistics.json"):
        OpenVLAOFTPolicy.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"holds no {name}"):
        OpenVLAOFTPolicy.from_pretrained(folder)


def test_a_name_on_a_hub_is_not_looked_up() -> None:
    with pytest.raises(ConfigError, match="not a folder; checkpoints are read from disk only"):
        read_config("openvla/openvla-7b")


def test_a_tokenizer_without_padding_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", pad_token=None)
    with pytest.raises(ConfigError, match="no padding token"):
        read_tokenizer(folder)


def test_image_statistics_come_from_the_file_then_from_the_constants(tmp_path: Path) -> None:
    assert read_image_statistics(tmp_path, 2) == OPENVLA_IMAGE_STATISTICS
    write_image_statistics(tmp_path, [SIGLIP_STATISTICS, DINO_STATISTICS], 224, None)
    assert read_image_statistics(tmp_path, 2) == (SIGLIP_STATISTICS, DINO_STATISTICS)


def test_image_statistics_of_another_number_of_towers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="statistics of 2 towers, the model has 1"):
        read_image_statistics(tmp_path, 1)
    write_image_statistics(tmp_path, [SIGLIP_STATISTICS], 224, None)
    with pytest.raises(ConfigError, match="statistics of 1 towers, the model has 2"):
        read_image_statistics(tmp_path, 2)


def test_prompts_are_padded_on_the_right(policy: OpenVLAOFTPolicy) -> None:
    processor = policy.processor
    long, short = (processor.prompt(instruction) for instruction in INSTRUCTIONS)
    ids, mask = processor.collate([short, long])
    pad = processor.tokenizer.pad_token_id
    assert ids.dtype == mask.dtype == torch.int64
    assert torch.equal(ids[1], long) and mask[1].all()
    assert torch.equal(ids[0, : len(short)], short)
    assert ids[0, len(short) :].tolist() == [pad] * (len(long) - len(short))
    assert mask.sum(1).tolist() == [len(short), len(long)]


def test_a_prompt_is_tokenised_once(policy: OpenVLAOFTPolicy) -> None:
    assert policy.processor.prompt("lift the cube") is policy.processor.prompt("lift the cube")


def test_views_follow_each_other_with_all_their_channels() -> None:
    sizes = TinySizes(image_size=28, num_views=2, fused=True, llm_depth=1)
    processor = build_tiny_policy(INSTRUCTIONS, STATISTICS, sizes=sizes).processor
    images = np.zeros((1, 2, 28, 28, 3), np.uint8)
    images[0, 1, ..., 2] = 255
    pixels = processor.pixel_values(images)
    assert pixels.shape == (1, 12, 28, 28)
    first, second = pixels[0, :6, 0, 0], pixels[0, 6:, 0, 0]
    assert torch.equal(first[[0, 1, 3, 4]], second[[0, 1, 3, 4]])
    assert second[5].item() == 1.0 and first[5].item() == -1.0
    assert second[2].item() == pytest.approx((1 - 0.40625) / 0.224609375)
    assert torch.equal(processor.pixel_values(torch.from_numpy(images)), pixels)


@pytest.mark.parametrize("shape", [(1, 1, 56, 56, 3), (1, 2, 28, 28, 3), (1, 28, 28, 3)])
def test_images_of_another_size_are_refused(
    policy: OpenVLAOFTPolicy, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ContractError, match="images must be"):
        policy.processor.pixel_values(np.zeros(shape, np.uint8))


def test_parts_of_different_checkpoints_are_refused(policy: OpenVLAOFTPolicy) -> None:
    other = build_tiny_policy(INSTRUCTIONS, STATISTICS, sizes=TinySizes(image_size=56))
    with pytest.raises(ConfigError, match="take both from one checkpoint"):
        OpenVLAOFTPolicy(policy.model, other.processor)
    with pytest.raises(ConfigError, match="of 1 towers and 2 vision towers"):
        OpenVLAOFTProcessor(
            policy.model.config, policy.processor.tokenizer, [SIGLIP_STATISTICS], STATISTICS
        )
