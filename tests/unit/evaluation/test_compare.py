"""Two policies on the same starts; nothing is compared that does not compare."""

from __future__ import annotations

import json
import math

import pytest

from verl_vla.cli import compare
from verl_vla.cli.arguments import parse
from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.evaluation.compare import Paired, pair, read_evaluation, table, told_differences
from verl_vla.evaluation.conditions import DECIDES
from verl_vla.runs.run_dir import evaluation_record

SUCCESS, TIMEOUT, CRASH = Outcome.SUCCESS, Outcome.TIMEOUT, Outcome.CRASH
NAMES = {4: "push", 0: "lift"}
CONDITIONS = {key: key for key in DECIDES} | {
    "seed": None,
    "versions": {"torch": "2", "numpy": "2"},
}


def evaluation(push: list[Outcome], lift: list[Outcome], **changed: object) -> dict:
    entries = [
        {"episode": 0, "task": task, "init_state": i, "outcome": o, "steps": 1, "crash": None}
        for task, outcomes in ((4, push), (0, lift))
        for i, o in enumerate(outcomes)
    ]
    return json.loads(json.dumps(evaluation_record(entries, CONDITIONS | changed, NAMES)))


A = evaluation([SUCCESS, SUCCESS, TIMEOUT, CRASH], [TIMEOUT, TIMEOUT])
B = evaluation([SUCCESS, TIMEOUT, TIMEOUT, SUCCESS], [SUCCESS, SUCCESS])


def test_pairs_are_counted_by_task_and_in_all():
    assert pair(A, B) == {
        "lift": Paired(both=0, first_only=0, second_only=2, neither=0),
        "push": Paired(both=1, first_only=1, second_only=0, neither=1),
        "all tasks": Paired(both=1, first_only=1, second_only=2, neither=1),
    }


def test_the_order_of_the_episodes_does_not_matter():
    turned = B | {"episodes": B["episodes"][::-1], "tasks": dict(reversed(B["tasks"].items()))}
    assert pair(A, turned) == pair(A, B)
    assert pair(turned, A)["all tasks"].second_only == pair(A, B)["all tasks"].first_only


@pytest.mark.parametrize(
    ("first_only", "second_only"), [(0, 0), (1, 0), (3, 3), (1, 9), (12, 2), (0, 6), (40, 20)]
)
def test_the_p_value_is_that_of_a_fair_coin(first_only, second_only):
    number, least = first_only + second_only, min(first_only, second_only)
    tail = sum(math.comb(number, k) for k in range(least + 1)) / 2**number
    found = Paired(both=5, first_only=first_only, second_only=second_only, neither=7)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail), abs=1e-12)


def test_starts_without_disagreement_do_not_move_the_p_value():
    few = Paired(both=0, first_only=1, second_only=8, neither=0)
    many = Paired(both=300, first_only=1, second_only=8, neither=200)
    assert few.p_value == many.p_value == pytest.approx(0.0390625)


@pytest.mark.parametrize("key", DECIDES)
def test_a_difference_that_decides_is_refused_by_its_name(key):
    with pytest.raises(ConfigError, match=f"do not compare: {key}: '{key}' -> 'other'"):
        pair(A, B | {key: "other"})


def test_other_starts_are_refused():
    with pytest.raises(ConfigError, match="1 starts were played by the first alone and 0 by"):
        pair(A, B | {"episodes": B["episodes"][1:]})


def test_what_does_not_decide_is_told():
    other = B | {"versions": {"torch": "3", "numpy": "2"}}
    pair(A, other)
    assert told_differences(A, other) == ["versions.torch: '2' -> '3'"]


def test_the_command_reads_folders_and_files_and_writes_what_it_prints(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "evaluation.json").write_text(json.dumps(A))
    (tmp_path / "step_4.json").write_text(json.dumps(B))
    words = [str(tmp_path / "a"), str(tmp_path / "step_4.json"), "--out", str(tmp_path / "out")]
    assert compare.run(parse("compare", words)) == 0
    written = json.loads((tmp_path / "out").read_text())["all tasks"]
    assert (written["first_only"], written["second_only"], written["p_value"]) == (1, 2, 1.0)
    lines = table(pair(A, B)).splitlines()
    assert lines[-1].split() == [
        *("all", "tasks", "40.0%", "2/5", "[", "12,", "77]"),
        *("60.0%", "3/5", "[", "23,", "88]", "1", "2", "1.0000"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "evaluation.json is missing"), ({"suite": "mini"}, "does not say its states, ")],
)
def test_what_is_no_evaluation_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_evaluation(tmp_path)
