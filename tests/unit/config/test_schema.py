"""From a mapping to typed options: every wrong value is named with its path and a remedy."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, StrictBool, StrictFloat, StrictInt, model_validator

from verl_vla.config.schema import meanings, parse, remedy, section
from verl_vla.core.errors import ConfigError
from verl_vla.core.text import nearest


@section("loss.clip")
class Clip:
    low: StrictFloat = Field(default=0.2, gt=0)
    """Lower
    bound."""
    norm: Literal["token", "episode"] = "token"


@section("loss")
class Loss:
    clip: Clip = Clip()
    betas: tuple[StrictFloat, ...] = (0.9, 0.999)


@section("")
class Options:
    name: str
    count: StrictInt = 1
    is_on: StrictBool = False
    limit: Literal["published"] | StrictInt = "published"
    maybe: StrictInt | None = None
    loss: Loss = Loss()
    rates: dict[str, StrictFloat] = Field(default_factory=dict[str, float])
    rest: dict[str, Any] = Field(default_factory=dict[str, Any])


def test_what_is_not_said_keeps_its_default():
    assert parse(Options, {"name": "a"}) == Options(name="a")


def test_every_kind_of_value_is_read():
    values = {
        "name": "a",
        "count": 3,
        "is_on": True,
        "limit": 220,
        "maybe": 7,
        "loss": {"clip": {"low": 1, "norm": "episode"}, "betas": [0, 0.5]},
        "rates": {"x": 1},
        "rest": {"anything": [1, {"deep": None}]},
    }
    assert parse(Options, values) == Options(
        name="a",
        count=3,
        is_on=True,
        limit=220,
        maybe=7,
        loss=Loss(clip=Clip(low=1.0, norm="episode"), betas=(0.0, 0.5)),
        rates={"x": 1.0},
        rest={"anything": [1, {"deep": None}]},
    )


def test_a_whole_number_becomes_a_float_where_one_is_wanted():
    low = parse(Clip, {"low": 1}).low
    assert (low, type(low)) == (1.0, float)


def test_null_means_none_only_where_that_is_allowed():
    assert parse(Options, {"name": "a", "maybe": None}).maybe is None
    with pytest.raises(ConfigError, match="count is None; it must be int"):
        parse(Options, {"name": "a", "count": None})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "name is required and has no default; set it"),
        ({"name": 3}, "name is 3; it must be str"),
        ({"name": "a", "count": 1.5}, "count is 1.5; it must be int"),
        ({"name": "a", "count": "2"}, "count is '2'; it must be int"),
        ({"name": "a", "count": True}, "count is True; it must be int"),
        ({"name": "a", "is_on": 1}, "is_on is 1; it must be bool"),
        ({"name": "a", "maybe": "x"}, "maybe is 'x'; it must be int"),
        ({"name": "a", "rates": {"x": "y"}}, "rates.x is 'y'; it must be float"),
        ({"name": "a", "rates": [1]}, "rates is [1]; it is a section, set rates.KEY instead"),
        ({"name": "a", "loss": 3}, "loss is 3; it is a section, set loss.KEY instead"),
        ({"name": "a", "loss": {"clip": None}}, "loss.clip is None; it is a section"),
        ({"name": "a", "loss": {"clip": {"low": True}}}, "loss.clip.low is True; it must be float"),
        ({"name": "a", "loss": {"betas": 0.9}}, "loss.betas is 0.9; it must be a list, like [a,b]"),
        ({"name": "a", "loss": {"betas": "ab"}}, "loss.betas is 'ab'; it must be a list"),
        ({"name": "a", "loss": {"betas": [1, "b"]}}, "loss.betas[1] is 'b'; it must be float"),
        (
            {"name": "a", "loss": {"clip": {"norm": "tokens"}}},
            "loss.clip.norm is 'tokens'; choose one of 'token', 'episode'",
        ),
        (
            {"name": "a", "limit": "simple"},
            "limit is 'simple'; choose one of 'published'; or limit is 'simple'; it must be int",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_path(values, message):
    with pytest.raises(ConfigError) as caught:
        parse(Options, values)
    assert message in str(caught.value)


def test_nan_is_refused_because_every_check_would_let_it_pass():
    with pytest.raises(ConfigError, match="clip.low is nan"):
        parse(Clip, {"low": float("nan")}, "clip")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nam": "a"}, "unknown key 'nam'; did you mean 'name'?"),
        (
            {"name": "a", "loss": {"clip": {"lo": 1}}},
            "unknown key 'loss.clip.lo'; did you mean 'loss.clip.low'?",
        ),
        (
            {"name": "a", "loss": {"zzz": 1}},
            "unknown key 'loss.zzz'; Known: loss.clip, loss.betas",
        ),
        ({"name": "a", 3: 1}, "unknown key '3'; Known: name, count"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_or_all(values, message):
    with pytest.raises(ConfigError) as caught:
        parse(Options, values)
    assert message in str(caught.value)


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()))
def test_whatever_comes_in_the_answer_is_knobs_or_a_config_error(values):
    try:
        assert isinstance(parse(Options, values), Options)
    except ConfigError as error:
        assert str(error)


def test_nearest_lists_what_is_known():
    assert nearest("mimi", ["libero_goal", "mini"]) == (
        "did you mean 'mini'? Known: libero_goal, mini"
    )
    assert nearest("zzz", ["libero_goal", "mini"]) == "Known: libero_goal, mini"
