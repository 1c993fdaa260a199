"""Damaged policy folders: read as valid by doctor and loader alike, or refused by both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import changed_bytes, documents, inputs, replaced
from hypothesis import given
from hypothesis import strategies as st
from openvla_oft_folder import save_tiny_policy
from safetensors.torch import load_file

from verl_vla.core.errors import ConfigError
from verl_vla.policies.registry import examine, load_policy

CONFIG, STATISTICS, WEIGHTS = "config.json", "dataset_statistics.json", "model.safetensors"
IMAGES, TOKENIZER = "preprocessor_config.json", "tokenizer.json"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("fuzz") / "policy")


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
