"""The language of code and pages: measures that a newcomer notices first."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted(p for top in ("verl_vla", "rewards") for p in (ROOT / top).rglob("*.py"))
QUESTIONS = {"What", "Where", "How", "Whether"}
PREPOSITIONS = {
    *("Of", "In", "For", "From", "With", "By", "At", "To", "On", "Under", "After", "Before"),
    *("Over", "Between", "Besides", "Within", "As", "Since", "Around", "Above", "Below"),
}
MAX_QUESTIONS, MAX_PREPOSITIONS = 0.02, 0.01
"""Shares of docstrings, and of attribute docs."""
MAX_LINE = 100


def docstrings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def attribute_docs(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        for before, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(before, (ast.Assign, ast.AnnAssign))
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                yield after.value.value


def first_word(text: str) -> str:
    return text.split()[0].strip("`,.:;")


@pytest.fixture(scope="module")
def trees() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in CODE]


def test_docstrings_say_what_a_thing_does_or_is(trees: list[ast.Module]) -> None:
    found = [text for tree in trees for text in docstrings(tree)]
    asking = [text.splitlines()[0] for text in found if first_word(text) in QUESTIONS]
    assert len(found) > 1000
    assert len(asking) < MAX_QUESTIONS * len(found), "\n".join(asking)


def test_attribute_docs_are_noun_phrases(trees: list[ast.Module]) -> None:
    found = [text for tree in trees for text in attribute_docs(tree)]
    hanging = [t.splitlines()[0] for t in found if first_word(t) in PREPOSITIONS | QUESTIONS]
    assert len(found) > 500
    assert len(hanging) < MAX_PREPOSITIONS * len(found), "\n".join(hanging)


def test_lines_of_pages_fit_a_screen() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this folder is not a git checkout, so what belongs to it is not known")
    listing = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    offenders = [
        f"{name}:{number}"
        for name in listing
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1)
        if len(line) > MAX_LINE
    ]
    assert not offenders, "\n".join(offenders)


def test_names_are_imported_from_where_they_are_defined() -> None:
    again = [
        f"{path.relative_to(ROOT)}: {alias.name}"
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    ]
    assert not again, "\n".join(again)
