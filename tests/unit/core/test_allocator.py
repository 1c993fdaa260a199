"""The allocator's settings: the project's, unless the user has some."""

from __future__ import annotations

import pytest

from verl_vla.core.allocator import VARIABLES, allocator_variables


def test_segments_are_expandable_unless_the_user_says_otherwise(monkeypatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert allocator_variables() == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_users_own_setting_is_kept(monkeypatch, name: str) -> None:
    for other in VARIABLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "expandable_segments:False")
    assert allocator_variables() == {name: "expandable_segments:False"}
