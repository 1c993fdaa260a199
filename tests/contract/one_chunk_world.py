"""The smallest world that an evaluation can be played in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from verl_vla.core.episode import EpisodeSpec, Observation, Outcome, Start
from verl_vla.core.errors import EpisodeCrashed
from verl_vla.core.tables import ActionChunk
from verl_vla.envs.base import ChunkResult
from verl_vla.policies.base import PolicyShape

SHAPE = PolicyShape(num_views=1, image_size=2, chunk_length=2, action_dim=1, num_bins=4)
TASK_NAMES = {0: "lift", 4: "push"}


def by_init_state(spec: EpisodeSpec) -> Outcome:
    return Outcome(spec.init_state_id % 3)


class OneChunkSimulators:
    """Every episode is over after one chunk; ``outcome_of`` says how."""

    num_slots = 3

    def __init__(self, outcome_of: Callable[[EpisodeSpec], Outcome] = by_init_state) -> None:
        self._outcome_of = outcome_of
        self._specs: dict[int, EpisodeSpec] = {}
        self._has_moved: set[int] = set()
        self.specs: list[EpisodeSpec] = []

    def reset(self, slots: Mapping[int, EpisodeSpec]) -> None:
        self._specs |= slots
        self.specs += slots.values()

    def step(self, chunks: Mapping[int, np.ndarray]) -> None:
        self._has_moved |= chunks.keys()

    def have_answered(self, slots: Collection[int]) -> bool:
        return True

    def wait(self, slots: Collection[int]) -> dict[int, Observation | ChunkResult | EpisodeCrashed]:
        return {slot: self._answer(slot) for slot in slots}

    def _answer(self, slot: int) -> Observation | ChunkResult | EpisodeCrashed:
        spec = self._specs[slot]
        if slot not in self._has_moved:
            return Observation(
                image=np.zeros((1, 2, 2, 3), dtype=np.uint8),
                proprio=np.zeros(8, dtype=np.float32),
                instruction=TASK_NAMES[spec.task_id],
            )
        self._has_moved.remove(slot)
        outcome = self._outcome_of(spec)
        if outcome == Outcome.CRASH:
            return EpisodeCrashed("lost")
        goals = np.zeros((2, 1, 3), dtype=np.float32)
        return ChunkResult(executed=2, outcome=outcome, observation=None, goals=goals)


@dataclass
class NotingPolicy:
    """Notes what it is asked."""

    shape: PolicyShape = SHAPE
    temperatures: set[float] = field(default_factory=set)
    noises: list[torch.Tensor] = field(default_factory=list)

    def act(
        self, observations: Sequence[Observation], noise: torch.Tensor, *, temperature: float
    ) -> ActionChunk:
        self.temperatures.add(temperature)
        self.noises += list(noise)
        count = len(observations)
        return ActionChunk(
            action_tokens=torch.zeros(count, 2, dtype=torch.int64),
            log_probs=torch.zeros(count, 2),
            prompt_ids=[torch.tensor([1])] * count,
            actions=np.zeros((count, 2, 1), dtype=np.float32),
        )


def starts_of(tasks: Mapping[int, Sequence[Outcome]]) -> list[Start]:
    """Starts whose episodes end as listed: state s ends with outcome s % 3."""
    return [
        Start(task_id=task, init_state_id=3 * place + outcome)
        for task, outcomes in tasks.items()
        for place, outcome in enumerate(outcomes)
    ]


SUCCESS, TIMEOUT, CRASH = Outcome.SUCCESS, Outcome.TIMEOUT, Outcome.CRASH
STARTS = starts_of({4: [SUCCESS, TIMEOUT, CRASH, SUCCESS], 0: [TIMEOUT, CRASH]})
