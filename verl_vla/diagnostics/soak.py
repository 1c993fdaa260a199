"""Soak test: growth of memory and open files over many episodes, with crashing simulators."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.policies.base import Policy
from verl_vla.rl.group_sampling import StartSampler
from verl_vla.rl.rollout import NoiseSource, rollout

SOAK_STREAM = 2
"""Stream of the noise source; training and evaluation use 0 and 1."""
KIB_PER_MIB = 1024
WARM_UP = 1 / 4
"""Share of the samples ignored at the start, while simulators are built and starts are cached."""
MIN_SAMPLES = 8
"""Least number of samples; each half after the warm-up then has three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Resources in use between two blocks of episodes."""

    episodes: int
    """Episodes completed so far."""
    crashes: int
    """Crashed episodes among them."""
    trainer_mib: float
    """Private memory of the rollout process."""
    simulator_mib: float
    """Private memory of the largest simulator process."""
    shared_mib: float
    """Shared memory that the rollout process has mapped and used."""
    trainer_handles: int
    """Open files of the rollout process."""
    simulator_handles: int
    """Largest number of open files of a simulator process."""


BOUNDS: dict[str, float] = {
    "trainer_mib": 32,
    "simulator_mib": 64,
    "shared_mib": 1,
    "trainer_handles": 0,
    "simulator_handles": 0,
}
"""Largest growth of each that is accepted. Memory needs a margin for the allocator; in 1,000
episodes a leak of 64 KiB per episode is found, which is a third of one image."""


def soak(
    pool: EnvPool, policy: Policy, starts: StartSampler, *, block: int, temperature: float
) -> Iterator[Sample]:
    """Roll out blocks of ``block`` groups without end; yield a sample after each."""
    noise = NoiseSource(seed=0, stream=SOAK_STREAM)
    episodes = crashes = 0
    while True:
        specs = [spec for group in starts.next_groups(block) for spec in group]
        played = rollout(specs, policy, pool, temperature=temperature, noise=noise)
        episodes += len(played.episodes)
        crashes += int((played.episodes.outcome == int(Outcome.CRASH)).sum())
        # the images of a block would count as memory in use
        del played
        gc.collect()
        yield measure(pool.worker_pids, episodes=episodes, crashes=crashes)


def measure(simulators: Sequence[int], *, episodes: int, crashes: int) -> Sample:
    """Read the resources of this process and of the largest of the ``simulators``.

    A simulator that just died is left out; the values are 0 if none is alive.
    """
    own = os.getpid()
    # a simulator that just died has no entry any more
    alive = [pid for pid in simulators if Path(f"/proc/{pid}/fd").exists()]
    return Sample(
        episodes=episodes,
        crashes=crashes,
        # not VmRSS, which counts files and shared memory too
        trainer_mib=_status_mib(own, "RssAnon"),
        simulator_mib=max((_status_mib(pid, "RssAnon") for pid in alive), default=0.0),
        shared_mib=_status_mib(own, "RssShmem"),
        trainer_handles=len(os.listdir(f"/proc/{own}/fd")),
        simulator_handles=max((len(os.listdir(f"/proc/{pid}/fd")) for pid in alive), default=0),
    )


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the increase of the largest value from the first half to the second, after warm-up.

    Raises:
        ConfigError: too few samples.
    """
    if len(samples) < MIN_SAMPLES:
        raise ConfigError(f"{len(samples)} samples were taken; play at least {MIN_SAMPLES} blocks")
    settled = [asdict(sample) for sample in samples[round(len(samples) * WARM_UP) :]]
    middle = len(settled) // 2
    # largest values, not means: memory that is given back in between is no leak
    return {
        name: max(s[name] for s in settled[middle:]) - max(s[name] for s in settled[:middle])
        for name in BOUNDS
    }


def excesses(grown: dict[str, float]) -> list[str]:
    """List the values that grew by more than their bound, as sentences."""
    return [
        f"{name} grew by {grown[name]:.1f}, and the bound is {bound:g}"
        for name, bound in BOUNDS.items()
        if grown[name] > bound
    ]


def _status_mib(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) / KIB_PER_MIB
