"""``check-suite`` on a suite that takes no simulator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from documented_suite import write_documented_suite

from verl_vla.cli import check_suite
from verl_vla.cli.arguments import parse
from verl_vla.core.errors import ConfigError
from verl_vla.envs.registry import suite

BROKEN = '''

class HalfBroken(TwoArms):
    """One of its tasks cannot be begun."""

    def make_env(self, config):
        env = super().make_env(config)
        begin = env.reset

        def reset(task_id, init_state_id):
            if task_id == 1:
                raise ValueError("no such motor\\nin detail")
            return begin(task_id, init_state_id)

        env.reset = reset
        return env
'''


@pytest.fixture
def half_broken(tmp_path: Path) -> str:
    path = Path(write_documented_suite(tmp_path).rpartition(":")[0])
    path.write_text(path.read_text() + BROKEN)
    return f"{path}:HalfBroken"


def test_a_fault_that_no_suite_foresaw_is_an_exit_code(half_broken: str, tmp_path: Path) -> None:
    out = tmp_path / "checks.json"
    assert (
        check_suite.run(parse("check-suite", ["--suite", half_broken, "--out", str(out)]))
        == check_suite.EXIT_FAULTY
    )
    found = json.loads(out.read_text())
    assert [check["task"] for check in found] == list(range(len(suite(half_broken).tasks)))
    assert [check["fault"] for check in found if check["task"] != 1] == [None] * (len(found) - 1)
    assert found[1]["fault"] == "ValueError: no such motor"
    assert not found[1]["foreseen"]


def test_every_so_many_of_the_tasks_are_checked(half_broken: str, tmp_path: Path) -> None:
    out = tmp_path / "checks.json"
    words = ["--suite", half_broken, "--every", "2", "--out", str(out)]
    assert check_suite.run(parse("check-suite", words)) == 0
    found = json.loads(out.read_text())
    assert [check["task"] for check in found] == list(range(0, len(suite(half_broken).tasks), 2))
    assert len(found) > 1


def test_what_cannot_be_checked_is_refused(half_broken: str) -> None:
    with pytest.raises(ConfigError, match="--every is 0; set at least 1"):
        check_suite.run(parse("check-suite", ["--suite", half_broken, "--every", "0"]))
    with pytest.raises(ConfigError, match="task 99 is not in two_arms"):
        check_suite.run(parse("check-suite", ["--suite", half_broken, "--tasks", "0", "99"]))
