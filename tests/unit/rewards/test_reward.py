"""How a reward is found, made and asked, and what is refused on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError, ContractError, RewardError
from verl_vla.core.tables import Episodes, PolicySteps, Trajectories
from verl_vla.rewards import (
    REWARDS_FOLDER,
    RewardResult,
    VideoNeed,
    learn,
    load_reward,
    looks_at_images,
    score,
    video_need,
)
from verl_vla.rewards.scoring import complete

HEADER = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import ClassVar
import numpy as np
from verl_vla.rewards import RewardResult, TrajectoryReward
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
    max_score: float = 1.0
    encoder: object = None

    def __call__(self, batch):
        self.seen = batch
        ones = np.ones(len(batch), dtype=np.float32)
        return RewardResult(
            score=ones if self.score is None else np.array(self.score, dtype=np.float32),
            progress=ones if self.progress is None else np.array(self.progress, dtype=np.float32),
            status=("ok",) * len(batch) if self.status is None else self.status,
            max_score=self.max_score,
        )

    def update(self, batch):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def make_trajectories() -> Trajectories:
    """Three episodes of 2, 1 and 1 policy steps; every value tells where it belongs."""
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
        policy_steps=PolicySteps(
            episode=episode,
            image=mark.to(torch.uint8)[:, None, None, None, None].expand(4, 1, 2, 2, 3).clone(),
            proprio=mark.float()[:, None].expand(4, 8).clone(),
            action_tokens=torch.zeros(4, 2, dtype=torch.int64),
            log_probs=torch.zeros(4, 2),
            executed=torch.tensor([4, 2, 4, 4]),
        ),
        prompt_ids=(torch.tensor([1]),) * 4,
        goals=tuple(np.full((n, 1, 3), b, dtype=np.float32) for b, n in enumerate((3, 2, 2))),
    )


def judge(reward, trajectories=None, split="train"):
    return score(
        reward, trajectories or make_trajectories(), suite="mini", split=split, mirrored=True
    )


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
        "class Mine:" + BODY + "    def __init__(self, *args, **options):"
        "\n        self.options = options\n"
    )
    assert load_reward(name, {"a": 1}).options == {"a": 1}  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("binry", "no entry point of verl_vla.rewards; did you mean 'binary'?"),
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
            "requires 'frame'; did you mean 'frames'? Known: frames, proprio, features",
        ),
        (
            "class Mine:" + BODY.replace("frozenset()", "frozenset({'video'})"),
            {},
            "requires a video and does not say which; give it an attribute `video`, a VideoNeed",
        ),
    ],
)
def test_a_wrong_plug_in_is_refused_before_the_run(write, source, arguments, message):
    with pytest.raises(ConfigError) as caught:
        load_reward(write(source), arguments)
    assert message in str(caught.value)


def test_a_named_reward_with_two_classes_must_say_which(tmp_path, monkeypatch):
    monkeypatch.setattr("verl_vla.rewards.loading.REWARDS_FOLDER", tmp_path)
    (tmp_path / "pair.py").write_text(HEADER + "class A:" + BODY + "class B:" + BODY)
    with pytest.raises(ConfigError, match=r"pair.py has 2 public classes; name one as .*:Class"):
        load_reward("pair", {})


def test_imported_and_private_classes_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr("verl_vla.rewards.loading.REWARDS_FOLDER", tmp_path)
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


def test_the_image_after_the_last_step_is_an_episodes_last_frame():
    """The publications never look at the success itself."""
    ended = (np.full((1, 2, 2, 3), 9, np.uint8), None, np.full((1, 2, 2, 3), 29, np.uint8))
    stub = Stub(requires=frozenset({"frames"}))
    batch, _ = judge(stub, replace(make_trajectories(), final_images=ended))
    assert [f[:, 0, 0, 0, 0].tolist() for f in batch.frames] == [[0, 1, 9], [10], [20, 29]]
    assert looks_at_images(stub) and not looks_at_images(Stub())


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
        ({"status": ("ok",)}, r"and 1 status words for 3 episodes, ids 100 to 102; it must"),
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
    assert Path(__file__).parents[3] / "rewards" == REWARDS_FOLDER


class MeanColour:
    """The smallest encoder: one number a frame."""

    feature_space = "mean colour"

    def encode(self, frames):
        return [f.mean(axis=(1, 2, 3)).astype(np.float32)[:, None] for f in frames]


def test_features_are_made_of_the_images_by_the_rewards_own_encoder():
    needs = frozenset({"features"})
    batch, _ = judge(Stub(requires=needs, encoder=MeanColour()))
    assert batch.frames is None
    assert batch.feature_space == "mean colour"
    assert [f[:, 0].tolist() for f in batch.features] == [[0, 1], [10], [20]]


def filmed() -> Trajectories:
    videos = tuple(np.full((n, 2, 2, 3), n, dtype=np.uint8) for n in (3, 1, 2))
    return replace(make_trajectories(), videos=videos)


def test_a_video_comes_only_where_it_is_required_and_then_of_every_episode():
    batch, _ = judge(Stub(), filmed())
    assert batch.videos is None
    stub = Stub(requires=frozenset({"video"}))
    batch, _ = judge(stub, filmed())
    assert [len(video) for video in batch.videos] == [3, 1, 2]
    one_lacks = replace(filmed(), videos=(*filmed().videos[:2], filmed().videos[2][:0]))
    for lacking in (make_trajectories(), one_lacks):
        with pytest.raises(ContractError, match="Stub requires a video of every episode"):
            judge(stub, lacking)


def test_features_are_made_of_the_video_where_there_is_one():
    needs = frozenset({"video", "features"})
    batch, _ = judge(Stub(requires=needs, encoder=MeanColour()), filmed())
    assert [f[:, 0].tolist() for f in batch.features] == [[3, 3, 3], [1], [2, 2]]


def test_features_that_are_there_are_not_made_again():
    needs = frozenset({"features"})
    batch, _ = judge(Stub(requires=needs, encoder=MeanColour()))
    assert complete(Stub(requires=needs), batch).features is batch.features
    without = complete(Stub(), batch)
    assert (without.features, without.feature_space) == (None, None)
    with pytest.raises(ContractError, match="holds neither features nor frames"):
        complete(Stub(requires=needs), without)


def test_goal_readings_and_proprio_come_only_when_asked_for():
    batch, _ = judge(Stub(requires=frozenset({"goals"})))
    assert [len(readings) for readings in batch.goals] == [3, 2, 2]
    assert (batch.proprio, batch.frames, batch.videos) == (None, None, None)
    batch, _ = judge(Stub())
    assert batch.goals is None
    assert batch.mirrored


@pytest.mark.parametrize(("every", "is_refused"), [(0, True), (1, False), (3, False)])
def test_frames_of_a_video_are_at_least_a_step_apart(every, is_refused):
    stub = Stub(requires=frozenset({"video"}))
    stub.video = VideoNeed(every=every, max_frames=4)
    if is_refused:
        with pytest.raises(ConfigError, match="Stub wants a frame every 0 steps; set at least 1"):
            video_need(stub)
        return
    assert video_need(stub) == stub.video
    assert video_need(Stub()) is None


def test_references_are_given_for_every_episode_or_for_none():
    class Referring(Stub):
        def __call__(self, batch):
            self.seen = batch
            return replace(super().__call__(batch), **self.references)

    stub = Referring()
    stub.references = {"num_references": np.array([1, 2, 3]), "reference_source": ("a",) * 3}
    judge(stub)
    for wrong in ({"num_references": np.array([1, 2])}, {"reference_source": ("a",) * 4}):
        stub.references = wrong
        with pytest.raises(RewardError, match="one number and one source of references for each"):
            judge(stub)


def test_a_rewards_own_metric_takes_the_place_of_a_count():
    class Counting(Stub):
        def __call__(self, batch):
            own = {"groups_all_failed": 9.0, "own": 1.0}
            return replace(super().__call__(batch), metrics=own)

    _, result = judge(Counting())
    assert (result.metrics["groups_all_failed"], result.metrics["own"]) == (9.0, 1.0)
    assert result.metrics["groups_one_failure"] == 2.0


def test_what_a_reward_says_of_its_learning_is_handed_on():
    class Learning(Stub):
        def update(self, batch):
            return {"loss": float(len(batch))}

    batch, _ = judge(Learning())
    assert learn(Learning(), batch) == {"loss": 3.0}


def test_one_embedding_for_a_whole_group_is_refused():
    """The released SRPO code files every episode of a group under one name."""

    class Aliased(MeanColour):
        def encode(self, frames):
            return [np.ones((3, 1), np.float32) for _ in frames]

    with pytest.raises(ContractError, match="100 and 101 of one group have different images"):
        judge(Stub(requires=frozenset({"features"}), encoder=Aliased()))


def test_an_encoder_that_loses_an_episode_is_refused():
    class Short(MeanColour):
        def encode(self, frames):
            return super().encode(frames)[:-1]

    with pytest.raises(ContractError, match="made features of 2 episodes, given 3"):
        judge(Stub(requires=frozenset({"features"}), encoder=Short()))


def test_a_reward_of_features_needs_an_encoder(write):
    source = "class Mine:" + BODY.replace("frozenset()", "frozenset({'features'})")
    with pytest.raises(ConfigError, match="requires features but has no encoder"):
        load_reward(write(source), {})


def test_an_episode_id_that_stands_twice_is_refused():
    whole = make_trajectories()
    twice = replace(whole.episodes, episode_id=torch.tensor([100, 100, 102]))
    with pytest.raises(ContractError, match="episode 100 stands 2 times in one batch"):
        judge(Stub(), replace(whole, episodes=twice))


def test_a_reward_that_raises_is_named_with_its_episodes_and_shown(caplog):
    class Broken(Stub):
        def __call__(self, batch):
            raise ValueError("no such thing")

        def update(self, batch):
            raise KeyError("head")

    with pytest.raises(RewardError) as caught:
        judge(Broken())
    assert "Broken raised ValueError('no such thing') while scoring 3 episodes, ids 100 to 102" in (
        str(caught.value)
    )
    assert 'raise ValueError("no such thing")' in caplog.text
    batch, _ = judge(Stub())
    with pytest.raises(RewardError, match=r"raised KeyError\('head'\) while learning from 3 episo"):
        learn(Broken(), batch)


def test_an_encoder_that_raises_is_named_too():
    class Empty(MeanColour):
        def encode(self, frames):
            raise RuntimeError("out of memory")

    with pytest.raises(RewardError, match=r"the encoder of Stub raised RuntimeError\('out of mem"):
        judge(Stub(requires=frozenset({"features"}), encoder=Empty()))


def test_a_score_above_the_stated_bound_is_refused():
    with pytest.raises(
        RewardError, match=r"returned 2 for episode 102 \(1 of 3 scores are above 1"
    ):
        judge(Stub(score=[1, 0, 2]))
    _, result = judge(Stub(score=[1, 0, 2], max_score=2.0))
    assert result.score.tolist() == [1, 0, 2]


def test_an_answer_of_another_type_is_refused():
    class Listing(Stub):
        def __call__(self, batch):
            return [1.0, 1.0, 1.0]

    with pytest.raises(RewardError, match="Listing returned list for 3 episodes"):
        judge(Listing())


def test_nothing_is_learned_from_held_out_episodes():
    batch, _ = judge(Stub(), split="held_out")
    with pytest.raises(ContractError, match="are held out; score them, never learn from them"):
        learn(Stub(), batch)


def test_cases_in_which_a_reward_has_little_to_say_are_counted():
    _, result = judge(Stub(requires=frozenset({"features"}), encoder=MeanColour()))
    assert result.metrics == {
        "groups_all_failed": 1.0,
        "groups_all_solved": 0.0,
        "groups_one_failure": 2.0,
        "groups_unequal_lengths": 1.0,
        "duplicate_features": 0.0,
    }


def test_the_seed_of_the_run_reaches_a_constructor_that_takes_it(write):
    name = write("class Mine:" + BODY + "    def __init__(self, seed): self.seed = seed\n")
    assert load_reward(name, {}, seed=7).seed == 7  # pyright: ignore[reportAttributeAccessIssue]
    assert load_reward(name, {"seed": 3}, seed=7).seed == 3  # pyright: ignore[reportAttributeAccessIssue]
    load_reward("binary", {}, seed=7)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_this_name\n", "cannot be imported: ModuleNotFoundError"),
        (
            "class Mine:" + BODY + "    def __init__(self): raise OSError('no disk')\n",
            r"could not be made with {}: OSError\('no disk'\)",
        ),
    ],
)
def test_a_file_or_constructor_that_raises_is_refused_before_the_run(write, source, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(write(source), {})


def test_an_installed_package_offers_a_reward_by_entry_point(tmp_path, monkeypatch):
    (tmp_path / "offered_rewards.py").write_text(HEADER + "class Offered:" + BODY + "LIMIT = 3\n")
    info = tmp_path / "offered-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[verl_vla.rewards]\ngood = offered_rewards:Offered\nlimit = offered_rewards:LIMIT\n"
        "gone = offered_rewards:Gone\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert type(load_reward("good", {})).__name__ == "Offered"
    with pytest.raises(ConfigError, match="offered as offered_rewards:LIMIT, which is no class"):
        load_reward("limit", {})
    with pytest.raises(ConfigError, match="offered_rewards:Gone, which cannot be imported"):
        load_reward("gone", {})


VERL_FUNCTION = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(data_source == "mini" and solution_str == ground_truth)

async def detailed(data_source, solution_str, ground_truth, extra_info, bonus=0.0):
    return {"score": bonus, "steps": extra_info["num_steps"], "task": extra_info["task"]}

def uneven(data_source, solution_str, ground_truth, extra_info):
    return {"score": 0.0} if extra_info["success"] else 0.0 if extra_info["index"] == 101 else {}
"""


@pytest.fixture
def verl_file(tmp_path):
    path = tmp_path / "for_verl.py"
    path.write_text(VERL_FUNCTION)
    return str(path)


def test_a_plain_verl_function_works_unchanged(verl_file):
    _, result = judge(load_reward("verl_function", {"path": verl_file}))
    assert result.score.tolist() == [1.0, 0.0, 0.0]
    assert result.status == ("success", "failure", "failure")


def test_a_verl_function_may_be_async_and_return_a_mapping(verl_file):
    arguments = {"path": verl_file, "function": "detailed", "reward_kwargs": {"bonus": 0.5}}
    _, result = judge(load_reward("verl_function", arguments))
    assert result.score.tolist() == [0.5, 0.5, 0.5]
    assert result.metrics["steps"] == pytest.approx(14 / 3)
    assert "task" not in result.metrics


def test_a_verl_function_must_exist_and_answer_alike(verl_file):
    with pytest.raises(ConfigError, match="no function 'score'; set reward_args.function to one "):
        load_reward("verl_function", {"path": verl_file, "function": "score"})
    reward = load_reward("verl_function", {"path": verl_file, "function": "uneven"})
    with pytest.raises(RewardError, match=r"returned \[\] for episode 102"):
        judge(reward)
