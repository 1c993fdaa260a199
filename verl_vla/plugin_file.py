"""Code of the user's own: Python files that a recipe names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from verl_vla.errors import ConfigError


def import_file(path: Path) -> ModuleType:
    """Import a Python file that belongs to no package.

    Raises:
        ConfigError: there is no such file, or it raises while it is imported.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; check the path")
    name = f"verl_vla_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported; name a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{path} cannot be imported: {error!r}; correct the file") from error
    return module
