"""Play episodes with the current policy and write down what happened.

Slots are split into two halves that take turns: while the simulators of one half move, the
policy decides for the other. A policy that computes elsewhere gets the request of the second half
before it has answered that of the first, so it never waits for this process. A slot whose episode
has ended takes the next one at once. The batches of the policy are fixed by the list of episodes
alone, never by which simulator was faster, so the same run gives the same numbers.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from verl_vla.core.episode import EpisodeSpec, Observation
from verl_vla.core.tables import ActionChunk, Trajectories
from verl_vla.policies.base import AsyncPolicy, PendingChunk, Policy
from verl_vla.rl.episode_record import (
    Answer,
    EpisodeRecord,
    ImageBuffer,
    join_tables,
    no_episodes,
)

logger = logging.getLogger(__name__)

POLL_S = 0.005
"""Longest wait for the policy between two looks at the simulators. A look costs some 0.2 ms of the
driver; a policy step takes 20 to 1,000 times as long as this."""


class Simulators(Protocol):
    """What a rollout needs of a pool; see `verl_vla.envs.pool.env_pool.EnvPool`."""

    @property
    def num_slots(self) -> int:
        """Episodes that can be under way at the same time."""
        ...

    def reset(self, slots: Mapping[int, EpisodeSpec]) -> None:
        """Start episodes; does not wait."""
        ...

    def step(self, chunks: Mapping[int, npt.NDArray[np.float32]]) -> None:
        """Run one action chunk in each of these slots; does not wait."""
        ...

    def wait(self, slots: Collection[int]) -> dict[int, Answer]:
        """Wait until exactly these slots have answered."""
        ...

    def have_answered(self, slots: Collection[int]) -> bool:
        """Return True where `wait` need not wait for these slots."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSource:
    """The randomness of a rollout, as a pure function of who asks.

    ``stream`` keeps training and evaluation apart under one seed.
    """

    seed: int
    stream: int

    def uniform(
        self, episode_id: int, policy_step: int, num_tokens: int
    ) -> npt.NDArray[np.float64]:
        """[T] uniform in [0, 1), the same for the same arguments on every machine."""
        # a generator for each policy step: no state to checkpoint, no order to keep (ADR-0006)
        rng = np.random.default_rng([self.seed, self.stream, episode_id, policy_step])
        return rng.random(num_tokens)


@dataclass(slots=True)
class RolloutTimes:
    """Seconds that the process that drives a rollout spent on its parts."""

    policy_s: float = 0.0
    """Asking the policy, and waiting for it."""
    wait_s: float = 0.0
    """Waiting for simulators."""
    total_s: float = 0.0
    policy_steps_for_ended: int = 0
    """Policy steps for episodes that had already ended; always 0, or the loop is wrong."""


