"""How a reward is found, made and asked, and what is refused on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from verl_vla.errors import ConfigError, ContractError
from verl_vla.reward import REWARDS_FOLDER, RewardResult, load_reward, score
from verl_vla.types import Decisions, Episodes, Outcome, Trajectories

HEADER = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import ClassVar
import numpy as np
from verl_vla.reward import RewardResult, TrajectoryReward
"""
BODY = """
    requires = frozenset()
    def __call__(self, batch):
        ones = np.ones(len(batch), dtype=np.float32)
        return RewardResult(score=ones, progress=ones, status=("ok",) * len(batch))
    def update(self, batch): return {}
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
"""


@pytest.fixture
def write(tmp_path):
    """Write a plug-in and return its name for a recipe."""

    def write_plugin(source: str, cls: str = "Mine") -> str:
        path = tmp_path / "mine.py"
        path.write_text(HEADER + source)
        return f"{path}:{cls}"

    return write_plugin


@dataclass
class Stub:
    """Answers with whatever it was given, and keeps the batch it saw."""

    score: object = None
    progress: object = None
    status: tuple[str, ...] | None = None
    requires: frozenset = frozenset()
    seen: object = None

    def __call__(self, batch):
        self.seen = batch
        ones = np.ones(len(batch), dtype=np.float32)
        return RewardResult(
            score=ones if self.score is None else np.array(self.score, dtype=np.float32),
            progress=ones if self.progress is None else np.array(self.progress, dtype=np.float32),
            status=("ok",) * len(batch) if self.status is None else self.status,
        )

    def update(self, batch):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def make_trajectories() -> Trajectories:
    """Three episodes of 2, 1 and 1 decisions; every value tells where it belongs."""
    episode = torch.tensor([0, 0, 1, 2])
    mark = torch.tensor([0, 1, 10, 20])
    return Trajectories(
        episodes=Episodes(
            task_id=torch.tensor([4, 4, 7]),
            init_state_id=torch.tensor([3, 3, 9]),
            group_id=torch.tensor([50, 50, 51]),
            episode_id=torch.tensor([100, 101, 102]),
            outcome=torch.tensor([Outcome.SUCCESS, Outcome.TIMEOUT, Outcome.TIMEOUT]),
            num_steps=torch.tensor([6, 4, 4]),
        ),
        decisions=Decisions(
            episode=episode,
            image=mark.to(torch.uint8)[:, None, None, None, None].expand(4, 1, 2, 2, 3).clone(),
            proprio=mark.float()[:, None].expand(4, 8).clone(),
            bins=torch.zeros(4, 2, dtype=torch.int64),
            logp=torch.zeros(4, 2),
            executed=torch.tensor([4, 2, 4, 4]),
        ),
        prompt_ids=(torch.tensor([1]),) * 4,
    )


def judge(reward, trajectories=None, split="train"):
    return score(reward, trajectories or make_trajectories(), suite="mini", split=split)


def test_a_plain_name_is_a_file_of_the_rewards_folder():
    assert type(load_reward("binary", {})).__name__ == "BinaryReward"
    assert (REWARDS_FOLDER / "binary.py").is_file()


def test_a_path_names_file_and_class(write):
    name = write("class Mine:" + BODY + "class Other:" + BODY)
    assert type(load_reward(name, {})).__name__ == "Mine"


def test_arguments_reach_the_constructor(write):
    name = write(
        "class Mine:" + BODY + "    def __init__(self, scale, shift=2.0):"
        "\n        self.sum = scale + shift\n"
    )
    assert load_reward(name, {"scale": 1.0}).sum == 3.0  # pyright: ignore[reportAttributeAccessIssue]


def test_a_plug_in_may_hold_dataclasses_whose_annotations_are_strings(write):
    """`dataclasses` looks the module up by name while it is imported."""
    name = write(
        "@dataclass\nclass _Knobs:\n    kinds: ClassVar[int] = 3\n    scale: float = 1.0\n"
        "class Mine:" + BODY
    )
    load_reward(name, {})


def test_a_plug_in_may_be_a_dataclass_or_subclass_the_protocol(write):
    load_reward(write("@dataclass\nclass Mine:\n    scale: float = 1.0\n" + BODY), {"scale": 2.0})
    load_reward(write("class Mine(TrajectoryReward):" + BODY), {})


