"""The environment-loop manager: what veRL calls to have groups played."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import transfer_queue as tq
from tensordict import TensorDict
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_vla.core.episode import EpisodeSpec
from verl_vla.core.errors import RewardError
from verl_vla.core.tables import Trajectories
from verl_vla.rewards import TrajectoryReward, learn, score
from verl_vla.rl.rollout import NoiseSource, RolloutTimes, Simulators, rollout
from verl_vla.runs.episode_recorder import EpisodeRecorder
from verl_vla.trainer.grpo.cluster_policy import ClusterPolicy
from verl_vla.trainer.grpo.rows import group_key, group_of, make_rows
from verl_vla.trainer.grpo.unscored_episodes import UnscoredEpisodes

TRAINING_STREAM = 0
"""Stream of the noise source; evaluation plays from stream 1."""


@dataclass(slots=True)
class StepStats:
    """What all rounds of one training step cost and brought."""

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
        """Under the names of `verl_vla.runs.metrics`; rates of nothing are NaN."""
        judged = self.episodes - self.crashes
        rollout_s = self.times.total_s or math.nan
        return {
            "env/success_rate": self.solved / judged if judged else math.nan,
            "critic/score/mean": self.score_sum / judged if judged else math.nan,
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
    """Plays the groups veRL asks for and puts one row per policy step into TransferQueue.

    `generate_sequences` is the name veRL calls. It blocks until every episode has ended and
    every group is scored, so the replay buffer never has to poll.
    """

    def __init__(
        self,
        policy: ClusterPolicy,
        simulators: Simulators,
        reward: TrajectoryReward,
        *,
        suite: str,
        temperature: float,
        seed: int,
        specs_of: Callable[[int], list[EpisodeSpec]],
        recorder: EpisodeRecorder,
        refused: UnscoredEpisodes,
    ) -> None:
        self._policy = policy
        self._simulators = simulators
        self._reward = reward
        self._suite = suite
        self._temperature = temperature
        self._noise = NoiseSource(seed=seed, stream=TRAINING_STREAM)
        self._specs_of = specs_of
        self._recorder = recorder
        self._refused = refused
        self.account = StepStats()
        """Of the training step under way; replaced when a step begins."""

    def begin_step(self) -> None:
        """Open a new account."""
        self.account = StepStats()

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Play the groups named by ``prompts["uid"]`` to their end and store their rows.

        Raises:
            RewardError: the reward was refused; the episodes are kept (`UnscoredEpisodes`).
        """
        global_step = int(prompts["global_steps"])
        groups = [group_of(str(uid)) for uid in prompts["uid"]]
        specs = [spec for group in groups for spec in self._specs_of(group)]
        played = self._refused.take(specs, global_step) or self._play(specs)
        self._enter(played)
        alive = played.select(~played.episodes.crashed)
        try:
            scores = self._score_and_store(alive, global_step) if len(alive.episodes) else {}
        except RewardError:
            self._refused.keep(played, global_step)
            raise
        self._refused.forget(global_step)
        self._recorder.add(global_step, played, scores)
        spread = _spread(played, scores)
        began = time.perf_counter()
        tq.kv_batch_put(
            keys=[group_key(group) for group in groups],
            partition_id="train",
            tags=[
                _prompt_tag(played, group, global_step) | {"score_spread": spread[group]}
                for group in groups
            ],
        )
        self.account.transfer_s += time.perf_counter() - began

    def _play(self, specs: list[EpisodeSpec]) -> Trajectories:
        return rollout(
            specs,
            self._policy,
            self._simulators,
            temperature=self._temperature,
            noise=self._noise,
            times=self.account.times,
        )

    def _score_and_store(self, alive: Trajectories, global_step: int) -> dict[int, float]:
        """Return the score of each episode, by its id."""
        began = time.perf_counter()
        batch, result = score(self._reward, alive, suite=self._suite, split="train")
        learned = learn(self._reward, batch)
        self.account.reward_metrics = dict(result.metrics) | dict(learned)
        self.account.score_sum += float(result.score.sum())
        scored = time.perf_counter()
        self.account.reward_s += scored - began
        keys, fields, tags = make_rows(
            alive,
            result.score,
            chunk_length=self._policy.shape.chunk_length,
            global_step=global_step,
        )
        tq.kv_batch_put(
            keys=keys, fields=list_of_dict_to_tensordict(fields), tags=tags, partition_id="train"
        )
        self.account.transfer_s += time.perf_counter() - scored
        return dict(zip(alive.episodes.episode_id.tolist(), result.score.tolist(), strict=True))

    def _enter(self, played: Trajectories) -> None:
        episodes = played.episodes
        self.account.episodes += len(episodes)
        self.account.crashes += int(episodes.crashed.sum())
        self.account.solved += int(episodes.success.sum())
        self.account.steps += int(episodes.num_steps.sum())
        self.account.policy_steps += len(played.policy_steps)


def _spread(played: Trajectories, scores: Mapping[int, float]) -> dict[int, float]:
    """By how much the scores of the surviving episodes of each group differ; 0 where none did."""
    known: dict[int, list[float]] = {}
    episodes = played.episodes
    for group, episode in zip(
        episodes.group_id.tolist(), episodes.episode_id.tolist(), strict=True
    ):
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
