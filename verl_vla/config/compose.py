"""Composition of ``recipe=NAME key=value ...``: Hydra merges the files, pydantic checks them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra._internal.defaults_list import DefaultsList
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from verl_vla.config.grpo import Recipe
from verl_vla.config.plain_values import LONGEST
from verl_vla.config.recipe_files import check_recipe_files
from verl_vla.config.schema import parse
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.core.text import nearest, shorten
from verl_vla.core.yaml_files import DEEPEST, parse_yaml

RECIPES_FOLDER = PROJECT_FOLDER / "recipes"
"""Folder of the recipes with a plain name; its subfolders are Hydra's config groups."""

COMMAND_LINE = "command line"
"""Origin of a value that no file sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """A merged recipe, with the origin of each value."""

    values: dict[str, Any]
    """Nested values, as `parse` expects them."""
    origins: dict[str, str]
    """The file, or `COMMAND_LINE`, that set each option last; options at their default are absent.
    """
    choices: dict[str, str]
    """Name of the file chosen from each config group."""


def load_recipe(arguments: Sequence[str]) -> Recipe:
    """Compose and check a recipe from ``recipe=NAME key=value ...``.

    ``recipe`` is a name in `RECIPES_FOLDER` or a path to a YAML file; other keys override it.

    Raises:
        ConfigError: no recipe named, unknown recipe or key, or an impossible value.
    """
    return parse(Recipe, compose_recipe(arguments, RECIPES_FOLDER).values)


def compose_recipe(arguments: Sequence[str], folder: Path) -> Composition:
    """Merge the recipe that ``arguments`` name, the files it builds on, and the overrides.

    Where the recipe builds on a config group, e.g. ``suite: spatial``, the override
    ``suite=object`` chooses another file of the group. Any other override sets an option, even if
    no file mentions it; `parse` refuses unknown options. A user's recipe outside ``folder`` may
    build on the recipes and groups in ``folder``.

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
    check_recipe_files(file)
    overrides = [_read_override(a) for a in arguments if not a.startswith("recipe=")]
    search = [] if file.parent == folder else [f"hydra.searchpath=['file://{folder}']"]
    try:
        # Hydra takes an absolute folder only; None means the defaults of the installed version
        with initialize_config_dir(str(file.parent), version_base=None):
            # twice: only the first list says which groups the recipe has, and the overrides may
            # choose other files of them
            parts = _parts(file.stem, search)
            words, options = _split(overrides, _choices(parts), folder)
            if words:
                parts = _parts(file.stem, [*words, *search])
            composed = compose(config_name=file.stem, overrides=[*words, *search])
        origins = dict(_origins(parts, (file.parent, folder)))
        # Hydra refuses to override an option that no file mentions, so options are set here
        for option in options:
            OmegaConf.update(composed, option.key_or_group, option.value(), force_add=True)
            origins |= {key: COMMAND_LINE for key, _ in leaves(option.value(), option.key_or_group)}
        # an unresolved ${...} or a ??? must fail here, not in a section that gets the bare string
        container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except ConfigError:
        raise
    except Exception as error:  # Hydra and OmegaConf raise errors of a dozen kinds
        raise ConfigError(
            f"recipe {file.stem!r} cannot be composed: {str(error) or repr(error)}; correct it or "
            "the options"
        ) from error
    values = cast("dict[str, Any]", container)
    return Composition(values=values, origins=origins, choices=_choices(parts))


def recipe_names(folder: Path = RECIPES_FOLDER) -> list[str]:
    """Return the names of the recipes in ``folder``; by default the project's GRPO recipes."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def group_options(group: str, folder: Path = RECIPES_FOLDER) -> list[str]:
    """Return the names of the files in a config group."""
    return sorted(path.stem for path in (folder / group).glob("*.yaml"))


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each leaf of a nested mapping; {} is a leaf."""
    # an empty section is listed too, or `explain` would not show it
    if not isinstance(values, Mapping) or not values:
        yield path, values
        return
    for key, value in cast("Mapping[str, Any]", values).items():
        yield from leaves(value, f"{path}.{key}" if path else key)


