"""From a fine-tuning recipe to a run: what is checked, made, and found again on resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from sft_world import SAMPLES_AN_EPISODE, SIZE, TASKS, grey_of, sft_recipe, write_demos

from verl_vla.config.choices import CAMERAS
from verl_vla.config.sft import SFTRecipe
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.datasets.action_targets import measure_statistics
from verl_vla.datasets.rerender import Rerendering
from verl_vla.datasets.sft_dataset import Draw
from verl_vla.envs.registry import suite
from verl_vla.policies.normalization import load_statistics
from verl_vla.policies.registry import load_policy
from verl_vla.trainer.sft import run as run_module
from verl_vla.trainer.sft.run import SFTRun, open_sft_run

BASE = PROJECT_FOLDER / "bases" / "mini"


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demos(tmp_path_factory.mktemp("demos"))


@pytest.fixture
def open_run(tmp_path: Path, demos: Path) -> Any:
    """Open a run and close it again."""

    def opened(*words: str, folder: Path = demos) -> SFTRun:
        with open_sft_run(sft_recipe(tmp_path / "run", folder, *words)) as run:
            return run

    return opened


def test_a_run_holds_the_parts_of_its_recipe(open_run: Any, tmp_path: Path) -> None:
    run = open_run()
    assert run.folder == tmp_path / "run"
    assert run.checkpoints == tmp_path / "run" / "checkpoints"
    assert run.policy_folder == run.folder / "first_policy"
    assert run.render_size == SIZE
    mini = suite("mini")
    assert run.task_names == {task: mini.tasks[task].name for task in TASKS}
    assert [demo.name for demo in run.train] == ["demo_0"] * 2
    assert [demo.name for demo in run.held_out] == ["demo_1"] * 2
    assert [demo.task_id for demo in run.train] == list(TASKS)
    assert [start.task_id for start in run.starts] == [0, 0, 4, 4]
    held_out = {task: mini.init_state_ids(task, "held_out") for task in TASKS}
    assert all(start.init_state_id in held_out[start.task_id] for start in run.starts)
    config = run.env_config
    assert (config.render_size, config.image_size, config.cameras) == (SIZE, SIZE, CAMERAS[:1])
    processor = run.load_processor()
    assert processor.render_size == SIZE
    assert len(run.samples(processor)) == len(run.held_out_samples(processor)) == 14
    assert 2 * SAMPLES_AN_EPISODE == 14


def test_the_first_policy_has_the_given_weights_and_the_statistics_of_the_demonstrations(
    open_run: Any,
) -> None:
    run = open_run()
    assert (run.policy_folder / "model.safetensors").resolve() == BASE / "model.safetensors"
    mine = load_statistics(run.policy_folder, "mini_no_noops")
    right = measure_statistics([demo.own_actions for demo in run.train], key="mini_no_noops")
    assert np.array_equal(mine.q01, right.q01) and np.array_equal(mine.q99, right.q99)
    assert not np.array_equal(mine.q99, load_statistics(BASE, None).q99)
    assert not (run.folder / "first_policy.partial").exists()


def test_idle_steps_are_part_of_the_statistics_name(open_run: Any) -> None:
    run = open_run("demos.choice.filter_noops=false")
    assert load_statistics(run.policy_folder, "mini").key == "mini"


def test_training_images_are_augmented_by_the_seed_and_held_out_ones_are_not(
    open_run: Any,
) -> None:
    run = open_run("demos.augment=true", "seed=5")
    processor = run.load_processor()
    samples, held_out = run.samples(processor), run.held_out_samples(processor)
    assert (samples._augment_seed, held_out._augment_seed) == (5, None)
    assert grey_of(held_out[Draw(row=3, number=0)].images) == [13]
    plain = open_run_again(run, "demos.augment=false")
    assert plain.samples(processor)._augment_seed is None


def open_run_again(run: SFTRun, *words: str) -> SFTRun:
    """The same demonstrations in another folder."""
    folder = run.folder.with_name("again")
    with open_sft_run(sft_recipe(folder, run.train[0].file.parent, *words)) as again:
        return again


def test_a_policy_is_made_where_none_is_given(open_run: Any) -> None:
    run = open_run("policy.path=null", "seed=3")
    first = load_policy(run.policy_folder)
    assert first.processor.codec.statistics.key == "mini_no_noops"
    # every task of every suite can be asked of it
    known = first.processor.prompt(suite("libero_spatial").tasks[0].instruction)
    assert len(known) > 0
    mine = load_file(run.policy_folder / "model.safetensors")
    with open_sft_run(
        sft_recipe(
            run.folder.with_name("again"),
            run.train[0].file.parent,
            "policy.path=null",
            "seed=4",
        )
    ) as again:
        theirs = load_file(again.policy_folder / "model.safetensors")
    assert any(not np.array_equal(mine[name], theirs[name]) for name in mine), "by the seed"


def test_a_resumed_run_keeps_its_first_policy(open_run: Any) -> None:
    run = open_run()
    before = (run.policy_folder / "model.safetensors").lstat().st_mtime_ns
    assert open_run().policy_folder == run.policy_folder
    assert (run.policy_folder / "model.safetensors").lstat().st_mtime_ns == before


def test_a_first_policy_that_was_cut_short_is_made_again(open_run: Any, tmp_path: Path) -> None:
    partial = tmp_path / "run" / "first_policy.partial"
    open_run()
    for path in (tmp_path / "run" / "first_policy").iterdir():
        path.unlink()
    (tmp_path / "run" / "first_policy").rmdir()
    partial.mkdir()
    (partial / "half").write_text("")
    run = open_run()
    assert not partial.exists()
    assert not (run.policy_folder / "half").exists()
    assert (run.policy_folder / "config.json").exists()


@pytest.mark.parametrize("scale", [0.2, 0.9])
def test_other_demonstrations_do_not_continue_a_run(
    open_run: Any, tmp_path: Path, scale: float
) -> None:
    """Their statistics give the same action tokens another meaning."""
    demos = write_demos(tmp_path / "demos")
    open_run(folder=demos)
    write_demos(demos, scale=scale)
    with pytest.raises(ConfigError, match="first_policy was made for other demonstrations than"):
        open_run(folder=demos)


def test_a_run_that_never_plays_has_no_starts_and_needs_no_simulator(
    open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        type(suite("mini")), "require_simulator", lambda _: pytest.fail("a simulator is needed")
    )
    assert open_run("trainer.eval_every=0").starts == ()


@pytest.mark.parametrize("word", ["trainer.eval_every=1", "demos.images=rerendered"])
def test_a_missing_simulator_is_found_before_the_folder_is_made(
    open_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    def refuse(_: Any) -> None:
        raise ConfigError("no assets")

    monkeypatch.setattr(type(suite("mini")), "require_simulator", refuse)
    words = () if word.startswith("trainer") else ("trainer.eval_every=0",)
    with pytest.raises(ConfigError, match="no assets"):
        open_run(word, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("policy.path=no/where",), "there is no config.json"),
        (("policy.path=null", "policy.architecture=gpt"), "gpt"),
        (("environment.tasks=[0,99]",), "environment.tasks has 99"),
        (("evaluation.episodes_per_task=9999",), "episodes_per_task is 9999"),
        (("demos.choice.held_out_per_task=2",), "ask for fewer"),
    ],
)
def test_what_is_wrong_is_found_before_the_folder_is_made(
    open_run: Any, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_run(*words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("batch", "is_refused"), [(14, False), (15, True)])
def test_a_batch_is_no_larger_than_the_data(open_run: Any, batch: int, is_refused: bool) -> None:
    words = (f"optimizer.batch_size={batch}", "optimizer.micro_batch_size=1")
    if not is_refused:
        assert open_run(*words).train
        return
    with pytest.raises(ConfigError, match="make 14 samples, fewer than optimizer.batch_size, 15"):
        open_run(*words)


def test_images_that_a_view_lacks_are_refused(
    open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = SFTRun.load_processor

    def with_two_views(run: SFTRun) -> Any:
        one = load(run)
        shape = replace(one.shape, num_views=2)
        return SimpleNamespace(shape=shape, codec=one.codec, prompt=one.prompt)

    monkeypatch.setattr(SFTRun, "load_processor", with_two_views)
    with pytest.raises(ConfigError, match="takes 2 images, but demo_0 .* of agentview alone"):
        open_run()


@pytest.mark.parametrize("check", ["require_valid", "check_adapters"])
def test_a_fault_of_the_policy_is_found_before_anything_is_rendered(
    open_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    asked: list[Any] = []

    def refuse(folder: Path, *given: Any, **more: Any) -> None:
        asked.append((given, more))
        raise ConfigError(f"{folder.name} has a fault")

    monkeypatch.setattr(run_module, check, refuse)
    monkeypatch.setattr(run_module, "rerender", lambda *_, **__: pytest.fail("it is rendered"))
    with pytest.raises(ConfigError, match="policy has a fault"):
        open_run("policy.lora_rank=2", "demos.images=rerendered", "trainer.eval_every=0")
    assert asked == [((), {}) if check == "require_valid" else ((2,), {"has_kl": False})]
    assert not (tmp_path / "run" / "first_policy").exists()


def test_a_sample_has_an_image_of_every_view(open_run: Any) -> None:
    run = open_run()
    one = run.load_processor()
    two: Any = SimpleNamespace(shape=replace(one.shape, num_views=2), codec=one.codec)
    assert run.samples(one)._cameras == CAMERAS[:1]
    assert run.samples(two)._cameras == run.held_out_samples(two)._cameras == CAMERAS


def test_demonstrations_are_rendered_again_and_read_from_there(
    tmp_path: Path, demos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Rerendering, tuple[int, ...], int]] = []

    def rerender(work: Rerendering, tasks: Any, workers: int) -> None:
        asked.append((work, tuple(tasks), workers))
        write_demos(work.target, scale=0.3)

    monkeypatch.setattr(run_module, "rerender", rerender)
    words = ("demos.images=rerendered", "environment.num_workers=3", "demos.replay=false")
    with open_sft_run(sft_recipe(tmp_path / "run", demos, *words)) as run:
        pass
    ((work, tasks, workers),) = asked
    assert (tasks, workers) == (TASKS, 3)
    assert (work.source, work.target) == (demos, run.folder / f"demos_{SIZE}px")
    assert (work.replays, work.filter_noops) == (False, True)
    assert (work.env.suite, work.env.render_size) == ("mini", SIZE)
    assert (work.env.cameras, work.env.max_simulators) == (CAMERAS[:1], 1)
    assert {demo.file.parent for demo in run.train + run.held_out} == {work.target}
    statistics = load_statistics(run.policy_folder, "mini_no_noops")
    assert statistics.q99[:6].max() < 0.31, "of what is learned, not of what was recorded"
    assert run.render_size == SIZE


def test_rendered_images_have_openvlas_size_unless_the_recipe_says_otherwise(
    tmp_path: Path, demos: Path
) -> None:
    recipe = sft_recipe(tmp_path / "run", demos, "environment.render_size=null")
    work = run_module._rerendering(recipe, demos, tmp_path, CAMERAS)
    assert work.env.render_size == 256
    assert work.target == tmp_path / "demos_256px"
    assert work.env.cameras == CAMERAS
    assert work.replays


def test_simulators_are_opened_for_the_policy(
    open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run()
    asked: list[Any] = []

    class Pool:
        def __init__(self, *given: Any) -> None:
            asked.extend(given)

        def __enter__(self) -> str:
            return "a pool"

        def __exit__(self, *_: object) -> None:
            asked.append("closed")

    monkeypatch.setattr(run_module, "open_simulators", Pool)
    processor = run.load_processor()
    with run.open_simulators(processor) as pool:
        assert pool == "a pool"
    assert asked == [run.recipe.environment, run.env_config, processor.shape, "closed"]


def test_the_recipe_is_written_down(open_run: Any) -> None:
    run = open_run()
    assert isinstance(run.recipe, SFTRecipe)
    with pytest.raises(ConfigError, match=r"optimizer.lr: 0.002 -> 0.1"):
        open_run("optimizer.lr=0.1")
    assert open_run("environment.num_slots=3", "trainer.total_training_steps=9").train
