"""Find, check and construct the reward that a recipe names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, cast, get_args

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.core.plugins import import_file
from verl_vla.core.text import nearest
from verl_vla.rewards.base import HasEncoder, HasVideo, Need, TrajectoryReward

REWARDS_FOLDER = PROJECT_FOLDER / "rewards"
"""Folder of the rewards that a recipe names without a path."""
ENTRY_POINTS = "verl_vla.rewards"
"""Entry-point group for rewards of installed packages: ``name = "package.module:Class"``."""
SEED = "seed"
"""Name of the constructor argument that receives the run's seed unless the recipe sets it."""


def load_reward(
    name: str, arguments: Mapping[str, Any], *, seed: int | None = None
) -> TrajectoryReward:
    """Construct the reward that a recipe names.

    Args:
        name: a file of `rewards/` without its suffix (its only public class is taken), a name
            that an installed package offers under `ENTRY_POINTS`, or ``path/to/file.py:ClassName``.
        arguments: passed to the constructor by keyword; checked against its signature.
        seed: seed of the run; passed as `SEED` to a constructor that has this argument.

    Raises:
        ConfigError: no such file or class, an unknown or missing constructor argument, a file or
            constructor that raises, or a class that does not implement `TrajectoryReward`.
    """
    cls = _find_class(name)
    named, takes_any = _parameters(cls)
    given = dict(arguments)
    # the recipe's own seed wins over the run's
    if seed is not None and SEED in named and SEED not in given:
        given[SEED] = seed
    _check_arguments(name, given, named, takes_any=takes_any)
    try:
        reward = cls(**given)
    except ConfigError:
        # says already what is wrong and what to do
        raise
    except Exception as error:
        raise ConfigError(
            f"reward {name!r} could not be made with {given}: {error!r}; correct reward_args or "
            "the constructor"
        ) from error
    _check_protocol(reward, name)
    return cast("TrajectoryReward", reward)


def _find_class(name: str) -> type[Any]:
    if ".py:" in name:
        # the last colon: a path may have others
        file, class_name = name.rsplit(":", 1)
        return pick_class(import_file(Path(file)), Path(file), class_name)
    files = {p.stem: p for p in REWARDS_FOLDER.glob("*.py") if not p.stem.startswith("_")}
    if name in files:
        return pick_class(import_file(files[name]), files[name], None)
    offered = {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
    if name in offered:
        return _load_entry_point(offered[name])
    raise ConfigError(
        f"reward is {name!r}, which is no file of rewards/ and no entry point of "
        f"{ENTRY_POINTS}; {nearest(name, sorted(files | offered))}; "
        "a reward of your own is path/to/file.py:ClassName"
    )


def _load_entry_point(point: metadata.EntryPoint) -> type[Any]:
    try:
        cls = point.load()
    except Exception as error:
        raise ConfigError(
            f"reward {point.name!r} is offered as {point.value}, which cannot be imported: "
            f"{error!r}; reinstall the package that offers it"
        ) from error
    if not inspect.isclass(cls):
        raise ConfigError(f"reward {point.name!r} is offered as {point.value}, which is no class")
    return cls


def pick_class(module: ModuleType, path: Path, class_name: str | None) -> type[Any]:
    """Return a class that a plug-in file defines.

    Args:
        module: the imported file.
        path: the file, for error messages.
        class_name: name of the class; None takes the only public one.

    Raises:
        ConfigError: no such class, or several public ones and no name.
    """
    own = {
        name: cls
        for name, cls in inspect.getmembers(module, inspect.isclass)
        # without the classes that the file imports
        if cls.__module__ == module.__name__ and not name.startswith("_")
    }
    if class_name is None:
        if len(own) != 1:
            raise ConfigError(
                f"{path.name} has {len(own)} public classes; name one as {path}:ClassName"
            )
        return next(iter(own.values()))
    if class_name not in own:
        raise ConfigError(f"{path} has no class {class_name!r}; {nearest(class_name, list(own))}")
    return own[class_name]


def _parameters(cls: type[Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the constructor's arguments by name, and whether it accepts any others."""
    found = inspect.signature(cls).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in found)
    return {p.name: p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}, takes_any


def _check_arguments(
    name: str,
    arguments: Mapping[str, Any],
    named: Mapping[str, inspect.Parameter],
    *,
    takes_any: bool,
) -> None:
    for key in arguments:
        if key not in named and not takes_any:
            raise ConfigError(
                f"reward {name!r} has no argument {key!r}; {nearest(key, list(named))}"
            )
    for key, parameter in named.items():
        if parameter.default is inspect.Parameter.empty and key not in arguments:
            raise ConfigError(f"reward {name!r} needs {key!r}; set reward_args.{key}")


def _check_protocol(reward: object, name: str) -> None:
    wanted: Sequence[str] = ("requires", "__call__", "update", "state_dict", "load_state_dict")
    present = set(dir(reward))
    missing = [member for member in wanted if member not in present]
    if missing:
        raise ConfigError(
            f"reward {name!r} lacks {', '.join(missing)}; "
            "see TrajectoryReward in verl_vla/rewards/base.py"
        )
    needs = cast("TrajectoryReward", reward).requires
    unknown = sorted(set(needs) - set(get_args(Need)))
    if unknown:
        raise ConfigError(
            f"reward {name!r} requires {unknown[0]!r}; {nearest(unknown[0], get_args(Need))}"
        )
    if "features" in needs and not isinstance(reward, HasEncoder):
        raise ConfigError(
            f"reward {name!r} requires features but has no encoder to make them; give it an "
            "attribute `encoder`, see verl_vla/rewards/encoders"
        )
    if "video" in needs and not isinstance(reward, HasVideo):
        raise ConfigError(
            f"reward {name!r} requires a video and does not say which; give it an attribute "
            "`video`, a VideoNeed of verl_vla/rewards/base.py"
        )
