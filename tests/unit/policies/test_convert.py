"""`convert`: each folder that cannot be read becomes one that can, with the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from openvla_oft_folder import save_tiny_policy
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.core.errors import ConfigError
from verl_vla.policies import weight_files as files_module
from verl_vla.policies.adapter_files import AdapterConfig
from verl_vla.policies.normalization import load_statistics
from verl_vla.policies.registry import examine, load_model, load_policy
from verl_vla.policies.weight_files import weight_files

WEIGHTS, PICKLED, ADAPTERS = "model.safetensors", "pytorch_model.bin", "adapter_config.json"
RANK, ALPHA = 2, 8


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("valid") / "policy")


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(valid, tmp_path / "policy"))


@pytest.fixture
def weights(valid: Path) -> dict[str, Tensor]:
    return load_file(valid / WEIGHTS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def converted(source: Path, *words: str) -> Path:
    """Convert a folder, which stays as it is."""
    before, target = contents(source), source.parent / "converted"
    assert main(["convert", str(source), str(target), *words]) == 0
    assert contents(source) == before
    assert [f for f in source.parent.iterdir() if f.name.startswith(".")] == []
    return target


def refused(capsys: pytest.CaptureFixture[str], source: Path, *words: str) -> str:
    before, target = contents(source), source.parent / "converted"
    assert main(["convert", str(source), str(target), *words]) == EXIT_USAGE
    assert contents(source) == before
    assert not target.exists()
    return capsys.readouterr().err


def require_equal(folder: Path, wanted: Mapping[str, Tensor]) -> None:
    found = {name: w for file in weight_files(folder) for name, w in load_file(file).items()}
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        assert torch.equal(weight, wanted[name]), name
    assert not [finding.says for finding in examine(folder) if finding.is_fault]
    load_policy(folder)


def pickle_weights(folder: Path, content: Any) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / PICKLED)


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}])
def test_pickled_weights(folder: Path, weights: dict[str, Tensor], wrap: Any) -> None:
    pickle_weights(folder, wrap(weights))
    require_equal(converted(folder), weights)


def test_pickled_weights_of_before_archives(folder: Path, weights: dict[str, Tensor]) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / PICKLED, _use_new_zipfile_serialization=False)
    require_equal(converted(folder), weights)


def test_pickled_weights_that_share_memory_and_have_gaps(
    folder: Path, weights: dict[str, Tensor]
) -> None:
    name = next(n for n, w in weights.items() if w.dim() == 2)
    pickle_weights(folder, weights | {name: weights[name].T.contiguous().T})
    require_equal(converted(folder), weights)


@pytest.mark.parametrize("written", [1 << 30, 5000])
def test_pickled_weights_in_parts(
    folder: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    monkeypatch.setattr(files_module, "WEIGHTS_FILE_BYTES", written)
    (folder / WEIGHTS).unlink()
    names, index = sorted(weights), {}
    for number in range(3):
        file = f"pytorch_model-{number + 1:05d}-of-00003.bin"
        torch.save({name: weights[name] for name in names[number::3]}, folder / file)
        index |= dict.fromkeys(names[number::3], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    require_equal(converted(folder), weights)


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "module._orig_mod."])
def test_names_with_a_wrappers_prefix(
    folder: Path, weights: dict[str, Tensor], prefix: str
) -> None:
    named = {prefix + name: value for name, value in weights.items()}
    save_file(named, folder / WEIGHTS, {"format": "pt"})
    require_equal(converted(folder), weights)


def test_statistics_in_the_config(folder: Path, weights: dict[str, Tensor]) -> None:
    statistics = folder / "dataset_statistics.json"
    content = json.loads(statistics.read_text())
    content["mini"] |= {"num_transitions": 7}
    statistics.unlink()
    config = json.loads((folder / "config.json").read_text()) | {"norm_stats": content}
    (folder / "config.json").write_text(json.dumps(config))
    target = converted(folder)
    require_equal(target, weights)
    assert json.loads((target / statistics.name).read_text()) == content
    assert load_statistics(target).key == "mini"


def adapters_of(base: Path, folder: Path, *, is_safe: bool = True, **choices: Any) -> Any:
    """Save adapters of a policy's language model with PEFT; return the merged model."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], **choices)
    torch.manual_seed(0)
    model = get_peft_model(load_model(base), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(str(folder))
    config_file = folder / ADAPTERS
    content = json.loads(config_file.read_text()) | {"base_model_name_or_path": str(base)}
    config_file.write_text(json.dumps(content))
    if not is_safe:
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    return model.merge_and_unload()


@pytest.mark.parametrize(
    ("is_safe", "choices"),
    [(True, {}), (False, {}), (True, {"use_rslora": True}), (True, {"modules_to_save": ["norm"]})],
)
def test_adapters_are_merged_as_peft_merges_them(
    valid: Path, tmp_path: Path, is_safe: bool, choices: dict[str, Any]
) -> None:
    merged = adapters_of(valid, tmp_path / "adapters", is_safe=is_safe, **choices)
    target = converted(tmp_path / "adapters")
    found = load_file(target / WEIGHTS)
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-6)
    changed = [n for n, w in load_file(valid / WEIGHTS).items() if not torch.equal(w, found[n])]
    assert len(changed) == 2
    load_policy(target)


