"""Weights on disk, written one after the other: what transformers and `read_weight_layout` read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from verl_vla.policies import weight_files as module
from verl_vla.policies.openvla_oft import OpenVLAOFTModel, tiny
from verl_vla.policies.weight_files import WeightWriter, read_weight_layout, weight_files

WEIGHTS = {f"layer.{i}": torch.full((10, 10), float(i)) for i in range(5)}
BYTES = 400


def write(folder: Path, weights: dict[str, Tensor], left_out: tuple[str, ...] = ()) -> None:
    writer = WeightWriter(folder, left_out)
    for name, weight in weights.items():
        writer.add(name, weight)
    writer.close()


def read(folder: Path) -> dict[str, Tensor]:
    return {name: w for file in weight_files(folder) for name, w in load_file(file).items()}


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    write(tmp_path, WEIGHTS, left_out=("layer.3",))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    found = read(tmp_path)
    assert set(found) == set(WEIGHTS) - {"layer.3"}
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in found)


def test_weights_can_be_read_by_whom_the_other_files_can_be_read(tmp_path: Path) -> None:
    """Safetensors writes files for the owner alone; colleagues share a disk."""
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path, WEIGHTS)
    modes = {file.name: file.stat().st_mode for file in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_a_large_model_is_several_files_and_an_index(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "WEIGHTS_FILE_BYTES", 2 * BYTES)
    write(tmp_path, WEIGHTS)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = "model.safetensors.index.json"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*files, index])
    content = json.loads((tmp_path / index).read_text())
    assert content["metadata"]["total_size"] == 5 * BYTES
    assert content["weight_map"]["layer.4"] == files[2]
    found = read(tmp_path)
    assert all(torch.equal(found[name], weight) for name, weight in WEIGHTS.items())
    with safe_open(tmp_path / files[0], framework="pt") as stored:
        assert stored.metadata() == {"format": "pt"}
    assert read_weight_layout(tmp_path)["layer.0"] == ((10, 10), "F32")


def test_no_file_of_an_earlier_save_is_left(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "WEIGHTS_FILE_BYTES", BYTES)
    write(tmp_path, WEIGHTS)
    monkeypatch.undo()
    write(tmp_path, WEIGHTS)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_waits_is_no_more_than_one_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "WEIGHTS_FILE_BYTES", 2 * BYTES)
    sizes: list[int] = []
    save_file = module.save_file

    def save(tensors: dict[str, Tensor], *args: object, **kwargs: object) -> None:
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr(module, "save_file", save)
    write(tmp_path, WEIGHTS)
    assert sizes == [2 * BYTES, 2 * BYTES, BYTES]


@pytest.mark.parametrize("limit", [1_000, 10**9])
def test_a_model_is_loaded_from_one_file_and_from_many(tmp_path: Path, monkeypatch, limit) -> None:
    monkeypatch.setattr(module, "WEIGHTS_FILE_BYTES", limit)
    sizes = tiny.TinySizes(image_size=28, vision_width=24, llm_width=32, llm_depth=2, llm_mlp=64)
    config = tiny.tiny_config(tiny.build_tokenizer(["lift the cube"]), sizes)
    torch.manual_seed(0)
    model = OpenVLAOFTModel(config)
    config.save_pretrained(tmp_path)
    write(tmp_path, dict(model.state_dict()))
    assert (len(weight_files(tmp_path)) > 1) == (limit == 1_000)
    again = OpenVLAOFTModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())
