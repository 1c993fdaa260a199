"""Launchers and rented machines: they install, and call the one command with words that exist."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from verl_vla.cli.arguments import COMMANDS
from verl_vla.config.compose import group_options, load_recipe
from verl_vla.core.errors import ConfigError
from verl_vla.diagnostics.planning.plan import host_cores
from verl_vla.trainer.grpo import launch

ROOT = Path(__file__).resolve().parents[3]
LAUNCHERS = [
    *(ROOT / "scripts" / name for name in ("train_8gpu.sh", "train_multinode.sh", "slurm.sbatch")),
    *(ROOT / "scripts" / "cloud" / name for name in ("modal_train.py", "skypilot.yaml")),
    ROOT / "docs" / "running.md",
]
SKYPILOT_FIELDS = {
    "name",
    "resources",
    "workdir",
    "num_nodes",
    "envs",
    "file_mounts",
    "setup",
    "run",
}
"""Of a task, docs.skypilot.co, YAML specification; those that anybody needs."""
SKYPILOT_RESOURCES = {"accelerators", "cpus", "memory", "disk_size", "infra", "use_spot"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", LAUNCHERS, ids=relative)
def test_a_launcher_names_verbs_and_choices_that_exist(path):
    text = path.read_text()
    verbs = set(re.findall(r"-m verl_vla ([\w-]+)", text))
    assert verbs <= COMMANDS.keys()
    for group in ("suite", "reward", "profile"):
        named = set(re.findall(rf"\b{group}=([\w]+)\b(?![.\w])", text))
        known = {*group_options(group), "SUITE", "my", "vlm_judge"}
        assert named <= known, f"{relative(path)}: {group}={named - known}"


def test_slurm_asks_for_what_the_profile_needs():
    text = (ROOT / "scripts" / "slurm.sbatch").read_text()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, flags=re.MULTILINE))
    cluster = load_recipe(["recipe=libero", "profile=8gpu"]).cluster
    assert int(asked["gpus-per-node"]) == cluster.ranks_per_node
    assert asked["ntasks-per-node"] == "1"
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 30


@pytest.mark.parametrize("words", [[], ["dance"], ["join"], ["head"]])
def test_a_node_that_is_told_nothing_says_what_it_needs(words, tmp_path):
    """Only what follows the set-up runs; a folder of its own stands in for the checkout."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    setup = 'root=$PWD; venv=$root; python=true\nstop() { echo "error: $*" >&2; exit 1; }\n'
    steps = ("set_up_packages", "set_up_renderer", "share_ray_token")
    (scripts / "_setup.sh").write_text(setup + "".join(f"{step}() {{ :; }}\n" for step in steps))
    script = scripts / "train_multinode.sh"
    script.write_text((ROOT / "scripts" / "train_multinode.sh").read_text())
    done = subprocess.run(
        ["bash", str(script), *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert re.search("say head NODES, join|name the first node|say how many nodes", done.stderr)


def test_training_waits_for_the_nodes_and_not_for_ever(monkeypatch):
    cores: dict[str, float] = {"CPU": 8.0}
    nodes: list[dict[str, Any]] = [
        {"Alive": True, "Resources": cores},
        {"Alive": False, "Resources": cores},
        {"Alive": True, "Resources": {"env_node": 1.0}},  # holds no ranks
    ]
    monkeypatch.setattr(launch.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(launch, "NODES_POLL_S", 0)
    launch.wait_for_nodes(1)
    with pytest.raises(ConfigError, match="cluster.num_nodes is 2, but 1 joined .* within 0 s"):
        launch.wait_for_nodes(2, limit_s=0)
    monkeypatch.setattr(launch.time, "sleep", lambda _: nodes.append(nodes[0]))
    launch.wait_for_nodes(3)


def test_the_skypilot_task_has_its_fields():
    task = yaml.safe_load((ROOT / "scripts" / "cloud" / "skypilot.yaml").read_text())
    assert task.keys() <= SKYPILOT_FIELDS
    assert task["resources"].keys() <= SKYPILOT_RESOURCES
    assert re.fullmatch(r"[\w-]+:\d+", task["resources"]["accelerators"])
    small = load_recipe(["recipe=libero", "profile=qlora_24gb"])
    assert task["resources"]["cpus"] == f"{host_cores(small)}+"
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    load_recipe(["recipe=libero", *task["envs"]["WORDS"].split()])


def test_the_modal_wrapper_decides_nothing():
    """Compiles without Modal; has neither a branch nor a loop, and its words make a recipe."""
    path = ROOT / "scripts" / "cloud" / "modal_train.py"
    tree = ast.parse(path.read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, (ast.If, ast.For, ast.While, ast.Try))]
    compile(tree, str(path), "exec")
    for words in re.findall(r'--words "([^"]+)"', path.read_text()):
        load_recipe(["recipe=libero", *words.split()])


HEAVY = {"numpy", "torch", "transformers", "scipy", "matplotlib", "mujoco", "ray", "rich", "shtab"}


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[str, list[str]]]:
    """Each command's help and what of `HEAVY` is loaded after it, from one new process for all."""
    program = (
        "import contextlib, io, json, sys; from verl_vla.cli.main import main\n"
        f"for command in {[*COMMANDS]!r}:\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stdout(said):\n"
        "        try:\n"
        "            main([command, '--help'])\n"
        "        except SystemExit as end:\n"
        "            assert end.code == 0, command\n"
        f"    loaded = sorted({HEAVY!r} & sys.modules.keys())\n"
        "    print(json.dumps([command, said.getvalue(), loaded]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {
        name: (said, loaded) for name, said, loaded in map(json.loads, done.stdout.splitlines())
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_imports_nothing_heavy(
    command: str, helps: dict[str, tuple[str, list[str]]]
) -> None:
    said, loaded = helps[command]
    assert said.startswith(f"usage: verl-vla {command}")
    assert loaded == []