def test_adapters_beside_the_statistics_of_their_fine_tuning(
    folder: Path, tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    """The folder that openvla-oft's ``finetune.py`` leaves, on a base in pickled parts."""
    run = tmp_path / "run"
    adapters_of(folder, run / "lora_adapter")
    content = json.loads((folder / "dataset_statistics.json").read_text())
    (run / "dataset_statistics.json").write_text(json.dumps({"libero_spatial": content["mini"]}))
    pickle_weights(folder, {f"module.{name}": weight for name, weight in weights.items()})
    target = converted(run, "--base", str(folder))
    assert load_statistics(target).key == "libero_spatial"
    assert load_file(target / WEIGHTS).keys() == weights.keys()


def test_a_forgotten_config_of_adapters_is_left_out(
    folder: Path, weights: dict[str, Tensor]
) -> None:
    (folder / ADAPTERS).write_text("{}")
    require_equal(converted(folder), weights)


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    folder: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    pickle_weights(folder, {f"module.{name}": weight for name, weight in weights.items()})
    before = contents(folder.parent)
    assert main(["convert", str(folder), str(folder.parent / "new"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in (
        f"write the {len(weights)} weights of {PICKLED} as safetensors",
        "take 'module.' off the names",
        "copy config.json",
        "nothing was written",
    ):
        assert part in said
    assert contents(folder.parent) == before


def test_a_result_that_cannot_be_trained_is_told(
    folder: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "dataset_statistics.json").unlink()
    pickle_weights(folder, weights)
    assert main(["convert", str(folder), str(folder.parent / "new")]) == 1
    assert "FAULT" in capsys.readouterr().out


class Code:
    """What a pickled file must not be able to run."""

    def __reduce__(self) -> Any:
        return (print, ("ran",))


REFUSED: dict[str, tuple[Any, str]] = {
    "code": ({"a": Code()}, "which is not run"),
    "a number": ({"a": torch.ones(2), "b": 3}, "int as 'b', which is no weight"),
    "a number as a name": ({3: torch.ones(2)}, "Tensor as 3, which is no weight"),
    "a list": ([torch.ones(2)], "holds list, and no weights by their names"),
}


@pytest.mark.parametrize(("content", "said"), REFUSED.values(), ids=REFUSED)
def test_a_pickled_file_of_something_else_is_refused(
    folder: Path, content: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pickle_weights(folder, content)
    assert said in refused(capsys, folder)
    assert "ran\n" not in capsys.readouterr().out


@pytest.mark.parametrize("bytes_", [b"", b"PK\x03\x04", b"\x80\x02}q\x00", bytes(range(256)) * 9])
def test_a_damaged_pickled_file_is_named(
    folder: Path, bytes_: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / WEIGHTS).unlink()
    (folder / PICKLED).write_bytes(bytes_)
    assert f"{folder / PICKLED} ({len(bytes_)} bytes) is damaged" in refused(capsys, folder)


def test_a_pickled_file_that_is_cut_off_is_named(
    folder: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    pickle_weights(folder, weights)
    whole = (folder / PICKLED).read_bytes()
    (folder / PICKLED).write_bytes(whole[: len(whole) // 2])
    assert f"{folder / PICKLED} ({len(whole) // 2} bytes) is damaged" in refused(capsys, folder)


def test_a_folder_that_needs_nothing_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "needs no conversion" in refused(capsys, folder)
    assert "holds no adapters; leave --base out" in refused(capsys, folder, "--base", "x")


def test_a_target_that_exists_and_a_source_that_does_not_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.parent / "there").mkdir()
    assert main(["convert", str(folder), str(folder.parent / "there")]) == EXIT_USAGE
    assert "is there already" in capsys.readouterr().err
    assert main(["convert", str(folder.parent / "gone"), "x"]) == EXIT_USAGE
    assert "gone is no folder" in capsys.readouterr().err
    assert main(["convert", str(folder.parent / "there"), "x"]) == EXIT_USAGE
    assert "holds none of model.safetensors" in capsys.readouterr().err


ADAPTER_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora is True"),
    "ranks by layer": ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is {'q_proj': 4}"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "which changes the base too"),
    "another kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "no rank": ({"r": 0}, "r is 0"),
    "another rank": ({"r": 3}, "of rank 3"),
    "a base elsewhere": ({"base_model_name_or_path": "openvla/openvla-7b"}, "with --base"),
}


@pytest.mark.parametrize(("changed", "said"), ADAPTER_FAULTS.values(), ids=ADAPTER_FAULTS)
def test_adapters_that_would_be_merged_wrongly_are_refused(
    valid: Path,
    tmp_path: Path,
    changed: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapters = tmp_path / "adapters"
    adapters_of(valid, adapters)
    config = json.loads((adapters / ADAPTERS).read_text()) | changed
    (adapters / ADAPTERS).write_text(json.dumps(config))
    message = refused(capsys, adapters)
    assert said in message
    assert str(adapters) in message or "another rank" not in said


def test_adapters_of_another_base_and_without_one_are_refused(
    valid: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = tmp_path / "adapters"
    adapters_of(valid, adapters)
    named = load_file(adapters / "adapter_model.safetensors")
    file = adapters / "adapter_model.safetensors"
    save_file({name.replace("layers.0", "layers.9"): w for name, w in named.items()}, file)
    assert "layers.9" in refused(capsys, adapters)
    save_file({name.removeprefix("base_model.model."): w for name, w in named.items()}, file)
    assert "does not begin with base_model.model." in refused(capsys, adapters)
    for name in (ADAPTERS, file.name):
        shutil.copy(adapters / name, folder)
    assert "holds whole weights and adapters" in refused(capsys, folder)


def test_the_scale_of_adapters_is_pefts() -> None:
    plain = AdapterConfig(peft_type="LORA", r=16, lora_alpha=8)
    assert plain.scale == 0.5
    assert plain.model_copy(update={"use_rslora": True}).scale == 2.0


@pytest.mark.parametrize("kind", ["pickled", "adapters", "prefix", "beside"])
def test_every_refusal_that_it_mends_names_it(
    folder: Path, weights: dict[str, Tensor], kind: str
) -> None:
    if kind == "pickled":
        pickle_weights(folder, weights)
    elif kind == "prefix":
        save_file({f"module.{n}": w for n, w in weights.items()}, folder / WEIGHTS)
    else:
        (folder / ADAPTERS).write_text("{}")
    if kind == "adapters":
        (folder / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=f"verl-vla convert {folder} NEW_FOLDER"):
        load_policy(folder)
