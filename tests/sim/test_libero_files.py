"""LIBERO's demonstration files, recorded in the real simulator: reading, drawing again, forking."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from recorded_demos import IDLE_AT, RENDER_SIZE
from torch.utils.data import DataLoader

from verl_vla.config.choices import CAMERAS
from verl_vla.config.sft import DemoChoice
from verl_vla.core.errors import ConfigError
from verl_vla.core.image_preprocessing import prepare_image
from verl_vla.datasets.action_targets import measure_statistics
from verl_vla.datasets.libero_reader import Demo, FrameReader, demo_file, read_demos
from verl_vla.datasets.libero_writer import IMAGES
from verl_vla.datasets.rerender import Rerendering, rerender, rerender_task
from verl_vla.datasets.sft_dataset import DemoSamples, Draw, SampleBatch, StepSampler, collate
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.envs.registry import suite
from verl_vla.policies.action_codec import ActionCodec

pytestmark = pytest.mark.sim

MINI = suite("mini")
PUSH, LIFT = 0, 1
ALL = DemoChoice(held_out_per_task=0)


def read_all(folder: Path) -> list[Demo]:
    return read_demos(folder, MINI, (PUSH, LIFT), ALL)[0]


def make_samples(
    demos: list[Demo], *, num_views: int = 1, augment_seed: int | None = 3
) -> DemoSamples:
    statistics = measure_statistics([demo.actions for demo in demos], key="mini_no_noops")
    codec = ActionCodec(num_bins=256, chunk_length=8, action_dim=7, statistics=statistics)
    return DemoSamples(demos, codec, image_size=28, num_views=num_views, augment_seed=augment_seed)


def test_what_is_read_is_what_was_recorded(mini_demos: Path) -> None:
    demos = read_all(mini_demos)
    assert [(d.task_id, d.name) for d in demos] == [
        (task, f"demo_{i}") for task in (PUSH, LIFT) for i in range(3)
    ]
    assert demos[3].instruction == "lift the red cube"
    with h5py.File(demos[3].file) as file:
        stored = file["data/demo_0/actions"][()]
    assert set(range(len(stored))) - set(demos[3].steps.tolist()) == set(IDLE_AT)
    assert np.array_equal(demos[3].actions, stored[demos[3].steps].astype(np.float32))


def test_the_instruction_is_the_tasks_or_the_files_own(mini_demos: Path) -> None:
    choice = DemoChoice(held_out_per_task=0, wording="problem_info")
    (demo, *_), _ = read_demos(mini_demos, MINI, [LIFT], choice)
    assert demo.instruction == "please lift the red cube"


def test_an_image_is_turned_as_policies_see_it(mini_demos: Path) -> None:
    demo = read_all(mini_demos)[3]
    env = make_libero_env(EnvConfig(suite="mini", render_size=RENDER_SIZE, image_size=28))
    env.reset(LIFT, 0)
    step = 0
    with h5py.File(demo.file) as file:
        for action in file["data/demo_0/actions"][: demo.steps[4]]:
            env.step(action)
            step += 1
    assert step == demo.steps[4] > 0
    assert demo.cameras == CAMERAS
    for camera in CAMERAS:
        seen = env.simulator(LIFT).render(camera)
        assert np.array_equal(FrameReader().read(demo, 4, camera), seen)
    env.close()


def test_an_image_is_the_one_before_its_action_in_files_of_liberos_own_script(
    mini_demos: Path, tmp_path: Path
) -> None:
    """LIBERO ``scripts/create_dataset.py`` stores each row's observation after its action."""
    name = MINI.task(LIFT).name
    shutil.copy(demo_file(mini_demos, name), tmp_path)
    with h5py.File(demo_file(tmp_path, name), "a") as file:
        episode = file["data/demo_0"]
        for path in ("obs/joint_states", *IMAGES.values()):
            values = episode[path][()]
            episode[path][:-1] = values[1:]
    [before, *_], _ = read_demos(mini_demos, MINI, [LIFT], ALL)
    [after, *_], _ = read_demos(tmp_path, MINI, [LIFT], ALL)
    first = int(before.steps[0] == 0)
    assert np.array_equal(after.steps, before.steps[first:])
    assert np.array_equal(after.actions, before.actions[first:])
    reader = FrameReader()
    for index in range(len(after.steps)):
        assert np.array_equal(reader.read(after, index), reader.read(before, index + first))
    reader.close()


