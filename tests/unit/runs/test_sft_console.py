"""The lines of a fine-tuning run at the console."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from verl_vla.trainer.sft import console
from verl_vla.trainer.sft.console import SFTConsole

VALUES = {"train/loss": 2.5, "train/accuracy": 0.125, "train/lr": 5e-4, "timing_s/step": 2.0}


@pytest.fixture(autouse=True)
def everything_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="verl_vla.trainer.sft.console")


def test_the_time_left_leaves_out_what_the_first_step_waited_for(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 103.0, 109.0])
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    shown = SFTConsole(tmp_path, total_steps=100, show_every=3)
    shown.show(1, VALUES)
    shown.show(2, VALUES)
    shown.show(3, VALUES | {"val/accuracy": 0.25})
    assert caplog.messages == [
        "step   1/100  loss 2.500  tokens right 12.5%  rate 5.0e-04  2.00 s  left 3m18s",
        "step   3/100  loss 2.500  tokens right 12.5%  held out 25.0%  rate 5.0e-04  2.00 s  "
        "left 7m16s",
    ]


def test_the_first_the_last_and_every_tested_step_are_shown(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    shown = SFTConsole(tmp_path, total_steps=9, show_every=4)
    for step in range(1, 10):
        shown.show(step, VALUES | ({"val/accuracy": 0.5} if step == 6 else {}))
    assert [int(line.split("/")[0].removeprefix("step")) for line in caplog.messages] == [
        1,
        4,
        6,
        8,
        9,
    ]
