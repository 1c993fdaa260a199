"""The declared numbers, and the file they go to."""

from __future__ import annotations

import json
import logging
import math

import pytest

from verl_vla.core.errors import ContractError
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.runs.metrics import (
    METRICS,
    OPEN_FAMILIES,
    SFT_METRICS,
    TIMING_FAMILY,
    Metric,
    MetricsFile,
    check_declared,
    is_reproducible,
    read_metrics,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write_steps(path, *steps: int) -> MetricsFile:
    file = MetricsFile(path)
    for step in steps:
        file.append(step, {"actor/pg_loss": step / 10})
    return file


def steps_in(path) -> list[float | None]:
    return [line["step"] for line in read_metrics(path)]


def test_what_is_appended_is_read_back_in_order(path):
    write_steps(path, 1, 2)
    assert read_metrics(path) == [
        {"step": 1, "actor/pg_loss": 0.1},
        {"step": 2, "actor/pg_loss": 0.2},
    ]


def test_every_line_is_json_even_where_a_number_is_unknown(path):
    MetricsFile(path).append(1, {"val/success_rate": float("nan"), "actor/pg_loss": float("inf")})

    def refuse(word):
        pytest.fail(f"{word} is no JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "val/success_rate": None, "actor/pg_loss": None}
    (line,) = read_metrics(path)
    assert math.isnan(line["val/success_rate"])


def test_any_kind_of_number_is_written_as_one(path):
    torch = pytest.importorskip("torch")
    MetricsFile(path).append(1, {"actor/lr": torch.tensor(0.5), "sampling/groups_kept": True})
    assert read_metrics(path) == [{"step": 1, "actor/lr": 0.5, "sampling/groups_kept": 1.0}]


def test_an_undeclared_name_stops_the_run_and_writes_nothing(path):
    with pytest.raises(ContractError, match="'actor/los' is not declared; add it to METRICS"):
        MetricsFile(path).append(1, {"actor/pg_loss": 0.0, "actor/los": 0.0})
    assert not path.exists()


@pytest.mark.parametrize("name", [*METRICS, "val/task/lift", "reward/progress"])
def test_declared_names_and_open_families_pass(name):
    check_declared({name: 0.0})


@pytest.mark.parametrize("name", ["", "val/task", "rewards/x", "timing_s/other", "step"])
def test_others_do_not(name):
    with pytest.raises(ContractError, match="not declared"):
        check_declared({name: 0.0})


def test_what_is_measured_later_joins_the_line_of_the_last_step(path):
    file = MetricsFile(path)
    file.append(1, {"timing_s/step": 1.0})
    file.append(2, {"timing_s/step": 2.0})
    file.add_to_last({"timing_s/testing": 3.0})
    first, last = read_metrics(path)
    assert first == {"step": 1, "timing_s/step": 1.0}
    assert last == {"step": 2, "timing_s/step": 2.0, "timing_s/testing": 3.0}
    with pytest.raises(ContractError, match="not declared"):
        file.add_to_last({"nobody/knows": 1.0})
    assert read_metrics(path) == [first, last]


def test_rewind_drops_the_steps_that_will_be_played_again(path):
    file = write_steps(path, 0, 1, 2, 3, 4)
    file.rewind(2)
    assert steps_in(path) == [0, 1, 2]
    file.append(3, {"actor/pg_loss": 0.0})
    assert steps_in(path) == [0, 1, 2, 3]


@pytest.mark.parametrize("torn", ['{"step": 3', '{"step": 2, "actor/pg_loss": 0.2}', "x"])
def test_rewind_drops_a_line_that_was_cut_short(path, torn):
    """A line without its end may be half of one, even where it can be read."""
    file = write_steps(path, 1)
    with path.open("a") as half:
        half.write(torn)
    file.rewind(5)
    assert steps_in(path) == [1]
    file.append(2, {"actor/pg_loss": 0.0})
    assert steps_in(path) == [1, 2]


def test_rewind_to_before_the_first_step_starts_afresh(path):
    write_steps(path, 0, 1).rewind(-1)
    assert path.read_text() == ""


def test_steps_that_are_made_again_are_named(path, caplog):
    logging.getLogger("verl_vla").propagate = True
    caplog.set_level("INFO", logger="verl_vla")
    write_steps(path, 1, 2, 3, 4).rewind(4)
    assert not caplog.text
    MetricsFile(path).rewind(2)
    assert "steps 3 to 4 are newer than the last checkpoint" in caplog.text


def test_rewind_of_no_file_is_nothing(path):
    MetricsFile(path).rewind(3)
    assert not path.exists()


def test_rewind_leaves_no_other_file_behind(path):
    write_steps(path, 1, 2).rewind(1)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_two_equal_runs_must_share():
    reproducible = {name for name in METRICS if is_reproducible(name)}
    assert {n for n in METRICS if n.split("/")[0] in ("groups", "actor", "eval")} <= reproducible
    assert "env/steps" in reproducible and "env/success_rate" in reproducible
    assert {n for n in METRICS if n.startswith(("timing_s/", "perf/"))}.isdisjoint(reproducible)
    assert {n for n in METRICS if n.endswith(("_per_s", "_share"))}.isdisjoint(reproducible)


def test_every_timing_prefix_is_of_some_metric():
    for prefix in TIMING_FAMILY:
        assert any(name.startswith(prefix) for name in METRICS), prefix


def test_every_metric_has_a_unit_and_a_meaning():
    for name, metric in METRICS.items():
        assert metric.unit and metric.meaning, name
        assert not name.startswith(OPEN_FAMILIES), f"{name} is declared twice"
        assert name.startswith("timing_s/") == (metric.unit == "s") or metric.unit == "1/s", name


@pytest.mark.parametrize(
    ("section", "declared"),
    [(0, METRICS), (1, {k: v for k, v in SFT_METRICS.items() if METRICS.get(k) != v})],
)
def test_the_page_says_of_every_metric_what_the_code_says(
    section: int, declared: dict[str, Metric]
) -> None:
    page = (PROJECT_FOLDER / "docs" / "metrics.md").read_text().split("## Fine-tuning")[section]
    lines = page.replace("\n  ", " ").splitlines()
    for name, metric in declared.items():
        assert f"- `{name}` ({metric.unit}): {metric.meaning}" in lines, name
