"""The rules that the project sets itself and no other gate checks."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import tomllib
import yaml

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted(p for top in ("verl_vla", "rewards") for p in (ROOT / top).rglob("*.py"))
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
LAUNCHERS = [path for path in SCRIPTS if not path.name.startswith("_")]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
BORDER = ROOT / "verl_vla" / "trainer"
FRAMEWORK_FREE = {"core", "config", "rl", "rewards", "runs", "datasets", "evaluation"}
FRAMEWORKS = {"verl", "ray", "transfer_queue"}
OURS = {"verl_vla", "rewards"}
PACKAGE_OF = {
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "hydra": "hydra-core",
    "libero": "hf-libero",
    "transfer_queue": "transferqueue",
    "typing_extensions": "typing-extensions",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""The package on an index, where a module has another name."""
MAX_FILE_LINES = 400
MAX_LINES_OF = {"verl_vla/diagnostics/libero_check.py": 450}
"""Users of other projects run it alone, with LIBERO's numbers in it, so it cannot be split."""
MAX_LAUNCHER_LINES = 30

# A folder that exists on one machine only, at the start of a path; written so that the pattern
# does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.$}/~-])/(?:work|farm|root|tmp|home/\w+)(?=/[\w.-])")
INDEX_ADDRESS = re.compile(
    r"https?://\S+/(?:simple|packages)\b|\bpypi\.(?:org|python)|pythonhosted"
)

LATE_IMPORT = re.compile(r"# noqa: .*\bPLC0415 -- \w+")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every text file that git tracks or would track."""
    if not (ROOT / ".git").exists():
        pytest.skip("this folder is not a git checkout, so what belongs to it is not known")
    listing = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    contents: dict[str, str] = {}
    for name in filter(None, listing.split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in data:
            contents[name] = data.decode(errors="replace")
    return contents


def lines_that(texts: dict[str, str], offend: re.Pattern[str]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if offend.search(line)
    ]


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def place(path: Path, node: ast.expr | ast.stmt) -> str:
    return f"{relative(path)}:{node.lineno}: {ast.unparse(node)[:100]}"


def imported(path: Path) -> set[str]:
    """The modules that ``path`` names in absolute imports, wherever they stand."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


def expect_none(offenders: Iterable[str]) -> None:
    found = list(offenders)
    assert not found, "\n" + "\n".join(found)


