"""veRL's tracking back ends: what a recipe names must be able to log, before anything starts."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from importlib.util import find_spec

from verl_vla.core.errors import ConfigError
from verl_vla.core.text import nearest, shorten

TRACKERS = (
    "tensorboard",
    "wandb",
    "mlflow",
    "swanlab",
    "clearml",
    "trackio",
    "console",
    "file",
    "vemlp_wandb",
    "rl_insight",
)
"""Names that veRL knows (``verl/utils/tracking.py``, ``supported_backend``)."""
OTHER_PACKAGES = ("clearml", "trackio")
"""Trackers whose package, of the same name, no extra installs; see `require_extras`."""
WANDB_MODE = "WANDB_MODE"
WITHOUT_LOGIN = ("offline", "dryrun", "disabled")
"""Values of `WANDB_MODE` that send nothing."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that could not log.

    Raises:
        ConfigError: an unknown name, a package that is not installed, or Weights & Biases without
            a key that it accepts: it would ask for one where nobody sees the question.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(
                f"trainer.loggers has {name!r}, which veRL does not know; {nearest(name, TRACKERS)}"
            )
        if name in OTHER_PACKAGES and find_spec(name) is None:
            raise ConfigError(
                f"trainer.loggers has {name!r}, and its package is not installed; run pip install "
                f"{name}, or leave it out"
            )
    if "wandb" in names:
        _require_login()


def _require_login() -> None:
    if WANDB_MODE in os.environ and os.environ[WANDB_MODE] in WITHOUT_LOGIN:
        return
    remedy = (
        "run `wandb login`, export WANDB_API_KEY=KEY, or export WANDB_MODE=offline to keep the "
        "curves in ./wandb and send them later with `wandb sync`"
    )
    # takes a second to import, and few runs log there
    wandb = importlib.import_module("wandb")
    try:
        has_key = wandb.login(prompt=False)
    except Exception as error:  # errors of its settings, of the key and of the network
        reason = shorten(" ".join(str(error).split()))
        raise ConfigError(
            f"trainer.loggers has 'wandb', and its login failed ({reason}); {remedy}"
        ) from error
    if not has_key:
        raise ConfigError(f"trainer.loggers has 'wandb', and there is no key for it; {remedy}")
