"""Sides in the images of a judge: LIBERO's sentences say left and right as a person sees them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
import simplejpeg
from judge_server import MODEL, judge_server, url_of

from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.rewards import TrajectoryBatch, load_reward

if TYPE_CHECKING:
    from verl_vla.envs.libero.simulator import Simulator

pytestmark = pytest.mark.sim

SUITE, TWO_PLATES = "libero_10", 4
"""Put the white mug on the left plate and put the yellow and white mug on the right plate."""
LEFT, RIGHT = "plate_1", "plate_2"
SIZE = 128


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    made = make_libero_env(EnvConfig(suite=SUITE, render_size=SIZE, image_size=SIZE))
    yield made
    made.close()


def columns_of_plates(simulator: Simulator) -> tuple[float, float]:
    """Mean columns of the plates' pixels in MuJoCo's own image, which nothing has mirrored."""
    import mujoco  # noqa: PLC0415 -- it reads MUJOCO_GL, which the environment sets

    with mujoco.Renderer(simulator.model, SIZE, SIZE) as renderer:
        renderer.enable_segmentation_rendering()
        renderer.update_scene(simulator.data, "agentview")
        labels = renderer.render()
    is_geom = labels[..., 1] == mujoco.mjtObj.mjOBJ_GEOM
    left, right = (column(labels[..., 0], is_geom, simulator, name) for name in (LEFT, RIGHT))
    return left, right


def column(geom_ids: np.ndarray, is_geom: np.ndarray, simulator: Simulator, name: str) -> float:
    """Mean column of the pixels of an object."""
    model = simulator.model
    body = simulator.body(name)
    geoms = np.flatnonzero(model.body_rootid[model.geom_bodyid] == model.body_rootid[body])
    found = np.argwhere(is_geom & np.isin(geom_ids, geoms))
    assert len(found) > 30
    return float(found[:, 1].mean())


def test_the_left_plate_is_at_the_left_of_what_a_judge_sees(env: LiberoEnv) -> None:
    seen = env.reset(TWO_PLATES, 0).image
    simulator = env.simulator(TWO_PLATES)
    left, right = columns_of_plates(simulator)
    assert left < right - 10
    key = f"{SUITE}/{TWO_PLATES}"
    with judge_server() as server:
        judge = load_reward(
            "vlm_judge",
            {
                "model": MODEL,
                "instructions": {key: env.suite.task(TWO_PLATES).instruction},
                "url": url_of(server),
                "max_lost_share": 1.0,
            },
        )
        judge(
            TrajectoryBatch(
                episode_id=np.array([0]),
                group_id=np.array([0]),
                task_key=(key,),
                init_state_id=np.array([0]),
                success=np.array([False]),
                num_steps=np.array([8]),
                frames=(seen[None],),
                proprio=None,
                mirrored=env.suite.images_are_mirrored,
            )
        )
        url = server.asked[0]["messages"][0]["content"][1]["image_url"]["url"]
    shown = simplejpeg.decode_jpeg(base64.b64decode(url.split(",")[1])).astype(float)
    truth = simulator.render("agentview")[:, ::-1].astype(float)
    mirrored = shown[:, ::-1]
    # the policy's image is cropped, so it is near the truth and not equal
    assert 2 * np.abs(shown - truth).mean() < np.abs(mirrored - truth).mean()