def top_levels(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def is_silent_default(node: ast.Call) -> bool:
    if isinstance(node.func, ast.Name):
        return node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
    if not isinstance(node.func, ast.Attribute) or node.func.attr not in ("get", "getenv"):
        return False
    table_is_argument = ast.unparse(node.func) == "tu.get"  # veRL's tensordict_utils
    has_default = len(node.args) == (3 if table_is_argument else 2)
    return has_default or any(keyword.arg == "default" for keyword in node.keywords)


def undocumented(node: ast.AST) -> Iterator[str]:
    """Public functions, methods and classes under ``node`` that have no docstring."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        is_setter = any(ast.unparse(mark).endswith(".setter") for mark in child.decorator_list)
        if child.name.startswith("_") or is_setter:
            continue
        if ast.get_docstring(child) is None:
            yield f"{child.name} (line {child.lineno})"
        if isinstance(child, ast.ClassDef):
            yield from (f"{child.name}.{name}" for name in undocumented(child))


@pytest.mark.parametrize(
    ("line", "offends"),
    [
        ("cd /wo" + "rk/main", True),
        ("path='/ho" + "me/someone/data'", True),
        ("--out=/tm" + "p/run", True),
        ("tests/work/data", False),
        ("~/tmp/run", False),
        ("the word work/life", False),
    ],
)
def test_a_machine_path_is_told_from_a_relative_one(line: str, offends: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) == offends


@pytest.mark.parametrize(
    ("source", "silent"),
    [
        ("values.get('key', 1)", True),
        ("values.get('key', default=1)", True),
        ("os.getenv('KEY', '')", True),
        ("getattr(thing, 'name', None)", True),
        ("hasattr(thing, 'name')", True),
        ("values.get('key')", False),
        ("getattr(thing, name)", False),
        ("queue.get(timeout=1)", False),
        ("tu.get(table, 'key')", False),
        ("tu.get(table, 'key', 0)", True),
    ],
)
def test_a_silent_default_is_told_from_a_plain_look_up(source: str, silent: bool) -> None:
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call)
    assert is_silent_default(call) == silent


def test_no_file_names_a_folder_of_one_machine(texts: dict[str, str]) -> None:
    expect_none(lines_that(texts, MACHINE_PATH))


def test_no_file_names_a_package_index(texts: dict[str, str]) -> None:
    named = {name: text for name, text in texts.items() if name != relative(Path(__file__))}
    expect_none(lines_that(named, INDEX_ADDRESS))


def test_no_silent_default() -> None:
    expect_none(
        place(path, node)
        for path in CODE
        for node in nodes(path)
        if isinstance(node, ast.Call) and is_silent_default(node)
    )


def test_imports_stand_at_the_top_or_say_why_not() -> None:
    expect_none(
        place(path, node)
        for path in CODE
        for function in nodes(path)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and not LATE_IMPORT.search(path.read_text().splitlines()[node.lineno - 1])
    )


def test_every_public_name_has_a_docstring() -> None:
    expect_none(
        f"{relative(path)}: {name}"
        for path in CODE
        for name in undocumented(ast.parse(path.read_text()))
    )


def test_a_file_fits_a_sitting() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in CODE}
    expect_none(
        f"{name}: {length} lines"
        for name, length in lengths.items()
        if length > (MAX_LINES_OF[name] if name in MAX_LINES_OF else MAX_FILE_LINES)
    )


def test_only_the_border_imports_a_framework() -> None:
    outside = (path for path in CODE if not path.is_relative_to(BORDER))
    expect_none(relative(path) for path in outside if top_levels(path) & FRAMEWORKS)


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[^\w.-]", line)[0].lower() for group in groups for line in group}
    used = set[str]().union(*map(top_levels, CODE)) - sys.stdlib_module_names - OURS
    packages = (PACKAGE_OF[name] if name in PACKAGE_OF else name for name in sorted(used))
    expect_none(f"{name} is not in pyproject.toml" for name in packages if name not in declared)


def test_page_contract_and_tree_have_the_same_rooms() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [sorted(layer.split(" | ")) for layer in contracts["contracts"][0]["layers"]]
    rooms = {room for layer in layers for room in layer} - {"__main__"}
    package = ROOT / "verl_vla"
    assert rooms == {path.parent.name for path in package.glob("*/__init__.py")}
    assert {path.name for path in package.glob("*.py")} == {"__init__.py", "__main__.py"}
    page = (ROOT / "docs" / "architecture.md").read_text().split("\n## Rooms\n")[1]
    block = page.split("```text\n")[1].split("```")[0]
    assert [sorted(line.split(", ")) for line in block.splitlines()] == layers[1:]


def test_unit_tests_lie_in_the_room_that_they_test() -> None:
    rooms = {path.parent.name for path in (ROOT / "verl_vla").glob("*/__init__.py")}
    folders = {path.parent.name for path in (ROOT / "tests" / "unit").glob("*/test_*.py")}
    assert folders <= rooms


def test_importing_the_core_starts_no_framework() -> None:
    core = [module(path) for path in CODE if path.parent.name in FRAMEWORK_FREE]
    program = (
        "import importlib, sys\n"
        f"for name in {core!r}: importlib.import_module(name)\n"
        f"print(sorted({FRAMEWORKS!r} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("path", [p for p in CODE if ">>> " in p.read_text()], ids=relative)
def test_examples_in_docstrings_hold(path: Path) -> None:
    result = doctest.testmod(importlib.import_module(module(path)), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_script_can_be_run() -> None:
    expect_none(relative(path) for path in SCRIPTS if not os.access(path, os.X_OK))
    expect_none(
        relative(path)
        for path in SCRIPTS
        if not path.read_text().startswith("#!/usr/bin/env bash\n")
        or subprocess.run(["bash", "-n", str(path)], check=False).returncode
    )


def test_a_launcher_holds_no_logic_to_speak_of() -> None:
    for path in LAUNCHERS:
        lines = [line.strip() for line in path.read_text().splitlines()]
        logic = [line for line in lines if line and not line.startswith("#")]
        assert len(logic) <= MAX_LAUNCHER_LINES, relative(path)
        assert "set -euo pipefail" in logic, f"{relative(path)} goes on after an error"


@pytest.mark.skipif(not RECIPES, reason="recipes/ holds no recipe yet")
@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_a_recipe_is_a_mapping(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)
