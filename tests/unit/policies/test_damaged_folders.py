"""A damaged policy folder: every fault is told by file and reason, none by a traceback.

Each case is one edit of a valid tiny folder. ``doctor`` must have a row for it, and whatever loads
the folder must refuse it with `ConfigError`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from openvla_oft_folder import KEY, save_tiny_policy
from safetensors.torch import load_file, save_file

from verl_vla.cli.arguments import parse
from verl_vla.cli.doctor import EXIT_FAULT, run
from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import Entries, read_json
from verl_vla.policies.normalization import load_statistics
from verl_vla.policies.openvla_oft.checks import judge_action_mass
from verl_vla.policies.registry import examine, load_policy

CONFIG, IMAGES, TOKENIZER = "config.json", "preprocessor_config.json", "tokenizer.json"
STATISTICS, WEIGHTS, INDEX = (
    "dataset_statistics.json",
    "model.safetensors",
    "model.safetensors.index.json",
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("valid") / "policy")


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(valid, tmp_path / "policy"))


def faults(folder: Path) -> str:
    """What doctor finds, one line each; it and its exit code must agree."""
    found = [finding.says for finding in examine(folder) if finding.is_fault]
    code = run(parse("doctor", ["--policy", str(folder)]))
    assert code == (EXIT_FAULT if found else 0)
    return "\n".join(found)


def refused(folder: Path, *parts: str) -> None:
    """Both doctor and the loader name these parts of the fault."""
    said = faults(folder)
    for part in parts:
        assert part in said
    with pytest.raises(ConfigError):
        load_policy(folder)


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    changed = change(content)
    file.write_text(json.dumps(content if changed is None else changed))


NO_JSON = {
    "cut off": b"{",
    "empty": b"",
    "a byte-order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "bytes": bytes(range(256)),
    "null": b"null",
    "a list": b"[]",
    "a number": b"3",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
@pytest.mark.parametrize("name", [CONFIG, IMAGES, TOKENIZER, STATISTICS])
def test_a_file_that_is_no_json_object_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    refused(folder, name)


@pytest.mark.parametrize("name", [CONFIG, IMAGES, TOKENIZER, STATISTICS, WEIGHTS])
def test_what_is_no_file_is_named_and_never_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, name)


@pytest.mark.parametrize("name", [CONFIG, IMAGES, TOKENIZER, STATISTICS, WEIGHTS])
def test_a_link_to_nothing_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "blobs" / "gone")
    refused(folder, name)


def test_a_folder_of_links_as_in_a_hubs_cache_is_valid(folder: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    assert faults(folder) == ""
    load_policy(folder)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "without a type": (lambda c: c.pop("model_type"), "model_type is missing"),
    "a type that is a number": (lambda c: c.update(model_type=3), "model_type is 3"),
    "a flag that is a number": (lambda c: c["text_config"].update(mlp_bias=0), "mlp_bias"),
    "sizes that are words": (lambda c: c.update(image_sizes=["a"]), CONFIG),
    "sizes of another kind": (lambda c: c.update(image_sizes={"a": 1}), CONFIG),
    "a language model that is a list": (lambda c: c.update(text_config=[]), CONFIG),
    "a negative width": (lambda c: c["text_config"].update(hidden_size=-16), CONFIG),
    "no heads": (lambda c: c["text_config"].update(num_attention_heads=0), CONFIG),
    "endless layers": (lambda c: c["text_config"].update(num_hidden_layers=10**9), "10"),
    "endless blocks of a tower": (lambda c: c["vision_towers"][0].update(depth=10**9), "depth"),
    "a vocabulary of null": (lambda c: c["text_config"].update(vocab_size=None), CONFIG),
    "towers that are no mappings": (lambda c: c.update(vision_towers=[1]), CONFIG),
    "an unknown activation": (lambda c: c["text_config"].update(hidden_act="none"), CONFIG),
}


@pytest.mark.parametrize(("change", "part"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_of_no_model_is_named(
    folder: Path, change: Callable[[Any], Any], part: str
) -> None:
    edit(folder / CONFIG, lambda c: change(c) and None)
    refused(folder, part)


PIXELS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no statistics": (lambda c: c.pop("tvf_normalize_params"), "tvf_normalize_params is missing"),
    "std of 0": (lambda t: t["tvf_normalize_params"][0]["std"].__setitem__(1, 0.0), "std[1] is 0"),
    "std of null": (lambda t: t["tvf_normalize_params"][0].update(std=None), "std is None"),
    "four channels": (
        lambda t: t["tvf_normalize_params"][0].update(mean=[0.5] * 4),
        "tvf_normalize_params[0].mean",
    ),
    "no towers": (lambda c: c.update(tvf_normalize_params=[]), "statistics of 0 towers"),
    "a render size of words": (lambda c: c.update(render_size="big"), "render_size is 'big'"),
}


@pytest.mark.parametrize(("change", "part"), PIXELS.values(), ids=PIXELS)
def test_image_statistics_that_cannot_be_used_are_named(
    folder: Path, change: Callable[[Any], Any], part: str
) -> None:
    edit(folder / IMAGES, lambda c: change(c) and None)
    refused(folder, part)


def action(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[KEY]["action"].update(changed)


RANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no action": (lambda c: c[KEY].pop("action"), "mini.action is missing"),
    "no mask": (lambda c: c[KEY]["action"].pop("mask"), "lacks ['mask']"),
    "a mask of words": (action(mask=["true"] * 6 + ["false"]), "mini.action.mask[0]"),
    "a mask of numbers": (action(mask=[1] * 6 + [0]), "mini.action.mask[0] is 1"),
    "an empty mask": (action(mask=[]), "mask (0,)"),
    "nothing normalised": (action(mask=[False] * 7), "no value is normalised"),
    "the gripper normalised": (action(mask=[True] * 7), "never closes"),
    "words": (action(q01=["a"] * 7), "mini.action.q01[0]"),
    "a null": (action(q99=[None] * 7), "mini.action.q99[0] is None"),
    "eight values": (action(q01=[-1.0] * 8, q99=[1.0] * 8, mask=[True] * 7 + [False]), "8 values"),
    "a reversed range": (action(q01=[2.0] * 7), "must not be reversed"),
    "no data set": (lambda c: c.pop(KEY), "0 datasets"),
}


@pytest.mark.parametrize(("change", "part"), RANGES.values(), ids=RANGES)
def test_action_statistics_that_cannot_be_used_are_named(
    folder: Path, change: Callable[[Any], Any], part: str
) -> None:
    edit(folder / STATISTICS, lambda c: change(c) and None)
    said = faults(folder)
    assert part in said


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_a_range_that_is_no_number_is_named(folder: Path, text: str) -> None:
    file = folder / STATISTICS
    edit(file, action(q01=["HERE"] + [-1.0] * 6))
    file.write_text(file.read_text().replace('"HERE"', text))
    refused(folder, STATISTICS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_a_fault(folder: Path, value: float) -> None:
    weights = load_file(folder / WEIGHTS)
    name = sorted(weights)[3]
    weights[name].view(-1)[0] = value
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    said = faults(folder)
    assert name in said and "not finite" in said
    # a plan reads the headers alone
    assert not any(finding.is_fault for finding in examine(folder, reads_values=False))


def test_a_probability_that_is_no_number_is_no_good_one() -> None:
    assert judge_action_mass(torch.full((2, 56), float("nan"))).is_fault


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_weights_of_another_kind_of_number_are_named(folder: Path, dtype: torch.dtype) -> None:
    weights = load_file(folder / WEIGHTS)
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name].to(dtype)}, folder / WEIGHTS, {"format": "pt"})
    assert f"weight {name} is stored as" in faults(folder)


@pytest.mark.parametrize("prefix", ["module.", "base_model.model."])
def test_names_with_a_wrappers_prefix_are_explained(folder: Path, prefix: str) -> None:
    weights = {prefix + name: value for name, value in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    assert f"begin with '{prefix}'" in faults(folder)


def test_a_pointer_of_git_lfs_is_called_one(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(folder, "pointer of Git LFS", "git lfs pull")


def test_pickled_weights_are_named_with_what_to_do(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "safetensors alone", "save_pretrained")


def test_adapters_alone_are_called_so(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds adapters alone", "merge_and_unload")


def test_a_config_of_adapters_beside_whole_weights_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter_config.json beside whole weights")


def split(folder: Path) -> dict[str, str]:
    """Split the weights into two files; return the index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    write_index(folder, index)
    return index


