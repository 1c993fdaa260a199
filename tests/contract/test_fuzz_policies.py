"""Damaged policy folders: read as valid by doctor and loader alike, or refused by both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import changed_bytes, documents, inputs, replaced
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from verl_vla.core.errors import ConfigError
from verl_vla.policies.convert import carry_out, plan_conversion
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tiny_policy
from verl_vla.policies.registry import examine, load_policy

CONFIG, STATISTICS, WEIGHTS = "config.json", "dataset_statistics.json", "model.safetensors"
IMAGES, TOKENIZER = "preprocessor_config.json", "tokenizer.json"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "policy"
    statistics = ActionStatistics(
        q01=-np.ones(7), q99=np.ones(7), mask=np.array([True] * 6 + [False]), key="mini"
    )
    sizes = TinySizes(image_size=28, vision_width=12, llm_width=16, llm_depth=1, llm_mlp=16)
    build_tiny_policy(["lift it"], statistics, sizes=sizes).save_pretrained(folder)
    return folder


def load_what_doctor_passes(folder: Path) -> None:
    """Load a policy folder; what doctor finds and what the loader refuses must agree."""
    found = [finding.says for finding in examine(folder) if finding.is_fault]
    if found:
        with pytest.raises(ConfigError) as error:
            load_policy(folder)
        raise error.value
    loaded = load_policy(folder)
    assert all(bool(torch.isfinite(p).all()) for p in loaded.model.parameters())
    scale = loaded.processor.codec.statistics
    assert np.isfinite(scale.q01).all() and np.isfinite(scale.q99).all()


@pytest.mark.parametrize("name", [CONFIG, IMAGES, STATISTICS, TOKENIZER])
@given(data=st.data())
@inputs(100)
def test_documents_of_a_policy(policy: Path, name: str, data: st.DataObject) -> None:
    content = json.loads((policy / name).read_text())
    text = json.dumps(data.draw(documents(content)))
    replaced(
        policy / name, text.encode(), lambda: load_what_doctor_passes(policy), named=str(policy)
    )


@given(data=st.data())
@inputs(100)
def test_weights_of_a_policy(policy: Path, data: st.DataObject) -> None:
    content = (policy / WEIGHTS).read_bytes()
    # most of the file is numbers; names and shapes come first
    header = 8 + int.from_bytes(content[:8], "little")
    changed = data.draw(changed_bytes(content[:header])) + content[header:]
    replaced(policy / WEIGHTS, changed, lambda: load_what_doctor_passes(policy), named=str(policy))
    assert load_file(policy / WEIGHTS)


def convertible(kind: str, policy: Path, folder: Path) -> Path:
    """A folder that `convert` makes readable; return the file that is to be damaged."""
    weights = load_file(policy / WEIGHTS)
    if kind == "adapters":
        name, weight = next((n, w) for n, w in weights.items() if n.endswith("q_proj.weight"))
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        folder.mkdir()
        factors = {
            f"{layer}.lora_A.weight": torch.ones(2, weight.shape[1]),
            f"{layer}.lora_B.weight": torch.ones(weight.shape[0], 2),
        }
        save_file(factors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False}
        config |= {"base_model_name_or_path": str(policy), "init_lora_weights": True}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder / "adapter_config.json"
    shutil.copytree(policy, folder, ignore=shutil.ignore_patterns(WEIGHTS, STATISTICS))
    torch.save({f"module.{name}": w for name, w in weights.items()}, folder / "pytorch_model.bin")
    if kind == "pickled":
        return folder / "pytorch_model.bin"
    config = json.loads((folder / CONFIG).read_text())
    config["norm_stats"] = json.loads((policy / STATISTICS).read_text())
    (folder / CONFIG).write_text(json.dumps(config))
    return folder / CONFIG


def convert_or_refuse(folder: Path) -> None:
    """Neither a traceback nor a half-written folder, and what is written can be read or named."""
    target = folder.parent / "converted"
    try:
        carry_out(plan_conversion(folder), target)
    except ConfigError:
        assert not target.exists()
    else:
        if not any(finding.is_fault for finding in examine(target)):
            load_policy(target)
        shutil.rmtree(target)
    assert not [file for file in folder.parent.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("kind", ["adapters", "statistics"])
@given(data=st.data())
@inputs(50)
def test_whatever_stands_in_a_folder_to_convert_is_converted_or_refused(
    policy: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    file = convertible(kind, policy, tmp_path_factory.mktemp("convert") / "source")
    file.write_text(json.dumps(data.draw(documents(json.loads(file.read_text())))))
    convert_or_refuse(file.parent)


@given(at=st.floats(0, 1), piece=st.binary(max_size=64), cut=st.sampled_from([0, 1, 4, 10**9]))
@inputs(60)
def test_whatever_stands_in_pickled_weights_is_converted_or_refused(
    policy: Path, tmp_path_factory: pytest.TempPathFactory, at: float, piece: bytes, cut: int
) -> None:
    file = convertible("pickled", policy, tmp_path_factory.mktemp("convert") / "source")
    whole = file.read_bytes()
    # cubed: the first bytes are the pickle, the others numbers
    first = int(at**3 * len(whole))
    file.write_bytes(whole[:first] + piece + whole[first + cut :])
    convert_or_refuse(file.parent)
