"""From a recipe to a run: what is refused before anything starts, and what a folder remembers."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from verl_vla.config.choices import CAMERAS
from verl_vla.config.grpo import (
    ColdStartConfig,
    GRPOClusterConfig,
    GRPOEvaluationConfig,
    GRPOOptimizerConfig,
    GRPOPolicyConfig,
    GRPOTrainerConfig,
    KLConfig,
    Recipe,
)
from verl_vla.config.shared import EnvironmentConfig
from verl_vla.core.episode import Start
from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.envs.registry import make_env, suite
from verl_vla.policies.base import PolicyShape
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft import OpenVLAOFTPolicy
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tiny_policy
from verl_vla.policies.registry import load_processor
from verl_vla.policies.scratch_vla import tiny as tiny_scratch_vla
from verl_vla.rl.setup import env_config, find_policy, open_simulators, starts, task_ids
from verl_vla.trainer.grpo.run import open_run

MINI = suite("mini")
SHAPE = PolicyShape(num_views=1, image_size=28, chunk_length=8, action_dim=7, num_bins=256)
MOTION = (1.0,) * 7


def tiny_policy(**sizes: int) -> OpenVLAOFTPolicy:
    """A policy as small as one can be."""
    return build_tiny_policy(
        [task.instruction for task in MINI.tasks],
        ActionStatistics(
            q01=-np.array(MOTION), q99=np.array(MOTION), mask=np.array([True] * 6 + [False])
        ),
        sizes=TinySizes(
            image_size=SHAPE.image_size,
            vision_width=12,
            vision_heads=2,
            llm_width=16,
            llm_depth=1,
            llm_heads=2,
            llm_mlp=16,
            **sizes,
        ),
    )


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_policy().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(policy_folder, tmp_path) -> Recipe:
    return Recipe(
        out=str(tmp_path / "run"),
        policy=GRPOPolicyConfig(path=str(policy_folder)),
        environment=EnvironmentConfig(
            suite="mini", tasks=(0, 2), render_size=64, num_workers=1, num_slots=1
        ),
        evaluation=GRPOEvaluationConfig(episodes_per_task=3),
    )


@pytest.fixture
def no_simulators(monkeypatch):
    """What is checked comes before the first process; leave the processes out."""
    monkeypatch.setattr("verl_vla.trainer.grpo.run.open_simulators", lambda *_: nullcontext())


def open_and_close(recipe: Recipe) -> None:
    with open_run(recipe):
        pass


def refusal(recipe: Recipe) -> str:
    with pytest.raises(ConfigError) as caught:
        open_and_close(recipe)
    return str(caught.value)


def test_a_run_holds_the_parts_of_its_recipe_and_closes_its_simulators(recipe, policy_folder):
    with open_run(recipe) as run:
        assert isinstance(run.simulators, EnvPool)
        assert run.simulators.num_slots == 1
        pids = run.simulators.worker_pids
    assert run.folder == Path(recipe.out)
    assert run.checkpoints == run.folder / "checkpoints"
    assert run.policy_folder == policy_folder
    assert run.processor.shape == SHAPE
    assert type(run.reward).__name__ == "BinaryReward"
    assert run.task_names == {0: MINI.tasks[0].name, 2: MINI.tasks[2].name}
    assert len(run.evaluation_starts) == 2 * 3
    assert set(run.training_starts).isdisjoint(run.evaluation_starts)
    assert not [pid for pid in pids if _is_running(pid)]
    with pytest.raises(ContractError, match="the pool is closed"):
        run.simulators.reset({})


def test_a_disk_without_room_for_the_run_is_refused(recipe, no_simulators, monkeypatch):
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    assert "needs up to" in refusal(recipe)
    assert not Path(recipe.out).exists()


@pytest.mark.parametrize(("reward_args", "every"), [({}, 0), ({"video_every": 2}, 2)])
def test_videos_are_rendered_for_a_reward_that_requires_them(
    recipe, no_simulators, reward_args, every
):
    shaped = replace(recipe, reward="srpo", reward_args={"encoder": "pixels", **reward_args})
    with open_run(shaped) as run:
        assert run.env_config.video_every == every


def test_the_image_after_the_last_step_is_rendered_for_a_reward_that_looks(recipe, no_simulators):
    with open_run(recipe) as run:
        assert not run.env_config.render_final
    shaped = replace(recipe, reward="srpo", reward_args={"encoder": "pixels"}, out=recipe.out + "2")
    with open_run(shaped) as run:
        assert run.env_config.render_final
        assert run.env_config.cameras == CAMERAS[:1]


def test_what_a_recipe_needs_besides_is_looked_for_before_anything_starts(
    recipe, no_simulators, monkeypatch
):
    asked: list[dict[str, str]] = []
    monkeypatch.setattr("verl_vla.trainer.grpo.run.require_extras", asked.append)
    loggers = GRPOTrainerConfig(loggers=("tensorboard", "mlflow"))
    open_and_close(replace(recipe, trainer=loggers))
    assert asked == [
        {"policy.quantization": "none", "optimizer.name": "adamw"},
        {"trainer.loggers": "tensorboard"},
        {"trainer.loggers": "mlflow"},
    ]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"lora_rank": 4}, {"lora_rank": 8}, "policy.lora_rank: 4 -> 8"),
        ({"lora_rank": 4}, {}, "policy.lora_rank: 4 -> None"),
        (
            {"lora_rank": 4},
            {"lora_rank": 4, "lora_targets": "all-linear"},
            "policy.lora_targets: 'language_model' -> 'all-linear'",
        ),
    ],
)
def test_other_adapters_do_not_continue_a_run(
    recipe, no_simulators, before: dict[str, Any], after: dict[str, Any], said: str
):
    open_and_close(replace(recipe, policy=replace(recipe.policy, **before)))
    assert said in refusal(replace(recipe, policy=replace(recipe.policy, **after)))


@pytest.mark.parametrize("option", ["ranks_per_node", "num_nodes"])
def test_another_number_of_ranks_does_not_continue_a_run(recipe, no_simulators, option: str):
    open_and_close(recipe)
    cluster = replace(recipe.cluster, **{option: 2})
    assert f"cluster.{option}: 1 -> 2" in refusal(replace(recipe, cluster=cluster))


def test_a_policy_with_a_fault_is_refused_before_the_folder_is_made(
    recipe, no_simulators, policy_folder, monkeypatch
):
    def refuse(folder: Path, unnorm_key: str | None) -> None:
        raise ConfigError(f"{folder} has no weights for {unnorm_key}")

    monkeypatch.setattr("verl_vla.trainer.grpo.run.require_valid", refuse)
    assert f"{policy_folder} has no weights for None" in refusal(recipe)
    assert not Path(recipe.out).exists()


def test_where_other_nodes_simulate_no_simulator_is_opened_here(recipe, monkeypatch):
    monkeypatch.setattr(
        "verl_vla.trainer.grpo.run.open_simulators", lambda *_: pytest.fail("a pool was opened")
    )
    cluster = GRPOClusterConfig(env_nodes=1, address="auto")
    with open_run(replace(recipe, cluster=cluster)) as run:
        assert run.simulators is None


def test_a_run_knows_its_starts_and_how_it_is_evaluated(recipe, no_simulators):
    several = replace(
        recipe, evaluation=GRPOEvaluationConfig(episodes_per_task=2, also_sampled="always")
    )
    with open_run(several) as run:
        assert run.evaluation_starts == starts(MINI, (0, 2), "held_out", per_task=2)
        assert run.training_starts == starts(MINI, (0, 2), "train")
        assert [kind.temperature for kind in run.evaluation_kinds] == [0.0, 1.6]
        assert run.recipe is several


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("environment", {"suite": "mimi"}, "did you mean 'mini'?"),
        (
            "environment",
            {"tasks": (9,)},
            "environment.tasks has 9, but suite 'mini' has tasks 0 to",
        ),
        ("environment", {"render_size": 20}, "environment.render_size is 20, but the policy sees"),
        ("environment", {"step_limit": 0}, "step_limit is 0"),
        ("environment", {"step_limit": "simplevla"}, "SimpleVLA-RL never played mini"),
        ("policy", {"path": "no/where"}, "policy.path is 'no/where', but there is no config.json"),
        ("policy", {"attention": "flash_attention_2"}, "needs a CUDA device and the package flash"),
        ("evaluation", {"episodes_per_task": 999}, "evaluation.episodes_per_task is 999"),
        (None, {"reward": "binry"}, "did you mean 'binary'?"),
        (None, {"reward_args": {"scale": 1}}, "reward 'binary' has no argument 'scale'"),
    ],
)
def test_whatever_is_wrong_is_found_before_a_process_or_a_folder_is_made(
    recipe, monkeypatch, part, change, message
):
    monkeypatch.setattr(
        "verl_vla.rl.setup.EnvPool", lambda *_, **__: pytest.fail("a pool was made")
    )
    if part is not None:
        change = {part: replace(getattr(recipe, part), **change)}
    assert message in refusal(replace(recipe, **change))
    assert not Path(recipe.out).exists()


def test_adapters_must_go_with_the_checkpoint(recipe, tmp_path, no_simulators):
    sizes = tiny_scratch_vla.ScratchSizes(
        image_size=28, llm_width=32, llm_depth=1, llm_mlp=64, lora_rank=4
    )
    statistics = tiny_policy().processor.codec.statistics
    words = [task.instruction for task in MINI.tasks]
    tiny_scratch_vla.build_tiny_policy(words, statistics, sizes=sizes).save_pretrained(
        tmp_path / "own"
    )
    plain = replace(sizes, lora_rank=0)
    tiny_scratch_vla.build_tiny_policy(words, statistics, sizes=plain).save_pretrained(
        tmp_path / "plain"
    )
    own, none = (
        replace(recipe, policy=GRPOPolicyConfig(path=str(tmp_path / name), lora_rank=8))
        for name in ("own", "plain")
    )
    assert "has adapters of rank 4 already" in refusal(own)
    open_and_close(none)
    held = replace(none, loss=replace(none.loss, kl=KLConfig(coefficient=0.1)))
    assert "which without its adapters is not the reference policy" in refusal(held)


def test_the_folder_holds_the_whole_recipe(recipe, no_simulators):
    open_and_close(recipe)
    written = yaml.safe_load((Path(recipe.out) / "recipe.yaml").read_text())
    assert written == json.loads(json.dumps(recipe.as_dict()))
    assert {p.name for p in Path(recipe.out).iterdir()} == {"recipe.yaml", "lock"}


def test_the_same_recipe_resumes(recipe, no_simulators):
    open_and_close(recipe)
    open_and_close(recipe)


def test_a_run_may_grow_longer_and_be_reported_elsewhere(recipe, no_simulators):
    open_and_close(recipe)
    longer = replace(
        recipe,
        trainer=GRPOTrainerConfig(total_training_steps=500, save_every=1, loggers=()),
        evaluation=GRPOEvaluationConfig(episodes_per_task=1),
        cold_start=ColdStartConfig(mode="off"),
        cluster=GRPOClusterConfig(address="auto"),
        environment=replace(recipe.environment, num_workers=7, timeout_s=77.0),
    )
    open_and_close(longer)
    written = yaml.safe_load((Path(recipe.out) / "recipe.yaml").read_text())
    assert written["trainer"]["total_training_steps"] == 500


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (None, {"seed": 4}, "(seed: 0 -> 4)"),
        (None, {"verl": {"a": {"b": 1}}}, "(verl.a: None -> {'b': 1})"),
        ("optimizer", {"lr": 1e-4}, "(optimizer.lr: 5e-06 -> 0.0001)"),
        ("environment", {"tasks": (0,)}, "(environment.tasks: [0, 2] -> [0])"),
        ("cluster", {"ranks_per_node": 2}, "(cluster.ranks_per_node: 1 -> 2)"),
    ],
)
def test_another_experiment_in_the_same_folder_is_refused(
    recipe, no_simulators, part, change, message
):
    open_and_close(recipe)
    before = (Path(recipe.out) / "recipe.yaml").read_text()
    if part is not None:
        change = {part: replace(getattr(recipe, part), **change)}
    answer = refusal(replace(recipe, **change))
    assert message in answer
    assert recipe.out in answer
    assert "choose another out=FOLDER" in answer
    assert (Path(recipe.out) / "recipe.yaml").read_text() == before


def test_every_difference_is_named(recipe, no_simulators):
    open_and_close(recipe)
    answer = refusal(replace(recipe, seed=1, optimizer=GRPOOptimizerConfig(micro_batch_size=2)))
    assert "optimizer.micro_batch_size: 16 -> 2; seed: 0 -> 1" in answer


def test_a_folder_that_cannot_be_made_is_refused(recipe, no_simulators, tmp_path):
    (tmp_path / "file").write_text("")
    answer = refusal(replace(recipe, out=str(tmp_path / "file" / "run")))
    assert "which cannot be written (Not a directory); choose another" in answer
    assert "(Not a directory)" in refusal(replace(recipe, out=str(tmp_path / "file")))


def test_a_folder_whose_recipe_cannot_be_written_is_refused(recipe, no_simulators):
    folder = Path(recipe.out)
    (folder / "recipe.tmp").mkdir(parents=True)
    assert "which cannot be written (Is a directory)" in refusal(recipe)


def test_a_policy_is_found_here_or_in_the_project(policy_folder, tmp_path, monkeypatch):
    assert find_policy(str(policy_folder)) == policy_folder
    monkeypatch.chdir(policy_folder.parent)
    assert find_policy(policy_folder.name) == policy_folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("verl_vla.rl.setup.PROJECT_FOLDER", policy_folder.parent)
    assert find_policy(policy_folder.name) == policy_folder


def test_all_tasks_or_the_named_ones_in_their_order():
    assert task_ids(MINI, None) == tuple(range(len(MINI.tasks)))
    assert task_ids(MINI, (2, 0)) == (2, 0)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((), "environment.tasks is empty; name at least one task, or null for all"),
        ((-1,), "environment.tasks has -1"),
        ((0, len(MINI.tasks)), f"has tasks 0 to {len(MINI.tasks) - 1}; choose among those"),
        ((1, 1), r"environment.tasks is \[1, 1\]; name each task once"),
    ],
)
def test_impossible_tasks_are_refused(wanted, message):
    with pytest.raises(ConfigError, match=message):
        task_ids(MINI, wanted)


def test_training_and_evaluation_share_no_start():
    tasks = task_ids(MINI, None)
    train, held_out = starts(MINI, tasks, "train"), starts(MINI, tasks, "held_out")
    assert set(train).isdisjoint(held_out)
    assert len(train) + len(held_out) == len(tasks) * MINI.num_init_states


def test_fewer_starts_are_the_first_of_each_task():
    some = starts(MINI, (3, 1), "held_out", per_task=2)
    first = MINI.init_state_ids(3, "held_out")[:2]
    assert [s.task_id for s in some] == [3, 3, 1, 1]
    assert some[:2] == tuple(Start(task_id=3, init_state_id=i) for i in first)


def test_drawn_starts_are_as_many_as_wanted_and_no_others():
    tasks = (0, 5)
    drawn = starts(MINI, tasks, "sampled", per_task=100)
    assert [sum(start.task_id == task for start in drawn) for task in tasks] == [100, 100]
    recorded = {*starts(MINI, tasks, "train"), *starts(MINI, tasks, "held_out")}
    assert not recorded & set(drawn)
    with pytest.raises(ConfigError, match="says how many a task"):
        starts(MINI, tasks, "sampled")


def test_more_starts_than_there_are_is_refused():
    available = len(MINI.init_state_ids(1, "held_out"))
    assert len(starts(MINI, (1,), "held_out", per_task=available)) == available
    with pytest.raises(ConfigError, match=f"task 1 of 'mini' has {available} held_out init states"):
        starts(MINI, (1,), "held_out", per_task=available + 1)


def test_a_simulator_learns_its_sizes_from_recipe_and_policy():
    env = EnvironmentConfig(suite="mini", step_limit=33, render_size=96)
    config = env_config(env, tiny_policy().processor)
    assert (config.suite, config.step_limit) == ("mini", 33)
    assert (config.render_size, config.image_size) == (96, SHAPE.image_size)


@pytest.mark.parametrize(("known", "rendered"), [({"render_size": 64}, 64), ({}, 256)])
def test_images_are_as_large_as_those_of_the_fine_tuning(known, rendered, tmp_path, caplog):
    tiny_policy(**known).save_pretrained(tmp_path)
    config = env_config(EnvironmentConfig(suite="mini"), load_processor(tmp_path))
    assert config.render_size == rendered
    assert caplog.messages == []


def test_images_of_another_size_are_pointed_out(caplog):
    env = EnvironmentConfig(suite="mini", render_size=96)
    assert env_config(env, tiny_policy(render_size=64).processor).render_size == 96
    assert "render_size is 96, but the policy was fine-tuned on images of 64 px" in caplog.text


def test_a_policy_is_shown_as_many_cameras_as_it_has_views():
    env = EnvironmentConfig(suite="mini")
    assert env_config(env, tiny_policy().processor).cameras == CAMERAS[:1]
    assert env_config(env, tiny_policy(num_views=2).processor).cameras == CAMERAS
    with pytest.raises(ConfigError, match="takes 3 images, but the environments have 2 cameras"):
        env_config(env, tiny_policy(num_views=3).processor)


def test_the_embedded_suite_needs_no_assets(monkeypatch):
    monkeypatch.setattr(
        "verl_vla.envs.libero.suite.find_assets", lambda: pytest.fail("assets were looked for")
    )
    MINI.require_simulator()


def test_a_missing_simulator_is_found_before_the_folder_is_made(recipe, no_simulators, monkeypatch):
    def refuse(_: Any) -> None:
        raise ConfigError("no assets")

    monkeypatch.setattr(type(MINI), "require_simulator", refuse)
    assert refusal(recipe) == "no assets"
    assert not Path(recipe.out).exists()


@dataclass(frozen=True)
class Processor:
    """A policy's sizes and statistics, without the policy."""

    shape: PolicyShape = SHAPE
    gripper_dims: tuple[int, ...] = (6,)
    render_size: int | None = None

    @property
    def codec(self) -> Any:
        return SimpleNamespace(
            statistics=SimpleNamespace(gripper_dims=self.gripper_dims, key="mini")
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_views": 3}, "takes 3 images, but the environments have 2 cameras"),
        ({"action_dim": 6}, "an action of the policy has 6 values, and one of suite 'mini' has 7"),
        ({"proprio_dim": 7}, "reads 7 proprio values, and suite 'mini' has 8"),
        ({"proprio_dim": 8}, None),
        ({"proprio_dim": 0}, None),
        ({"num_views": 2}, None),
    ],
)
def test_a_policy_must_suit_the_robot(change, message):
    given: Any = Processor(shape=replace(SHAPE, **change))
    if message is None:
        env_config(EnvironmentConfig(suite="mini"), given)
        return
    with pytest.raises(ConfigError, match=message):
        env_config(EnvironmentConfig(suite="mini"), given)