def write_index(folder: Path, index: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_an_index_that_names_another_file_for_a_weight_is_refused(folder: Path) -> None:
    index = split(folder)
    name = sorted(index)[0]
    write_index(folder, index | {name: sorted(set(index.values()) - {index[name]})[0]})
    refused(folder, INDEX, "do not agree on 1 weights", name)


def test_an_index_that_names_a_weight_that_is_nowhere_is_refused(folder: Path) -> None:
    index = split(folder)
    write_index(folder, index | {"new.weight": sorted(index.values())[0]})
    refused(folder, INDEX, "new.weight")


def test_a_weight_in_two_files_is_refused(folder: Path) -> None:
    index = split(folder)
    one, other = sorted(set(index.values()))
    name = next(name for name, file in sorted(index.items()) if file == one)
    weights = load_file(folder / one)
    save_file(load_file(folder / other) | {name: weights[name]}, folder / other, {"format": "pt"})
    refused(folder, f"weight {name} is in", "two saves")


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_refused(folder: Path, content: str) -> None:
    split(folder)
    (folder / INDEX).write_text(content)
    refused(folder, INDEX)


def test_weights_of_two_saves_are_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    split(folder)
    (folder / WEIGHTS).write_bytes(whole)
    refused(folder, "one is of another save")


def test_statistics_in_the_config_are_read_as_openvla_ships_them(folder: Path) -> None:
    datasets = json.loads((folder / STATISTICS).read_text())
    (folder / STATISTICS).unlink()
    edit(folder / CONFIG, lambda c: c.update(norm_stats=datasets | {"bridge": datasets[KEY]}))
    statistics = load_statistics(folder, KEY)
    assert (statistics.key, statistics.q01.tolist()) == (KEY, [-1.0] * 7)
    with pytest.raises(ConfigError, match=r"set unnorm_key to one of \['bridge', 'mini'\]"):
        load_statistics(folder)


@pytest.mark.parametrize("stored", ["libero_spatial", "libero_spatial_no_noops"])
@pytest.mark.parametrize("wanted", ["libero_spatial", "libero_spatial_no_noops"])
def test_a_data_set_is_found_with_and_without_its_suffix(
    folder: Path, stored: str, wanted: str
) -> None:
    edit(folder / STATISTICS, lambda c: {stored: c[KEY]})
    assert load_statistics(folder, wanted).key == stored


@pytest.mark.parametrize("verb", ["eval", "train", "plan"])
def test_every_verb_makes_doctors_checks(
    folder: Path, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "adapter_config.json").write_text("{}")
    out = tmp_path / "out"
    words = {
        "eval": ["--policy", str(folder), "--suite", "mini", "--out", str(out)],
        "train": ["recipe=quickstart", f"policy.path='{folder}'", f"out='{out}'"],
        "plan": ["recipe=quickstart", f"policy.path='{folder}'"],
    }
    assert main([verb, *words[verb]]) == EXIT_USAGE
    assert "adapter_config.json beside whole weights" in capsys.readouterr().err
    assert not out.exists()


class Sizes(Entries):
    width: int
    names: list[str] = []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"width": "2"}', "width is '2', but it should be a valid integer; mend it"),
        ('{"width": 1, "names": ["a", 2]}', "names[1] is 2, but it should be a valid string"),
        ("{}", "width is missing; mend it"),
        ("7", "it is 7, but it should be an object"),
        ('{"width": 1', "it is no JSON in UTF-8 (EOF while parsing an object at line 1 column 11)"),
        ('{"width": "' + "x" * 200 + '"}', f"width is '{'x' * 59}..., but"),
    ],
)
def test_a_refusal_names_file_entry_value_reason_and_remedy(
    tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "sizes.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_json(file, Sizes, "mend it")
    assert str(error.value).startswith(f"{file}: {said}")


def test_entries_of_other_programs_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "sizes.json"
    file.write_text('{"width": 3, "other": 1}')
    assert read_json(file, Sizes, "mend it") == Sizes(width=3)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "sizes.json"
    with file.open("wb") as opened:
        opened.truncate(1 << 30)
    with pytest.raises(ConfigError, match="1,073,741,824 bytes"):
        read_json(file, Sizes, "mend it")


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sizes.json"
    file.write_text("{}")

    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    # whoever runs as root may read everything
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\); mend it"):
        read_json(file, Sizes, "mend it")
