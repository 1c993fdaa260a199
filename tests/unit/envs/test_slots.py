"""Bookkeeping of a pool: starts that are shared, failures that are not, answers taken once."""

import numpy as np
import pytest

from verl_vla.core.episode import EpisodeSpec, Observation, Outcome
from verl_vla.core.errors import ContractError, EpisodeCrashed
from verl_vla.envs.pool.messages import Failed, Moment, Started, StartEpisode, Stepped
from verl_vla.envs.pool.slots import PoolStats, Slots
from verl_vla.envs.pool.start_cache import Start, StartCache, StartKey

CHUNK = np.zeros((8, 7), dtype=np.float32)
GOALS = np.arange(6, dtype=np.float32).reshape(2, 1, 3)


def spec(init_state_id: int) -> EpisodeSpec:
    return EpisodeSpec(task_id=0, init_state_id=init_state_id, group_id=0, episode_id=0)


def moment(name: bytes) -> Moment:
    return Moment(snapshot=name, proprio=np.zeros(8, dtype=np.float32), instruction="go")


def started(name: bytes = b"start") -> Started:
    return Started(moment=moment(name), busy_s=0.5)


def stepped(name: bytes) -> Stepped:
    return Stepped(
        executed=8,
        outcome=None,
        moment=moment(name),
        has_final_image=False,
        goals=GOALS,
        busy_s=0.25,
    )


@pytest.fixture
def frames() -> np.ndarray:
    return np.zeros((4, 1, 2, 2, 3), dtype=np.uint8)


@pytest.fixture
def slots(frames) -> Slots:
    return Slots(frames, max_cached_starts=8)


def test_slots_with_the_same_start_ask_for_it_once(slots, frames):
    request = slots.start(0, spec(5))
    assert (request.task_id, request.init_state_id, request.slot) == (0, 5, 0)
    assert slots.start(1, spec(5)) is None
    assert slots.start(2, spec(6)).init_state_id == 6
    frames[0] = 9
    assert slots.note(request, started()) is None
    assert slots.have_answered([0, 1])
    assert not slots.have_answered([0, 1, 2])
    first, second = slots.take_answers([0, 1]).values()
    assert (first.image == 9).all()
    assert (second.image == 9).all()
    assert slots.stats == PoolStats(resets_simulated=1, resets_served=1, busy_s=0.5)


def test_who_writes_to_an_observation_changes_nobody_elses(slots):
    slots.note(slots.start(0, spec(5)), started())
    slots.take_answers([0])[0].image[...] = 77
    slots.start(1, spec(5))
    answer = slots.take_answers([1])[1]
    assert (answer.image == 0).all()
    answer.proprio[...] = 77
    slots.start(2, spec(5))
    assert (slots.take_answers([2])[2].proprio == 0).all()


def test_an_answer_keeps_its_image_when_the_frame_is_drawn_again(slots, frames):
    slots.note(slots.start(0, spec(5)), started())
    first = slots.take_answers([0])[0]
    request = slots.step(0, CHUNK)
    frames[0] = 200
    slots.note(request, stepped(b"later"))
    assert (first.image == 0).all()
    assert (slots.take_answers([0])[0].observation.image == 200).all()


def test_a_failed_start_is_asked_again_for_the_next_in_line(slots):
    request = slots.start(0, spec(5))
    for slot in (1, 2):
        slots.start(slot, spec(5))
    again = slots.note(request, Failed(error=EpisodeCrashed("boom")))
    assert isinstance(again, StartEpisode)
    assert (again.slot, again.init_state_id) == (1, 5)
    assert isinstance(slots.take_answers([0])[0], EpisodeCrashed)
    slots.note(again, started())
    assert isinstance(slots.take_answers([1])[1], Observation)
    assert isinstance(slots.take_answers([2])[2], Observation)
    assert slots.stats.crashes == 1


def test_a_step_starts_from_the_latest_moment(slots):
    slots.note(slots.start(0, spec(5)), started(b"start"))
    slots.take_answers([0])[0]
    request = slots.step(0, CHUNK)
    assert (request.snapshot, request.num_steps) == (b"start", 0)
    slots.note(request, stepped(b"later"))
    slots.take_answers([0])[0]
    request = slots.step(0, CHUNK)
    assert (request.snapshot, request.num_steps) == (b"later", 8)


def test_a_request_keeps_its_actions_when_the_caller_reuses_the_array(slots):
    slots.note(slots.start(0, spec(5)), started())
    slots.take_answers([0])[0]
    chunk = CHUNK.copy()
    request = slots.step(0, chunk)
    chunk[...] = 1
    assert (request.actions == 0).all()


def test_a_slot_is_free_once_its_episode_has_ended(slots):
    slots.note(slots.start(0, spec(5)), started())
    slots.take_answers([0])[0]
    end = Stepped(
        executed=3,
        outcome=Outcome.SUCCESS,
        moment=None,
        has_final_image=False,
        goals=GOALS,
        busy_s=0.25,
    )
    slots.note(slots.step(0, CHUNK), end)
    result = slots.take_answers([0])[0]
    assert (result.executed, result.outcome, result.observation) == (3, Outcome.SUCCESS, None)
    assert np.array_equal(result.goals, GOALS)
    with pytest.raises(ContractError, match="plays no episode"):
        slots.check_playing(0)
    slots.check_free(0)
    assert slots.stats == PoolStats(steps=3, policy_steps=1, resets_simulated=1, busy_s=0.75)


def test_a_slot_owes_an_answer_until_it_is_taken(slots):
    with pytest.raises(ContractError, match="asked nothing"):
        slots.check_asked(0)
    slots.note(slots.start(0, spec(5)), started())
    slots.check_asked(0)
    with pytest.raises(ContractError, match="still owes an answer"):
        slots.check_free(0)
    slots.take_answers([0])[0]
    slots.check_free(0)
    with pytest.raises(ContractError, match=r"slots are 0\.\.3"):
        slots.check_free(4)


def test_the_cache_forgets_what_was_unused_for_longest():
    seen = Observation(
        image=np.zeros((1, 2, 2, 3), np.uint8), proprio=np.zeros(8, np.float32), instruction="go"
    )
    keys = [StartKey(task_id=0, init_state_id=i) for i in range(3)]
    starts = [Start(observation=seen, snapshot=bytes([i])) for i in range(3)]
    cache = StartCache(2)
    cache.keep(keys[0], starts[0])
    cache.keep(keys[1], starts[1])
    assert cache.find(keys[0]) is starts[0]
    cache.keep(keys[2], starts[2])
    assert cache.find(keys[1]) is None
    assert cache.find(keys[0]) is starts[0]
    assert cache.find(keys[2]) is starts[2]
    assert len(cache) == 2


def test_a_cache_of_no_starts_remembers_none(frames):
    slots = Slots(frames, max_cached_starts=0)
    slots.note(slots.start(0, spec(5)), started())
    slots.take_answers([0])[0]
    assert slots.start(1, spec(5)) is not None


def test_a_mistake_is_raised_and_the_other_answers_stay(slots):
    slots.note(slots.start(0, spec(5)), started())
    slots.note(slots.start(1, spec(6)), Failed(error=ContractError("wrong shape")))
    with pytest.raises(ContractError, match="wrong shape"):
        slots.take_answers([0, 1])
    assert slots.have_answered([0])
    assert isinstance(slots.take_answers([0])[0], Observation)
    slots.check_free(1)
    assert slots.stats.crashes == 0
