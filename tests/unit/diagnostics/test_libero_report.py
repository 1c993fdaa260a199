"""``doctor --libero``: what it adds to the simulator's check, and how it answers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from verl_vla.cli import doctor as verb
from verl_vla.cli.arguments import parse
from verl_vla.cli.main import main
from verl_vla.core.errors import ConfigError
from verl_vla.core.image_preprocessing import prepare_image
from verl_vla.diagnostics import libero_report
from verl_vla.diagnostics.libero_check import Check
from verl_vla.diagnostics.libero_report import (
    ATTENTION,
    HEAD,
    SCALE,
    golden_frame,
    judge_assets,
    judge_image_pipeline,
    judge_policy,
)
from verl_vla.envs.libero.assets import ASSETS_VARIABLE, find_assets
from verl_vla.policies.checks import Finding
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tiny_policy

SIZES = TinySizes(image_size=28, vision_width=12, llm_width=16, llm_depth=1, llm_mlp=16)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of a published checkpoint of LIBERO-Spatial."""
    folder = tmp_path_factory.mktemp("published") / "policy"
    statistics = ActionStatistics(
        q01=-np.ones(7),
        q99=np.ones(7),
        mask=np.array([True] * 6 + [False]),
        key="libero_spatial_no_noops",
    )
    build_tiny_policy(["lift it"], statistics, sizes=SIZES).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "policy"))


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    """LIBERO's own, by links, so that a test can take one away."""
    own, folder = find_assets(), tmp_path / "assets"
    return Path(shutil.copytree(own, folder, copy_function=os.symlink))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, assets: Path) -> None:
    """A simulator that is LIBERO's, without running it."""
    monkeypatch.delenv(ASSETS_VARIABLE, raising=False)
    monkeypatch.setattr(libero_report, "find_assets", lambda: assets)
    same = [Check("mujoco", "3.3.2", "2.3.7 to 3.3.2")]
    monkeypatch.setattr(libero_report, "run_simulator_check", lambda assets: same)


def stand_in(assets: Path) -> None:
    """Something else in place of one of LIBERO's files."""
    file = assets / "articulated_objects" / "basin_faucet.xml"
    file.unlink()
    file.write_text("<mujoco/>")


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def found(checks: list[Check]) -> dict[str, Check]:
    return {check.subject: check for check in checks if check.differs}


def test_a_published_layout_is_sound_and_says_what_it_is(published: Path) -> None:
    checks = judge_policy(published, suite="libero_spatial")
    assert found(checks) == {}
    here = {check.subject: check.here for check in checks}
    assert "both directions" in here["policy: attention"]
    assert here["policy: action head"] == "no regression head beside the weights"
    assert here["policy: views"] == "1"
    assert here["policy: statistics' key"] == "libero_spatial_no_noops"
    assert here["policy: gripper mask"] == "xxxxxx-"


def test_statistics_of_another_robot_are_found(folder: Path) -> None:
    statistics = folder / "dataset_statistics.json"
    edit(statistics, lambda c: c.update(bridge_orig=c["libero_spatial_no_noops"]))
    (check,) = found(judge_policy(folder, "bridge_orig")).values()
    assert check.subject == "policy: statistics' key"
    assert check.here == "bridge_orig"
    assert check.effect == SCALE
    assert "--unnorm-key" in check.remedy
    assert "['bridge_orig', 'libero_spatial_no_noops']" in check.remedy
    assert found(judge_policy(folder, "libero_spatial")) == {}


def test_statistics_of_another_suite_are_found_where_the_suite_is_named(published: Path) -> None:
    (check,) = found(judge_policy(published, suite="libero_object")).values()
    assert check.libero == "libero_object or libero_4_task_suites"


def test_a_key_that_is_not_there_is_found(published: Path) -> None:
    (check,) = found(judge_policy(published, "libero_object")).values()
    assert check.subject == "policy: action statistics"
    assert check.effect == SCALE
    assert "choose one of ['libero_spatial_no_noops']" in check.remedy


def test_a_normalised_gripper_is_found(folder: Path) -> None:
    name = "libero_spatial_no_noops"
    file = folder / "dataset_statistics.json"
    # the gripper in place of a value of the motion
    edit(file, lambda c: c[name]["action"].update(mask=[False] + [True] * 6))
    (check,) = found(judge_policy(folder)).values()
    assert (check.subject, check.here) == ("policy: gripper mask", "-xxxxxx")
    assert name in check.remedy
    # what no robot can use is a fault of the folder itself
    edit(file, lambda c: c[name]["action"].update(mask=[True] * 7))
    (check,) = found(judge_policy(folder)).values()
    assert check.subject == "policy: action statistics"
    assert name in check.remedy and "never closes" in check.remedy


def test_three_views_are_none_that_was_published(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(num_images_in_input=3))
    (check,) = found(judge_policy(folder)).values()
    assert (check.subject, check.here) == ("policy: views", "3")


def test_a_regression_head_comes_first_and_hides_nothing(folder: Path) -> None:
    (folder / "action_head--150000_checkpoint.pt").write_bytes(b"")
    differing = found(judge_policy(folder, suite="libero_goal"))
    assert set(differing) == {"policy: action head", "policy: statistics' key"}
    head = differing["policy: action head"]
    assert head.effect == HEAD
    assert head.effect.points > SCALE.points
    assert "use_l1_regression False" in head.remedy


