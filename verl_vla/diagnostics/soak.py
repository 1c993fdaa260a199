"""Does anything grow while episodes are played and simulators die? Measured over many episodes."""

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
"""Stream of the noise source; training and evaluation have 0 and 1."""
KIB_PER_MIB = 1024
WARM_UP = 1 / 4
"""Share of the samples before the first that counts: simulators are built and starts remembered."""
MIN_SAMPLES = 8
"""So that a half of what counts has three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What is in use between two blocks of episodes."""

    episodes: int
    """Played until now."""
    crashes: int
    """Of them."""
    trainer_mib: float
    """Private memory of the process that plays."""
    simulator_mib: float
    """Private memory of the largest simulator process."""
    shared_mib: float
    """Shared memory that the process that plays has mapped and used."""
    trainer_handles: int
    """Open files of the process that plays."""
    simulator_handles: int
    """Most open files of a simulator process."""


BOUNDS: dict[str, float] = {
    "trainer_mib": 32,
    "simulator_mib": 64,
    "shared_mib": 1,
    "trainer_handles": 0,
    "simulator_handles": 0,
}
"""By how much each may grow. Memory needs room for what the allocator keeps; in 1,000 episodes a
leak of 64 KiB an episode shows, which is a third of one image."""


def soak(
    pool: EnvPool, policy: Policy, starts: StartSampler, *, block: int, temperature: float
) -> Iterator[Sample]:
    """Play blocks of ``block`` groups for ever; yield what is in use after each."""
    noise = NoiseSource(seed=0, stream=SOAK_STREAM)
    episodes = crashes = 0
    while True:
        specs = [spec for group in starts.next_groups(block) for spec in group]
        played = rollout(specs, policy, pool, temperature=temperature, noise=noise)
        episodes += len(played.episodes)
        crashes += int((played.episodes.outcome == int(Outcome.CRASH)).sum())
        del played
        gc.collect()
        yield measure(pool.worker_pids, episodes=episodes, crashes=crashes)


def measure(simulators: Sequence[int], *, episodes: int, crashes: int) -> Sample:
    """Read what this process and the largest of the ``simulators`` have in use.

    One that just died is left out; where none lives, none has anything in use.
    """
    own = os.getpid()
    alive = [pid for pid in simulators if Path(f"/proc/{pid}/fd").exists()]
    return Sample(
        episodes=episodes,
        crashes=crashes,
        trainer_mib=_status_mib(own, "RssAnon"),
        simulator_mib=max((_status_mib(pid, "RssAnon") for pid in alive), default=0.0),
        shared_mib=_status_mib(own, "RssShmem"),
        trainer_handles=len(os.listdir(f"/proc/{own}/fd")),
        simulator_handles=max((len(os.listdir(f"/proc/{pid}/fd")) for pid in alive), default=0),
    )


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """By how much the largest value of the second half exceeds that of the first, warm-up aside.

    Raises:
        ConfigError: too few samples.
    """
    if len(samples) < MIN_SAMPLES:
        raise ConfigError(f"{len(samples)} samples were taken; play at least {MIN_SAMPLES} blocks")
    settled = [asdict(sample) for sample in samples[round(len(samples) * WARM_UP) :]]
    middle = len(settled) // 2
    return {
        name: max(s[name] for s in settled[middle:]) - max(s[name] for s in settled[:middle])
        for name in BOUNDS
    }


def excesses(grown: dict[str, float]) -> list[str]:
    """What grew beyond its bound, in words."""
    return [
        f"{name} grew by {grown[name]:.1f}, and the bound is {bound:g}"
        for name, bound in BOUNDS.items()
        if grown[name] > bound
    ]


def _status_mib(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) / KIB_PER_MIB
