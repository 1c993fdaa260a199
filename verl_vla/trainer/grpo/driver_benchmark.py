"""The driver's part of a training step, measured in a process of its own by ``bench driver``.

Simulators and policy are made up; everything between them and the ranks' update is real: the
rollout, the reward, TransferQueue in its own Ray processes, dynamic sampling, the advantage and
the cut into mini-batches.

    python -m verl_vla.trainer.grpo.driver_benchmark '{"groups": 8, ...}' FILE

writes what it measured to FILE, as one JSON object.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from verl_vla.config.compose import load_recipe
from verl_vla.core.episode import EpisodeSpec, Observation, Outcome, Start
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.core.tables import ActionChunk
from verl_vla.envs.base import ChunkResult
from verl_vla.policies.base import PolicyShape, Processor
from verl_vla.policies.registry import load_processor
from verl_vla.rewards.loading import load_reward
from verl_vla.rl.episode_record import Answer
from verl_vla.rl.group_sampling import StartSampler
from verl_vla.runs.run_recorder import RunRecorder
from verl_vla.trainer.grpo.advantage import tag_advantages
from verl_vla.trainer.grpo.env_loop import EpisodeLoop
from verl_vla.trainer.grpo.replay_buffer import GroupReplayBuffer
from verl_vla.trainer.grpo.unscored_episodes import UnscoredEpisodes
from verl_vla.trainer.grpo.update import update
from verl_vla.trainer.verl_compat.process import ADV_ESTIMATOR, prepare_verl

PROMPT_TOKENS = 38
"""Longest prompt of LIBERO with the published tokenizer."""
REPORTED = (
    "num_rows",
    "num_rows_idle",
    "num_tokens",
    "loss_sum",
    "entropy_sum",
    "ratio_sum",
    "ratio_deviation",
    "num_clipped_low",
    "num_clipped_high",
    "optimizer_step",
    "grad_norm",
    "lr",
)
"""Values that a rank reports of each micro-batch (`update_metrics.summarise_update`)."""
GIB = 2**30
KIB = 2**10


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One rollout round of a training step."""

    groups: int
    group_size: int
    policy_steps: int
    """Policy steps of every episode."""
    image_size: int
    num_views: int
    num_slots: int
    answers_per_s: float
    """Rate at which policy and simulators answer, policy steps per second; 0: as fast as asked."""
    recipe: Sequence[str]
    """Arguments of the recipe whose groups, ranks and mini-batches these are, as for ``train``."""


def main(size: str, file: str) -> None:
    """Measure one round, given as JSON, and write the result as JSON."""
    prepare_verl("cpu", option="bench driver")
    with tempfile.TemporaryDirectory() as folder:
        try:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=3)
            tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
            found = measure(Round(**json.loads(size)), Path(folder))
        finally:
            tq.close()
            ray.shutdown()
    Path(file).write_text(json.dumps(found))


def measure(size: Round, folder: Path) -> dict[str, Any]:
    """Carry two rounds to the update, one whose policy and simulators answer as fast as asked.

    Returns:
        Policy steps per second of that round, and of the other one the seconds of each part after
        its last policy step, which neither ranks nor simulators overlap.
    """
    at_once = _carry(replace(size, answers_per_s=0.0), folder / "at_once")
    paced = _carry(size, folder / "paced")
    return paced | {
        "policy_steps_per_s": at_once["policy_steps_per_s"],
        "not_overlapped_at_once_s": at_once["not_overlapped_s"],
    }