def test_causal_attention_has_its_published_effect(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal = Finding(subject="attention", says="causal; set is_causal False", is_fault=True)
    monkeypatch.setattr(libero_report, "examine", lambda folder, key: [causal])
    check = found(judge_policy(published))["policy: attention"]
    assert check.effect == ATTENTION
    assert check.remedy == causal.says


def test_a_folder_that_is_none_is_found(tmp_path: Path) -> None:
    (check,) = found(judge_policy(tmp_path / "nowhere")).values()
    assert "is not a folder" in check.remedy


def test_the_image_pipeline_gives_tensorflows_bytes_and_others_are_found() -> None:
    assert golden_frame().shape == (256, 256, 3)
    assert not judge_image_pipeline(prepare_image(golden_frame())).differs
    for options in ({"jpeg": False}, {"crop_area": 1.0}):
        check = judge_image_pipeline(prepare_image(golden_frame(), **options))
        assert check.differs
        assert "requirements/run.lock" in check.remedy


def test_one_asset_of_another_content_is_named(assets: Path) -> None:
    assert not judge_assets(assets).differs
    stand_in(assets)
    check = judge_assets(assets)
    assert check.differs
    assert "1 files not LIBERO's, the first articulated_objects/basin_faucet.xml" in check.here


def test_an_empty_folder_holds_no_assets(tmp_path: Path) -> None:
    check = judge_assets(tmp_path)
    assert check.differs
    assert "files absent, the first articulated_objects/" in check.here


@pytest.mark.usefixtures("quick")
def test_the_command_says_that_this_is_libero(
    published: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="verl_vla")
    assert verb.run(parse("doctor", ["--libero", "--policy", str(published)])) == 0
    assert caplog.messages[-1] == "this is LIBERO"


@pytest.mark.usefixtures("quick")
def test_the_command_lists_what_differs_by_effect(
    folder: Path,
    assets: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="verl_vla")
    monkeypatch.setenv(ASSETS_VARIABLE, str(assets))
    stand_in(assets)
    words = ["--libero", "--policy", str(folder), "--suite", "libero_10"]
    assert verb.run(parse("doctor", words)) == verb.EXIT_FAULT
    text = caplog.text
    assert "2 of 14 differ from LIBERO" in text
    first, second = text.index("1. --unnorm-key"), text.index(f"2. unset {ASSETS_VARIABLE}")
    assert first < second


@pytest.mark.usefixtures("quick")
def test_scripts_read_json(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # as a shell calls it: with the handler that writes our own lines to stdout
    assert main(["doctor", "--libero", "--json"]) == 0
    said = capsys.readouterr()
    assert "running six tasks" in said.err
    checks = json.loads(said.out)["checks"]
    assert [check["subject"] for check in checks] == ["mujoco", "all assets", "image pipeline"]
    file = tmp_path / "answer.json"
    words = ["--libero", "--json", str(file), "--policy", str(published), "--unnorm-key", "x"]
    assert verb.run(parse("doctor", words)) == verb.EXIT_FAULT
    (differing,) = (check for check in json.loads(file.read_text())["checks"] if check["differs"])
    assert differing["effect"] == SCALE._asdict()


def test_json_of_the_machine_alone_and_a_suite_of_another_project_are_refused() -> None:
    with pytest.raises(ConfigError, match="add --libero"):
        verb.run(parse("doctor", ["--json", "answer.json"]))
    with pytest.raises(ConfigError, match="did you mean 'libero_spatial'"):
        verb.run(parse("doctor", ["--libero", "--suite", "libero_spacial"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fix", "--images", "3"], "--fix True, --images 3: not used by --libero"),
        (["--render-size", "64"], "--render-size 64: not used"),
        (["--policy", "nowhere"], "--policy is nowhere, which is not a folder"),
        (["--json", "nowhere/answer.json"], "there is no folder nowhere"),
        (["--json", "."], "is a folder; name a file in it"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_run(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []
    monkeypatch.setattr(libero_report, "run_simulator_check", ran.append)
    with pytest.raises(ConfigError, match=said):
        verb.run(parse("doctor", ["--libero", *words]))
    assert not ran


def test_assets_that_are_nowhere_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ASSETS_VARIABLE, raising=False)
    monkeypatch.setattr(libero_report, "assets_available", lambda: False)
    downloaded: list[object] = []
    monkeypatch.setattr(libero_report, "find_assets", lambda: downloaded.append(0))
    with pytest.raises(ConfigError, match="not on this machine; pip install"):
        verb.run(parse("doctor", ["--libero"]))
    assert not downloaded


def test_a_check_that_does_not_end_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "check.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(libero_report.libero_check, "__file__", str(script))
    monkeypatch.setattr(libero_report, "CHECK_LIMIT_S", 0.5)
    with pytest.raises(ConfigError, match=r"no answer in 0\.5 s.*See where it stays with: python"):
        libero_report.run_simulator_check(tmp_path)


def test_the_traceback_that_the_remedy_names_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"measured": {"failure": "ValueError: no texture"}, "checks": []}
    script = tmp_path / "check.py"
    script.write_text(
        f"import pathlib, sys\npathlib.Path(sys.argv[-1]).write_text({json.dumps(answer)!r})\n"
        "sys.stderr.write('Traceback: no texture')\n"
    )
    monkeypatch.setattr(libero_report.libero_check, "__file__", str(script))
    assert libero_report.run_simulator_check(tmp_path) == []
    assert "Traceback: no texture" in capsys.readouterr().err


def test_a_check_without_an_answer_says_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "check.py"
    script.write_text("raise SystemExit('libero is not installed')\n")
    monkeypatch.setattr(libero_report.libero_check, "__file__", str(script))
    with pytest.raises(ConfigError, match=r"ended with 1 \(libero is not installed\)"):
        libero_report.run_simulator_check(tmp_path)