@pytest.mark.parametrize("dims", [(), (5,), (5, 6)])
def test_the_gripper_is_where_the_suite_has_it(dims):
    given: Any = Processor(gripper_dims=dims)
    with pytest.raises(
        ConfigError, match="'mini' leave the values .* are at .6.: the mask must be"
    ):
        env_config(EnvironmentConfig(suite="mini"), given)


@pytest.mark.parametrize(
    ("known", "asked", "rendered", "is_warned"),
    [
        (None, None, 256, False),
        (64, None, 64, False),
        (None, 32, 32, False),
        (64, 64, 64, False),
        (64, 28, 28, True),
    ],
)
def test_the_recipe_decides_how_large_images_are_rendered(
    known, asked, rendered, is_warned, caplog
):
    given: Any = Processor(render_size=known)
    config = env_config(EnvironmentConfig(suite="mini", render_size=asked), given)
    assert config.render_size == rendered
    assert bool(caplog.messages) == is_warned


@pytest.mark.parametrize(
    ("tasks", "workers", "number"), [(None, 1, 10), ((0,), 1, 2), ((0, 1, 2), 1, 6), (None, 2, 7)]
)
def test_a_process_keeps_simulators_for_its_share_of_the_tasks(tasks, workers, number):
    given: Any = Processor()
    env = EnvironmentConfig(suite="mini", tasks=tasks, num_workers=workers)
    assert env_config(env, given).max_simulators == number


