"""The episode loop: it chooses groups, plays and scores them, and hands their rows to veRL.

veRL asks for a number of groups (`EpisodeLoop.next_groups`) and then for their rows
(`EpisodeLoop.generate_sequences`, the name that veRL calls).
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import transfer_queue as tq
from tensordict import TensorDict

from verl_vla.core.episode import EpisodeSpec
from verl_vla.core.errors import EXIT_REWARD, RewardError
from verl_vla.core.tables import Trajectories
from verl_vla.core.time_limit import run_within
from verl_vla.rewards import RewardResult, TrajectoryReward, learn, score, video_need
from verl_vla.rl.group_sampling import StartSampler
from verl_vla.rl.rollout import NoiseSource, RolloutTimes, Simulators, rollout
from verl_vla.runs.console import episodes_bar
from verl_vla.runs.run_recorder import RunRecorder
from verl_vla.trainer.grpo.cluster_policy import ClusterPolicy
from verl_vla.trainer.grpo.row_writer import RowWriter
from verl_vla.trainer.grpo.rows import group_key, group_of, score_tags
from verl_vla.trainer.grpo.unscored_episodes import UnscoredEpisodes

TRAINING_STREAM = 0
"""Stream of the noise source; evaluation plays from stream 1."""


@dataclass(slots=True)
class StepStats:
    """Counts and seconds of all rollout rounds of one training step."""

    times: RolloutTimes = field(default_factory=RolloutTimes)
    reward_s: float = 0.0
    transfer_s: float = 0.0
    episodes: int = 0
    crashes: int = 0
    solved: int = 0
    steps: int = 0
    policy_steps: int = 0
    score_sum: float = 0.0
    reward_metrics: dict[str, float] = field(default_factory=dict[str, float])

    def as_metrics(self) -> dict[str, float]:
        """Return metrics by their declared names; a rate of no episodes is NaN."""
        completed = self.episodes - self.crashes
        # 0 where episodes kept for a corrected reward were scored without being played
        rollout_s = self.times.total_s or math.nan
        return {
            "env/success_rate": self.solved / completed if completed else math.nan,
            "critic/score/mean": self.score_sum / completed if completed else math.nan,
            "env/episodes": float(self.episodes),
            "env/crashes": float(self.crashes),
            "env/steps": float(self.steps),
            "env/policy_steps": float(self.policy_steps),
            "perf/policy_steps_per_s": self.policy_steps / rollout_s,
            "env/policy_steps_after_end": float(self.times.policy_steps_for_ended),
            "perf/env_wait_share": self.times.wait_s / rollout_s,
            "perf/policy_share": self.times.policy_s / rollout_s,
            "timing_s/gen": self.times.total_s,
            "timing_s/reward": self.reward_s,
            "timing_s/transfer": self.transfer_s,
        } | {f"reward/{name}": value for name, value in self.reward_metrics.items()}


class EpisodeLoop:
    """Plays the groups that veRL asks for and puts one row per policy step into TransferQueue.

    `generate_sequences` blocks until every episode has ended and every group is scored, so the
    replay buffer never has to poll.

    Args:
        policy: whose episodes they are.
        simulators: a pool whose slots are all free.
        reward: scores whole groups, and learns from them.
        starts: chooses the init state of each group.
        suite: name of the suite, for the reward.
        mirrored: `Suite.images_are_mirrored`, for the reward.
        temperature: sampling temperature of the action tokens.
        seed: seed of the sampling noise.
        reward_timeout_s: time within which the reward must score a round, s.
        recorder: keeps the episodes.
        unscored: keeps the episodes that the reward could not score.
        most_policy_steps: of an episode, see `rollout`.
    """

    def __init__(
        self,
        policy: ClusterPolicy,
        simulators: Simulators,
        reward: TrajectoryReward,
        starts: StartSampler,
        *,
        suite: str,
        mirrored: bool,
        temperature: float,
        seed: int,
        reward_timeout_s: float,
        recorder: RunRecorder,
        unscored: UnscoredEpisodes,
        most_policy_steps: int,
    ) -> None:
        self._policy = policy
        self._simulators = simulators
        self._reward = reward
        video = video_need(reward)
        self._max_video_frames = 0 if video is None else video.max_frames
        self._suite, self._mirrored = suite, mirrored
        self._temperature = temperature
        self._noise = NoiseSource(seed=seed, stream=TRAINING_STREAM)
        self._reward_timeout_s = reward_timeout_s
        self._starts = starts
        self._recorder = recorder
        self._unscored = unscored
        self._most_policy_steps = most_policy_steps
        self._specs: dict[int, list[EpisodeSpec]] = {}
        self.stats = StepStats()
        """Counts of the current training step."""

    def begin_step(self) -> None:
        """Forget the groups of the last training step and count from 0."""
        self._specs.clear()
        self.stats = StepStats()

    def next_groups(self, num_groups: int) -> list[str]:
        """Choose the init states of the next groups; return veRL's ``uid`` of each."""
        groups = {group[0].group_id: group for group in self._starts.next_groups(num_groups)}
        # a refill adds to the groups of the step
        self._specs |= groups
        return [group_key(group) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the groups sampled so far and the reward's state."""
        return {
            "num_groups_sampled": self._starts.num_groups_sampled,
            # a copy: the reward goes on learning, and a step cut short resumes from before it
            "reward": deepcopy(self._reward.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._starts.num_groups_sampled = state["num_groups_sampled"]
        self._reward.load_state_dict(state["reward"])

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Play the groups named by ``prompts["uid"]`` to their end and store their rows.

        Raises:
            RewardError: the reward was refused; the episodes are kept (`UnscoredEpisodes`).
        """
        global_step = int(prompts["global_steps"])
        groups = [group_of(str(uid)) for uid in prompts["uid"]]
        specs = [spec for group in groups for spec in self._specs[group]]
        with RowWriter(
            chunk_length=self._policy.shape.chunk_length, global_step=global_step
        ) as writer:
            kept = self._unscored.take(specs, global_step)
            if kept is not None:
                writer.add(kept)
            played = kept or self._play(specs, writer)
            self._count(played)
            # a crashed episode has no outcome
            alive = played.select(~played.episodes.crashed)
            try:
                earned = self._score(alive)
            except RewardError:
                self._unscored.keep(played, global_step)
                raise
            # until the last rows are stored, on leaving the block
            began = time.perf_counter()
        keys, tags = score_tags(alive, earned)
        # every simulator may have crashed
        if keys:
            tq.kv_batch_put(keys=keys, partition_id="train", tags=tags)
        self.stats.transfer_s += time.perf_counter() - began
        scores = dict(zip(alive.episodes.episode_id.tolist(), earned.tolist(), strict=True))
        self._unscored.forget(global_step)
        self._recorder.add_episodes(global_step, played, scores)
        spread = _spread(played, scores)
        # last: "finished" lets the replay buffer take a group, whose rows must be there by then
        began = time.perf_counter()
        tq.kv_batch_put(
            keys=[group_key(group) for group in groups],
            partition_id="train",
            tags=[
                _prompt_tag(played, group, global_step) | {"score_spread": spread[group]}
                for group in groups
            ],
        )
        self.stats.transfer_s += time.perf_counter() - began

    def _play(self, specs: list[EpisodeSpec], writer: RowWriter) -> Trajectories:
        """Play the episodes, and store the rows of each as it ends."""
        with episodes_bar("rollout", len(specs)) as show:

            def ended(episode: Trajectories) -> None:
                show(episode)
                writer.add(episode)

            return rollout(
                specs,
                self._policy,
                self._simulators,
                temperature=self._temperature,
                noise=self._noise,
                times=self.stats.times,
                ended=ended,
                max_video_frames=self._max_video_frames,
                most_policy_steps=self._most_policy_steps,
            )

    def _score(self, alive: Trajectories) -> npt.NDArray[np.float32]:
        """Score the episodes, and let the reward learn from them; there may be none."""
        if not len(alive.episodes):
            return np.zeros(0, dtype=np.float32)
        began = time.perf_counter()
        result, learned = run_within(
            self._reward_timeout_s,
            partial(self._ask_reward, alive),
            partial(self._overdue, len(alive.episodes)),
            EXIT_REWARD,
        )
        self.stats.reward_metrics = dict(result.metrics) | dict(learned)
        self.stats.score_sum += float(result.score.sum())
        self.stats.reward_s += time.perf_counter() - began
        return result.score

    def _ask_reward(self, alive: Trajectories) -> tuple[RewardResult, Mapping[str, float]]:
        batch, result = score(
            self._reward, alive, suite=self._suite, split="train", mirrored=self._mirrored
        )
        # after scoring, so that no episode is scored by what it taught itself
        return result, learn(self._reward, batch)

    def _overdue(self, number: int, where: str) -> RewardError:
        reward = type(self._reward)
        return RewardError(
            f"{reward.__name__} of {inspect.getfile(reward)} did not score {number} "
            f"episodes within {self._reward_timeout_s:g} s{where}; correct the reward, or set a "
            "longer reward_timeout_s"
        )

    def _count(self, played: Trajectories) -> None:
        episodes = played.episodes
        self.stats.episodes += len(episodes)
        self.stats.crashes += int(episodes.crashed.sum())
        self.stats.solved += int(episodes.success.sum())
        self.stats.steps += int(episodes.num_steps.sum())
        self.stats.policy_steps += len(played.policy_steps)


def _spread(played: Trajectories, scores: Mapping[int, float]) -> dict[int, float]:
    """By how much the scores of the surviving episodes of each group differ; 0 where none did."""
    known: dict[int, list[float]] = {}
    episodes = played.episodes
    for group, episode in zip(
        episodes.group_id.tolist(), episodes.episode_id.tolist(), strict=True
    ):
        # a crashed episode has no score
        known.setdefault(group, []).extend([scores[episode]] if episode in scores else [])
    return {group: max(values) - min(values) if values else 0.0 for group, values in known.items()}


def _prompt_tag(played: Trajectories, group: int, global_step: int) -> dict[str, int | bool | str]:
    """The tag of a finished group: its outcome, which decides whether it is kept."""
    member = played.episodes.group_id == group
    solved = int((played.episodes.success & member).sum())
    crashed = int((played.episodes.crashed & member).sum())
    return {
        "is_prompt": True,
        "status": "finished",
        "global_steps": global_step,
        "task_id": int(played.episodes.task_id[member][0]),
        "num_solved": solved,
        "num_failed": int(member.sum()) - solved - crashed,
        "num_crashed": crashed,
    }
