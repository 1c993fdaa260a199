"""docs/how-to-make-a-base.md: every command in it is one that its verb would begin to carry out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from verl_vla.cli.arguments import COMMANDS, parse
from verl_vla.config.compose import load_recipe
from verl_vla.config.sft import load_sft_recipe

PAGE = Path(__file__).resolve().parents[3] / "docs" / "how-to-make-a-base.md"
CALL = "python -m verl_vla "


def commands() -> list[str]:
    """The lines of the page's bash blocks, each joined where it continues on the next."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix(CALL) for line in lines if line.strip()]


def test_every_code_line_is_a_command() -> None:
    assert len(commands()) > 10
    assert {command.split()[0] for command in commands()} <= COMMANDS.keys()


@pytest.mark.parametrize("command", commands())
def test_a_command_is_understood(command: str) -> None:
    verb, *words = shlex.split(command, comments=True)
    if not any(word.startswith("recipe=") for word in words):
        parse(verb, words)
    elif verb == "sft":
        load_sft_recipe(words)
    else:
        assert verb == "train"
        load_recipe(words)


def headings(page: Path) -> set[str]:
    """The anchors that a page's headings have, as GitHub and MkDocs name them."""
    titles = re.findall(r"^##+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_file_and_heading_that_the_page_names_exists() -> None:
    links = re.findall(r"\]\((\S+?)\)", PAGE.read_text())
    assert links
    for link in links:
        file, _, heading = link.partition("#")
        page = PAGE.parent / file if file else PAGE
        assert page.is_file(), link
        assert not heading or heading in headings(page), link