def test_a_step_limit_that_is_none_is_refused_before_anything_starts():
    given: Any = Processor()
    with pytest.raises(ConfigError, match="step_limit is 0"):
        env_config(EnvironmentConfig(suite="mini", step_limit=0), given)


def test_a_suite_of_one_task_will_do(monkeypatch):
    given: Any = Processor()
    one = replace(MINI, tasks=MINI.tasks[:1])
    monkeypatch.setattr("verl_vla.rl.setup.suite", lambda _: one)
    env = EnvironmentConfig(suite="mini", num_workers=1)
    assert env_config(env, given).max_simulators == 2


def test_tasks_that_cannot_be_built_are_left_out_and_named(caplog):
    some: Any = SimpleNamespace(
        name="some", tasks="abcd", refusals={1: "no mesh", 2: "no mesh", 3: "no texture"}
    )
    assert task_ids(some, None) == (0,)
    assert caplog.messages == [
        "2 of 4 tasks of some are left out: no mesh",
        "1 of 4 tasks of some are left out: no texture",
    ]
    assert task_ids(some, (0,)) == (0,)
    with pytest.raises(ConfigError, match="has 2, which cannot be built: no mesh"):
        task_ids(some, (0, 2))
    some.refusals[0] = "no mesh"
    with pytest.raises(ConfigError, match="no task of suite 'some' can be built here"):
        task_ids(some, None)


