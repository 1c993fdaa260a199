"""Damaged folders given to ``convert``, and damaged runs that a page shows; see `damage`."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import changed_bytes, documents, inputs
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from openvla_oft_folder import save_tiny_policy
from report_world import evaluate_run, make_run, make_tuning_run
from safetensors.torch import load_file, save_file

from verl_vla.core.errors import ConfigError
from verl_vla.policies.convert import carry_out, plan_conversion
from verl_vla.policies.registry import examine, load_policy
from verl_vla.runs.html import dashboard, figures
from verl_vla.runs.html.dashboard import make_app
from verl_vla.runs.html.report import write_report

CONFIG, STATISTICS, WEIGHTS = "config.json", "dataset_statistics.json", "model.safetensors"
METRICS, RECIPE = "metrics.jsonl", "recipe.yaml"
PICKLED, ADAPTERS = "pytorch_model.bin", "adapter_config.json"


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("valid") / "policy")


def to_convert(name: str, valid: Path, folder: Path) -> Path:
    """Make a folder that `convert` makes readable; return its file of that name."""
    weights = load_file(valid / WEIGHTS)
    if name == ADAPTERS:
        target = next(weight for weight in weights if weight.endswith("q_proj.weight"))
        layer, (out, width) = target.removesuffix(".weight"), weights[target].shape
        folder.mkdir()
        factors = {
            f"base_model.model.{layer}.lora_A.weight": torch.ones(2, width),
            f"base_model.model.{layer}.lora_B.weight": torch.ones(out, 2),
        }
        save_file(factors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False}
        config |= {"base_model_name_or_path": str(valid), "init_lora_weights": True}
        (folder / ADAPTERS).write_text(json.dumps(config))
        return folder / name
    shutil.copytree(valid, folder, ignore=shutil.ignore_patterns(WEIGHTS, STATISTICS))
    torch.save({f"module.{key}": weight for key, weight in weights.items()}, folder / PICKLED)
    config = json.loads((folder / CONFIG).read_text())
    config["norm_stats"] = json.loads((valid / STATISTICS).read_text())
    (folder / CONFIG).write_text(json.dumps(config))
    return folder / name


def convert_or_refuse(folder: Path) -> None:
    """Neither a traceback nor a part of a folder; what is written can be read, or is a fault."""
    target = folder.parent / "converted"
    try:
        carry_out(plan_conversion(folder), target)
    except ConfigError:
        assert not target.exists()
    else:
        if not any(finding.is_fault for finding in examine(target)):
            load_policy(target)
        shutil.rmtree(target)
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", [ADAPTERS, CONFIG])
@given(data=st.data())
@inputs(100)
def test_documents_of_a_folder_to_convert(
    valid: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    file = to_convert(name, valid, tmp_path_factory.mktemp("convert") / "source")
    file.write_text(json.dumps(data.draw(documents(json.loads(file.read_text())))))
    convert_or_refuse(file.parent)


@given(data=st.data())
@inputs(150)
def test_pickled_weights(
    valid: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = to_convert(PICKLED, valid, tmp_path_factory.mktemp("convert") / "source")
    whole = file.read_bytes()
    # names and shapes come first, then numbers, then the table of the archive
    first, last = whole[:20_000], whole[-3000:]
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(changed_bytes(first)) + whole[len(first) :])
    else:
        file.write_bytes(whole[: -len(last)] + data.draw(changed_bytes(last)))
    convert_or_refuse(file.parent)


def drawn_only(draw: Callable[[Axes], None], *_: Any) -> str:
    """Draw a figure and make no picture of it, which takes a second."""
    draw(Figure().subplots())
    return ""


@given(data=st.data(), is_tuning=st.booleans())
@inputs(60)
def test_numbers_of_metrics(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, is_tuning: bool
) -> None:
    run = (make_tuning_run if is_tuning else make_run)(tmp_path_factory.mktemp("runs") / "one")
    if is_tuning:
        evaluate_run(run, 4, solved=1)
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    line = data.draw(st.sampled_from(lines))
    name = data.draw(st.sampled_from(sorted(line)))
    value = data.draw(st.one_of(st.none(), st.integers(-(2**63), 2**63), st.floats(), st.just("")))
    if value == "":
        del line[name]
    else:
        line[name] = value
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # of numbers that are as large as floats can be
        warnings.simplefilter("ignore", RuntimeWarning)
        patch.setattr(figures, "_svg", drawn_only)
        try:
            write_report(run)
        except ConfigError as error:
            assert METRICS in str(error)


@pytest.mark.parametrize("name", [METRICS, RECIPE])
@given(data=st.data(), is_tuning=st.booleans())
@inputs(60)
def test_pages_of_damaged_runs(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject, is_tuning: bool
) -> None:
    root = tmp_path_factory.mktemp("runs")
    file = (make_tuning_run if is_tuning else make_run)(root / "one") / name
    make_run(root / "other", steps=0)
    file.write_bytes(data.draw(changed_bytes(file.read_bytes())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dashboard, "charts", lambda _: [])
        client = TestClient(make_app(root), base_url="http://127.0.0.1")
        overview = client.get("/")
        answer = client.get("/run", params={"name": "one"})
    # the run beside it is shown all the same
    assert overview.status_code == 200
    assert "0 of 5" in overview.text
    assert answer.status_code in (200, 404, 422)
