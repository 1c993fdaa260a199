"""The Modal wrapper: what it rents, and that a run of more than a day goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from verl_vla.cli import plan as plan_command
from verl_vla.cli.arguments import parse
from verl_vla.core.plugins import import_file
from verl_vla.diagnostics.planning.plan import CORES_BESIDE

ROOT = Path(__file__).resolve().parents[3]
WRAPPER = ROOT / "scripts" / "cloud" / "modal_train.py"


class Function:
    """A function on Modal, which runs here."""

    def __init__(self, call: Callable[..., Any], options: dict[str, Any]) -> None:
        self.options, self._call = options, call
        self.asked: list[dict[str, Any]] = []

    def with_options(self, **options: Any) -> Function:
        self.asked.append(options)
        return self

    def remote(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class App:
    def __init__(self, _: str) -> None:
        pass

    def function(self, **options: Any) -> Callable[[Any], Function]:
        return lambda call: Function(call, options)

    def local_entrypoint(self) -> Callable[[Any], Any]:
        return lambda call: call


class Image:
    """Every step of building an image gives an image."""

    def __getattr__(self, _: str) -> Callable[..., Image]:
        return lambda *_, **__: self


@pytest.fixture
def wrapper(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    modal: Any = ModuleType("modal")
    modal.App, modal.Image = App, Image()
    modal.Volume = SimpleNamespace(from_name=lambda *_, **__: None)
    modal.Retries = lambda **options: options
    monkeypatch.setitem(sys.modules, "modal", modal)
    return import_file(WRAPPER)


class Commands(list[list[str]]):
    """The commands that would run on Modal, and the code that each ends with."""

    code = 0

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.append(command)
        counted = json.dumps({"host_cores": 11, "host_bytes": 44 * 10**9})
        return subprocess.CompletedProcess(command, self.code, counted)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    ran = Commands()
    monkeypatch.setattr(subprocess, "run", ran.run)
    return ran


GIVEN = "profile=qlora_24gb suite=spatial"


def test_processors_and_memory_are_those_of_the_plan(
    wrapper: ModuleType, commands: Commands
) -> None:
    with pytest.raises(SystemExit) as end:
        wrapper.main(gpu="A10G", words=GIVEN)
    assert end.value.code == 0
    (rented,) = wrapper.train.asked
    assert rented == {"gpu": "A10G", "cpu": 5.5, "memory": 44 * 10**9 // 2**20}
    planned, trained = commands
    assert planned == ["python", "-m", "verl_vla", "plan", "recipe=libero", *GIVEN.split(),
                       "--gpu", "h200", "--json"]  # fmt: skip
    assert trained[-3:] == ["recipe=libero", *GIVEN.split()]


def test_a_run_is_stopped_before_modals_day_is_over(
    wrapper: ModuleType, commands: Commands
) -> None:
    wrapper.train.remote(GIVEN.split())
    command, signal, kill, limit, *_ = commands[0]
    assert (command, signal) == ("timeout", "--signal=TERM")
    assert int(limit) + int(kill.partition("=")[2]) < wrapper.train.options["timeout"] == 24 * 3600
    # by the plan, a step of the slowest profile takes 55 minutes
    assert wrapper.train.options["timeout"] - int(limit) >= 3 * 55 * 60
    assert wrapper.train.options["retries"]["max_retries"] == 10


@pytest.mark.parametrize("code", [0, 2, 6, 143])
def test_only_a_day_that_is_over_is_tried_again(
    wrapper: ModuleType, commands: Commands, code: int
) -> None:
    """Modal tries again what raises; a recipe that is refused would cost ten starts."""
    commands.code = code
    assert wrapper.train.remote(GIVEN.split()) == code
    commands.code = 124
    with pytest.raises(AssertionError, match="goes on in a new container"):
        wrapper.train.remote(GIVEN.split())


def test_the_stop_is_what_timeout_sends() -> None:
    """GNU's timeout ends with 124 also where the command ends by itself after the signal."""
    done = subprocess.run(
        ["timeout", "--signal=TERM", "--kill-after=9", "0.2", "bash", "-c",
         "trap 'echo saved; exit 143' TERM; sleep 5 & wait"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    # timeout signals the command and then its group, so that a slow trap may run twice
    assert (done.returncode, set(done.stdout.splitlines())) == (124, {"saved"})


def test_the_plan_counts_a_core_for_every_busy_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["recipe=libero", "suite=mini", "profile=two_cores", "policy.path=bases/mini"]
    assert plan_command.run(parse("plan", [*words, "--json"])) == 0
    sums = json.loads(capsys.readouterr().out)
    simulators, ranks = 2, 1
    assert sums["host_cores"] == simulators + ranks + CORES_BESIDE
    assert sums["host_bytes"] > 1e9
    assert sums["fits"] is True
    assert sums["step_seconds"] is None
    assert sums["disk_bytes"] > 0
