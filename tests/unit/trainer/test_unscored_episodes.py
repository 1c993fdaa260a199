"""Episodes that outlive the reward that could not score them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from bench_world import NUM_GROUPS, SIZE, make_trajectories
from row_store import RowStore
from verl.utils import tensordict_utils as tu

from verl_vla.core.episode import EpisodeSpec, Start
from verl_vla.core.errors import RewardError
from verl_vla.policies.base import PolicyShape
from verl_vla.rewards import RewardResult, StatelessReward, TrajectoryBatch
from verl_vla.rl.group_sampling import StartSampler
from verl_vla.trainer.grpo.env_loop import EpisodeLoop
from verl_vla.trainer.grpo.unscored_episodes import UnscoredEpisodes

STEP = 3
PLAYED = make_trajectories(crash_last=True)
SPECS = [
    EpisodeSpec(task_id=t, init_state_id=i, group_id=g, episode_id=e)
    for t, i, g, e in zip(
        PLAYED.episodes.task_id.tolist(),
        PLAYED.episodes.init_state_id.tolist(),
        PLAYED.episodes.group_id.tolist(),
        PLAYED.episodes.episode_id.tolist(),
        strict=True,
    )
]


def test_what_was_kept_of_the_first_step_is_taken_up_whole(tmp_path: Path) -> None:
    UnscoredEpisodes(tmp_path, first_step=1).keep(PLAYED, STEP)
    again = UnscoredEpisodes(tmp_path, first_step=STEP)
    taken = again.take(SPECS, STEP)
    assert taken is not None
    assert torch.equal(taken.policy_steps.image, PLAYED.policy_steps.image)
    assert torch.equal(taken.policy_steps.log_probs, PLAYED.policy_steps.log_probs)
    assert taken.crashes == PLAYED.crashes
    again.forget(STEP)
    again.forget(STEP)
    assert again.take(SPECS, STEP) is None
    assert not list(tmp_path.iterdir())


def test_other_episodes_and_other_weights_are_played_anew(tmp_path: Path) -> None:
    kept = UnscoredEpisodes(tmp_path, first_step=STEP)
    kept.keep(PLAYED, STEP)
    assert kept.take(SPECS[:-1], STEP) is None
    assert kept.take(SPECS[::-1], STEP) is None
    assert kept.take(SPECS, STEP + 1) is None
    earlier = UnscoredEpisodes(tmp_path, first_step=STEP - 1)
    assert earlier.take(SPECS, STEP) is None, "the weights of that step were trained anew"


class Unsure(StatelessReward):
    """Knows no score for one episode."""

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        score = np.where(batch.episode_id == SIZE, np.nan, 1).astype(np.float32)
        return RewardResult(score=score, progress=score, status=("ok",) * len(batch))


def test_a_refused_round_leaves_its_episodes_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RowStore().stand_in(monkeypatch)
    kept = UnscoredEpisodes(tmp_path, first_step=STEP)
    kept.keep(PLAYED, STEP)
    nobody: Any = None  # no simulator is asked, and nothing is shown
    tokens = PLAYED.policy_steps.action_tokens.shape[1]
    sizes = {"num_views": 1, "image_size": 2, "chunk_length": tokens, "action_dim": 1}
    loop = EpisodeLoop(
        cast("Any", SimpleNamespace(shape=PolicyShape(**sizes, num_bins=4))),
        nobody,
        Unsure(),
        StartSampler([Start(task_id=0, init_state_id=0)], seed=0, group_size=SIZE),
        suite="mini",
        mirrored=True,
        temperature=1.0,
        seed=0,
        reward_timeout_s=60,
        recorder=nobody,
        unscored=kept,
        most_policy_steps=1,
    )
    asked = tu.get_tensordict({"uid": loop.next_groups(NUM_GROUPS)})
    tu.assign_non_tensor_data(asked, "global_steps", STEP)
    with pytest.raises(RewardError, match=f"Unsure returned nan for episode {SIZE} "):
        loop.generate_sequences(asked)
    assert loop.stats.as_metrics()["env/episodes"] == len(SPECS)
    assert np.isnan(loop.stats.as_metrics()["perf/policy_steps_per_s"])
    assert kept.take(SPECS, STEP) is not None
