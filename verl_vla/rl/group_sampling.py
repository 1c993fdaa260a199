"""Sampling of starts, and dynamic sampling: repeat rollouts until enough groups have a signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from verl_vla.config.grpo import SamplingConfig
from verl_vla.core.episode import EpisodeSpec, Start
from verl_vla.core.errors import SolvedError, StarvedError


class StartSampler:
    """Sampler that visits all starts in a new random order each epoch.

    The n-th group of a run is a pure function of the seed and n, so the only state is the number of
    groups sampled.
    """

    def __init__(self, starts: Sequence[Start], *, seed: int, group_size: int) -> None:
        self._starts = tuple(starts)
        self._seed = seed
        self._group_size = group_size
        self.num_groups_sampled = 0
        """Number of groups sampled since the run began; checkpointed with the run."""

    def next_groups(self, num_groups: int) -> list[list[EpisodeSpec]]:
        """Return the episodes of the next ``num_groups`` groups."""
        first = self.num_groups_sampled
        self.num_groups_sampled += num_groups
        return [self._group(first + i) for i in range(num_groups)]

    def _group(self, group_id: int) -> list[EpisodeSpec]:
        epoch, index = divmod(group_id, len(self._starts))
        # seeded by epoch: any epoch's order is known without replaying those before it
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._starts))
        start = self._starts[order[index]]
        return [
            EpisodeSpec(
                task_id=start.task_id,
                init_state_id=start.init_state_id,
                group_id=group_id,
                # unique over the run, since the noise of an episode is a function of this number
                episode_id=group_id * self._group_size + member,
            )
            for member in range(self._group_size)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupResult:
    """Outcomes of a group whose episodes have all ended."""

    group_id: int
    task_id: int
    num_solved: int
    num_failed: int
    num_crashed: int
    score_spread: float
    """Largest score of the surviving episodes, less the smallest."""

    @property
    def is_comparable(self) -> bool:
        """True if at least two episodes survived."""
        return self.num_solved + self.num_failed >= 2


@dataclass(slots=True, kw_only=True)
class GroupFilter:
    """Group filter of one training step: groups completed, groups kept, groups still missing."""

    config: SamplingConfig
    played: list[GroupResult] = field(default_factory=list[GroupResult])
    kept: list[int] = field(default_factory=list[int])
    num_rounds: int = 0

    def add_round(self, groups: Sequence[GroupResult]) -> list[int]:
        """Add one rollout round and return the ids of the groups to drop."""
        self.num_rounds += 1
        self.played.extend(groups)
        keep = [g.group_id for g in groups if self._is_wanted(g)]
        self.kept.extend(keep)
        return [g.group_id for g in groups if g.group_id not in set(keep)]

    @property
    def num_to_refill(self) -> int:
        """Number of groups for the next rollout round: exactly the missing ones, 0 when done."""
        # a step that found too few groups trains on those that it has
        if self.num_rounds >= self.config.max_rounds:
            return 0
        return max(0, self.config.groups_per_step - len(self.kept))

    def check_not_starved(self) -> None:
        """Check that at least one group was kept.

        Raises:
            StarvedError: no group was kept; the message says how the episodes ended and what to
                change. A `SolvedError` if no episode failed.
        """
        if self.kept:
            return
        solved = sum(g.num_solved for g in self.played)
        failed = sum(g.num_failed for g in self.played)
        crashed = sum(g.num_crashed for g in self.played)
        is_comparable = any(g.is_comparable for g in self.played)
        if not is_comparable:
            # a lost simulator says nothing of the task, so the tasks are not to blame
            remedy = (
                "simulators were lost until no group had two episodes left; "
                "see the reason of each crash above and repair that first"
            )
        else:
            remedy = (
                f"{self._why_groups_agree(solved, failed)}, "
                f"or raise sampling.max_rounds (= {self.config.max_rounds})"
            )
        # nothing failed: the trainer ends such a run as finished, see `VLATrainer.train`
        kind = SolvedError if is_comparable and not failed else StarvedError
        raise kind(
            f"no group taught anything: {len(self.played)} groups "
            f"({solved + failed + crashed} episodes) were played in {self.num_rounds} rounds, "
            f"{solved} episodes solved, {failed} failed, {crashed} crashed; {remedy}"
        )

    @staticmethod
    def _why_groups_agree(solved: int, failed: int) -> str:
        if solved == 0:
            return (
                "the tasks are too hard for this policy: start from easier tasks, "
                "or from a base that was fine-tuned on demonstrations"
            )
        if failed == 0:
            return "the tasks are solved: choose harder ones"
        return "groups agree inside: raise sampling.group_size or sampling.temperature"

    def _is_wanted(self, group: GroupResult) -> bool:
        if not group.is_comparable:
            return False
        if not self.config.dynamic:
            return True
        # on scores, a group of failures counts as well where the reward tells them apart
        if self.config.filter_on == "reward":
            return group.score_spread > 0
        return group.num_solved > 0 and group.num_failed > 0
