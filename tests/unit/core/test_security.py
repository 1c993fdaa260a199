"""Nothing from outside is executed, and nothing is written where it was not asked for."""

from __future__ import annotations

import ast
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.policies.scratch_vla.assembly import assemble
from verl_vla.rewards.encoders.transformer import Dinov2Encoder
from verl_vla.trainer.checkpoint import RUN_STATE, load_run_state
from verl_vla.trainer.engine.weights import SWITCH, refuse_code
from verl_vla.trainer.grpo.verl_overrides import check_overrides

SOURCES = sorted(
    path for folder in ("verl_vla", "rewards") for path in (PROJECT_FOLDER / folder).rglob("*.py")
)
OWN_PROCESSES = {
    "verl_vla/envs/pool/worker_process.py",
    "verl_vla/envs/pool/worker.py",
    "verl_vla/trainer/grpo/env_nodes.py",
}
"""They unpickle what a process that this one started has sent over a private socket, or an actor
of this run's own Ray cluster, which carries pickles itself."""


class Hostile:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def executes(call: ast.Call) -> bool:
    """Whether a call runs, or may run, code that is in its argument."""
    name = ast.unparse(call.func)
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name == "torch.load":
        return given.get("weights_only") != "True"
    if name in ("np.load", "numpy.load"):
        return given.get("allow_pickle") != "False"
    if "trust_remote_code" in given:
        return given["trust_remote_code"] != "False"
    if name.startswith(("AutoConfig.from_pretrained", "AutoModel")) and "from_pre" in name:
        return True
    return name in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("torch.load(f)", True),
        ("torch.load(f, weights_only=False)", True),
        ("torch.load(f, weights_only=True)", False),
        ("np.load(f)", True),
        ("np.load(f, allow_pickle=False)", False),
        ("pickle.loads(b)", True),
        ("model.eval()", False),
        ("eval(text)", True),
        ("AutoConfig.from_pretrained(f)", True),
        ("AutoConfig.from_pretrained(f, trust_remote_code=False)", False),
        ("HFModelConfig(trust_remote_code=True)", True),
    ],
)
def test_a_call_that_executes_what_it_reads_is_told_from_others(source, expected):
    assert executes(calls(ast.parse(source))[0]) == expected


def test_no_call_executes_what_it_reads():
    found = [
        f"{path.relative_to(PROJECT_FOLDER)}:{call.lineno}: {ast.unparse(call)}"
        for path in SOURCES
        if str(path.relative_to(PROJECT_FOLDER)) not in OWN_PROCESSES
        for call in calls(ast.parse(path.read_text()))
        if executes(call)
    ]
    assert found == []


def test_verl_executes_no_checkpoint(tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    torch.save({"model": Hostile(mark)}, tmp_path / "rank.pt")
    monkeypatch.setenv(SWITCH, "0")
    torch.load(tmp_path / "rank.pt", weights_only=False)  # as veRL does
    assert mark.exists(), "the file is not hostile, so this test shows nothing"
    mark.unlink()
    refuse_code()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "rank.pt", weights_only=False)
    assert not mark.exists()


def test_what_a_rank_saves_of_its_random_numbers_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    refuse_code()
    state = np.random.default_rng(0).bit_generator.state, np.random.get_state()
    torch.save(state[1], tmp_path / "extra.pt")
    name, keys, *_ = torch.load(tmp_path / "extra.pt", weights_only=False)
    assert name == "MT19937"
    np.testing.assert_array_equal(keys, state[1][1])


def test_no_run_state_is_executed(tmp_path):
    torch.save({"reward": Hostile(tmp_path / "mark")}, tmp_path / RUN_STATE)
    with pytest.raises(pickle.UnpicklingError):
        load_run_state(tmp_path)
    assert not (tmp_path / "mark").exists()


@pytest.fixture
def model_with_code(tmp_path: Path) -> Path:
    """A model folder that brings a module to be imported, as hubs offer them."""
    folder = tmp_path / "model"
    folder.mkdir()
    mark = tmp_path / "mark"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    autos = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": autos}))
    return folder


def test_no_code_of_a_model_folder_is_imported(model_with_code, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code"):
        assemble(model_with_code, [tmp_path], None, dtype=torch.float32)
    with pytest.raises(ValueError, match="trust_remote_code"):
        Dinov2Encoder(str(model_with_code))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"trainer": {"default_local_dir": "/tmp"}},
            "default_local_dir is '/tmp', but",
        ),
        ({"actor_rollout_ref": {"model": {"trust_remote_code": True}}}, "the project decides this"),
        ({"data": {"trust_remote_code": True}}, "verl.data.trust_remote_code is True, but"),
        ({"trainer": {"rollout_data_dir": "../../elsewhere"}}, "is not in the run's folder"),
    ],
)
def test_what_verl_writes_stays_in_the_runs_folder(tmp_path, section, message):
    with pytest.raises(ConfigError, match=message):
        check_overrides(section, tmp_path, {"trainer.default_local_dir": "x"})


def test_what_is_free_is_handed_on(tmp_path):
    inside = os.path.join(tmp_path, "dumps")
    section = {"trainer": {"rollout_data_dir": inside, "log_val_generations": 1}}
    check_overrides(section, tmp_path, {"trainer.default_local_dir": "x"})
    # no folder at all, and a text that names none
    section = {"trainer": {"rollout_data_dir": None}, "data": {"prompt_key": "../else"}}
    check_overrides(section, tmp_path, {})
