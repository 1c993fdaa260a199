"""Packages that only some recipes need."""

from __future__ import annotations

from importlib import metadata

import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.core.plugins import EXTRAS, Extra, require_extras


def test_every_extra_is_one_of_the_projects() -> None:
    declared = metadata.requires("verl-vla") or []
    for extra in EXTRAS.values():
        assert f'{extra.package}; extra == "{extra.name}"' in declared


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, ("optimizer.name", "adamw_8bit"), Extra("no_such_package", "qlora"))
    require_extras({"policy.quantization": "none", "optimizer.name": "adamw"})
    with pytest.raises(ConfigError) as caught:
        require_extras({"policy.quantization": "none", "optimizer.name": "adamw_8bit"})
    assert str(caught.value) == (
        "optimizer.name is 'adamw_8bit', which needs the package no_such_package; install it with "
        "pip install 'verl-vla[qlora]', or choose another value"
    )
