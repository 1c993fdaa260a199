"""A suite by path, two arms of 14 joints: it is loaded, must fit the policy, and is trained in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from documented_suite import JOINTS, PAGE, two_armed_policy, write_documented_suite

from verl_vla.config.compose import load_recipe
from verl_vla.config.grpo import ClipRange
from verl_vla.config.shared import EnvironmentConfig
from verl_vla.core.episode import EpisodeSpec
from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.core.tables import Trajectories
from verl_vla.envs.base import Suite
from verl_vla.envs.registry import absolute_name, suite
from verl_vla.evaluation.conditions import conditions
from verl_vla.policies.registry import load_policy
from verl_vla.rl.advantage import group_advantage
from verl_vla.rl.loss import executed_mask, policy_loss, trajectory_weight
from verl_vla.rl.rollout import NoiseSource, rollout
from verl_vla.rl.setup import env_config
from verl_vla.trainer.grpo.run import Run, open_run

CHUNK, TEMPERATURE = 25, 1.0
GROUPS, GROUP_SIZE = 2, 4
ROBOTWIN = "verl_vla/envs/robotwin.py:RoboTwin"


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documented_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a policy for it."""
    folder = tmp_path_factory.mktemp("policy")
    two_armed_policy([task.instruction for task in suite(name).tasks]).save_pretrained(folder)
    return folder


def words(name: str, folder: Path, out: Path) -> list[str]:
    return [
        "recipe=robotwin",
        "profile=two_cores",
        f"policy.path='{folder}'",
        f"environment.suite='{name}'",
        "environment.tasks=[0,1]",
        "environment.num_workers=1",
        "environment.num_slots=4",
        "evaluation.episodes_per_task=2",
        f"out='{out}'",
    ]


@pytest.fixture(scope="module")
def run(name: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with open_run(load_recipe(words(name, folder, tmp_path_factory.mktemp("out")))) as run:
        yield run


@pytest.fixture(scope="module")
def played(run: Run) -> Trajectories:
    assert run.simulators is not None
    specs = [
        EpisodeSpec(task_id=g, init_state_id=0, group_id=g, episode_id=g * GROUP_SIZE + i)
        for g in range(GROUPS)
        for i in range(GROUP_SIZE)
    ]
    policy, noise = load_policy(run.policy_folder), NoiseSource(seed=0, stream=0)
    return rollout(specs, policy, run.simulators, temperature=TEMPERATURE, noise=noise)


def test_a_suite_by_path_says_what_it_is(name: str) -> None:
    chosen = suite(name)
    assert isinstance(chosen, Suite)
    assert chosen is suite(name), "each process reads the file once"
    assert chosen.action_dim == JOINTS
    assert chosen.init_state_ids(0, "held_out") == list(range(4, 100, 5))
    assert not set(chosen.init_state_ids(0, "train")) & set(chosen.init_state_ids(0, "held_out"))
    for split, message in (("sampled", "has recorded ones alone"), ("some", "split is 'some'")):
        with pytest.raises(ConfigError, match=message):
            chosen.init_state_ids(0, split)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="SimpleVLA-RL never played two_arms"):
        chosen.step_limit("simplevla", 0)


def test_a_relative_name_is_made_absolute(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(name.split(":")[0])
    monkeypatch.chdir(path.parent)
    assert absolute_name(f"{path.name}:TwoArms") == name
    assert absolute_name("mini") == "mini"
    assert suite(ROBOTWIN).name == "robotwin", "from the project's root, wherever one works"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "there is no file"),
        ("x = 1 / 0", "cannot be imported: ZeroDivisionError"),
        ("class Mine: ...", "has no suite 'Mine'.*extends verl_vla.envs.base.Suite"),
        (
            "from verl_vla.envs.base import Suite\nclass Mine(Suite): ...",
            "could not be made: TypeError.*abstract",
        ),
        (
            "from verl_vla.envs.base import Suite\n"
            "class Mine(Suite):\n    name = 'mine'; versions = {}\n    def make_env(self, c): ...",
            "lacks tasks, num_init_states, cameras, action_dim, proprio_dim, gripper_dims",
        ),
    ],
)
def test_a_suite_that_cannot_be_used_is_refused(
    code: str | None, message: str, tmp_path: Path
) -> None:
    if code is not None:
        (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ConfigError, match=message):
        suite(f"{tmp_path / 'mine.py'}:Mine")


def test_robotwin_says_before_a_start_that_its_simulator_is_missing(
    folder: Path, tmp_path: Path
) -> None:
    with (
        pytest.raises(ConfigError, match="is in no package index.*make_env"),
        open_run(load_recipe(words(ROBOTWIN, folder, tmp_path / "out"))),
    ):
        pass
    assert not (tmp_path / "out").exists()