def _carry(size: Round, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    processor = load_processor(str(PROJECT_FOLDER / "bases" / "libero_spatial"))
    shape = replace(processor.shape, image_size=size.image_size, num_views=size.num_views)
    simulators = PacedSimulators(size, shape)
    loop = _make_loop(size, shape, simulators, processor, folder)
    recipe = load_recipe(size.recipe)
    buffer = GroupReplayBuffer(
        trainer_mode="sync",
        trainer_config=OmegaConf.create({}),
        max_off_policy_threshold=None,
        max_off_policy_strategy="drop",
        sampler_kwargs=OmegaConf.create(asdict(recipe.sampling)),
        refill_fn=_no_refill,
    )
    loop.begin_step()
    request = tu.get_tensordict({"uid": loop.next_groups(size.groups)})
    tu.assign_non_tensor_data(request, "global_steps", 1)
    began = time.perf_counter()
    loop.generate_sequences(request)
    played = time.perf_counter()
    (batch, _), sample_s = _timed(lambda: buffer.sample(1, "train", size.groups))
    config = OmegaConf.create({"adv_estimator": ADV_ESTIMATOR})
    batch, advantage_s = _timed(lambda: tag_advantages(batch, config))
    ranks = InstantRanks()
    prepared = time.perf_counter()
    batch, _ = update(batch, ranks, recipe, eos_token_id=0)
    # as the trainer does after a step
    tq.kv_clear(keys=batch.keys, partition_id="train")
    parts = {
        "after_the_last_policy_step_s": played - simulators.last_answer,
        "dynamic_sampling_s": sample_s,
        "advantage_s": advantage_s,
        "before_the_update_s": ranks.asked - prepared,
    }
    rows = size.groups * size.group_size * size.policy_steps
    images = rows * size.num_views * size.image_size**2 * 3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return {
        "rows": rows,
        "policy_steps_per_s": round(rows / (simulators.last_answer - began)),
        **{name: round(seconds, 2) for name, seconds in parts.items()},
        "not_overlapped_s": round(sum(parts.values()), 2),
        "images_gib": round(images / GIB, 2),
        "peak_of_the_driver_gib": round(peak / GIB, 2),
    }


def _make_loop(
    size: Round,
    shape: PolicyShape,
    simulators: PacedSimulators,
    processor: Processor,
    folder: Path,
) -> EpisodeLoop:
    starts = [Start(task_id=0, init_state_id=i) for i in range(size.groups)]
    return EpisodeLoop(
        InstantPolicy(shape),  # pyright: ignore[reportArgumentType] -- in this process
        simulators,
        load_reward("binary", {}),
        StartSampler(starts, seed=0, group_size=size.group_size),
        suite="libero_spatial",
        mirrored=False,
        temperature=1.0,
        seed=0,
        reward_timeout_s=600,
        recorder=RunRecorder(folder, {}, processor.codec, groups_per_step=2, total_steps=1),
        unscored=UnscoredEpisodes(folder, first_step=1),
        most_policy_steps=size.policy_steps,
    )


class PacedSimulators:
    """Simulators that answer at a given rate; half of the episodes of a group succeed.

    Every image is an array of its own, as a simulator's is.
    """

    def __init__(self, size: Round, shape: PolicyShape) -> None:
        self.num_slots = size.num_slots
        self.last_answer = 0.0
        """When the simulators last answered, by `time.perf_counter`."""
        self._answers_per_s = size.answers_per_s
        self._num_answers = 0
        self._began = 0.0
        self._length = size.policy_steps
        self._chunk_length = shape.chunk_length
        random = np.random.default_rng(0)
        self._image = random.integers(0, 256, shape.image_shape, dtype=np.uint8)
        self._specs: dict[int, EpisodeSpec] = {}
        self._moves: dict[int, int] = {}

    def reset(self, slots: Mapping[int, EpisodeSpec]) -> None:
        """See `verl_vla.rl.rollout.Simulators.reset`."""
        self._specs |= slots
        self._moves |= dict.fromkeys(slots, 0)

    def step(self, chunks: Mapping[int, Any]) -> None:
        """See `verl_vla.rl.rollout.Simulators.step`."""
        for slot in chunks:
            self._moves[slot] += 1

    def have_answered(self, slots: Collection[int]) -> bool:
        """See `verl_vla.rl.rollout.Simulators.have_answered`."""
        return True

    def wait(self, slots: Collection[int]) -> dict[int, Answer]:
        """See `verl_vla.rl.rollout.Simulators.wait`."""
        answers: dict[int, Answer] = {slot: self._answer(slot) for slot in slots}
        self._keep_pace(len(answers))
        self.last_answer = time.perf_counter()
        return answers

    def _keep_pace(self, num_answers: int) -> None:
        """Wait until so many answers are due."""
        if not self._num_answers:
            self._began = time.perf_counter()
        self._num_answers += num_answers
        if self._answers_per_s:
            due = self._began + self._num_answers / self._answers_per_s
            time.sleep(max(0.0, due - time.perf_counter()))

    def _answer(self, slot: int) -> Observation | ChunkResult:
        if self._moves[slot] == 0:
            return self._observation()
        is_over = self._moves[slot] == self._length
        won = Outcome.SUCCESS if self._specs[slot].episode_id % 2 else Outcome.TIMEOUT
        return ChunkResult(
            executed=self._chunk_length,
            outcome=won if is_over else None,
            observation=None if is_over else self._observation(),
            goals=np.zeros((2, 1, 3), dtype=np.float32),
        )

    def _observation(self) -> Observation:
        return Observation(
            image=self._image.copy(),
            proprio=np.zeros(8, dtype=np.float32),
            instruction="pick up the black bowl and place it on the plate",
        )


class InstantPolicy:
    """A policy that answers at once."""

    def __init__(self, shape: PolicyShape) -> None:
        self.shape = shape
        self._prompt = torch.arange(PROMPT_TOKENS)

    def act(
        self, observations: Sequence[Observation], noise: torch.Tensor, *, temperature: float
    ) -> ActionChunk:
        """See `verl_vla.policies.base.Policy.act`."""
        count, shape = len(observations), self.shape
        return ActionChunk(
            action_tokens=(noise * shape.num_bins).long(),
            log_probs=torch.full((count, shape.num_tokens), -1.0),
            prompt_ids=[self._prompt] * count,
            actions=np.zeros((count, shape.chunk_length, shape.action_dim), dtype=np.float32),
        )


class InstantRanks:
    """Ranks whose update takes no time."""

    def __init__(self) -> None:
        self.asked = 0.0
        """When the update was asked for, by `time.perf_counter`."""

    def update_actor(self, batch: Any) -> TensorDict:
        """Note the moment; answer as one rank does after one micro-batch of one row."""
        self.asked = time.perf_counter()
        return tu.get_tensordict({}, non_tensor_dict={"metrics": dict.fromkeys(REPORTED, [0.0])})


def _no_refill(num_groups: int) -> None:
    raise AssertionError(f"{num_groups} groups were dropped, and all are informative")


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


if __name__ == "__main__":
    main(*sys.argv[1:])
