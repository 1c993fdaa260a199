"""Encoders on ranks: the features of one process, and no weights where nothing is computed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from documented_reward import documented_encoder
from encoder_folders import save_dinov2, save_siglip, save_vjepa2
from encoding_ranks import EncodingRanks
from planted_world import make_batch
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from safetensors.torch import save_file

from verl_vla.config.compose import load_recipe
from verl_vla.core.errors import ConfigError, RewardError
from verl_vla.rewards import Rows, TrajectoryBatch, complete, load_reward
from verl_vla.rewards.encoders import make_encoder
from verl_vla.rewards.encoders.base import BATCHES_A_RANK, track_batches
from verl_vla.trainer.grpo.cluster_encoder import place_encoders
from verl_vla.trainer.grpo.trainer import VLATrainer

ROOT = Path(__file__).resolve().parents[3]
MINI = {"path": str(ROOT / "bases" / "mini")}
LENGTHS = (3, 17, 1, 17, 4, 17, 8)
NAMES = ("dinov2", "siglip", "vjepa2", "policy_towers")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("weights")
    return {
        "dinov2": {"path": save_dinov2(root / "dino"), "batch_size": 5},
        "siglip": {"path": save_siglip(root / "siglip"), "batch_size": 5},
        "vjepa2": {"path": save_vjepa2(root / "vjepa"), "batch_size": 2},
        "policy_towers": {**MINI, "batch_size": 5},
    }


def round_of(lengths: tuple[int, ...] = LENGTHS) -> TrajectoryBatch:
    """A batch whose episodes have as many images."""
    rng = np.random.default_rng(0)
    frames = tuple(rng.integers(0, 255, (n, 1, 32, 32, 3), dtype=np.uint8) for n in lengths)
    return make_batch([0.5] * len(lengths), frames=frames, features=None, feature_space=None)


def reward_of(name: str, arguments: dict[str, Any]) -> Any:
    return load_reward("knn_align", {"encoder": name, "encoder_args": arguments})


def features_of(reward: Any, batch: TrajectoryBatch) -> tuple[Rows, ...]:
    made = complete(reward, batch).features
    assert made is not None
    return made


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_make_the_features_of_one_process_to_the_bit(
    name: str, num_ranks: int, dtype: str, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {**arguments[name], "dtype": dtype}
    here, there = reward_of(name, own), reward_of(name, own)
    ranks = EncodingRanks(num_ranks)
    ranks.stand_in(monkeypatch)
    place_encoders(there, ranks, num_ranks=num_ranks)
    batch = round_of()
    alone, together = complete(here, batch), complete(there, batch)
    assert alone.features is not None and together.features is not None
    for mine, theirs in zip(alone.features, together.features, strict=True):
        assert mine.dtype == theirs.dtype == np.float32
        assert np.array_equal(mine, theirs)
    assert together.feature_space == alone.feature_space
    # rank by rank, however many batches are left for the last round
    assert ranks.computed == [i % num_ranks for i in range(len(ranks.computed))]
    assert len(ranks.computed) > num_ranks


def test_weights_are_where_they_are_used(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = reward_of("siglip", arguments["siglip"])
    ranks = EncodingRanks(2)
    ranks.stand_in(monkeypatch)
    place_encoders(reward, ranks, num_ranks=2)
    networks = [cast("Any", rank._encoders[0].network) for rank in ranks.ranks]
    assert not any(network.is_read for network in networks), "before the first round"
    moves: list[str] = []
    for network in networks:
        read = network._read
        network._read = lambda dtype, read=read: Noted(read(dtype), moves)
    complete(reward, round_of())
    assert all(network.is_read and not network._is_on_device for network in networks)
    assert moves == ["there", "there", "back", "back"]
    assert not reward.encoder.network.is_read, "the driver never reads them"
    complete(reward, round_of())
    assert moves == 2 * ["there", "there", "back", "back"]
    # what its name is computed of may stay on the host
    ranks.name_feature_space(0)
    assert len(moves) == 8


class Noted:
    """A network that notes its moves between two devices, of which this machine has one."""

    def __init__(self, module: torch.nn.Module, moves: list[str]) -> None:
        self.module, self.moves = module, moves

    def eval(self) -> Noted:
        return self

    def requires_grad_(self, _: bool) -> Noted:
        return self

    def to(self, where: Any) -> Noted:
        # the host is named by a string, a device by an object
        if not isinstance(where, torch.dtype):
            self.moves.append("back" if where == "cpu" and isinstance(where, str) else "there")
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict()

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_few_batches_wait_at_a_time_and_a_bar_can_follow_them(
    arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = reward_of("siglip", {**arguments["siglip"], "batch_size": 2})
    ranks = EncodingRanks(3)
    ranks.stand_in(monkeypatch)
    place_encoders(reward, ranks, num_ranks=3)
    seen: list[tuple[int, int]] = []

    def track(batches: Any) -> Any:
        for done, batch in enumerate(batches):
            seen.append((done, len(ranks.computed)))
            yield batch

    track_batches(reward, track)
    complete(reward, round_of())
    assert len(seen) == -(-sum(LENGTHS) // 2)
    assert all(done == computed for done, computed in seen), "it advances with the computation"
    assert ranks.most_waiting == BATCHES_A_RANK * 3
    assert ranks.waiting == 0
    assert ranks.times_freed == 1


def test_a_round_without_images_asks_no_rank(
    arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = reward_of("vjepa2", arguments["vjepa2"])
    ranks = EncodingRanks(2)
    ranks.stand_in(monkeypatch)
    place_encoders(reward, ranks, num_ranks=2)
    made = reward.encoder.encode([np.zeros((0, 32, 32, 3), np.uint8)])
    assert [len(rows) for rows in made] == [0]
    assert not ranks.computed


def test_an_error_on_a_rank_is_the_encoders_and_frees_the_devices(
    arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = reward_of("siglip", arguments["siglip"])
    ranks = EncodingRanks(2)
    ranks.stand_in(monkeypatch)
    place_encoders(reward, ranks, num_ranks=2)

    def run_out(_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    cast("Any", ranks.ranks[1]._encoders[0]).embed = run_out
    with pytest.raises(
        RewardError,
        match=r"encoder of KnnAlignReward raised OutOfMemoryError\('tried to .* its encoder_args",
    ):
        complete(reward, round_of())
    assert ranks.times_freed == 1


def test_ranks_with_other_weights_are_refused(
    arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = reward_of("siglip", arguments["siglip"])
    ranks = EncodingRanks(2)
    ranks.stand_in(monkeypatch)
    place_encoders(reward, ranks, num_ranks=2)
    cast("Any", ranks.ranks[1]._encoders[0])._kind = "another"
    with pytest.raises(ConfigError, match="ranks have different encoders .*on every node"):
        complete(reward, round_of())


def test_a_folder_that_a_rank_lacks_is_reported_when_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    reward = reward_of("siglip", {"path": save_siglip(tmp_path / "siglip")})
    (tmp_path / "siglip").rename(tmp_path / "elsewhere")
    ranks = EncodingRanks(2)
    ranks.stand_in(monkeypatch)
    with pytest.raises(RayTaskError) as caught:
        place_encoders(reward, ranks, num_ranks=2)
    # `launch` tells the user the cause
    assert isinstance(caught.value.cause, ConfigError)
    assert "siglip holds no config" in str(caught.value.cause)


def test_a_resumed_run_compares_with_what_one_process_encoded(
    arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {**arguments["policy_towers"], "dtype": "float32"}
    before, after = reward_of("policy_towers", own), reward_of("policy_towers", own)
    solved = make_batch([1, 0.5], group_size=2, frames=(round_of().frames or ())[:2], features=None)
    learned = complete(before, solved)
    before.update(learned)
    after.load_state_dict(before.state_dict())
    ranks = EncodingRanks(2)
    ranks.stand_in(monkeypatch)
    place_encoders(after, ranks, num_ranks=2)
    again = complete(after, solved)
    assert after(again).score.tolist() == before(learned).score.tolist()
    after.update(again)
    assert len(after._memory) == 1, "the same success, which is known by its features"


def test_what_cannot_be_moved_is_computed_here() -> None:
    ranks: Any = None
    place_encoders(load_reward("binary", {}), ranks, num_ranks=2)
    place_encoders(reward_of("pixels", {}), ranks, num_ranks=2)
    plain = reward_of("pixels", {})
    plain.encoder = OwnEncoder()
    place_encoders(plain, ranks, num_ranks=2)
    assert [rows.shape for rows in plain.encoder.encode([np.zeros((2, 4, 4, 3), np.uint8)])]


class OwnEncoder:
    """What a reward may bring along."""

    feature_space = "own"

    def encode(self, frames: Any) -> list[Rows]:
        return [clip.mean(axis=(1, 2, 3), dtype=np.float32)[:, None] for clip in frames]


class TwoEncoders:
    """A reward that combines two spaces."""

    def __init__(self, encoders: Any) -> None:
        self.encoders = encoders


def test_a_reward_may_list_several_encoders(
    arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [make_encoder(name, arguments[name]) for name in ("siglip", "dinov2")]
    alone = [make_encoder(name, arguments[name]) for name in ("siglip", "dinov2")]
    ranks = EncodingRanks(2)
    ranks.stand_in(monkeypatch)
    place_encoders(cast("Any", TwoEncoders([OwnEncoder(), *listed])), ranks, num_ranks=2)
    clips = [frames[:, 0] for frames in round_of().frames or ()]
    for mine, theirs in zip(alone, listed, strict=True):
        for a, b in zip(mine.encode(clips), theirs.encode(clips), strict=True):
            assert np.array_equal(a, b)
        assert mine.feature_space == theirs.feature_space


def test_the_encoder_of_the_page_runs_on_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/add-a-reward.md, Where an encoder runs."""
    (tmp_path / "colour.py").write_text(documented_encoder())
    weights = tmp_path / "colour.safetensors"
    save_file(torch.nn.Linear(3, 8).state_dict(), weights)
    monkeypatch.chdir(tmp_path)
    own = {"path": str(weights), "batch_size": 4}
    here, there = (reward_of("colour.py:ColourEncoder", own) for _ in range(2))
    # ranks may work in another folder
    monkeypatch.chdir(os.sep)
    ranks = EncodingRanks(2)
    ranks.stand_in(monkeypatch)
    place_encoders(there, ranks, num_ranks=2)
    batch = round_of()
    for mine, theirs in zip(features_of(here, batch), features_of(there, batch), strict=True):
        assert mine.shape[1] == 8
        assert np.array_equal(mine, theirs)
    assert len(ranks.computed) > 2
    with pytest.raises(ConfigError, match=r"encoder is 'colour'; .* is path/to/file.py:ClassName"):
        reward_of("colour", {})


