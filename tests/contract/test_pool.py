"""A pool of real processes gives what one environment gives, and survives what kills them.

The environments that go wrong live in `faulty_envs`, beside this file.
"""

import gc
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from verl_vla.core.episode import EpisodeSpec, Observation, Outcome
from verl_vla.core.errors import ConfigError, ContractError, EpisodeCrashed
from verl_vla.envs.base import ChunkResult, EnvConfig, EnvFactory
from verl_vla.envs.fake import FakeEnv, FakeEnvConfig
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.envs.pool.env_pool import EnvPool

FAKE = partial(FakeEnv, FakeEnvConfig(image_size=16))
TIMEOUT_S = 10.0
NOT_MOVING = np.zeros((8, 7), dtype=np.float32)


def make_pool(factory: EnvFactory = FAKE, **options) -> EnvPool:
    defaults = {
        "num_workers": 1,
        "num_slots": 4,
        "image_shape": (1, 16, 16, 3),
        "timeout_s": 60.0,
        "worker_env": {},
    }
    return EnvPool(factory, **(defaults | options))


def spec(task_id: int, init_state_id: int = 0) -> EpisodeSpec:
    return EpisodeSpec(task_id=task_id, init_state_id=init_state_id, group_id=0, episode_id=0)


def start(pool: EnvPool, tasks: dict[int, int]) -> dict:
    pool.reset({slot: spec(task_id, slot) for slot, task_id in tasks.items()})
    return pool.wait(list(tasks))


def is_alive(pid: int) -> bool:
    """Whether a process is there, be it as a zombie."""
    return Path(f"/proc/{pid}").exists()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def eventually(claim: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not claim():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def device_of(pid: int) -> str:
    """The EGL device that a running worker was started with."""
    lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (value,) = (line for line in lines if line.startswith(b"MUJOCO_EGL_DEVICE_ID="))
    return value.decode().partition("=")[2]


def test_workers_render_on_the_devices_in_turn_and_a_replacement_on_its_predecessors():
    # no start is remembered, so that the second ones need processes too
    with make_pool(num_workers=3, render_devices=(4, 2), max_cached_starts=0) as pool:
        start(pool, {slot: slot for slot in range(4)})
        assert sorted(map(device_of, pool.worker_pids)) == ["2", "4", "4"]
        lost = next(pid for pid in pool.worker_pids if device_of(pid) == "2")
        os.kill(lost, signal.SIGKILL)
        assert eventually(lambda: lost not in pool.worker_pids)
        start(pool, {slot: slot for slot in range(4)})
        assert sorted(map(device_of, pool.worker_pids)) == ["2", "4", "4"]


def test_a_device_in_the_environment_of_the_workers_stays():
    chosen = {"MUJOCO_EGL_DEVICE_ID": "7"}
    with make_pool(worker_env=chosen, render_devices=(4, 2)) as pool:
        start(pool, {0: 0})
        assert [device_of(pid) for pid in pool.worker_pids] == ["7"]


@pytest.fixture(scope="module")
def faulty() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))  # workers import from here as well
        yield importlib.import_module("faulty_envs")


@pytest.fixture(scope="module")
def shared_pool(faulty: ModuleType) -> Iterator[EnvPool]:
    """A pool that many tests use; each starts its own episodes and takes all its answers."""
    with make_pool(faulty.FaultyEnv, num_workers=2, num_slots=8, timeout_s=TIMEOUT_S) as pool:
        yield pool


@dataclass(frozen=True)
class Case:
    """An environment to compare with itself, alone and in a pool."""

    factory: EnvFactory
    image_shape: tuple[int, int, int, int]
    specs: list[EpisodeSpec]
    scale: float

    def chunk(self, episode: EpisodeSpec, policy_step: int) -> np.ndarray:
        rng = np.random.default_rng([episode.episode_id, policy_step])
        return rng.uniform(-self.scale, self.scale, (8, 7)).astype(np.float32)


