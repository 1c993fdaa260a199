"""The trials of faults, with a training that takes no time: what they see and what they say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from verl_vla.cli.chaos import RESULT, row
from verl_vla.cli.main import EXIT_CHECKPOINT, EXIT_USAGE, main
from verl_vla.core.errors import EXIT_REWARD
from verl_vla.diagnostics.chaos import faults, trial
from verl_vla.diagnostics.chaos.comparison import differing
from verl_vla.diagnostics.chaos.experiment import Fault, run_trial, send
from verl_vla.diagnostics.chaos.faults import FAULTS
from verl_vla.diagnostics.chaos.trial import BASE_STEP, LAST_STEP, Trial, train_undisturbed
from verl_vla.runs.metrics import read_metrics

HERE = Path(__file__).parent
KILLED = Fault(disturb=send(signal.SIGKILL), exit_code=-signal.SIGKILL, says="training")


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PROGRAM", (sys.executable, str(HERE / "training_stub.py")))
    monkeypatch.setattr(trial, "NOTE_EVERY_S", 0.02)
    monkeypatch.setattr(trial, "CHILDREN_LIMIT_S", 1.0)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parents[1]), str(HERE)]))
    monkeypatch.setenv("COMMAND", "")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """The undisturbed run, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "PROGRAM", (sys.executable, str(HERE / "training_stub.py")))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parents[1]), str(HERE)]))
        patch.setenv("COMMAND", "")
        return train_undisturbed(tmp_path_factory.mktemp("chaos"))


@pytest.fixture
def undisturbed(trained: Trial, tmp_path: Path) -> Trial:
    copy = Trial(tmp_path, "undisturbed")
    shutil.copytree(trained.folder, copy.folder, symlinks=True)
    return copy


def test_a_run_that_is_killed_and_resumes_as_if_nothing_had_happened_passes(
    undisturbed: Trial,
) -> None:
    verdict = run_trial(undisturbed, "the run is killed", KILLED)
    assert verdict.complaints == ()
    assert (verdict.exit_code, verdict.equal) == (-signal.SIGKILL, True)
    assert row(verdict).startswith("the run is killed | -9 | ")
    steps = [line["step"] for line in read_metrics(undisturbed.folder / "metrics.jsonl")]
    assert steps == [*range(1, LAST_STEP + 1)]


def test_a_trial_begins_after_the_base_step_and_its_reward_waits(undisturbed: Trial) -> None:
    seen: list[list[int]] = []

    def look(disturbed: Trial) -> None:
        seen.append([step for step in range(9) if disturbed.checkpoint(step).exists()])
        os.kill(disturbed.pid, signal.SIGKILL)

    fault = Fault(disturb=look, exit_code=-signal.SIGKILL, says="training")
    assert run_trial(undisturbed, "looked at", fault).complaints == ()
    assert seen == [[*range(1, BASE_STEP + 1)]]


@pytest.mark.parametrize(
    ("command", "fault", "complaint"),
    [
        ("drift", KILLED, "other weights"),
        ("", Fault(disturb=send(signal.SIGTERM), exit_code=143, says=""), "exit code -15 instead"),
        ("", Fault(exit_code=0, says="nobody says this"), "it does not say 'nobody says this'"),
        ("", Fault(exit_code=0, says="", keeps_folder=True), "the folder was changed"),
        ("", Fault(exit_code=0, says="", lost_episodes=True), "other metrics"),
    ],
)
def test_what_is_not_as_it_should_be_is_said(
    undisturbed: Trial,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    fault: Fault,
    complaint: str,
) -> None:
    monkeypatch.setenv("COMMAND", command)
    if fault.lost_episodes:
        line = '{"step": 3, "env/crashes": 7}\n'
        (undisturbed.folder / "metrics.jsonl").write_text(line * LAST_STEP)
    complaints = run_trial(undisturbed, "a fault", fault).complaints
    assert any(complaint in found for found in complaints), complaints


