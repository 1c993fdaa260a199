"""A run's page: right numbers, nothing from elsewhere, at any moment of the run."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import yaml
from report_world import NAMES, add_step, evaluate_run, make_run, make_tuning_run

from verl_vla.cli import report
from verl_vla.cli.arguments import parse
from verl_vla.config.sft import load_sft_recipe
from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.runs.html import figures
from verl_vla.runs.html.reader import find_runs, kind_of, read_run
from verl_vla.runs.html.report import (
    REFRESH_EVERY_S,
    LiveReport,
    share_with_counts,
    status,
    write_report,
)
from verl_vla.runs.run_dir import keep_solved

FIGURES = (
    *(figures.success, figures.success_by_task, figures.groups, figures.failures),
    *(figures.time_by_part, figures.waits, figures.memory, figures.learning),
)


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "first_run")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The report of a run that is going."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "first_run")
    assert report.run(parse("report", [str(folder)])) == 0
    return (folder / "report.html").read_text()


def test_the_report_stands_alone(page):
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert sources
    assert all(source.startswith(("data:image/webp;base64,", "#")) for source in sources)
    assert "@import" not in page
    assert "<script" not in page


def test_the_report_shows_the_numbers_of_the_run(page):
    for expected in (
        "3 of 5 training steps, going",
        "18, 3 lost with their simulator",
        "25.0% (2/8, 7\N{EN DASH}59%)",  # held out, first
        "75.0% (6/8, 41\N{EN DASH}93%)",
        "push the cube",
        "step 3: push the cube, init state 1, mixed",
        "0.9.1",
    ):
        assert expected in page, expected
    assert page.count("<svg") == len(FIGURES)


def test_text_of_a_run_is_text(page):
    assert "bases/&lt;mini&gt;" in page
    assert "<mini>" not in page


def test_best_median_and_worst_of_the_filmed_episodes(page):
    highlights = page[page.index("Best, median and worst") : page.index("Newest groups")]
    assert re.findall(r'alt="episode (\d+)"', highlights) == ["300", "202", "101"]


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    page = write_report(make_run(tmp_path / "run", steps=0)).read_text()
    assert "No training step has ended yet" in page
    assert "<svg" not in page


def test_a_run_that_is_writing_can_be_read(folder):
    for name in ("metrics.jsonl", "episodes.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 4, "roll')
    view = read_run(folder)
    assert view.last_step == 3
    assert len(view.episodes) == 18


def test_a_page_grows_with_its_run(folder):
    add_step(folder, 4)
    add_step(folder, 5)
    view = read_run(folder)
    assert (view.last_step, len(view.groups)) == (5, 5)
    assert status(view) == "ended after 5 training steps"


def test_a_run_that_solved_everything_has_ended_early(folder):
    assert not read_run(folder).has_ended
    keep_solved(folder, 2)
    assert not read_run(folder).has_ended, "it has gone on since"
    keep_solved(folder, 3)
    assert status(read_run(folder)) == "ended after 3 training steps, all solved"


@pytest.mark.parametrize("draw", FIGURES)
def test_a_figure_is_svg_that_scales(folder, draw):
    root = ElementTree.fromstring(draw(read_run(folder)))
    assert root.tag.endswith("svg")
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib


def test_the_same_run_gives_the_same_figure(folder):
    assert figures.success(read_run(folder)) == figures.success(read_run(folder))


@pytest.mark.parametrize(
    ("outcomes", "kind"),
    [
        ([0, 1], "mixed"),
        ([0, 0, 2], "all solved"),
        ([1, 2], "all failed"),
        ([2, 2], "all crashed"),
    ],
)
def test_kinds_of_groups(outcomes, kind):
    assert kind_of([{"outcome": Outcome(outcome)} for outcome in outcomes]) == kind


def test_a_rate_without_episodes_is_said_so():
    assert share_with_counts(None) == "\N{EM DASH}"
    assert share_with_counts({"rate": None}) == "every simulator was lost"


def test_tasks_have_their_names_once_they_were_evaluated(folder, tmp_path):
    assert read_run(folder).task_names == NAMES
    view = read_run(make_run(tmp_path / "new", steps=0))
    assert view.task_names == {}


def test_runs_are_found_at_any_depth(tmp_path):
    made = [make_run(tmp_path / name, steps=0) for name in ("a", "b/c/d")]
    assert find_runs(tmp_path) == made
    assert find_runs(made[0]) == made[:1]


TUNING_FIGURES = (figures.loss, figures.accuracy, figures.gradient, figures.time_by_part)


def test_fine_tuning_has_a_report_of_its_own(tmp_path):
    folder = make_tuning_run(tmp_path / "tuned")
    page = write_report(folder).read_text()
    for expected in (
        "4 of 6 training steps, going",
        "runs/&lt;demos&gt;",
        "16 samples",
        "0.0005",
        "made by the run",
    ):
        assert expected in page, expected
    assert page.count("<svg") == len(TUNING_FIGURES)
    assert "Newest groups" not in page
    assert "reward" not in page
    evaluate_run(folder, 4, solved=3)
    played = write_report(folder).read_text()
    assert played.count("<svg") == len(TUNING_FIGURES) + 1
    assert "75.0% (6/8, 41\N{EN DASH}93%)" in played
    assert "push the cube" in played


def test_a_recipe_as_fine_tuning_writes_it_has_a_page(tmp_path):
    recipe = load_sft_recipe(["recipe=sft_mini", "demos.folder=here", "optimizer.lr=1"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.as_dict()))
    page = write_report(tmp_path).read_text()
    assert f"{recipe.optimizer.batch_size} samples" in page


def test_fine_tuning_that_has_just_begun_and_that_has_ended_have_reports(tmp_path):
    begun = make_tuning_run(tmp_path / "begun", steps=0)
    assert "No training step has ended yet" in write_report(begun).read_text()
    ended = make_tuning_run(tmp_path / "ended", steps=6)
    assert status(read_run(ended)) == "ended after 6 training steps"


@pytest.mark.parametrize("draw", TUNING_FIGURES)
def test_a_figure_of_fine_tuning_is_svg_of_every_curve(tmp_path, draw):
    root = ElementTree.fromstring(draw(read_run(make_tuning_run(tmp_path / "tuned"))))
    assert "viewBox" in root.attrib
    text = "".join(root.itertext())
    labels = {
        figures.loss: ("training", "held-out demonstrations", "loss, nats per token"),
        figures.accuracy: ("training", "held-out demonstrations", "action tokens right, %"),
        figures.gradient: ("norm of the gradient", "learning rate"),
        figures.time_by_part: ("learning", "waiting for samples", "seconds"),
    }
    for label in labels[draw]:
        assert label in text


@pytest.mark.parametrize("number", [1, 999, 1000, 1001, 2500, 150_000])
def test_a_long_curve_is_thinned_evenly_and_keeps_its_end(number):
    lines = [{"step": step} for step in range(number)]
    shown = [line["step"] for line in figures._thin(lines)]
    assert len(shown) <= figures.MOST_POINTS
    assert shown[-1] == number - 1
    assert len(set(np.diff(shown))) <= 1
    assert len(shown) > figures.MOST_POINTS / 2 or len(shown) == number


def test_runs_of_both_kinds_are_compared(tmp_path):
    views = {"grpo": read_run(make_run(tmp_path / "grpo"))}
    views["sft"] = read_run(evaluate_run(make_tuning_run(tmp_path / "sft"), 4, solved=3))
    views["unplayed"] = read_run(make_tuning_run(tmp_path / "unplayed"))
    text = "".join(ElementTree.fromstring(figures.compared(views)).itertext())
    assert "grpo" in text
    assert "sft" in text
    assert "unplayed" not in text


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no recipe\.yaml"):
        write_report(tmp_path)


def test_the_report_of_a_run_that_goes_on_is_written_now_and_then(folder, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("verl_vla.runs.html.report.time.monotonic", lambda: now[0])
    live = LiveReport(folder)
    live.refresh()
    assert not (folder / "report.html").exists()
    now[0] += REFRESH_EVERY_S
    live.refresh()
    assert "3 of 5 training steps" in (folder / "report.html").read_text()