def case_fake() -> Case:
    specs = [
        EpisodeSpec(task_id=i % 4, init_state_id=i // 8, group_id=i // 4, episode_id=i)
        for i in range(16)
    ]
    config = FakeEnvConfig(image_size=32, num_views=2, render_final=True, video_every=3)
    return Case(partial(FakeEnv, config), (2, 32, 32, 3), specs, scale=1.0)


def case_mini() -> Case:
    config = EnvConfig(
        suite="mini", step_limit=20, render_size=128, image_size=112, render_final=True
    )
    specs = [
        EpisodeSpec(task_id=i % 2, init_state_id=i // 4, group_id=i // 2, episode_id=i)
        for i in range(6)
    ]
    return Case(partial(make_libero_env, config), (1, 112, 112, 3), specs, scale=0.5)


CASES = {"fake": case_fake, "mini": case_mini}


@pytest.fixture(params=["fake", pytest.param("mini", marks=pytest.mark.sim)])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def play_alone(case: Case) -> dict[int, list]:
    """Each episode in an environment by itself: what the pool must give."""
    env = case.factory()
    played = {}
    for episode in case.specs:
        answers: list = [env.reset(episode.task_id, episode.init_state_id)]
        while not (isinstance(answers[-1], ChunkResult) and answers[-1].outcome is not None):
            answers.append(env.step_chunk(case.chunk(episode, len(answers))))
        played[episode.episode_id] = answers
    env.close()
    return played


def play_in_pool(pool: EnvPool, case: Case) -> dict[int, list]:
    """All episodes, slots taking turns in two halves, as a rollout does."""
    queue = list(case.specs)
    played: dict[int, list] = {episode.episode_id: [] for episode in case.specs}
    halves: list[dict[int, EpisodeSpec]] = [{}, {}]

    def fill(half: int) -> None:
        new = {
            s: queue.pop(0)
            for s in range(half, pool.num_slots, 2)
            if s not in halves[half] and queue
        }
        halves[half] |= new
        pool.reset(new)

    fill(0), fill(1)
    while any(halves):
        for half, playing in enumerate(halves):
            chunks = {}
            for slot, answer in pool.wait(list(playing)).items():
                answers = played[playing[slot].episode_id]
                answers.append(answer)
                if isinstance(answer, ChunkResult) and answer.outcome is not None:
                    del playing[slot]
                else:
                    chunks[slot] = case.chunk(playing[slot], len(answers))
            pool.step(chunks)
            fill(half)
    return played


def assert_same_observation(got: Observation, expected: Observation) -> None:
    np.testing.assert_array_equal(got.image, expected.image)
    np.testing.assert_array_equal(got.proprio, expected.proprio)
    assert got.instruction == expected.instruction


def assert_same_answers(got: dict[int, list], expected: dict[int, list]) -> None:
    assert got.keys() == expected.keys()
    for episode_id, answers in expected.items():
        assert len(got[episode_id]) == len(answers)
        assert_same_observation(got[episode_id][0], answers[0])
        for mine, theirs in zip(got[episode_id][1:], answers[1:], strict=True):
            np.testing.assert_array_equal(mine.video, theirs.video)
            assert (mine.executed, mine.outcome) == (theirs.executed, theirs.outcome)
            if theirs.observation is None:
                assert mine.observation is None
                np.testing.assert_array_equal(mine.final_image, theirs.final_image)
                assert theirs.final_image is not None
            else:
                assert mine.final_image is theirs.final_image is None
                assert_same_observation(mine.observation, theirs.observation)


@pytest.mark.parametrize(
    ("num_workers", "num_slots", "max_cached_starts"), [(1, 5, 512), (3, 8, 1), (2, 1, 0)]
)
def test_a_pool_gives_what_one_environment_gives(case, num_workers, num_slots, max_cached_starts):
    expected = play_alone(case)
    with EnvPool(
        case.factory,
        num_workers=num_workers,
        num_slots=num_slots,
        image_shape=case.image_shape,
        timeout_s=120.0,
        worker_env={},
        max_cached_starts=max_cached_starts,
    ) as pool:
        got = play_in_pool(pool, case)
        stats = pool.stats
    assert_same_answers(got, expected)
    policy_steps = [a for answers in expected.values() for a in answers[1:]]
    assert stats.policy_steps == len(policy_steps)
    assert stats.steps == sum(a.executed for a in policy_steps)
    assert stats.resets_simulated + stats.resets_served == len(case.specs)
    assert (stats.crashes, stats.restarts) == (0, 0)
    assert stats.busy_s > 0
    assert stats.wait_s > 0


def test_a_start_is_simulated_once_and_served_afterwards(shared_pool):
    before = shared_pool.stats
    for _ in range(2):
        shared_pool.reset({slot: spec(0, 77) for slot in range(4)})
        answers = shared_pool.wait(range(4))
        expected = FAKE().reset(0, 77)
        for answer in answers.values():
            assert_same_observation(answer, expected)
    stats = shared_pool.stats
    assert stats.resets_simulated - before.resets_simulated == 1
    assert stats.resets_served - before.resets_served == 7


def test_requests_are_served_while_the_caller_is_busy(shared_pool):
    start(shared_pool, dict.fromkeys(range(8), 0))
    before = shared_pool.stats.policy_steps
    shared_pool.step(dict.fromkeys(range(8), NOT_MOVING))
    # two processes, eight requests, and nobody waits
    assert eventually(lambda: shared_pool.stats.policy_steps == before + 8)
    assert list(shared_pool.wait([3, 1])) == [3, 1]
    assert list(shared_pool.wait([0, 2, 4, 5, 6, 7])) == [0, 2, 4, 5, 6, 7]


def test_a_process_that_hangs_is_killed_and_says_where_it_hung(shared_pool, faulty):
    start(shared_pool, {0: 0, 1: 1})
    began = time.monotonic()
    shared_pool.step({0: NOT_MOVING, 1: faulty.faulty_chunk("hang")})
    answers = shared_pool.wait([0, 1])
    assert time.monotonic() - began >= TIMEOUT_S
    assert answers[0].executed == 8
    why = f"no answer within {TIMEOUT_S:g} s, so its process was killed"
    assert_crashed(answers[1], "task 1, init state 1, step 0", why)
    assert "in _hang_for_ever" in str(answers[1])
    assert "(signal 9: Killed, by this run; its last output:" in str(answers[1])
    assert "memory" not in str(answers[1])


FAULTS = [
    ("raise", "FloatingPointError: the arm left the solar system"),
    ("exit", "its process ended (exit code 7; it wrote nothing)"),
    ("kill", "its process ended (signal 9: Killed, by the kernel if memory ran out; it wrote"),
    ("crash", "Fatal Python error: Segmentation fault"),
    ("ask", "EOFError"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_a_fault_costs_one_episode_and_says_why(shared_pool, faulty, fault, reason):
    start(shared_pool, {0: 0, 1: 1, 2: 2, 3: 0})
    before = shared_pool.stats
    shared_pool.step({0: NOT_MOVING, 1: NOT_MOVING, 2: faulty.faulty_chunk(fault), 3: NOT_MOVING})
    answers = shared_pool.wait(range(4))
    assert_crashed(answers[2], "task 2, init state 2, step 0", reason)
    for slot in (0, 1, 3):
        assert (answers[slot].executed, answers[slot].outcome) == (8, None)
    assert shared_pool.stats.crashes == before.crashes + 1
    with pytest.raises(ContractError, match="plays no episode"):
        shared_pool.step({2: NOT_MOVING})
    assert_same_observation(start(shared_pool, {2: 0})[2], FAKE().reset(0, 2))


@pytest.mark.parametrize(("fault", "reason"), FAULTS[:2])
def test_a_fault_at_a_reset_costs_one_episode_too(shared_pool, faulty, fault, reason):
    shared_pool.reset({0: spec(faulty.FAULTY_TASK, faulty.faulty_start(fault)), 1: spec(0)})
    answers = shared_pool.wait([0, 1])
    assert_crashed(answers[0], "task 3, init state", reason)
    assert_same_observation(answers[1], FAKE().reset(0, 0))


def assert_crashed(answer: object, where: str, reason: str) -> None:
    assert isinstance(answer, EpisodeCrashed)
    assert where in str(answer)
    assert reason in str(answer)


def test_output_is_told_in_part_and_kept_in_bounds(shared_pool, faulty):
    start(shared_pool, {0: 0, 1: 1})
    for _ in range(2):
        shared_pool.step({0: faulty.faulty_chunk("chatter"), 1: faulty.faulty_chunk("chatter")})
        assert all(answer.executed == 8 for answer in shared_pool.wait([0, 1]).values())
        for pid in shared_pool.worker_pids:
            assert os.stat(f"/proc/{pid}/fd/1").st_size < 5e6
    shared_pool.step({1: faulty.faulty_chunk("exit")})
    crash = str(shared_pool.wait([1])[1])
    assert "this is the last line" in crash
    assert len(crash) < 5000


def test_a_lost_process_is_replaced_when_it_is_needed(faulty):
    with make_pool(faulty.FaultyEnv) as pool:
        start(pool, {0: 0, 1: 1})
        pool.step({0: faulty.faulty_chunk("kill")})
        assert isinstance(pool.wait([0])[0], EpisodeCrashed)
        assert pool.worker_pids == ()
        pool.step({1: NOT_MOVING})
        assert pool.wait([1])[1].executed == 8
        assert (pool.stats.crashes, pool.stats.restarts) == (1, 1)
        (pid,) = pool.worker_pids
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not is_alive(pid))
        pool.step({1: NOT_MOVING})
        assert pool.wait([1])[1].executed == 8
        # the death of an idle process costs no episode
        assert (pool.stats.crashes, pool.stats.restarts) == (1, 2)


def test_a_start_that_fails_once_costs_only_who_asked_first(faulty, tmp_path):
    with make_pool(partial(faulty.FailsOnce, tmp_path / "mark")) as pool:
        pool.reset({slot: spec(0, 7) for slot in range(4)})
        answers = pool.wait(range(4))
        stats = pool.stats
    assert [isinstance(a, EpisodeCrashed) for a in answers.values()] == [True, False, False, False]
    assert (stats.resets_simulated, stats.resets_served, stats.crashes) == (1, 2, 1)


@pytest.mark.parametrize(
    ("factory", "reason", "start_timeout_s"),
    [
        ("raise_at_start", "OSError: libEGL.so.1 is missing", 300.0),
        ("FailsEverywhere", "OSError: libEGL.so.1 is missing", 300.0),
        ("FaultyEnv", "no answer within 0.05 s", 0.05),
    ],
)
def test_a_pool_gives_up_when_no_process_is_of_any_use(faulty, factory, reason, start_timeout_s):
    make = getattr(faulty, factory)
    with make_pool(make, num_workers=3, start_timeout_s=start_timeout_s) as pool:
        pool.reset({slot: spec(0, slot) for slot in range(4)})
        with pytest.raises(RuntimeError, match="3 simulator processes in a row") as caught:
            pool.wait(range(4))
        assert reason in str(caught.value)
        with pytest.raises(RuntimeError, match="in a row"):
            pool.step({0: NOT_MOVING})


def test_an_impossible_environment_is_the_authors_mistake(faulty):
    with make_pool(faulty.refuse) as pool:
        pool.reset({0: spec(0)})
        with pytest.raises(ConfigError, match="did you mean 'libero_spatial'"):
            pool.wait([0])


def test_a_mistake_in_one_slot_is_raised_and_leaves_the_others(shared_pool):
    before = shared_pool.stats
    shared_pool.reset({0: spec(0), 1: spec(9)})
    with pytest.raises(ConfigError, match=r"task 9, .*the fake suite has 0\.\.3"):
        shared_pool.wait([0, 1])
    assert isinstance(shared_pool.wait([0])[0], Observation)
    shared_pool.step({0: np.zeros((8, 6), dtype=np.float32)})
    with pytest.raises(ContractError, match=r"got \[8, 6\]"):
        shared_pool.wait([0])
    shared_pool.reset({0: spec(1), 1: spec(2)})
    assert all(isinstance(a, Observation) for a in shared_pool.wait([0, 1]).values())
    assert shared_pool.stats.crashes == before.crashes


def test_an_exception_such_as_an_image_of_another_size_ends_the_processes():
    wrong = pytest.raises(ContractError, match=r"\[1, 16, 16, 3\], but .* \[1, 24, 24, 3\]")
    with wrong, make_pool(image_shape=(1, 24, 24, 3)) as pool:
        assert eventually(lambda: len(pool.worker_pids) == 1)
        pids = pool.worker_pids
        start(pool, {0: 0})
    assert not any(is_alive(pid) for pid in pids)


def test_a_pool_is_asked_in_order(shared_pool):
    pool = shared_pool
    with pytest.raises(ContractError, match="asked nothing"):
        pool.wait([7])
    with pytest.raises(ContractError, match="does not exist"):
        pool.reset({8: spec(0)})
    start(pool, {0: 0})
    for wrong in (NOT_MOVING.astype(np.float64), NOT_MOVING[0]):
        with pytest.raises(ContractError, match="must be float32"):
            pool.step({0: wrong})
    pool.step({0: NOT_MOVING})
    with pytest.raises(ContractError, match="still owes an answer"):
        pool.step({0: NOT_MOVING})
    with pytest.raises(ContractError, match="still owes an answer"):
        pool.reset({0: spec(0)})
    assert pool.wait([0, 0])[0].executed == 8
    assert pool.wait([]) == {}


def test_a_request_that_is_refused_asks_nothing(shared_pool):
    start(shared_pool, {0: 0, 1: 0})
    shared_pool.step({1: np.ones((8, 7), dtype=np.float32)})
    assert shared_pool.wait([1])[1].outcome is Outcome.SUCCESS
    with pytest.raises(ContractError, match="slot 1 plays no episode"):
        shared_pool.step({0: NOT_MOVING, 1: NOT_MOVING})
    shared_pool.step({0: NOT_MOVING})
    assert shared_pool.wait([0])[0].executed == 8


@pytest.mark.parametrize(
    "options", [{"num_workers": 0}, {"num_slots": 0}, {"timeout_s": 0}, {"max_cached_starts": -1}]
)
def test_impossible_numbers_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        make_pool(**options)


def test_a_factory_that_cannot_travel_is_refused():
    with pytest.raises(ContractError, match="cannot be sent to another process"):
        make_pool(lambda: FAKE())


def test_processes_know_their_environment_and_are_never_more_than_slots(faulty):
    env = {"MADE_FOR": "test", "MUJOCO_GL": "osmesa", "LP_NUM_THREADS": "2"}
    with make_pool(faulty.Telling, num_workers=3, num_slots=1, worker_env=env) as pool:
        told = start(pool, {0: 0})[0].instruction
        assert told.endswith("OMP_NUM_THREADS=1 LP_NUM_THREADS=2 MUJOCO_GL=osmesa MADE_FOR=test")
        assert len(pool.worker_pids) == 1


def test_a_task_stays_with_the_process_that_served_it_last(faulty):
    env = {"MADE_FOR": "test", "MUJOCO_GL": "egl"}
    with make_pool(faulty.Telling, num_workers=2, worker_env=env) as pool:

        def step(*slots: int) -> list[str]:
            pool.step({slot: NOT_MOVING for slot in slots})
            answers = pool.wait(slots)
            start(pool, {slot: slot for slot in slots})
            return [answers[slot].observation.instruction for slot in slots]

        start(pool, {slot: slot for slot in range(4)})
        assert eventually(lambda: len(set(step(2, 3))) == 2)  # both processes are up
        home = step(0, 1)
        assert len(set(home)) == 2
        assert step(1, 0) == home[::-1]
        assert step(1) + step(0) + step(0) + step(1) == [home[1], home[0], home[0], home[1]]


@contextmanager
def closing_in(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def test_nobody_waits_for_a_process_that_hangs_and_closing_ends_it(faulty):
    pool = make_pool(faulty.FaultyEnv, num_workers=2)
    start(pool, {0: 0, 1: 1})
    pool.step({1: faulty.faulty_chunk("hang")})
    pool.step({0: NOT_MOVING})
    assert pool.wait([0])[0].executed == 8
    assert pool.stats.crashes == 0  # the other slot still owes its answer
    assert eventually(lambda: len(pool.worker_pids) == 2)
    pids = pool.worker_pids
    with closing_in(10.0):
        pool.close()
    assert not any(is_alive(pid) for pid in pids)
    pool.close()
    for ask in (lambda: pool.reset({2: spec(0)}), lambda: pool.wait([1])):
        with pytest.raises(ContractError, match="closed"):
            ask()


def test_closing_right_away_leaves_no_process():
    with make_pool(num_workers=2) as pool, closing_in(10.0):
        assert eventually(lambda: len(pool.worker_pids) == 2)
        pids = pool.worker_pids
        pool.close()
    assert not any(is_alive(pid) for pid in pids)


def test_nothing_stays_open_or_mapped(faulty):
    def held() -> int:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("verl_vla_frames")
        return len(os.listdir("/proc/self/fd")) + maps

    before = held()
    with make_pool(faulty.FaultyEnv) as pool:
        start(pool, {0: 0})
        pool.step({0: faulty.faulty_chunk("exit")})
        assert isinstance(pool.wait([0])[0], EpisodeCrashed)
        start(pool, {1: 1})
        assert held() > before
    del pool
    assert held() == before


ABANDON = """
    import os, signal, sys
    sys.path.insert(0, {folder!r})
    from faulty_envs import FaultyEnv, faulty_chunk
    from verl_vla.core.episode import EpisodeSpec
    from verl_vla.envs.pool.env_pool import EnvPool

    pool = EnvPool(FaultyEnv, num_workers=2, num_slots=2,
                   image_shape=(1, 16, 16, 3), timeout_s=60.0, worker_env={{}})
    spec = EpisodeSpec(task_id=0, init_state_id=0, group_id=0, episode_id=0)
    pool.reset({{0: spec, 1: spec}})
    pool.wait([0, 1])
    pool.step({{1: faulty_chunk("hang")}})
    print(*pool.worker_pids, flush=True)
    {ending}
"""


@pytest.mark.parametrize("ending", ["raise KeyError(1)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_process_outlives_its_pool(ending):
    folder = str(Path(__file__).parent)
    script = textwrap.dedent(ABANDON).format(folder=folder, ending=ending)
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids
    assert eventually(lambda: not any(is_running(pid) for pid in pids))
