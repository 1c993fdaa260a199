"""From a mapping to typed options: every wrong value is named with its path and a remedy."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Annotated, Any, Literal

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


@section("range")
class Range(Clip):
    """A base, fields with answers of their own, and a check across fields."""

    high: StrictFloat = Field(default=0.3, gt=0, json_schema_extra=remedy("choose e.g. 0.3"))
    """Upper bound."""
    norm: Literal["token", "episode"] = "episode"
    steps: Literal["all"] | Annotated[StrictInt, Field(ge=1)] = Field(
        default="all", json_schema_extra=remedy("set 'all' or at least 1")
    )
    pair: tuple[Annotated[StrictFloat, Field(ge=0, lt=1)], ...] = Field(
        default=(0.5, 0.5), min_length=2, json_schema_extra=remedy("two shares are needed")
    )
    most: tuple[Annotated[StrictInt, Field(le=9)], ...] = ()

    @model_validator(mode="after")
    def _check_order(self) -> Range:
        if self.low > self.high:
            raise ConfigError(f"range.low is {self.low}, above range.high; swap them")
        return self


def refusal(schema: type[object], **values: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        schema(**values)
    return str(caught.value).splitlines()


def test_all_errors_are_reported_at_once_one_a_line_unknown_keys_first():
    assert refusal(Options, name=3, loss={"clip": {"low": 0, "hi": 1}}, cuont=2) == [
        "unknown key 'loss.clip.hi'; Known: loss.clip.low, loss.clip.norm",
        "unknown key 'cuont'; did you mean 'count'? Known: name, count, is_on, limit, maybe, loss, "
        "rates, rest",
        "name is 3; it must be str",
        "loss.clip.low is 0; set more than 0",
    ]


def test_a_section_that_is_made_by_itself_is_named_with_its_path():
    assert refusal(Clip, low=-1.0) == ["loss.clip.low is -1.0; set more than 0"]
    assert refusal(Loss, clip={"low": -1}) == ["loss.clip.low is -1; set more than 0"]
    with pytest.raises(ConfigError, match="loss.clip.low is 0; set"):
        replace(Clip(), low=0)


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({"high": 0}, ["range.high is 0; choose e.g. 0.3"]),
        ({"high": "x"}, ["range.high is 'x'; it must be float"]),
        ({"high": float("nan")}, ["range.high is nan, which no check can compare; set a number"]),
        ({"steps": 0}, ["range.steps is 0; set 'all' or at least 1"]),
        (
            {"steps": "al"},
            ["range.steps is 'al'; choose one of 'all'; or range.steps is 'al'; it must be int"],
        ),
        ({"pair": [0.5]}, ["range.pair is [0.5]; two shares are needed"]),
        ({"pair": [0.5, 1, 2]}, ["range.pair is [0.5, 1, 2]; two shares are needed"]),
        ({"pair": [0.5, 0.1, "x"]}, ["range.pair[2] is 'x'; it must be float"]),
        ({"most": [3, 10]}, ["range.most[1] is 10; it should be less than or equal to 9"]),
        ({"norm": ""}, ["range.norm is empty; choose one of 'token', 'episode'"]),
        ({"low": 0.4}, ["range.low is 0.4, above range.high; swap them"]),
        ({"low": 0.4, "high": -1}, ["range.high is -1; choose e.g. 0.3"]),
    ],
)
def test_a_field_answers_for_its_range_in_its_own_words(values, lines):
    assert refusal(Range, **values) == lines


def test_descriptions_come_from_the_docstrings_also_of_a_base():
    found = dict(meanings(Range, "range"))
    assert found["range.low"] == "Lower bound."
    assert found["range.high"] == "Upper bound."
    assert found["range.most"] == ""


def test_a_section_is_frozen_keyword_only_and_travels_between_processes():
    section = Loss(clip=Clip(low=0.1))
    with pytest.raises(FrozenInstanceError):
        section.clip.low = 0.2
    with pytest.raises(TypeError):
        Clip(0.2)
    assert pickle.loads(pickle.dumps(section)) == section
    assert replace(section, betas=(0.1,)).clip is section.clip


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