@pytest.mark.parametrize(("asked", "there"), [("auto", "meta"), ("cpu", "cpu"), (None, "meta")])
def test_a_rank_computes_on_its_own_device_unless_the_recipe_says_cpu(
    asked: str | None, there: str, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {} if asked is None else {"device": asked}
    reward = reward_of("siglip", {**arguments["siglip"], **given})
    monkeypatch.setattr("verl_vla.rewards.encoders.network.find_device", torch.device)
    ranks = EncodingRanks(2)
    ranks.stand_in(monkeypatch, device="meta")
    place_encoders(reward, ranks, num_ranks=2)
    assert {str(cast("Any", r._encoders[0].network).device) for r in ranks.ranks} == {there}


@pytest.mark.parametrize("died", [RayActorError, OutOfMemoryError])
def test_a_rank_that_dies_while_it_encodes_is_no_fault_of_the_reward(died: Any) -> None:
    trainer = object.__new__(VLATrainer)

    def fit(_: Any) -> None:
        try:
            raise died("it is gone")
        except died as error:
            raise RewardError("the encoder raised") from error

    recipe = load_recipe(["recipe=quickstart"])
    vars(trainer).update(fit=fit, loop=None, global_steps=2, recipe=recipe)
    with pytest.raises(died):
        trainer.train()
