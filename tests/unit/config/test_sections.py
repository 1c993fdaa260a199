"""What holds of every section of both kinds of recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic.dataclasses import is_pydantic_dataclass

from verl_vla.config.grpo import Recipe
from verl_vla.config.schema import meanings, parse
from verl_vla.config.sft import SFTRecipe
from verl_vla.config.shared import (
    BaseRecipe,
    ClusterConfig,
    EnvironmentConfig,
    EvaluationConfig,
    OptimizerConfig,
    PolicyConfig,
    TrainerConfig,
)
from verl_vla.core.errors import ConfigError

RECIPES = (Recipe, SFTRecipe)
SHARED = {
    "policy": PolicyConfig,
    "environment": EnvironmentConfig,
    "optimizer": OptimizerConfig,
    "trainer": TrainerConfig,
    "evaluation": EvaluationConfig,
    "cluster": ClusterConfig,
}
BOOL, FLOAT, INT, TEXT = "bool", "float", "int", "str"


def sections(schema: Any) -> Iterator[Any]:
    yield schema
    for field in schema.__pydantic_fields__.values():
        if is_pydantic_dataclass(field.annotation):
            yield from sections(field.annotation)


OPTIONS = sorted(
    {
        (section.__name__, name): (section, name, section.__annotations__[name])
        for recipe in RECIPES
        for section in sections(recipe)
        for name in section.__annotations__
    }.values(),
    key=lambda option: (option[0].__name__, option[1]),
)
"""Every option and section that a class declares: the class, the name, and its type as written."""


def accepts(section: type[Any], name: str, value: object) -> bool:
    """True if a section takes the value, whatever else it lacks."""
    try:
        parse(section, {name: value})
    except ConfigError as error:
        return not any(line.startswith(f"{name} is {value!r}") for line in str(error).splitlines())
    return True


@pytest.mark.parametrize(
    ("section", "name", "written"), OPTIONS, ids=[f"{s.__name__}.{n}" for s, n, _ in OPTIONS]
)
def test_nothing_is_converted_to_another_type(section: type[Any], name: str, written: str) -> None:
    """pydantic takes "2" and true for numbers, unless the type is one of its strict ones."""
    assert not accepts(section, name, float("nan"))
    assert accepts(section, name, "2") == (written in ("str", "str | None"))
    assert accepts(section, name, True) == (written == "StrictBool")
    assert not accepts(section, name, 1.5) or written.startswith("StrictFloat")
    if written.startswith("StrictFloat"):
        assert accepts(section, name, 1) or accepts(section, name, 0.5)


@pytest.mark.parametrize(
    ("section", "name"), [o[:2] for o in OPTIONS], ids=[f"{s.__name__}.{n}" for s, n, _ in OPTIONS]
)
def test_no_option_is_infinite_or_too_large_for_64_bits(section: type[Any], name: str) -> None:
    for value in (float("inf"), float("-inf"), float("nan"), 2**64):
        with pytest.raises(ConfigError, match=rf"^{name} is ({value}|a whole number of 65 bits)"):
            parse(section, {name: value})


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_has_a_description(recipe: type[Any]) -> None:
    assert not [name for name, meaning in meanings(recipe) if not meaning]


def test_grpo_and_fine_tuning_share_their_sections_and_words() -> None:
    fields = [recipe.__pydantic_fields__ for recipe in RECIPES]
    assert set(fields[0]) & set(fields[1]) == SHARED.keys() | set(BaseRecipe.__pydantic_fields__)
    for name, base in SHARED.items():
        assert all(issubclass(of_recipe[name].annotation, base) for of_recipe in fields), name