def find_recipe(name: str, folder: Path = RECIPES_FOLDER) -> Path:
    """Return the YAML file of a recipe: a path if ``name`` ends in .yaml, else in ``folder``.

    Raises:
        ConfigError: there is no such recipe.
    """
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


def _read_override(word: str) -> Override:
    """Parse an override; refuse what Hydra cannot read or would not read as setting an option.

    Raises:
        ConfigError: it is not ``key=value``, sets an option of Hydra, or names several values.
    """
    # in Hydra's grammar ~key deletes an option; a section would then take its default
    if "=" not in word or word.startswith("~"):
        raise ConfigError(f"{word!r} is no key=value; write e.g. seed=1")
    depth = _depth(word)
    if len(word) > LONGEST or depth > DEEPEST:
        raise ConfigError(
            f"{shorten(repr(word))} has {len(word):,} characters, and brackets up to {depth} "
            f"deep; write at most {LONGEST:,} and {DEEPEST}, or put the value into a recipe's file"
        )
    try:
        override = OverridesParser.create().parse_override(word)
    except (HydraException, ValueError) as error:  # ValueError: a number of too many digits
        raise ConfigError(
            f"{shorten(repr(word))} cannot be read ({shorten(str(error).splitlines()[0])}); a "
            "value with special characters needs quotes of its own, e.g. \"out='runs/a=b'\""
        ) from error
    if override.key_or_group.split(".")[0] == "hydra":
        raise ConfigError(f"{word!r} is an option of Hydra, which runs no job here; leave it out")
    # key=1,2 is a sweep, one run per value, to Hydra
    if override.is_sweep_override():
        raise ConfigError(f"{word!r} names several values; for a list use key=[value1,value2]")
    return override


def _depth(word: str) -> int:
    """Return how deep brackets lie within each other; quoted ones count too."""
    depth = deepest = 0
    for character in word:
        depth += (character in "[{(") - (character in "]})")
        deepest = max(deepest, depth)
    return deepest


def _split(
    overrides: Sequence[Override], choices: Mapping[str, str], folder: Path
) -> tuple[list[str], list[Override]]:
    """Split overrides into those that choose a file of a group (for Hydra) and the others.

    A group may share its name with an option, as ``reward`` does. Then a value that names no file
    of the group is a value of the option.
    """
    words: list[str] = []
    options: list[Override] = []
    for override in overrides:
        group, value = override.key_or_group, str(override.value())
        members = group_options(group, folder) if group in choices else []
        if value in members:
            # quoted, so that Hydra takes any name as text, also one that is a number
            words.append(f"{group}='{value}'")
        elif group in choices and group not in [field.name for field in fields(Recipe)]:
            raise ConfigError(f"{group} is {value!r}, which is unknown; {nearest(value, members)}")
        else:
            options.append(override)
    return words, options


def _parts(name: str, words: list[str]) -> DefaultsList:
    """Return the list of the files that Hydra merges, in order."""
    # compose() merges at once; only its loader tells which files those are
    loader = GlobalHydra.instance().config_loader()
    return loader.compute_defaults_list(name, words, RunMode.RUN)


def _choices(parts: DefaultsList) -> dict[str, str]:
    """Return the config groups that a recipe builds on, and the file chosen from each."""
    known = parts.overrides.known_choices
    # Hydra's own groups (logging, launcher) are no choice of the recipe
    return {group: str(taken) for group, taken in known.items() if not group.startswith("hydra/")}


def _origins(parts: DefaultsList, folders: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield each option and the file that sets it, in the order of merging."""
    for part in parts.defaults:
        relative = f"{part.config_path}.yaml"
        # the user's folder comes first, as in Hydra's search path
        for file in [f / relative for f in folders if (f / relative).is_file()][:1]:
            content = parse_yaml(file.read_text(), str(file), "correct the file") or {}
            # the defaults list names files and sets no option
            for key, _ in leaves({k: v for k, v in content.items() if k != "defaults"}):
                yield key, relative