def test_a_file_that_does_not_tell_when_its_images_were_taken_is_refused(
    mini_demos: Path, tmp_path: Path
) -> None:
    name = MINI.task(LIFT).name
    shutil.copy(demo_file(mini_demos, name), tmp_path)
    with h5py.File(demo_file(tmp_path, name), "a") as file:
        del file["data/demo_1/obs/joint_states"]
    with pytest.raises(ConfigError, match="demo_1 holds no obs/joint_states, so nothing tells"):
        read_demos(tmp_path, MINI, [LIFT], ALL)


def test_episodes_are_chosen_in_the_order_of_their_numbers(mini_demos: Path, tmp_path) -> None:
    source = demo_file(mini_demos, MINI.task(LIFT).name)
    shutil.copy(source, tmp_path)
    with h5py.File(tmp_path / source.name, "a") as file:
        for number in range(3, 12):
            file.copy("data/demo_0", f"data/demo_{number}")
    one, held_out = read_demos(tmp_path, MINI, [LIFT], DemoChoice(per_task=1, held_out_per_task=2))
    assert [d.name for d in one] == ["demo_0"]
    assert [d.name for d in held_out] == ["demo_10", "demo_11"]
    rest, _ = read_demos(tmp_path, MINI, [LIFT], DemoChoice(held_out_per_task=2))
    assert [d.name for d in rest] == [f"demo_{n}" for n in range(10)]
    with pytest.raises(ConfigError, match=r"holds 12 episodes, but demos.choice.per_task is 11"):
        read_demos(tmp_path, MINI, [LIFT], DemoChoice(per_task=11, held_out_per_task=2))


def test_a_file_that_is_not_one_is_refused(mini_demos: Path, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"holds no .*_demo.hdf5 \(tasks without a file: \[2\]"):
        read_demos(mini_demos, MINI, (PUSH, 2), ALL)
    path = demo_file(tmp_path, MINI.task(LIFT).name)
    whole = demo_file(mini_demos, MINI.task(LIFT).name).read_bytes()
    for content in (whole[: len(whole) // 2], b"no HDF5"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="is broken"):
            read_demos(tmp_path, MINI, [LIFT], ALL)
    path.write_bytes(whole)
    with h5py.File(path, "a") as file:
        del file["data/demo_1/obs"]
    with pytest.raises(ConfigError, match="is broken"):
        read_demos(tmp_path, MINI, [LIFT], ALL)


def test_h5py_handle_across_fork(mini_demos: Path) -> None:
    """A handle opened in the parent and inherited by forked loader workers reads corrupt data."""
    samples = make_samples(read_all(mini_demos))
    draws = [Draw(row=row, number=row) for row in range(len(samples))]
    alone = [samples[draw] for draw in draws]
    assert len(samples._frames._files) == 2, "the parent holds its handles while it forks"
    loader = DataLoader(
        samples,
        batch_sampler=[[draw] for draw in draws],
        collate_fn=collate,
        num_workers=2,
        multiprocessing_context="fork",
        worker_init_fn=_refuse_inherited,
    )
    for ours, theirs in zip(alone, loader, strict=True):
        assert same(ours, theirs)
    # and the parent's own handles have not suffered
    assert all(same(samples[draw], before) for draw, before in zip(draws, alone, strict=True))
    samples.close()


def _refuse_inherited(worker: int) -> None:
    samples = torch.utils.data.get_worker_info().dataset
    assert os.getpid() != samples._frames._process
    inherited = list(samples._frames._files.values())
    samples[Draw(row=0, number=0)]
    assert len(inherited) == 2 and not any(inherited), "an h5py.File is false once it is closed"
    assert len(samples._frames._files) == 1, "only what the worker has opened itself"


def same(a: SampleBatch, b: SampleBatch) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.action_tokens, b.action_tokens)
        and a.instructions == b.instructions
    )


