"""Playing episodes, with simulators whose episodes are known beforehand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
import torch

from verl_vla.core.episode import EpisodeSpec, Observation, Outcome
from verl_vla.core.errors import EpisodeCrashed
from verl_vla.core.tables import ActionChunk, Trajectories
from verl_vla.envs.base import ChunkResult
from verl_vla.policies.base import PolicyShape
from verl_vla.rl import rollout as rollout_module
from verl_vla.rl.episode_record import Answer, thin_video
from verl_vla.rl.rollout import POLL_S, NoiseSource, RolloutTimes, rollout

SHAPE = PolicyShape(num_views=1, image_size=2, chunk_length=4, action_dim=2, num_bins=16)
NOISE = NoiseSource(seed=7, stream=0)
Reply = int | Outcome | str
"""What a simulator does with a chunk: runs all of it (an int: that many actions, the episode goes
on), ends after some actions (an Outcome), or crashes (the reason)."""


@dataclass(frozen=True)
class Script:
    """One episode; ``last`` is how many actions of its last chunk ran."""

    policy_steps: int = 1
    outcome: Outcome = Outcome.TIMEOUT
    last: int = SHAPE.chunk_length
    crash_at: int | None = None
    """The chunk that a simulator dies on; -1 is the reset."""


def see(spec: EpisodeSpec, policy_step: int) -> Observation:
    """An observation that says whose it is and when."""
    return Observation(
        image=np.full((1, 2, 2, 3), spec.episode_id, dtype=np.uint8),
        proprio=np.array([spec.episode_id, policy_step], dtype=np.float32),
        instruction=f"task {spec.task_id}",
    )


def goals(before: int) -> np.ndarray:
    """Readings that count the chunks."""
    return np.array([before, before + 1], dtype=np.float32).repeat(3).reshape(2, 1, 3)


def run_substeps(executed: int, spec: EpisodeSpec, policy_step: int) -> ChunkResult:
    return ChunkResult(
        executed=executed,
        outcome=None,
        observation=see(spec, policy_step + 1),
        goals=goals(policy_step),
    )


def end(executed: int, outcome: Outcome, policy_step: int) -> ChunkResult:
    """An end whose image tells after how many policy steps it came."""
    return ChunkResult(
        executed=executed,
        outcome=outcome,
        observation=None,
        goals=goals(policy_step),
        final_image=np.full((1, 2, 2, 3), 100 + policy_step, dtype=np.uint8),
    )


class ScriptedSimulators:
    """Slots whose episodes follow scripts; refuses every call that a pool would refuse."""

    are_fast = True
    """Whether they have answered before somebody waits for them."""

    def __init__(self, scripts: Mapping[int, Script], num_slots: int) -> None:
        self._scripts = scripts
        self._num_slots = num_slots
        self._specs: dict[int, EpisodeSpec] = {}
        self._policy_step: dict[int, int] = {}
        self._pending: dict[int, Observation | ChunkResult | EpisodeCrashed] = {}
        self.events: list[tuple[str, int, int]] = []
        """(what, slot, episode id), in order."""

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def moving(self) -> set[int]:
        """Slots that owe an answer."""
        return set(self._pending)

    def reset(self, slots: Mapping[int, EpisodeSpec]) -> None:
        for slot, spec in slots.items():
            assert 0 <= slot < self._num_slots
            assert slot not in self._specs, f"slot {slot} is not free"
            self._specs[slot], self._policy_step[slot] = spec, 0
            self.events.append(("reset", slot, spec.episode_id))
            dies = self._script(slot).crash_at == -1
            self._pending[slot] = EpisodeCrashed("died at reset") if dies else see(spec, 0)

    def step(self, chunks: Mapping[int, np.ndarray]) -> None:
        for slot, actions in chunks.items():
            assert slot in self._specs, f"slot {slot} plays nothing"
            assert slot not in self._pending, f"slot {slot} still owes an answer"
            assert actions.shape == (SHAPE.chunk_length, SHAPE.action_dim)
            spec = self._specs[slot]
            assert actions[0].tolist() == [spec.episode_id, self._policy_step[slot]]
            self.events.append(("step", slot, spec.episode_id))
            self._pending[slot] = self._after_chunk(slot, actions)

    def have_answered(self, slots: Collection[int]) -> bool:
        assert self._pending.keys() >= set(slots)
        return self.are_fast

    def wait(self, slots: Collection[int]) -> dict[int, Observation | ChunkResult | EpisodeCrashed]:
        self.events += [("wait", slot, self._specs[slot].episode_id) for slot in sorted(slots)]
        # backwards: the order in which simulators answer must not matter
        answers = {slot: self._pending.pop(slot) for slot in sorted(slots, reverse=True)}
        for slot, answer in answers.items():
            over = isinstance(answer, ChunkResult) and answer.outcome is not None
            if over or isinstance(answer, EpisodeCrashed):
                self.events.append(("over", slot, self._specs.pop(slot).episode_id))
        return answers

    def _script(self, slot: int) -> Script:
        return self._scripts[self._specs[slot].episode_id]

    def _after_chunk(self, slot: int, actions: np.ndarray) -> ChunkResult | EpisodeCrashed:
        script, policy_step = self._script(slot), self._policy_step[slot]
        self._policy_step[slot] += 1
        if script.crash_at == policy_step:
            return EpisodeCrashed(f"died on chunk {policy_step}")
        if policy_step == script.policy_steps - 1:
            return end(script.last, script.outcome, policy_step)
        return run_substeps(len(actions), self._specs[slot], policy_step)


class ReactiveSimulators(ScriptedSimulators):
    """Here the bins decide how an episode goes on, as they do in the world."""

    def _after_chunk(self, slot: int, actions: np.ndarray) -> ChunkResult | EpisodeCrashed:
        policy_step, luck = self._policy_step[slot], int(actions[1:].sum())
        self._policy_step[slot] += 1
        if luck % 11 == 0:
            return EpisodeCrashed(f"unlucky at {policy_step}")
        if luck % 5 == 0 or policy_step == 5:
            outcome = Outcome.TIMEOUT if policy_step == 5 else Outcome.SUCCESS
            return end(1 + luck % 4, outcome, policy_step)
        return run_substeps(len(actions), self._specs[slot], policy_step)


@dataclass
class ScriptedPolicy:
    """Bins are the noise, cut into 16; the first action of a chunk says whose it is."""

    simulators: ScriptedSimulators | None = None
    batches: list[list[tuple[int, int]]] = field(default_factory=list)
    """(episode, policy step) of every call."""
    noises: list[torch.Tensor] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)
    moving: list[set[int]] = field(default_factory=list)
    """Slots that simulated while the policy decided."""
    shape: PolicyShape = SHAPE

    def act(
        self, observations: Sequence[Observation], noise: torch.Tensor, *, temperature: float
    ) -> ActionChunk:
        whose = np.stack([o.proprio for o in observations])
        self.batches.append([(int(e), int(d)) for e, d in whose])
        self.noises.append(noise)
        self.temperatures.append(temperature)
        if self.simulators is not None:
            self.moving.append(self.simulators.moving)
        action_tokens = (noise * SHAPE.num_bins).long()
        actions = (
            action_tokens.numpy().astype(np.float32).reshape(len(whose), SHAPE.chunk_length, -1)
        )
        actions[:, 0] = whose
        return ActionChunk(
            action_tokens=action_tokens,
            log_probs=-noise.float(),
            prompt_ids=[torch.tensor([1, *o.instruction.encode()]) for o in observations],
            actions=actions,
        )


@dataclass
class RemotePolicy(ScriptedPolicy):
    """Computes elsewhere, and writes into the simulators' events when it is asked and collected."""

    simulators: ScriptedSimulators = field(kw_only=True)
    polls_until_ready: int = 0

    def request(
        self, observations: Sequence[Observation], noise: torch.Tensor, *, temperature: float
    ) -> RemoteChunk:
        self._note("ask", observations)
        chunk = self.act(observations, noise, temperature=temperature)
        collected = partial(self._note, "collect", observations)
        return RemoteChunk(chunk, collected, self.polls_until_ready)

    def _note(self, what: str, observations: Sequence[Observation]) -> None:
        episode, policy_step = observations[0].proprio
        self.simulators.events.append((what, int(policy_step), int(episode)))