def test_a_constructor_that_takes_anything_is_given_anything(write):
    name = write(
        "class Mine:" + BODY + "    def __init__(self, *args, **knobs):"
        "\n        self.knobs = knobs\n"
    )
    assert load_reward(name, {"a": 1}).knobs == {"a": 1}  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("binry", "reward is 'binry', which is no file of rewards/; did you mean 'binary'?"),
        ("__init__", "reward is '__init__', which is no file of rewards/"),
        ("nowhere.py:Mine", "there is no file nowhere.py; check the path"),
        ("nowhere.py", "a reward of your own is path/to/file.py:ClassName"),
    ],
)
def test_an_unknown_reward_is_refused(name, message):
    with pytest.raises(ConfigError) as caught:
        load_reward(name, {})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("class Yours:" + BODY, {}, "has no class 'Mine'; Known: Yours"),
        ("class Mine:" + BODY, {"scale": 1}, "has no argument 'scale'"),
        (
            "class Mine:" + BODY + "    def __init__(self, scale): pass\n",
            {"skale": 1},
            "has no argument 'skale'; did you mean 'scale'?",
        ),
        (
            "class Mine:" + BODY + "    def __init__(self, scale): pass\n",
            {},
            "needs 'scale'; set reward_args.scale",
        ),
        (
            "class Mine:\n    requires = frozenset()\n",
            {},
            "lacks __call__, update, state_dict, load",
        ),
        (
            "class Mine:" + BODY.replace("frozenset()", "frozenset({'frame'})"),
            {},
            "requires 'frame'; did you mean 'frames'? Known: frames, proprio",
        ),
    ],
)
def test_a_wrong_plug_in_is_refused_before_the_run(write, source, arguments, message):
    with pytest.raises(ConfigError) as caught:
        load_reward(write(source), arguments)
    assert message in str(caught.value)


def test_a_named_reward_with_two_classes_must_say_which(tmp_path, monkeypatch):
    monkeypatch.setattr("verl_vla.reward.REWARDS_FOLDER", tmp_path)
    (tmp_path / "pair.py").write_text(HEADER + "class A:" + BODY + "class B:" + BODY)
    with pytest.raises(ConfigError, match=r"pair.py has 2 public classes; name one as .*:Class"):
        load_reward("pair", {})


def test_imported_and_private_classes_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr("verl_vla.reward.REWARDS_FOLDER", tmp_path)
    (tmp_path / "one.py").write_text(
        HEADER + "from pathlib import Path\nclass _Part: pass\nclass A:" + BODY
    )
    assert type(load_reward("one", {})).__name__ == "A"


def test_a_reward_sees_the_episodes_row_by_row():
    stub = Stub()
    batch, result = judge(stub, split="held_out")
    assert stub.seen is batch
    assert len(batch) == 3
    assert batch.episode_id.tolist() == [100, 101, 102]
    assert batch.group_id.tolist() == [50, 50, 51]
    assert batch.task_key == ("mini/4", "mini/4", "mini/7")
    assert batch.init_state_id.tolist() == [3, 3, 9]
    assert batch.success.tolist() == [True, False, False]
    assert batch.num_steps.tolist() == [6, 4, 4]
    assert batch.split == "held_out"
    assert result.score.tolist() == [1.0, 1.0, 1.0]


def test_frames_and_proprio_come_only_when_asked_for():
    batch, _ = judge(Stub())
    assert batch.frames is None and batch.proprio is None
    batch, _ = judge(Stub(requires=frozenset({"frames"})))
    assert batch.proprio is None
    assert [f.shape for f in batch.frames] == [(2, 1, 2, 2, 3), (1, 1, 2, 2, 3), (1, 1, 2, 2, 3)]
    assert [f[:, 0, 0, 0, 0].tolist() for f in batch.frames] == [[0, 1], [10], [20]]
    batch, _ = judge(Stub(requires=frozenset({"proprio"})))
    assert batch.frames is None
    assert [p[:, 0].tolist() for p in batch.proprio] == [[0, 1], [10], [20]]


def test_a_crashed_episode_never_reaches_a_reward():
    whole = make_trajectories()
    outcome = torch.tensor([Outcome.SUCCESS, Outcome.CRASH, Outcome.TIMEOUT])
    crashed = replace(whole, episodes=replace(whole.episodes, outcome=outcome))
    with pytest.raises(ContractError, match="a crashed episode reached the reward"):
        judge(Stub(), crashed)
    batch, _ = judge(Stub(), crashed.select(~crashed.episodes.crashed))
    assert batch.episode_id.tolist() == [100, 102]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"score": [1, 2]}, r"scores \[2\], progress \[3\] and 3 status words for 3 episodes"),
        ({"score": [[1, 2, 3]]}, r"scores \[1, 3\]"),
        ({"progress": [1]}, r"progress \[1\]"),
        ({"status": ("ok",)}, r"and 1 status words for 3 episodes; it must return one of each"),
        ({"score": [0, float("nan"), float("inf")]}, r"Stub returned nan for episode 101 \(2 of 3"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_is_refused(wrong, message):
    with pytest.raises(ContractError, match=message):
        judge(Stub(**wrong))


def test_progress_may_be_unknown():
    _, result = judge(Stub(progress=[float("nan")] * 3))
    assert np.isnan(result.progress).all()


def test_the_folder_of_rewards_is_the_one_in_the_project():
    assert Path(__file__).parents[2] / "rewards" == REWARDS_FOLDER
