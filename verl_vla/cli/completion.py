"""Print the script with which a shell completes commands, options and values.

It is made of the parsers, by shtab, and starts no Python while somebody types.
"""

from __future__ import annotations

import argparse

import shtab

from verl_vla.cli.arguments import COMMANDS, make_parser
from verl_vla.cli.options import Parser
from verl_vla.config.choices import PERTURBATIONS, SUITES
from verl_vla.config.compose import group_options, recipe_names
from verl_vla.config.sft import SFT_RECIPES_FOLDER

OVERRIDES = "overrides"
GROUPS = ("suite", "reward", "profile")
"""Config groups of `recipes/`."""
NAMES = {"suite": SUITES, "perturbation": PERTURBATIONS}
"""Values of arguments that take others too, such as a plug-in's file."""

BASH_OVERRIDES = """
# bash takes "=" for a word of its own, so only what follows it is offered once it is typed
{name}() {{
  local typed="${{COMP_LINE:0:COMP_POINT}}" start word
  typed="${{typed##* }}"
  start="${{typed%"${{1#=}}"}}"
  compgen -W "{words}" -- "$typed" | while read -r word; do echo "${{word#"$start"}}"; done
}}"""
"""Function that completes KEY=VALUE; its argument is the word that bash sees."""

ZSH_FIRST, ZSH_EVERY = '"(*)::', '"*:'
"""Specification of a positional argument as shtab writes it for ``nargs="*"``, after which zsh
completes only the first value, and the one that completes every value (zshcompsys, _arguments)."""


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    script = shtab.complete(_all_commands(), options.shell)
    print(script.replace(ZSH_FIRST, ZSH_EVERY))
    return 0


def _all_commands() -> Parser:
    """Return one parser of all commands, whose arguments know their values."""
    parser = Parser(prog="verl-vla")
    commands = parser.add_subparsers()
    for name, add_arguments in COMMANDS.items():
        alone = make_parser(name)
        for action in alone._actions:  # pyright: ignore[reportPrivateUsage] -- as shtab does
            _add_values(name, action)
        about = add_arguments.__doc__
        # its -h comes with the parent; a second one would conflict
        commands.add_parser(name, parents=[alone], add_help=False, help=about, description=about)
    return parser


def _add_values(command: str, action: argparse.Action) -> None:
    if action.dest == OVERRIDES:
        # shtab reads this attribute, which argparse does not declare
        vars(action)["complete"] = _complete_overrides(command)
    elif action.dest in NAMES and not action.choices:
        action.choices = NAMES[action.dest]
    # a number or a flag (nargs 0) takes no path
    elif action.choices is None and action.type is None and action.nargs != 0:
        vars(action)["complete"] = shtab.FILE  # text may be a path


def _complete_overrides(command: str) -> dict[str, str | dict[str, str]]:
    words, name = " ".join(_overrides(command)), f"_verl_vla_{command}_overrides"
    bash = BASH_OVERRIDES.format(name=name, words=words)
    return {"bash": name, "zsh": f"({words})", "fish": words, "preamble": {"bash": bash}}


def _overrides(command: str) -> list[str]:
    """List recipes and, for training, the files of the config groups that recipes build on."""
    if command == "sft":
        return [f"recipe={name}" for name in recipe_names(SFT_RECIPES_FOLDER)]
    chosen = {"recipe": recipe_names()} | {group: group_options(group) for group in GROUPS}
    return [f"{key}={name}" for key, names in chosen.items() for name in names]
