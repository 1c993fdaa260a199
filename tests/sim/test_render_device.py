"""A simulator renders on the device that it is given, whatever CUDA's variables say."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.egl_devices import EglDevice, query_egl
from verl_vla.envs.libero.gl import prepare_gl
from verl_vla.envs.libero.suite import make_libero_env

pytestmark = pytest.mark.sim

RENDER = """
import os
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.registry import make_env
image = make_env(EnvConfig(render_size=32)).reset(0, 0).image
print(image.any(), os.environ["CUDA_VISIBLE_DEVICES"])
"""


@pytest.mark.parametrize("visible", ["3", "MIG-7c1b0d3e-0000-5555-9999-123456789abc", "GPU-77aa"])
def test_robosuite_compares_no_egl_device_with_cudas_numbers(visible: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "MUJOCO_EGL_DEVICE_ID": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RENDER],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # the rest of the process, such as torch, still has its variable
    assert done.stdout.splitlines()[-1] == f"True {visible}"


def test_the_query_finds_what_mujoco_renders_on() -> None:
    if prepare_gl() != "egl":
        pytest.skip("this machine renders through OSMesa")
    found = query_egl()
    assert found
    assert all(isinstance(device, EglDevice) for device in found)


def test_a_process_keeps_one_renderer_on_a_gpu_and_the_images_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A renderer holds 0.4 GB of textures in the memory of the GPU that trains."""
    env = make_libero_env(EnvConfig(render_size=32))
    images = [env.reset(task_id, 0).image for task_id in (0, 1)]
    # with software rendering all are kept
    assert [kept.has_renderer for kept in env._simulators.values()] == [True, True]
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "0")
    for task_id in (2, 0, 1):
        image = env.reset(task_id, 0).image
        with_renderer = [task for task, kept in env._simulators.items() if kept.has_renderer]
        assert with_renderer == [task_id]
        if task_id < len(images):
            np.testing.assert_array_equal(image, images[task_id])
    env.close()