@pytest.mark.parametrize(("split", "number"), [("train", 1), ("held_out", 1), ("sampled", 9)])
def test_a_task_with_fewer_recorded_starts_gives_all_that_it_has(split, number):
    """LIBERO-Plus records one for each of its tasks."""
    first = replace(MINI.tasks[0], num_init_states=1)
    fewer = replace(MINI, tasks=(first, *MINI.tasks[1:]))
    found = starts(fewer, (0, 1), split, per_task=9)
    by_task = [sum(start.task_id == task for start in found) for task in (0, 1)]
    assert by_task == [number if split != "train" else len(fewer.init_state_ids(0, split)[:9]), 9]


def test_simulators_are_opened_as_the_recipe_says_and_closed_after_an_error(monkeypatch):
    asked: list[Any] = []

    class Pool:
        def __init__(self, make: Any, **options: Any) -> None:
            asked.append((make.func, make.args, options))

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            asked.append("closed")

    monkeypatch.setattr("verl_vla.rl.setup.EnvPool", Pool)
    monkeypatch.setattr("verl_vla.rl.setup.render_devices", lambda: ["3"])
    env = EnvironmentConfig(suite="mini", num_workers=3, num_slots=5, timeout_s=7.0)
    config: Any = "a configuration"
    with pytest.raises(KeyError), open_simulators(env, config, SHAPE) as pool:
        assert isinstance(pool, Pool)
        raise KeyError
    assert asked == [
        (
            make_env,
            (config,),
            {
                "num_workers": 3,
                "num_slots": 5,
                "image_shape": SHAPE.image_shape,
                "timeout_s": 7.0,
                "worker_env": {},
                "render_devices": ["3"],
            },
        ),
        "closed",
    ]
