"""From ``recipe=NAME key=value ...`` to a checked `Recipe`: Hydra merges, dataclasses check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from verl_vla.config import nearest, parse
from verl_vla.errors import ConfigError
from verl_vla.recipe import Recipe

RECIPES_FOLDER = Path(__file__).resolve().parent.parent / "recipes"
"""Where recipes with a plain name live."""


def load_recipe(arguments: Sequence[str]) -> Recipe:
    """Compose and check a recipe from ``recipe=NAME key=value ...``.

    ``recipe`` is a name in `RECIPES_FOLDER` or a path to a YAML file; other keys override it.

    Raises:
        ConfigError: no recipe named, unknown recipe or key, or a value that cannot be.
    """
    return parse(Recipe, compose_recipe(arguments, RECIPES_FOLDER))


def compose_recipe(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Let Hydra merge the recipe that ``arguments`` name, the files it builds on, and overrides.

    Overrides may name keys that the file leaves at their default, so each is marked as one that
    may be new; `parse` refuses those that nobody knows. A recipe of the user's own may build on
    the project's recipes and profiles.

    A plain name is looked up in ``folder``.

    Raises:
        ConfigError: no recipe named, an unknown one, or one that cannot be read.
    """
    recipes = [a.removeprefix("recipe=") for a in arguments if a.startswith("recipe=")]
    if len(recipes) != 1:
        raise ConfigError(
            f"{len(recipes)} recipes were named; say which one with recipe=NAME. "
            f"Known: {', '.join(recipe_names(folder))}"
        )
    file = find_recipe(recipes[0], folder)
    overrides = [a for a in arguments if not a.startswith("recipe=")]
    for override in overrides:
        _check_override(override)
    words = [f"++{o.lstrip('+')}" for o in overrides]
    if file.parent != folder:
        words.append(f"hydra.searchpath=['file://{folder}']")
    try:
        with initialize_config_dir(str(file.parent), version_base=None):
            composed = compose(config_name=file.stem, overrides=words)
        container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {file.stem!r} cannot be composed: {error}") from error
    return cast("dict[str, Any]", container)


def recipe_names(folder: Path = RECIPES_FOLDER) -> list[str]:
    """Names of the recipes in a folder, those of training that come with the project."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_recipe(name: str, folder: Path = RECIPES_FOLDER) -> Path:
    """The YAML file that ``name`` stands for; ``folder`` as of `recipe_names`."""
    if name.endswith(".yml"):
        raise ConfigError(f"recipe is {name!r}, but Hydra reads .yaml alone; rename the file")
    if name.endswith(".yaml"):
        path = Path(name).resolve()
        if not path.is_file():
            raise ConfigError(f"recipe is {name!r}, but there is no such file; check the path")
        return path
    if name not in (known := recipe_names(folder)):
        raise ConfigError(f"recipe is {name!r}, which is unknown; {nearest(name, known)}")
    return folder / f"{name}.yaml"


def _check_override(override: str) -> None:
    """Refuse what Hydra would not read, or would read as something else than a knob."""
    if "=" not in override or override.startswith("~"):
        raise ConfigError(f"{override!r} is no key=value; write e.g. seed=1")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(
            f"{override!r} cannot be read ({str(error).splitlines()[0]}); a value with special "
            "characters needs quotes of its own, e.g. \"out='runs/a=b'\""
        ) from error
    if parsed.key_or_group.split(".")[0] == "hydra":
        raise ConfigError(f"{override!r} is a knob of Hydra, which runs no job here; leave it out")
