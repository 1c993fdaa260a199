"""What every test finds: recorded demonstrations, and no test on a device that is not there."""

from __future__ import annotations

import importlib
from pathlib import Path

import hypothesis
import pytest
from recorded_demos import record_folder


def pytest_configure() -> None:
    # other work on the machine may stop a test for a second
    hypothesis.settings.register_profile(
        "shared-machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("shared-machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the longest first, so that one process trains while another does everything else
    items.sort(key=lambda item: item.get_closest_marker("smoke") is None)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not importlib.import_module("torch").cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


@pytest.fixture(scope="session")
def mini_demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of LIBERO files: three episodes each of two tasks of the mini suite."""
    return record_folder(tmp_path_factory.mktemp("demos"), tasks=(0, 1), episodes=3)
