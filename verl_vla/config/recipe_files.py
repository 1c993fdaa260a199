"""The YAML files of a user's recipe, read within bounds before Hydra composes them.

Hydra walks over every value that a file stands for, which aliases can make a billion of.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml

from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import read_bytes
from verl_vla.core.yaml_files import require_bounds

DEFAULTS = "defaults"
"""Key of the list of files that a recipe builds on."""
REMEDY = "correct the file"


def check_recipe_files(file: Path) -> None:
    """Read a recipe's file, and those beside it that it builds on.

    Raises:
        ConfigError: a file cannot be read, holds no options, or is out of bounds; see
            `verl_vla.core.yaml_files.require_bounds`.
    """
    folder = file.parent
    left, seen = [file.name], set[str]()
    while left:
        name = left.pop()
        # what is not beside it is the project's, or Hydra's to refuse
        if name in seen or not (folder / name).is_file():
            continue
        seen.add(name)
        content = _read(folder / name)
        if not isinstance(content, dict | list | None):
            # OmegaConf would take a text for the name of an option
            raise ConfigError(f"{folder / name} is {content!r}, and no options; {REMEDY}")
        if isinstance(content, dict) and DEFAULTS in content:
            left += _named(content[DEFAULTS], name.rpartition("/")[0])


def _read(file: Path) -> Any:
    """Return the content of a file within bounds.

    Raises:
        ConfigError: it cannot be read, is no YAML, or is out of bounds.
    """
    try:
        text = read_bytes(file, REMEDY).decode()
        require_bounds(text, str(file), REMEDY)
        return yaml.safe_load(text)
    except ConfigError:
        raise
    except Exception as error:  # PyYAML's constructors raise errors of a dozen kinds
        raise ConfigError(f"recipe {file.stem!r} cannot be composed: {error}; {REMEDY}") from error


def _named(defaults: Any, group: str) -> Iterator[str]:
    """Yield the names of the files in a list of defaults; Hydra refuses what else is wrong in it.

    Raises:
        ConfigError: the name of a group is no text, which Hydra asserts without a message.
    """
    for entry in cast("list[Any]", defaults) if isinstance(defaults, list) else []:
        below, chosen = group, [entry]
        if isinstance(entry, dict):
            for key, value in cast("dict[Any, Any]", entry).items():
                if not isinstance(key, str):
                    raise ConfigError(f"{DEFAULTS} has the group {key!r}; write its name in quotes")
                # without Hydra's words before a group, and the package after it
                below = f"{group}/{key.rpartition(' ')[2].partition('@')[0]}"
                chosen = cast("list[Any]", value) if isinstance(value, list) else [value]
        for choice in chosen:
            path = str(choice).partition("@")[0].removesuffix(".yaml")
            # a leading slash starts in the folder of the recipe
            full = path if path.startswith("/") else f"{below}/{path}"
            yield full.strip("/") + ".yaml"