def test_a_child_that_outlives_its_run_is_seen_and_ended(
    undisturbed: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMAND", "orphan")
    seen: list[Trial] = []

    def kill(disturbed: Trial) -> None:
        seen.append(disturbed)
        os.kill(disturbed.pid, signal.SIGKILL)

    fault = Fault(disturb=kill, exit_code=-signal.SIGKILL, says="training")
    verdict = run_trial(undisturbed, "an orphan", fault)
    assert verdict.complaints == ("a child is left",)
    assert verdict.children_s is None
    assert " | no | " in row(replace(verdict, fault="SIGTERM"))
    assert not seen[0]._left(), "it is left after the trial too"


def test_a_training_that_ends_before_its_fault_spoils_no_other_trial(
    undisturbed: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "PROGRAM", (sys.executable, "-c", "print('no memory')"))
    verdict = run_trial(undisturbed, "SIGTERM", KILLED)
    assert verdict.complaints == ("the moment for the fault did not come: ['no memory']",)
    assert row(verdict) == "SIGTERM | too early | 0 | no | no"


def test_a_faulty_reward_is_put_right_before_the_run_is_resumed(undisturbed: Trial) -> None:
    fault = Fault(reward_line="raise ValueError", exit_code=EXIT_REWARD, says="training")
    assert run_trial(undisturbed, "a reward", fault).complaints == ()


DAMAGES = [name for name, fault in FAULTS.items() if fault.damage and fault.repair]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_repair_undoes_its_damage(undisturbed: Trial, name: str) -> None:
    for step in range(1, BASE_STEP + 1):
        (undisturbed.checkpoint(step) / "manifest.json").write_text("{}")
    kept = {
        file: file.read_bytes()
        for file in undisturbed.folder.rglob("*")
        # videos are written again
        if file.is_file() and file.suffix != ".webp"
    }
    damage, repair = FAULTS[name].damage, FAULTS[name].repair
    assert damage is not None
    assert repair is not None
    damage(undisturbed)
    repair(undisturbed)
    assert {file: file.read_bytes() for file in kept} == kept


def test_a_disk_that_is_full_is_full_for_videos_alone(undisturbed: Trial) -> None:
    faults.fill_disk(undisturbed)
    with pytest.raises(OSError, match="No space left"):
        (undisturbed.folder / "episodes" / "episode_9.webp").write_text("a video")


def test_two_runs_differ_where_they_do(undisturbed: Trial) -> None:
    other = Trial(undisturbed.folder.parent, "other")
    shutil.copytree(undisturbed.folder, other.folder, symlinks=True)
    assert differing(undisturbed, other, but_last=False) == []
    log = other.folder / "episodes.jsonl"
    log.write_text(log.read_text().replace('"steps": 20', '"steps": 21', 1))
    metrics = other.folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("0.5", "0.5000001", 1))
    (other.checkpoint(LAST_STEP) / "policy" / "model.safetensors").unlink()
    found = differing(undisturbed, other, but_last=False)
    assert found == ["other metrics", "other episodes", "other weights"]


def test_the_command_prints_a_table_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FAULTS, "the run is killed", KILLED)
    monkeypatch.setitem(FAULTS, "SIGTERM", Fault(exit_code=9, says="training"))
    out = tmp_path / "chaos"
    words = ["chaos", "--out", str(out), "--faults", "the run is killed", "SIGTERM"]
    assert main(words) == 1
    said = capfd.readouterr().out
    assert "the run is killed | -9 | " in said
    assert "1 of 2 as they should be" in said
    assert "SIGTERM: exit code 0 instead of 9" in said
    record = json.loads((out / RESULT).read_text())
    assert [each["fault"] for each in record["trials"]] == words[-2:]
    assert record["versions"]["ray"]
    assert main(words) == EXIT_USAGE
    assert "is not empty; choose a new folder" in capfd.readouterr().err


def test_an_unknown_fault_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "chaos"
    assert main(["chaos", "--out", str(out), "--faults", "SIGTREM"]) == EXIT_USAGE
    assert "did you mean 'SIGTERM'?" in capfd.readouterr().err
    assert not out.exists()


def test_the_exit_codes_are_those_of_the_command_line() -> None:
    assert (faults.EXIT_USAGE, faults.EXIT_CHECKPOINT) == (EXIT_USAGE, EXIT_CHECKPOINT)
