"""veRL inside this process: which release, on which platform, and where its words go."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import verl
from verl.utils.device import get_device_name

from verl_vla.core.errors import ConfigError

VERL_VERSION = "0.9.1"
"""The release whose hooks `VLATrainer` and `VLAEngine` answer; others have other hooks."""

MODEL_TYPE = "vla"
"""veRL's key for `VLAEngine`; set as ``actor_rollout_ref.model.model_type``. Which architecture it
holds, the checkpoint's own ``config.json`` says."""

ADV_ESTIMATOR = "verl_vla_grpo"
"""veRL's name for `verl_vla.rl.advantage.group_advantage`; set as ``algorithm.adv_estimator``."""

ROLLOUT_NAME = "shared_weights"
"""veRL's name for a rollout that needs no server: the learner's module plays."""


def choose_device(wanted: str) -> str:
    """``cuda`` or ``cpu``; ``auto`` takes the GPUs where there are any."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def prepare_verl(device: str, *, option: str) -> None:
    """Check the release, and tell veRL which platform it is on before it is asked.

    Args:
        device: ``cuda`` or ``cpu``.
        option: of the recipe that chose it.

    Raises:
        ConfigError: another release is installed, or veRL does not find the platform.
    """
    if verl.__version__ != VERL_VERSION:
        raise ConfigError(
            f"veRL {verl.__version__} is installed, but this project extends {VERL_VERSION}; "
            f"install verl=={VERL_VERSION}"
        )
    # before anything asks: veRL settles on a platform once a process
    os.environ["VERL_PLATFORM"] = "nvidia" if device == "cuda" else "cpu"
    if get_device_name() != device:
        raise ConfigError(
            f"{option} asks for {device}, but veRL found {get_device_name()}; "
            "install this project (pip install -e .) so that veRL finds its CPU platform, "
            f"or set {option}"
        )


@contextmanager
def divert_output(folder: Path) -> Generator[None]:
    """Send what veRL prints and logs to ``verl.log``; only our own lines reach the console."""
    with (folder / "verl.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        root = logging.getLogger()
        before = root.handlers[:]
        # a handler that exists already keeps its old stream, which redirecting does not change
        root.handlers[:] = [logging.StreamHandler(log)]
        try:
            yield
        finally:
            root.handlers[:] = before
