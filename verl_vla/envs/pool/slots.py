"""State of a pool's slots: bookkeeping only, without processes or threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from verl_vla.core.episode import EpisodeSpec, Observation
from verl_vla.core.errors import ConfigError, ContractError, EpisodeCrashed
from verl_vla.envs.base import ChunkResult
from verl_vla.envs.pool.messages import (
    Failed,
    Frames,
    Moment,
    Request,
    Result,
    Started,
    StartEpisode,
    StepChunk,
    Stepped,
)
from verl_vla.envs.pool.start_cache import Start, StartCache, StartKey

Answer = Observation | ChunkResult | EpisodeCrashed
"""Answer of a slot: an observation to a reset, a result to a step, a crash to either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """Counters of a pool's work so far."""

    steps: int = 0
    """Number of simulator steps that the policy chose."""
    policy_steps: int = 0
    """Number of action chunks that were run."""
    resets_simulated: int = 0
    resets_served: int = 0
    """Number of resets answered with a cached start."""
    crashes: int = 0
    """Number of requests whose simulator crashed; each of them lost one episode."""
    restarts: int = 0
    """Number of processes started in place of one that had ended."""
    busy_s: float = 0.0
    """Time that processes spent on requests they answered, summed over processes, s."""
    wait_s: float = 0.0
    """Time that the caller spent in `EnvPool.wait`, s."""

    def __add__(self, other: PoolStats) -> PoolStats:
        names = [f.name for f in fields(self)]
        return PoolStats(**{name: getattr(self, name) + getattr(other, name) for name in names})