@dataclass
class RemoteChunk:
    """Ready after some polls."""

    chunk: ActionChunk
    collected: Callable[[], None]
    polls_left: int

    def is_ready(self, timeout_s: float) -> bool:
        self.polls_left -= 1
        return self.polls_left < 0

    def collect(self) -> ActionChunk:
        self.collected()
        return self.chunk


def make_specs(count: int) -> list[EpisodeSpec]:
    """Ids start at 10, so that a row number can never be taken for one."""
    return [
        EpisodeSpec(task_id=i % 3, init_state_id=i % 5, group_id=i // 2, episode_id=10 + i)
        for i in range(count)
    ]


def play_scripts(scripts: Sequence[Script], num_slots: int, policy: ScriptedPolicy | None = None):
    """Play one episode per script; returns the tables, the simulators and the policy."""
    specs = make_specs(len(scripts))
    simulators = ScriptedSimulators(
        {spec.episode_id: script for spec, script in zip(specs, scripts, strict=True)}, num_slots
    )
    policy = policy or ScriptedPolicy(simulators)
    return rollout(specs, policy, simulators, temperature=1.5, noise=NOISE), simulators, policy


def policy_steps_of(trajectories: Trajectories, row: int) -> torch.Tensor:
    return torch.nonzero(trajectories.policy_steps.episode == row).flatten()


@pytest.mark.parametrize("num_slots", [1, 2, 3, 20])
def test_rows_are_in_the_order_of_the_specs_whatever_ends_first(num_slots):
    lengths = [5, 1, 3, 2, 4]
    played, _, _ = play_scripts([Script(policy_steps=n) for n in lengths], num_slots)
    assert played.episodes.episode_id.tolist() == [10, 11, 12, 13, 14]
    assert played.episodes.task_id.tolist() == [0, 1, 2, 0, 1]
    assert played.episodes.init_state_id.tolist() == [0, 1, 2, 3, 4]
    assert played.episodes.group_id.tolist() == [0, 0, 1, 1, 2]
    assert torch.bincount(played.policy_steps.episode).tolist() == lengths
    assert played.policy_steps.episode.tolist() == sorted(played.policy_steps.episode.tolist())


def test_every_policy_step_is_written_down_with_what_it_saw_and_chose():
    played, _, _ = play_scripts([Script(policy_steps=3), Script(policy_steps=2)], num_slots=2)
    for row, policy_step in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        i = int(policy_steps_of(played, row)[policy_step])
        episode_id = 10 + row
        noise = NOISE.uniform(episode_id, policy_step, SHAPE.num_tokens)
        assert played.policy_steps.proprio[i].tolist() == [episode_id, policy_step]
        assert (played.policy_steps.image[i] == episode_id).all()
        assert (
            played.policy_steps.action_tokens[i].tolist()
            == (noise * SHAPE.num_bins).astype(int).tolist()
        )
        assert played.policy_steps.log_probs[i].tolist() == (-noise).astype(np.float32).tolist()
        assert bytes(played.prompt_ids[i][1:].tolist()).decode() == f"task {row}"


def test_goal_readings_begin_before_the_first_policy_step_and_follow_each():
    scripts = [Script(policy_steps=3), Script(policy_steps=2, crash_at=1), Script(crash_at=-1)]
    played, _, _ = play_scripts(scripts, num_slots=3)
    whole, cut, never_began = played.goals
    assert whole[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert cut[:, 0, 0].tolist() == [0, 1]
    assert whole.shape[1:] == (1, 3)
    assert len(never_began) == 0


def test_an_episode_keeps_the_image_it_ended_in():
    scripts = [Script(policy_steps=3), Script(policy_steps=2, crash_at=1), Script(policy_steps=1)]
    played, _, _ = play_scripts(scripts, num_slots=3)
    long, lost, short = played.final_images
    assert (long[0, 0, 0, 0], short[0, 0, 0, 0]) == (102, 100)
    assert lost is None


class FilmedSimulators(ScriptedSimulators):
    """Gives as many frames a chunk as it executed, numbered by policy step."""

    def wait(self, slots: Collection[int]) -> dict[int, Answer]:
        return {slot: self._filmed(answer) for slot, answer in super().wait(slots).items()}

    def _filmed(self, answer: Answer) -> Answer:
        if not isinstance(answer, ChunkResult):
            return answer
        step = int(answer.goals[0, 0, 0])
        return replace(answer, video=np.full((answer.executed, 2, 2, 3), step, np.uint8))


@pytest.mark.parametrize(
    ("max_frames", "long", "short"),
    [
        (None, [0] * 4 + [1] * 4 + [2] * 4, [0] * 4),
        (5, [0, 0, 1, 2, 2], [0] * 4),
        (2, [0, 2], [0, 0]),
    ],
)
def test_a_video_is_kept_evenly_in_time(max_frames, long, short):
    scripts = [Script(policy_steps=3), Script(policy_steps=2, crash_at=1), Script(policy_steps=1)]
    specs = make_specs(len(scripts))
    by_id = {spec.episode_id: script for spec, script in zip(specs, scripts, strict=True)}
    played = rollout(
        specs,
        ScriptedPolicy(),
        FilmedSimulators(by_id, 3),
        temperature=1.0,
        noise=NOISE,
        max_video_frames=max_frames,
    )
    frames = [video[:, 0, 0, 0].tolist() if len(video) else [] for video in played.videos]
    assert frames == [long, [], short]


def test_no_video_is_kept_unless_asked_for():
    specs = make_specs(1)
    simulators = FilmedSimulators({specs[0].episode_id: Script(policy_steps=2)}, 1)
    played = rollout(specs, ScriptedPolicy(), simulators, temperature=1.0, noise=NOISE)
    assert played.videos == ()


def test_steps_and_outcomes_are_counted_to_the_action():
    played, _, _ = play_scripts(
        [
            Script(policy_steps=3, outcome=Outcome.SUCCESS, last=2),
            Script(policy_steps=2, outcome=Outcome.TIMEOUT),
            Script(policy_steps=1, outcome=Outcome.SUCCESS, last=1),
        ],
        num_slots=2,
    )
    assert played.episodes.num_steps.tolist() == [10, 8, 1]
    assert played.episodes.outcome.tolist() == [Outcome.SUCCESS, Outcome.TIMEOUT, Outcome.SUCCESS]
    assert played.policy_steps.executed.tolist() == [4, 4, 2, 4, 4, 1]
    assert played.crashes == {}


def test_no_policy_step_is_made_for_an_episode_that_ended():
    lengths = [4, 1, 2, 6, 1]
    _, _, policy = play_scripts([Script(policy_steps=n) for n in lengths], num_slots=3)
    asked = [one for batch in policy.batches for one in batch]
    assert sorted(asked) == [(10 + e, d) for e, n in enumerate(lengths) for d in range(n)]


def test_a_freed_slot_takes_the_next_episode_before_anybody_decides():
    """The fifth episode starts where the short one ended, before its neighbour's next chunk."""
    scripts = [Script(policy_steps=4), Script(policy_steps=1), *[Script(policy_steps=4)] * 3]
    _, simulators, _ = play_scripts(scripts, num_slots=4)
    over = simulators.events.index(("over", 1, 11))
    assert simulators.events[over + 1 : over + 3] == [("reset", 1, 14), ("step", 0, 10)]


def test_few_episodes_in_many_slots_still_take_turns():
    _, simulators, policy = play_scripts([Script(), Script()], num_slots=8)
    assert {slot for _, slot, _ in simulators.events} == {0, 1}
    assert policy.batches == [[(10, 0)], [(11, 0)]]


def test_the_order_in_which_simulators_answer_does_not_reach_the_policy():
    """A batched matrix product may differ in its last bit with the order of its rows."""
    _, _, policy = play_scripts([Script(policy_steps=2)] * 6, num_slots=6)
    assert all(batch == sorted(batch) for batch in policy.batches)
    assert [len(batch) for batch in policy.batches] == [3, 3, 3, 3]


def test_one_half_simulates_while_the_policy_decides_for_the_other():
    _, _, policy = play_scripts([Script(policy_steps=6)] * 4, num_slots=4)
    halves = [{0, 1}, {2, 3}]
    for turn, (batch, moving) in enumerate(zip(policy.batches, policy.moving, strict=True)):
        assert {episode - 10 for episode, _ in batch} == halves[turn % 2]
        if turn < len(policy.batches) - 1:
            assert moving == halves[1 - turn % 2]


def play_remotely(are_fast: bool, polls_until_ready: int = 0) -> list[tuple[str, int, int]]:
    """Play two episodes of three policy steps in two slots; return the events, waits included."""
    specs = make_specs(2)
    simulators = ScriptedSimulators({s.episode_id: Script(policy_steps=3) for s in specs}, 2)
    simulators.are_fast = are_fast
    policy = RemotePolicy(simulators=simulators, polls_until_ready=polls_until_ready)
    rollout(specs, policy, simulators, temperature=1.5, noise=NOISE)
    return simulators.events


def test_a_remote_policy_has_its_next_request_before_it_has_answered():
    """Where simulators are the faster ones, the ranks never wait for the driver."""
    events = [e for e in play_remotely(are_fast=True) if e[0] in ("ask", "collect")]
    assert events == [
        ("ask", 0, 10),
        ("ask", 0, 11),
        *[
            event
            for policy_step in (1, 2)
            for event in (
                ("collect", policy_step - 1, 10),
                ("ask", policy_step, 10),
                ("collect", policy_step - 1, 11),
                ("ask", policy_step, 11),
            )
        ],
        ("collect", 2, 10),
        ("collect", 2, 11),
    ]


@pytest.mark.parametrize("polls_until_ready", [0, 3])
def test_chunks_are_sent_while_the_other_half_still_moves(polls_until_ready):
    """Where the policy is the faster one, no simulator waits for those of the other half."""
    events = play_remotely(are_fast=False, polls_until_ready=polls_until_ready)
    for policy_step in (1, 2):
        sent = events.index(("collect", policy_step - 1, 11)) + 1
        assert events[sent] == ("step", 1, 11)
        asked = events.index(("ask", policy_step, 10))
        assert sent < asked
        assert ("wait", 0, 10) in events[sent:asked]


@pytest.mark.parametrize("are_fast", [True, False])
@pytest.mark.parametrize("num_slots", [1, 3, 8])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_remote_policy_plays_the_same_episodes(are_fast, num_slots, num_parts):
    specs = make_specs(9)
    played = []
    for is_remote in (False, True):
        simulators = ReactiveSimulators({s.episode_id: Script() for s in specs}, num_slots)
        simulators.are_fast = are_fast
        policy = RemotePolicy(simulators=simulators) if is_remote else ScriptedPolicy()
        options = {"temperature": 1.5, "noise": NOISE, "num_parts": num_parts}
        played.append(rollout(specs, policy, simulators, **options))
    here, there = played
    assert torch.equal(here.policy_steps.action_tokens, there.policy_steps.action_tokens)
    assert torch.equal(here.policy_steps.proprio, there.policy_steps.proprio)
    assert here.episodes.outcome.tolist() == there.episodes.outcome.tolist()
    assert here.crashes == there.crashes


def test_in_one_part_nothing_simulates_while_the_policy_decides():
    specs = make_specs(6)
    simulators = ScriptedSimulators({s.episode_id: Script(policy_steps=3) for s in specs}, 4)
    policy = ScriptedPolicy(simulators)
    alone = rollout(specs, policy, simulators, temperature=1.5, noise=NOISE, num_parts=1)
    assert not any(policy.moving)
    in_halves, _, _ = play_scripts([Script(policy_steps=3)] * 6, 4)
    assert torch.equal(alone.policy_steps.action_tokens, in_halves.policy_steps.action_tokens)


def test_a_policy_step_for_an_ended_episode_would_be_counted():
    class Forgetful(ScriptedSimulators):
        """Shows one more image after the end."""

        def _after_chunk(self, slot: int, actions: np.ndarray) -> ChunkResult | EpisodeCrashed:
            ended = super()._after_chunk(slot, actions)
            assert isinstance(ended, ChunkResult)
            return ChunkResult(
                executed=ended.executed,
                outcome=ended.outcome,
                observation=see(self._specs[slot], 1),
                goals=ended.goals,
            )

    specs, times = make_specs(1), RolloutTimes()
    simulators = Forgetful({specs[0].episode_id: Script()}, 1)
    with pytest.raises(AssertionError, match="plays nothing"):
        rollout(specs, ScriptedPolicy(), simulators, temperature=1.0, noise=NOISE, times=times)
    assert times.policy_steps_for_ended == 1


def test_the_policy_step_a_simulator_died_on_is_left_out():
    played, _, policy = play_scripts(
        [Script(policy_steps=4, crash_at=2), Script(policy_steps=2)], num_slots=2
    )
    assert (10, 2) in [one for batch in policy.batches for one in batch]
    assert played.episodes.outcome.tolist() == [Outcome.CRASH, Outcome.TIMEOUT]
    assert len(policy_steps_of(played, 0)) == 2
    assert played.episodes.num_steps.tolist() == [8, 8]
    assert played.crashes == {10: "died on chunk 2"}


def test_an_episode_lost_at_its_start_has_no_policy_steps_and_its_slot_goes_on():
    played, _, _ = play_scripts([Script(crash_at=-1), Script(), Script()], num_slots=1)
    assert played.episodes.outcome.tolist() == [Outcome.CRASH, Outcome.TIMEOUT, Outcome.TIMEOUT]
    assert played.policy_steps.episode.tolist() == [1, 2]
    assert played.episodes.num_steps.tolist() == [0, 4, 4]
    assert played.crashes == {10: "died at reset"}


@pytest.mark.parametrize("most", [2, 6, 100], ids=["too few", "as many", "many"])
def test_images_that_lie_together_from_the_start_are_those_of_the_same_episodes(most):
    """With room for too few, the images are copied at the end as ever."""
    lengths = [5, 1, 3, 6, 4]
    scripts = [Script(policy_steps=n) for n in lengths]
    scripts[2] = Script(crash_at=-1)
    plain, _, _ = play_scripts(scripts, num_slots=2)
    told: list[Trajectories] = []
    specs = make_specs(len(scripts))
    simulators = ScriptedSimulators(
        {spec.episode_id: script for spec, script in zip(specs, scripts, strict=True)}, 2
    )
    placed = rollout(
        specs,
        ScriptedPolicy(simulators),
        simulators,
        temperature=1.5,
        noise=NOISE,
        ended=told.append,
        most_policy_steps=most,
    )
    for name in ("outcome", "num_steps", "episode_id", "task_id", "group_id"):
        assert torch.equal(getattr(plain.episodes, name), getattr(placed.episodes, name))
    assert plain.crashes == placed.crashes
    assert all(map(np.array_equal, plain.goals, placed.goals))
    for row in range(len(specs)):
        ours, theirs = policy_steps_of(placed, row), policy_steps_of(plain, row)
        for name in ("action_tokens", "log_probs", "executed", "proprio", "image"):
            mine, other = (getattr(t.policy_steps, name) for t in (placed, plain))
            assert torch.equal(mine[ours], other[theirs]), name
        assert [placed.prompt_ids[i].tolist() for i in ours] == [
            plain.prompt_ids[i].tolist() for i in theirs
        ]
    memory = {part.policy_steps.image.untyped_storage().data_ptr() for part in told}
    whole = placed.policy_steps.image.untyped_storage().data_ptr()
    assert (whole in memory) == (most > 2), "no copy was made"


@pytest.mark.parametrize("crash_at", [-1, 0])
def test_a_rollout_that_lost_everything_is_still_two_tables(crash_at):
    played, _, _ = play_scripts([Script(crash_at=crash_at)] * 5, num_slots=2)
    assert played.episodes.crashed.all()
    assert len(played.crashes) == 5
    assert len(played.policy_steps) == 0
    assert played.policy_steps.image.shape == (0, 1, 2, 2, 3)
    assert played.policy_steps.action_tokens.shape == (0, SHAPE.num_tokens)
    assert len(played.select(~played.episodes.crashed).episodes) == 0


def test_no_episodes_give_empty_tables_and_touch_no_simulator():
    played, simulators, policy = play_scripts([], num_slots=4)
    assert (len(played.episodes), len(played.policy_steps)) == (0, 0)
    assert (simulators.events, policy.batches) == ([], [])


def test_a_crash_is_reported_with_its_reason(caplog):
    with caplog.at_level(logging.WARNING):
        play_scripts([Script(policy_steps=2, crash_at=1)], num_slots=1)
    assert [r.getMessage() for r in caplog.records] == ["episode 10 lost: died on chunk 1"]


def test_results_do_not_depend_on_how_many_play_at_a_time():
    specs = make_specs(60)
    tables = []
    for num_slots in (1, 2, 7, 64):
        simulators = ReactiveSimulators({s.episode_id: Script() for s in specs}, num_slots)
        tables.append(rollout(specs, ScriptedPolicy(), simulators, temperature=1.0, noise=NOISE))
    first = tables[0]
    assert set(first.episodes.outcome.tolist()) == {0, 1, 2}, "the case should hold every outcome"
    for other in tables[1:]:
        for name in ("outcome", "num_steps", "episode_id"):
            assert torch.equal(getattr(first.episodes, name), getattr(other.episodes, name))
        for name in ("episode", "action_tokens", "log_probs", "executed", "proprio", "image"):
            assert torch.equal(getattr(first.policy_steps, name), getattr(other.policy_steps, name))
        assert first.crashes == other.crashes


def test_the_policy_gets_the_temperature_and_the_noise_of_each_policy_step():
    _, _, policy = play_scripts([Script(policy_steps=2)] * 3, num_slots=3)
    assert set(policy.temperatures) == {1.5}
    for batch, noise in zip(policy.batches, policy.noises, strict=True):
        assert noise.dtype == torch.float64
        expected = [NOISE.uniform(e, d, SHAPE.num_tokens).tolist() for e, d in batch]
        assert noise.tolist() == expected


def test_noise_is_a_function_of_who_asks_and_of_nothing_else():
    first = NoiseSource(seed=1, stream=0).uniform(5, 2, 56)
    again = NoiseSource(seed=1, stream=0).uniform(5, 2, 56)
    assert first.dtype == np.float64
    assert ((first >= 0) & (first < 1)).all()
    assert np.array_equal(first, again)
    others = [
        NoiseSource(seed=2, stream=0).uniform(5, 2, 56),
        NoiseSource(seed=1, stream=1).uniform(5, 2, 56),
        NoiseSource(seed=1, stream=0).uniform(6, 2, 56),
        NoiseSource(seed=1, stream=0).uniform(5, 3, 56),
    ]
    assert all(not np.array_equal(first, other) for other in others)


def test_times_add_up_over_rollouts():
    times = RolloutTimes()
    specs = make_specs(3)
    totals = []
    for _ in range(2):
        simulators = ScriptedSimulators({s.episode_id: Script(policy_steps=2) for s in specs}, 2)
        rollout(specs, ScriptedPolicy(), simulators, temperature=0.0, noise=NOISE, times=times)
        totals.append(times.total_s)
        assert 0 < times.policy_s + times.wait_s <= times.total_s
    assert totals[1] > totals[0]


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


POLICY_S, SIMULATOR_S = 2.0, 0.25


class TimedSimulators(ScriptedSimulators):
    """Whoever waits for them waits a while."""

    clock: Clock

    def wait(self, slots: Collection[int]) -> dict[int, Answer]:
        self.clock.now += SIMULATOR_S
        return super().wait(slots)


class TimedPolicy(ScriptedPolicy):
    clock: Clock

    def act(
        self, observations: Sequence[Observation], noise: torch.Tensor, *, temperature: float
    ) -> ActionChunk:
        self.clock.now += POLICY_S
        return super().act(observations, noise, temperature=temperature)


class TimedChunk(RemoteChunk):
    clock: Clock

    def is_ready(self, timeout_s: float) -> bool:
        assert timeout_s == POLL_S
        self.clock.now += timeout_s
        return super().is_ready(timeout_s)


def test_seconds_are_those_of_the_policy_and_of_the_simulators(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(rollout_module, "time", clock)
    specs, times = make_specs(2), RolloutTimes()
    simulators = TimedSimulators({s.episode_id: Script(policy_steps=3) for s in specs}, 2)
    policy = TimedPolicy()
    simulators.clock = policy.clock = clock
    rollout(specs, policy, simulators, temperature=1.0, noise=NOISE, times=times)
    # two slots take turns: three policy steps and a reset each
    assert times.policy_s == 6 * POLICY_S
    assert times.wait_s == 8 * SIMULATOR_S
    assert times.total_s == clock.now - 100 == times.policy_s + times.wait_s
    assert times.policy_steps_for_ended == 0


def test_waiting_for_a_remote_policy_is_the_policys_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(rollout_module, "time", clock)

    class Remote(RemotePolicy):
        def request(
            self, observations: Sequence[Observation], noise: torch.Tensor, *, temperature: float
        ) -> RemoteChunk:
            chunk = super().request(observations, noise, temperature=temperature)
            timed = TimedChunk(chunk.chunk, chunk.collected, self.polls_until_ready)
            timed.clock = clock
            return timed

    specs, times = make_specs(2), RolloutTimes()
    simulators = ScriptedSimulators({s.episode_id: Script(policy_steps=1) for s in specs}, 2)
    simulators.are_fast = False
    policy = Remote(simulators=simulators, polls_until_ready=3)
    rollout(specs, policy, simulators, temperature=1.0, noise=NOISE, times=times)
    # each of the two requests is polled four times
    assert times.policy_s == pytest.approx(8 * POLL_S)
    assert times.total_s == pytest.approx(times.policy_s + times.wait_s)


def test_nothing_is_timed_before_it_is_played():
    assert RolloutTimes() == RolloutTimes(
        policy_s=0.0, wait_s=0.0, total_s=0.0, policy_steps_for_ended=0
    )


@pytest.mark.parametrize("num_slots", [1, 3])
def test_each_episode_is_told_as_it_ends(num_slots):
    specs, told = make_specs(4), []
    scripts = [Script(policy_steps=2, outcome=Outcome.SUCCESS), Script(), Script(crash_at=-1)]
    by_id = {s.episode_id: script for s, script in zip(specs, [*scripts, Script()], strict=True)}
    rollout(
        specs,
        ScriptedPolicy(),
        ScriptedSimulators(by_id, num_slots),
        temperature=1.0,
        noise=NOISE,
        ended=told.append,
    )
    assert sorted(table.episodes.episode_id.tolist() for table in told) == [[10], [11], [12], [13]]
    for table in told:
        episode = int(table.episodes.episode_id)
        outcome = Outcome.CRASH if episode == 12 else by_id[episode].outcome
        assert table.episodes.outcome.tolist() == [outcome]
        assert len(table.policy_steps) == (0 if episode == 12 else by_id[episode].policy_steps)
        assert table.videos == ()


def test_what_never_was_is_empty_in_every_dimension_but_the_fixed_ones():
    specs = make_specs(1)
    simulators = FilmedSimulators({10: Script(crash_at=-1)}, 1)
    played = rollout(
        specs, ScriptedPolicy(), simulators, temperature=1.0, noise=NOISE, max_video_frames=None
    )
    assert played.goals[0].shape == (0, 0, 3)
    assert played.videos[0].shape == (0, 0, 0, 3)
    steps = played.policy_steps
    assert steps.image.shape == (0, 1, 2, 2, 3)
    assert steps.proprio.shape == (0, 0)
    assert steps.log_probs.shape == steps.action_tokens.shape == (0, SHAPE.num_tokens)
    assert steps.executed.shape == steps.episode.shape == (0,)


def test_a_video_that_is_short_enough_is_kept_as_it_is():
    video = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    for most in (None, 5, 6):
        assert thin_video(video, most) is video
    assert thin_video(video, 4)[:, 0, 0, 0].tolist() in ([0, 1, 3, 4], [0, 1, 2, 4], [0, 2, 3, 4])
    assert len(thin_video(video, 1)) == 1


def test_an_odd_number_of_slots_gives_the_first_group_one_more():
    _, _, policy = play_scripts([Script()] * 5, num_slots=5)
    assert [len(batch) for batch in policy.batches] == [3, 2]
