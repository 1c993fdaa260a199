"""veRL inside a process of ours: its release, its platform, and where its words go."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest
import torch
import verl

from verl_vla.core.errors import ConfigError
from verl_vla.trainer.verl_compat import process
from verl_vla.trainer.verl_compat.process import choose_device, divert_output, prepare_verl

OPTION = "cluster.device"


@pytest.mark.parametrize(
    ("wanted", "has_gpu", "device"),
    [
        ("auto", True, "cuda"),
        ("auto", False, "cpu"),
        ("cpu", True, "cpu"),
        ("cuda", False, "cuda"),
    ],
)
def test_a_gpu_is_taken_where_there_is_one_unless_the_recipe_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, wanted: str, has_gpu: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert choose_device(wanted) == device


@pytest.mark.parametrize(("device", "platform"), [("cpu", "cpu"), ("cuda", "nvidia")])
def test_verl_is_told_its_platform_before_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, device: str, platform: str
) -> None:
    told: list[str] = []

    def ask() -> str:
        told.append(os.environ["VERL_PLATFORM"])
        return device

    monkeypatch.setenv("VERL_PLATFORM", "")
    monkeypatch.setattr(process, "get_device_name", ask)
    prepare_verl(device, option=OPTION)
    assert set(told) == {platform}


def test_a_platform_that_verl_does_not_find_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "")
    monkeypatch.setattr(process, "get_device_name", lambda: "cuda")
    with pytest.raises(ConfigError, match="device asks for cpu, but veRL found cuda; install"):
        prepare_verl("cpu", option=OPTION)


def test_another_release_of_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verl, "__version__", "0.8.0")
    with pytest.raises(ConfigError, match="0.8.0 is installed.*; install verl==0.9.1"):
        prepare_verl("cpu", option=OPTION)


def test_what_verl_prints_and_logs_goes_to_a_file(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = root.handlers[:]
    streams = sys.stdout, sys.stderr
    (tmp_path / "verl.log").write_text("of the run before\n")
    with pytest.raises(KeyError), divert_output(tmp_path):
        sys.stdout.write("printed\n")
        sys.stderr.write("complained\n")
        # a handler that exists already would still write to the console
        (handler,) = root.handlers
        assert isinstance(handler, logging.StreamHandler)
        logging.getLogger("verl.trainer").error("logged")
        raise KeyError
    assert root.handlers == before
    assert (sys.stdout, sys.stderr) == streams
    said = (tmp_path / "verl.log").read_text().splitlines()
    assert said == ["of the run before", "printed", "complained", "logged"]