def rollout(
    specs: Sequence[EpisodeSpec],
    policy: Policy,
    simulators: Simulators,
    *,
    temperature: float,
    noise: NoiseSource,
    times: RolloutTimes | None = None,
    ended: Callable[[Trajectories], None] | None = None,
    num_parts: int = 2,
    max_video_frames: int | None = 0,
    most_policy_steps: int = 0,
) -> Trajectories:
    """Play every spec to its end, as many at a time as there are slots.

    Args:
        specs: the episodes; rows of the result are in this order.
        policy: decides for a batch of observations at a time.
        simulators: a pool whose slots are all free.
        temperature: of the action tokens; 0 plays greedily.
        noise: gives the random numbers of each policy step.
        times: if given, the seconds spent are added to it.
        ended: if given, told of each episode as it ends, by a table of that episode alone.
        num_parts: 2 lets the slot groups alternate; 1 has simulators and policy wait for
            each other, as other projects do, and is there to be measured.
        max_video_frames: most frames kept of an episode's video, evenly in time; None keeps all,
            0 no videos.
        most_policy_steps: of an episode. If given, the images of the round lie in one piece of
            memory from the start and need no copy at the end; rows of policy steps are then in
            the order in which episodes end.
    """
    started = time.perf_counter()
    if not specs:
        return no_episodes(policy.shape)
    records = [EpisodeRecord(spec) for spec in specs]
    images = ImageBuffer(len(specs) * most_policy_steps, policy.shape)
    queue = deque(records)
    num_slots = min(simulators.num_slots, len(records))
    # rounded up: with one part, the second group has no slots
    middle = -(-num_slots // num_parts)
    loop = _RolloutLoop(
        policy,
        simulators,
        temperature,
        noise,
        queue,
        times or RolloutTimes(),
        ended,
        max_video_frames,
        images,
    )
    # both groups are under way before either is waited for
    slot_groups = [_SlotGroup(range(middle)), _SlotGroup(range(middle, num_slots))]
    for group in slot_groups:
        loop.start_free_slots(group)
    first, second = slot_groups
    while first.active or second.active:
        loop.advance(first, second)
        loop.advance(second, first)
    loop.times.total_s += time.perf_counter() - started
    for record in records:
        if record.crash is not None:
            logger.warning("episode %d lost: %s", record.spec.episode_id, record.crash)
    if images.whole is None:
        return Trajectories.concat(record.take_tables() for record in records)
    index = {spec.episode_id: i for i, spec in enumerate(specs)}
    tables = [record.take_tables() for record in records]
    ended_at = [index[episode_id] for episode_id in loop.ended_ids]
    return join_tables(tables, ended_at, images.whole, policy.shape)


class _SlotGroup:
    """Half of the slots: their episodes move together."""

    def __init__(self, slots: range) -> None:
        self.slots = slots
        self.active: dict[int, EpisodeRecord] = {}
        self.asked: _Asked | None = None
        """What the policy was asked for these slots and has not delivered yet."""


@dataclass(slots=True)
class _Asked:
    """A request to the policy: one row a slot."""

    seen: dict[int, Observation]
    chunks: PendingChunk


@dataclass(slots=True)
class _RolloutLoop:
    policy: Policy
    simulators: Simulators
    temperature: float
    noise: NoiseSource
    queue: deque[EpisodeRecord]
    times: RolloutTimes
    ended: Callable[[Trajectories], None] | None
    max_video_frames: int | None
    images: ImageBuffer
    ended_ids: list[int] = field(default_factory=list[int])
    """Ids of episodes in the order in which they ended."""

    def start_free_slots(self, group: _SlotGroup) -> None:
        """Give every free slot of ``group`` the next episode of the queue."""
        starting: dict[int, EpisodeSpec] = {}
        for slot in group.slots:
            if slot not in group.active and self.queue:
                group.active[slot] = self.queue.popleft()
                starting[slot] = group.active[slot].spec
        if starting:
            self.simulators.reset(starting)

    def advance(self, group: _SlotGroup, other: _SlotGroup) -> None:
        """Take what the simulators of ``group`` answered, and ask the policy what they do next.

        Meanwhile the policy may answer for the other group. Whichever is first is served first, so
        that neither simulators nor policy wait for this process.
        """
        self._deliver(group)
        began = time.perf_counter()
        while other.asked is not None and not self.simulators.have_answered(list(group.active)):
            if other.asked.chunks.is_ready(POLL_S):
                self.times.policy_s += time.perf_counter() - began
                self._deliver(other)
                began = time.perf_counter()
        if not group.active:
            return
        answers = self.simulators.wait(list(group.active))
        self.times.wait_s += time.perf_counter() - began
        seen: dict[int, Observation] = {}
        # in the order of slots, not of arrival: the rows of a batch must not depend on timing
        for slot in sorted(answers):
            observation = group.active[slot].note_answer(answers[slot], self.max_video_frames)
            if observation is None:
                record = group.active.pop(slot)
                tables = record.tabulate(
                    self.policy.shape, has_video=self.max_video_frames != 0, images=self.images
                )
                self.ended_ids.append(record.spec.episode_id)
                if self.ended is not None:
                    self.ended(tables)
            else:
                seen[slot] = observation
        # before the policy is asked, so that the resets run while it computes
        self.start_free_slots(group)
        if seen:
            self._ask(group, seen)

    def _ask(self, group: _SlotGroup, seen: dict[int, Observation]) -> None:
        began = time.perf_counter()
        records = [group.active[slot] for slot in seen]
        self.times.policy_steps_for_ended += sum(r.outcome is not None for r in records)
        num_tokens = self.policy.shape.num_tokens
        noise = np.stack(
            [
                # the observations noted so far number the policy step
                self.noise.uniform(r.spec.episode_id, len(r.observations), num_tokens)
                for r in records
            ]
        )
        batch = list(seen.values()), torch.from_numpy(noise)
        if isinstance(self.policy, AsyncPolicy):
            group.asked = _Asked(seen, self.policy.request(*batch, temperature=self.temperature))
        else:
            self._send(group, seen, self.policy.act(*batch, temperature=self.temperature))
        self.times.policy_s += time.perf_counter() - began

    def _deliver(self, group: _SlotGroup) -> None:
        """Wait for the chunks that were asked for ``group``, and send them to its simulators."""
        if group.asked is None:
            return
        began = time.perf_counter()
        asked, group.asked = group.asked, None
        self._send(group, asked.seen, asked.chunks.collect())
        self.times.policy_s += time.perf_counter() - began

    def _send(self, group: _SlotGroup, seen: dict[int, Observation], chunk: ActionChunk) -> None:
        for row, (slot, observation) in enumerate(seen.items()):
            group.active[slot].note_policy_step(observation, chunk, row)
        self.simulators.step({slot: chunk.actions[row] for row, slot in enumerate(seen)})