def test_a_sample_is_the_prepared_image_and_the_next_actions(mini_demos: Path) -> None:
    demos = read_all(mini_demos)
    plain = make_samples(demos, augment_seed=None)
    assert len(plain) == sum(len(demo.actions) - 7 for demo in demos)
    sample = plain[Draw(row=0, number=0)]
    render = FrameReader().read(demos[0], 0)
    assert np.array_equal(sample.images[0, 0], prepare_image(render, size=28, crop_area=0.9))
    assert sample.instructions == (MINI.task(PUSH).instruction,)
    changed = make_samples(demos)
    again = [changed[Draw(row=0, number=n)].images for n in (0, 1, 0)]
    assert torch.equal(again[0], again[2])
    assert not torch.equal(again[0], again[1])
    for dataset in (plain, changed):
        dataset.close()


def test_a_policy_of_two_views_sees_the_wrist_camera_too(mini_demos: Path) -> None:
    demos = read_all(mini_demos)
    plain = make_samples(demos, num_views=2, augment_seed=None)
    images = plain[Draw(row=3, number=0)].images[0]
    assert images.shape == (2, 28, 28, 3)
    for image, camera in zip(images, CAMERAS, strict=True):
        render = FrameReader().read(demos[0], 3, camera)
        assert np.array_equal(image, prepare_image(render, size=28, crop_area=0.9))
    both, one = (make_samples(demos, num_views=n)[Draw(row=3, number=7)].images for n in (2, 1))
    assert torch.equal(both[:, :1], one)
    plain.close()


def test_drawing_again_gives_the_recorded_images(mini_demos: Path, tmp_path) -> None:
    work = Rerendering(
        source=mini_demos,
        target=tmp_path / "large",
        env=EnvConfig(suite="mini", render_size=128, image_size=28, cameras=CAMERAS),
        replays=False,
        filter_noops=True,
    )
    rerender(work, (PUSH, LIFT), workers=1)
    stored, drawn = read_all(mini_demos), read_all(tmp_path / "large")
    assert {demo.cameras for demo in drawn} == {CAMERAS}
    assert [d.actions.tobytes() for d in stored] == [d.actions.tobytes() for d in drawn]
    for small, large in zip(stored, drawn, strict=True):
        ends = (0, len(small.actions) - 1)
        for index, camera in ((0, CAMERAS[0]), (1, CAMERAS[0]), (0, CAMERAS[1])):
            recorded = [FrameReader().read(small, end, camera).astype(float) for end in ends]
            after = FrameReader().read(large, ends[index], camera).astype(float)
            assert after.shape == (128, 128, 3)
            halved = after.reshape(RENDER_SIZE, 2, RENDER_SIZE, 2, 3).mean(axis=(1, 3))
            own, other = (np.abs(halved - recorded[i]).mean() for i in (index, 1 - index))
            # small images have jagged edges, and those of a moving arm are a little older
            assert own < 6 < 10 < other
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "large").iterdir()}
    rerender(work, (PUSH, LIFT), workers=1)
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "large").iterdir()}


def test_states_of_another_task_are_refused(mini_demos: Path, tmp_path) -> None:
    wrong, out = tmp_path / "wrong", tmp_path / "out"
    wrong.mkdir()
    out.mkdir()
    shutil.copy(demo_file(mini_demos, MINI.task(LIFT).name), demo_file(wrong, MINI.task(4).name))
    env = EnvConfig(suite="mini", render_size=32)
    work = Rerendering(source=wrong, target=out, env=env, replays=False, filter_noops=True)
    with pytest.raises(ConfigError, match=r"has states \[\d+, \d+\], but a state of its task has"):
        rerender_task(work, 4)
    assert not demo_file(work.target, MINI.task(4).name).exists()


def test_steps_share_out_every_sample_once_a_round() -> None:
    def rows(rank: int = 0, num_ranks: int = 1, first_step: int = 0) -> list[list[Draw]]:
        return list(
            StepSampler(
                10,
                batch_size=4,
                seed=5,
                first_step=first_step,
                last_step=10,
                rank=rank,
                num_ranks=num_ranks,
            )
        )

    whole = rows()
    drawn = [draw.row for step in whole for draw in step]
    for start in range(0, 40, 10):
        assert sorted(drawn[start : start + 10]) == list(range(10))
    assert drawn[:10] != drawn[10:20]
    assert [d.number for step in whole for d in step] == list(range(40))
    assert rows(first_step=3) == whole[3:], "a resumed run takes up the same order"
    for step, left, right in zip(whole, rows(0, 2), rows(1, 2), strict=True):
        assert sorted([*left, *right], key=lambda d: d.number) == step