class Slots:
    """The episode of each slot, its pending request and its answer.

    Args:
        frames: [slots, V, H, W, 3]; the image of an answer is in its slot's frame when the answer
            is recorded.
        max_cached_starts: number of recorded starts that are cached instead of simulated again.

    Attributes:
        stats: counters of the work done so far.
    """

    def __init__(self, frames: Frames, *, max_cached_starts: int) -> None:
        self.stats = PoolStats()
        self._frames = frames
        self._starts = StartCache(max_cached_starts)
        self._followers: dict[StartKey, deque[int]] = {}
        self._playing: dict[int, _Episode] = {}
        self._asked: set[int] = set()
        self._answers: dict[int, Answer | ConfigError | ContractError] = {}

    def __len__(self) -> int:
        return len(self._frames)

    def check_free(self, slot: int) -> None:
        """Refuse a slot that does not exist, or whose last answer was not yet taken."""
        if not 0 <= slot < len(self):
            raise ContractError(f"slot {slot} does not exist; slots are 0..{len(self) - 1}")
        if slot in self._asked:
            raise ContractError(f"slot {slot} still owes an answer; wait for it first")

    def check_playing(self, slot: int) -> None:
        """Refuse a slot that plays no episode."""
        if slot not in self._playing:
            raise ContractError(f"slot {slot} plays no episode; reset it first")

    def check_asked(self, slot: int) -> None:
        """Refuse a slot that has no request to be answered."""
        if slot not in self._asked:
            raise ContractError(f"slot {slot} was asked nothing; reset or step it first")

    def have_answered(self, slots: Collection[int]) -> bool:
        """Return True once all of these slots have answers."""
        return all(slot in self._answers for slot in slots)

    def take_answers(self, slots: Collection[int]) -> dict[int, Answer]:
        """Take the answers of these slots to their last requests.

        Raises:
            ConfigError, ContractError: a request was wrong; the answers of the other slots stay and
                can be taken later.
        """
        taken: dict[int, Answer] = {}
        for slot in slots:
            answer = self._answers[slot]
            if isinstance(answer, ConfigError | ContractError):
                self._forget(slot)
                raise answer
            taken[slot] = answer
        # only now: an error above leaves the answers before it where they are
        for slot in taken:
            self._forget(slot)
        return taken

    def start(self, slot: int, spec: EpisodeSpec) -> StartEpisode | None:
        """Start an episode.

        Returns:
            The request to a simulator; None where the start is cached, or already requested.
        """
        self._asked.add(slot)
        # the old episode ends here, even where the new one fails
        self._playing.pop(slot, None)
        key = StartKey(task_id=spec.task_id, init_state_id=spec.init_state_id)
        start = self._starts.find(key)
        if start is not None:
            self._begin(slot, key, start)
            self.stats += PoolStats(resets_served=1)
        elif key in self._followers:
            self._followers[key].append(slot)
        else:
            # later slots with the same start wait in this queue, so it is simulated only once
            self._followers[key] = deque()
            return _request(slot, key)
        return None

    def step(self, slot: int, actions: npt.NDArray[np.float32]) -> StepChunk:
        """Continue an episode; return the request to a simulator."""
        self._asked.add(slot)
        # from its latest snapshot, which any process can continue from
        episode = self._playing[slot]
        return StepChunk(
            slot=slot,
            task_id=episode.key.task_id,
            init_state_id=episode.key.init_state_id,
            num_steps=episode.num_steps,
            snapshot=episode.snapshot,
            # a copy: the caller may use its array again before the request is sent
            actions=actions.copy(),
        )

    def note(self, request: Request, result: Result) -> StartEpisode | None:
        """Record the result of a request; return the reset of the next follower if it failed."""
        match result:
            case Started():
                self._note_start(request, result)
            case Stepped():
                self._note_step(request.slot, result)
            case Failed():
                return self._note_failure(request, result)
        return None

    def _forget(self, slot: int) -> None:
        self._asked.remove(slot)
        del self._answers[slot]

    def _note_start(self, request: Request, result: Started) -> None:
        key = _key(request)
        followers = self._followers.pop(key)
        observation = self._observe(request.slot, result.moment)
        start = Start(observation=observation, snapshot=result.moment.snapshot)
        self._starts.keep(key, start)
        for slot in (request.slot, *followers):
            self._begin(slot, key, start)
        self.stats += PoolStats(
            resets_simulated=1, resets_served=len(followers), busy_s=result.busy_s
        )

    def _begin(self, slot: int, key: StartKey, start: Start) -> None:
        self._playing[slot] = _Episode(key=key, snapshot=start.snapshot)
        seen = start.observation
        # copies, since the receiver of an observation may write to it
        copied = replace(seen, image=seen.image.copy(), proprio=seen.proprio.copy())
        self._answers[slot] = copied

    def _note_step(self, slot: int, result: Stepped) -> None:
        self.stats += PoolStats(policy_steps=1, steps=result.executed, busy_s=result.busy_s)
        observation = None
        if result.moment is None:
            del self._playing[slot]
        else:
            episode = self._playing[slot]
            episode.snapshot = result.moment.snapshot
            episode.num_steps += result.executed
            observation = self._observe(slot, result.moment)
        self._answers[slot] = ChunkResult(
            executed=result.executed,
            outcome=result.outcome,
            observation=observation,
            goals=result.goals,
            # copies, here and in `_observe`: the next request of the slot writes to the same frame
            final_image=self._frames[slot].copy() if result.has_final_image else None,
            video=result.video,
        )

    def _note_failure(self, request: Request, result: Failed) -> StartEpisode | None:
        self._playing.pop(request.slot, None)
        self._answers[request.slot] = result.error
        self.stats += PoolStats(crashes=int(isinstance(result.error, EpisodeCrashed)))
        if isinstance(request, StepChunk):
            return None
        key = _key(request)
        followers = self._followers.pop(key)
        if not followers:
            return None
        slot = followers.popleft()  # only the first slot fails; the next one tries again
        self._followers[key] = followers
        return _request(slot, key)

    def _observe(self, slot: int, moment: Moment) -> Observation:
        return Observation(
            image=self._frames[slot].copy(),
            proprio=moment.proprio,
            instruction=moment.instruction,
        )


@dataclass(slots=True, kw_only=True)
class _Episode:
    """A running episode, as of its latest answer."""

    key: StartKey
    snapshot: bytes
    num_steps: int = 0


def _key(request: Request) -> StartKey:
    return StartKey(task_id=request.task_id, init_state_id=request.init_state_id)


def _request(slot: int, key: StartKey) -> StartEpisode:
    return StartEpisode(slot=slot, task_id=key.task_id, init_state_id=key.init_state_id)
