"""Tables and bars on a terminal; elsewhere lines that a log file can hold."""

from __future__ import annotations

import io
import logging
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
from one_chunk_world import STARTS, NotingPolicy, OneChunkSimulators

from verl_vla.cli.main import main
from verl_vla.core.episode import EpisodeSpec, Outcome
from verl_vla.core.tables import Trajectories
from verl_vla.core.text import TextTable
from verl_vla.rewards.encoders.base import BatchedEncoder, track_batches
from verl_vla.rewards.encoders.pixels import PixelEncoder
from verl_vla.rl.rollout import NoiseSource, rollout
from verl_vla.runs.console import EvaluationProgress, episodes_bar
from verl_vla.runs.screen import REFRESHES_PER_SECOND
from verl_vla.runs.terminal import Console, bar, can_draw, track, track_encoding

ROOT = Path(__file__).resolve().parents[3]
TABLE = TextTable(["task", "rate"], [["lift", "50.0%"], ["push", "[ 6, 79]"]], notes=["[greedy]"])
LINES = ["task      rate", "lift     50.0%", "push  [ 6, 79]", "[greedy]"]
ESCAPE, SHOW_CURSOR = "\x1b[", "\x1b[?25h"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """A terminal to write to, and a function that returns what it was sent."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:

        def sent() -> str:
            stream.flush()
            os.set_blocking(ours, False)
            text = b""
            with suppress(BlockingIOError):  # nothing more was sent
                while part := os.read(ours, 1 << 16):
                    text += part
            return text.decode()

        yield stream, sent
    os.close(ours)


@pytest.fixture
def attach() -> Iterator[Callable[[TextIO], logging.Logger]]:
    """Send our log lines to a stream, as the command line does."""
    logger = logging.getLogger("verl_vla")
    before, level = logger.handlers[:], logger.level

    def to(stream: TextIO) -> logging.Logger:
        logger.handlers[:] = [Console(stream)]
        logger.setLevel(logging.INFO)
        return logger

    yield to
    logger.handlers[:] = before
    logger.setLevel(level)


def test_a_table_is_its_plain_lines() -> None:
    assert TABLE.splitlines() == LINES
    assert TextTable([], [["a", "1"], ["bcd", "22"]], left=(0, 1)).splitlines() == [
        "a    1",
        "bcd  22",
    ]
    assert TextTable(["a", "b"], []) == "a  b"


@pytest.mark.parametrize(
    ("variable", "value", "draws"),
    [("TERM", "xterm", True), ("TERM", "dumb", False), ("NO_COLOR", "1", False)],
)
def test_the_user_can_ask_for_plain_lines(
    terminal: tuple[TextIO, Callable[[], str]],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    draws: bool,
) -> None:
    monkeypatch.setenv(variable, value)
    assert can_draw(terminal[0]) == draws
    monkeypatch.delenv("TERM")
    assert not can_draw(terminal[0])


def one_episode() -> Trajectories:
    start = STARTS[0]
    return rollout(
        [EpisodeSpec(task_id=start.task_id, init_state_id=0, group_id=0, episode_id=0)],
        NotingPolicy(),
        OneChunkSimulators(),
        temperature=0.0,
        noise=NoiseSource(seed=0, stream=0),
    )


def test_a_file_gets_lines_and_no_bar(attach: Callable[[TextIO], logging.Logger]) -> None:
    stream = io.StringIO()
    logger = attach(stream)
    with bar("episodes", 2) as advance, episodes_bar("episodes", 2) as ended:
        assert advance is None
        ended(one_episode())
    assert list(track(iter("ab"), "letters", 2)) == ["a", "b"]
    logger.info("\n%s\n", TABLE)
    logger.info("%d of %s", 1, "[red]two[/red]")
    assert stream.getvalue().splitlines() == ["", *LINES, "", "1 of [red]two[/red]"]


def test_a_terminal_gets_a_drawn_table(
    terminal: tuple[TextIO, Callable[[], str]], attach: Callable[[TextIO], logging.Logger]
) -> None:
    stream, sent = terminal
    attach(stream).info("\n%s\n", TABLE)
    text = sent()
    assert "──" in text and ESCAPE in text
    assert all(part in text for part in ("task", "50.0%", "[ 6, 79]", "[greedy]"))


def test_a_table_of_numbers_that_does_not_fit_is_its_lines(
    terminal: tuple[TextIO, Callable[[], str]],
    attach: Callable[[TextIO], logging.Logger],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "16")
    stream, sent = terminal
    attach(stream).info("%s", TABLE)
    assert sent().splitlines() == LINES


def test_cells_of_wrapped_text_are_wrapped_by_the_terminal(
    terminal: tuple[TextIO, Callable[[], str]], attach: Callable[[TextIO], logging.Logger]
) -> None:
    stream, sent = terminal
    table = TextTable([], [["gpu", "FAULT", "no GPU\n           was found"]], left=range(3))
    attach(stream).info("%s", table)
    text = sent()
    assert "no GPU was found" in text
    assert "\x1b[1;31mFAULT" in text


def test_a_bar_counts_below_the_lines_and_leaves_nothing(
    terminal: tuple[TextIO, Callable[[], str]], attach: Callable[[TextIO], logging.Logger]
) -> None:
    stream, sent = terminal
    logger = attach(stream)
    for what in ("first", "second"):
        with bar(what, 3) as advance, bar("inner", 2):
            assert advance is not None
            advance("1 solved")
            logger.info("a line of [brackets] and 100%% %s", "x" * 100)
            time.sleep(2 / REFRESHES_PER_SECOND)
        text = sent()
        assert "a line of [brackets] and 100% " + "x" * 100 + "\r\n" in text, "not wrapped"
        assert all(part in text for part in (what, "inner", "1/3", "1 solved"))
        assert SHOW_CURSOR in text.rpartition("1 solved")[2]


def test_an_error_ends_the_bars_before_it_is_told(
    terminal: tuple[TextIO, Callable[[], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, sent = terminal
    console = Console(stream)
    console.end_bars()  # none was ever shown
    with console.screen.bar("episodes", 2):
        console.end_bars()
        assert SHOW_CURSOR in sent()


def test_an_evaluation_moves_a_bar_in_place_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="verl_vla.runs.console")
    notes: list[str] = []
    progress = EvaluationProgress(3, [{"outcome": Outcome.SUCCESS}], notes.append)
    for outcome in (Outcome.CRASH, Outcome.TIMEOUT, Outcome.SUCCESS):
        progress.show({"outcome": outcome})
    assert notes == [f"success {rate}%  simulators lost 1" for rate in ("50.0", "66.7")]
    assert caplog.messages == []


def test_the_batches_of_an_encoder_are_tracked_and_change_nothing(
    terminal: tuple[TextIO, Callable[[], str]], attach: Callable[[TextIO], logging.Logger]
) -> None:
    stream, sent = terminal
    attach(stream)
    encoder = PixelEncoder(grid=4, batch_size=4)
    frames = [np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), np.uint8) for n in (7, 3)]
    before = encoder.encode(frames)

    class Reward:
        encoder = PixelEncoder(grid=4, batch_size=4)

    track_batches(Reward(), track_encoding)  # pyright: ignore[reportArgumentType]
    track_batches(object(), track_encoding)  # pyright: ignore[reportArgumentType] -- has no encoder
    after = Reward.encoder.encode(frames)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert "encoding images" in sent()
    assert isinstance(encoder, BatchedEncoder)


def test_what_a_command_prints_into_a_pipe_is_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert not {"\x1b", "\r"} & set(out)
    assert len(out.splitlines()) == len({line.split()[0] for line in out.splitlines()})
    assert os.environ["TQDM_DISABLE"] == "1", "bars of libraries are bars too"


def test_a_command_draws_on_a_terminal() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "verl_vla", "recipes"]
    subprocess.run(words, cwd=ROOT, env=environment, stdout=theirs, check=True)
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert " quickstart " in drawn
    assert {line[:1] for line in drawn.split("\r\n")} == {" ", ""}, "a box of rich"