def test_a_policy_must_be_for_the_robot(name: str, folder: Path) -> None:
    mine, embedded = load_policy(folder).processor, load_policy("bases/mini").processor
    with pytest.raises(ConfigError, match="has 14 values, and one of suite 'mini' has 7"):
        env_config(EnvironmentConfig(suite="mini"), mine)
    with pytest.raises(ConfigError, match="has 7 values, and one of suite 'two_arms' has 14"):
        env_config(EnvironmentConfig(suite=name, render_size=128), embedded)
    mine.shape = replace(mine.shape, proprio_dim=3)
    with pytest.raises(ConfigError, match="reads 3 proprio values, and suite 'two_arms' has 14"):
        env_config(EnvironmentConfig(suite=name), mine)


def test_grippers_are_where_the_suite_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(suite(ROBOTWIN)), "gripper_dims", (6, 13))
    with pytest.raises(ConfigError, match=r"leave the values \[\] .* are at \[6, 13\]"):
        env_config(EnvironmentConfig(suite=ROBOTWIN), load_policy(folder).processor)


def test_a_rate_stands_beside_the_suites_own_versions(run: Run) -> None:
    given = conditions(run.env_config, run.task_names, states="held_out", temperature=0.0, seed=0)
    assert given["suite"] == "two_arms"
    assert given["simulation"] == {"two_arms": "1"}
    assert given["renderer"] is given["assets"] is None
    assert set(given["step_limits"].values()) == {50}


def test_episodes_are_played_in_chunks_of_25_by_14(played: Trajectories) -> None:
    assert not played.crashes
    assert played.policy_steps.action_tokens.shape[1] == CHUNK * JOINTS
    assert played.policy_steps.proprio.shape[1] == JOINTS
    assert len(played.policy_steps) <= len(played.episodes) * 2, "50 steps are two chunks"
    assert int(played.episodes.num_steps.max()) <= 50


def test_one_training_step_raises_what_did_better(
    run: Run, played: Trajectories, folder: Path
) -> None:
    """GRPO's own parts on the episodes of real workers; the reward is how far the dot got."""
    policy, rows = load_policy(folder), played.policy_steps

    def log_probs() -> torch.Tensor:
        seen = (rows.image, played.prompt_ids, rows.action_tokens)
        return policy.log_prob(*seen, temperature=TEMPERATURE, proprio=rows.proprio)

    assert torch.allclose(log_probs(), rows.log_probs, atol=1e-4), "rollout and update see the same"
    reward = torch.tensor([float(goals[-1, 0, 1]) for goals in played.goals]).neg()
    advantage = group_advantage(reward, played.episodes.group_id)[rows.episode]
    mask = executed_mask(rows.executed, chunk_length=CHUNK, action_dim=JOINTS)
    steps = played.episodes.num_steps[rows.episode]
    weight = trajectory_weight(steps, action_dim=JOINTS, num_trajectories=len(played.episodes))

    def loss() -> torch.Tensor:
        return policy_loss(log_probs(), rows.log_probs, advantage, mask, weight, ClipRange()).loss

    before = loss()
    assert before.isfinite()
    weights = [w for w in policy.model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0)
    before.backward()
    projector = dict(policy.model.named_parameters())["proprio_projector.fc1.weight"]
    assert projector.grad is not None
    assert projector.grad[:, :2].any(), "where the dot is"
    optimizer.step()
    assert loss() < before


def test_what_the_joints_report_decides(played: Trajectories, folder: Path) -> None:
    policy, rows = load_policy(folder), played.policy_steps
    inputs = (rows.image[:3], played.prompt_ids[:3])
    seen = policy.logits(*inputs, rows.action_tokens[:3], proprio=rows.proprio[:3])
    moved = policy.logits(*inputs, rows.action_tokens[:3], proprio=rows.proprio[:3] + 0.5)
    assert not torch.allclose(seen, moved, atol=1e-3)
    far = policy.logits(*inputs, rows.action_tokens[:3], proprio=torch.full((3, JOINTS), 9.0))
    edge = policy.logits(*inputs, rows.action_tokens[:3], proprio=torch.ones(3, JOINTS))
    assert torch.equal(far, edge), "beyond the data's range it is cut off"
    for missing, found in ((None, "None"), (rows.proprio[:3, :8], r"\[3, 8\]")):
        with pytest.raises(ContractError, match=rf"proprio must be \[3, 14\], got {found}"):
            policy.logits(*inputs, rows.action_tokens[:3], proprio=missing)


def test_every_file_that_the_page_names_exists() -> None:
    links = re.findall(r"\]\((\S+?)\)", PAGE.read_text())
    assert links
    assert all((PAGE.parent / link).is_file() for link in links)
