"""The scripts with which shells complete a command line."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from verl_vla.cli.arguments import COMMANDS, SHELLS
from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.config.compose import recipe_names

BASH = shutil.which("bash")
assert BASH is not None


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> str:
    assert main(["completion", request.param]) == 0
    return capsys.readouterr().out


def offered(script: str, *words: str) -> list[str]:
    """What bash offers for the last of the words, as it splits them."""
    line = " ".join(words).replace(" =", "=").replace("= ", "=")
    listed = " ".join(f"'{word}'" for word in words)
    program = (
        f"{script}\nCOMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; "
        "COMP_POINT=${#COMP_LINE}; _shtab_verl_vla; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run([BASH, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(("script", "shell"), [(s, s) for s in SHELLS], indirect=["script"])
def test_each_shell_reads_its_script(script: str, shell: str) -> None:
    assert all(command in script for command in COMMANDS)
    assert all(f"recipe={name}" in script for name in (*recipe_names(), "sft_mini"))
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("script", ["bash"], indirect=True)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ex"], ["explain"]),
        (["eval", "--temp"], ["--temperature"]),
        (["eval", "--protocol", ""], ["published"]),
        (["eval", "--suite", "libero_s"], ["libero_spatial"]),
        (["demos", "--seed", "0", "--ta"], ["--tasks"]),
        (["bench", "ro"], ["rollout"]),
        (["completion", ""], list(SHELLS)),
        (["train", "recipe=ro"], ["recipe=robotwin"]),
        (["train", "recipe", "=", "ro"], ["robotwin"]),
        (["train", "recipe", "="], recipe_names()),
        (["train", "recipe", "=", "libero", "suite", "=", "sp"], ["spatial"]),
        (["plan", "recipe", "=", "libero", "--gpu", "h2"], ["h200"]),
        (["sft", "recipe", "=", "sft_m"], ["sft_mini"]),
    ],
)
def test_bash_offers_what_can_follow(script: str, words: list[str], expected: list[str]) -> None:
    assert offered(script, "verl-vla", *words) == expected


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_bash_offers_paths(script: str, tmp_path: object) -> None:
    assert f"{tmp_path}" in offered(script, "verl-vla", "eval", "--policy", f"{tmp_path}"[:-1])


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["completion", "tcsh"])
    assert stopped.value.code == EXIT_USAGE
    assert "bash" in capsys.readouterr().err
