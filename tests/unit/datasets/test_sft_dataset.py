"""The samples of demonstrations: which steps are learned, and with which image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from verl_vla.config.sft import DemoChoice
from verl_vla.datasets.action_targets import measure_statistics
from verl_vla.datasets.libero_reader import Demo, demo_file, read_demos
from verl_vla.datasets.libero_writer import LiberoEpisode, write_libero_file
from verl_vla.datasets.sft_dataset import DemoSamples, Draw
from verl_vla.envs.registry import suite
from verl_vla.policies.action_codec import ActionCodec

MINI = suite("mini")
LIFT = 1
NUM_STEPS, SIZE, CHUNK = 20, 28, 4
DISTURBED, EVERY = 9, 3


def episode() -> LiberoEpisode:
    """One action of another's, an image at every third step; the image shows its row's number."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(NUM_STEPS, 12))
    rows = np.arange(NUM_STEPS)
    rendered = rows % EVERY == 0
    actions = rng.uniform(-0.5, 0.5, (NUM_STEPS, 7))
    actions[DISTURBED] = 0.9
    images = np.broadcast_to(rows[rendered, None, None, None], (rendered.sum(), SIZE, SIZE, 3))
    return LiberoEpisode(
        task_id=LIFT,
        attributes={"problem_info": json.dumps({"language_instruction": "lift it"})},
        model_file="<mujoco/>",
        actions=actions,
        states=states,
        disturbed=rows == DISTURBED,
        robot_states=rng.normal(size=(NUM_STEPS, 9)),
        proprio={"obs/joint_states": states[:, 1:8]},
        rendered=rendered,
        images={"obs/agentview_rgb": images.astype(np.uint8)},
    )


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    write_libero_file(demo_file(tmp_path, MINI.task(LIFT).name), iter([episode()]), {})
    choice = DemoChoice(held_out_per_task=0, filter_noops=False)
    (demo,), _ = read_demos(tmp_path, MINI, [LIFT], choice)
    return demo


def samples_of(demo: Demo) -> DemoSamples:
    statistics = measure_statistics([demo.own_actions], key="mini")
    codec = ActionCodec(num_bins=256, chunk_length=CHUNK, action_dim=7, statistics=statistics)
    return DemoSamples([demo], codec, image_size=SIZE, augment_seed=None)


def test_steps_with_an_image_and_a_chunk_of_the_experts_own_are_learned(demo: Demo) -> None:
    samples = samples_of(demo)
    # of 0, 3, .. 18: no chunk may hold step 9, and 18 has two actions left
    steps = [0, 3, 12, 15]
    shown = [samples[Draw(row=row, number=row)] for row in range(len(samples))]
    assert [int(sample.images.float().mean().round()) for sample in shown] == steps
    samples.close()


def test_a_disturbed_action_has_no_part_in_the_ranges(demo: Demo) -> None:
    assert len(demo.own_actions) == NUM_STEPS - 1
    assert measure_statistics([demo.own_actions], key="mini").q99[0] < 0.5
    assert measure_statistics([demo.actions], key="mini").q99[0] > 0.5
