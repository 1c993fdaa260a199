"""Base class of rewards that compare failures with successes of the same task.

A success scores 1, independently of its features. A failure scores ``alpha`` times its quality, an
absolute number in [0, 1]: nothing is normalised over the batch, so the score of one episode does
not depend on how badly another one failed. Each row of the table of cases in
tests/unit/rewards/test_reward_cases.py is decided here, and is the same for every such reward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.rewards.base import FeatureExtractor, Need, RewardResult, Rows, TrajectoryBatch
from verl_vla.rewards.features import Floats, idle_share, is_valid
from verl_vla.rewards.reference_memory import Reference, ReferenceMemory, References, without

SUCCESS, SHAPED, GATED = "success", "shaped", "gated"
NO_REFERENCE, INVALID = "no_reference", "invalid_features"

MAX_LEFT_OUT = 8
"""Number of successes that are measured against the others to estimate the noise; more would cost
time without a better estimate."""
LONE_NOISE = 0.1
"""Share of the mean measure that counts as noise with less than two references to measure, which
have no spread: more than several references usually show."""
RATE_KEPT = 0.8
"""Weight of the old success rate in an update: a mean over about 5 steps."""
TIE = 1e-4
"""Difference below which scores of a group count as the same: GRPO divides by their spread, which
would turn a rounding error into a full-size advantage."""


@dataclass(slots=True)
class _Judgement:
    """Scores of a batch while they are computed, by row."""

    score: npt.NDArray[np.float64]
    progress: npt.NDArray[np.float64]
    status: list[str]
    num_references: npt.NDArray[np.int64]
    source: list[str]
    noise: list[float] = field(default_factory=list[float])


class ReferenceReward(ABC):
    """A reward that measures failures against references; subclasses add `measure`, `quality`."""

    requires: frozenset[Need] = frozenset({"features"})

    def __init__(
        self,
        encoder: FeatureExtractor,
        *,
        alpha: float,
        anneal: bool,
        memory_capacity: int,
        memory_max_age: int,
        max_invalid_share: float,
        noise_gate: bool,
    ) -> None:
        """Make a reward without references.

        Args:
            encoder: computes the features.
            alpha: score of the best possible failure, in (0, 1).
            anneal: let alpha fall as the success rate of the task rises, to 0 where all is solved:
                shaping that helps a policy to begin can then not be exploited at the end.
            memory_capacity: successes kept of each task.
            memory_max_age: updates after which they are removed.
            max_invalid_share: share of a batch whose features may be unusable; above it, and with
                more than one such episode, the run stops instead of training on guesses.
            noise_gate: give the failures of a group the same score, ``alpha / 2``, where their
                measures differ by less than those of successes do. No publication does this.

        Raises:
            ConfigError: a number outside its range.
        """
        if not 0 < alpha < 1:
            raise ConfigError(
                f"alpha is {alpha}; a failure must be worth more than nothing and less than a "
                "success, so set a number between 0 and 1"
            )
        if not 0 <= max_invalid_share <= 1:
            raise ConfigError(f"max_invalid_share is {max_invalid_share}; it is a share, 0 to 1")
        self.encoder = encoder
        self._alpha = alpha
        self._anneal = anneal
        self._rates: dict[str, float] = {}
        self._max_invalid_share = max_invalid_share
        self._noise_gate = noise_gate
        self._memory = ReferenceMemory(memory_capacity, memory_max_age)

    @abstractmethod
    def measure(
        self, task_key: str, episodes: Sequence[Rows], references: Sequence[Reference]
    ) -> Floats:
        """Measure the progress of episodes, each independently of the others.

        Args:
            task_key: task of the episodes and of the references.
            episodes: n arrays [T, D].
            references: successes, at least one, none of them among ``episodes``.

        Returns:
            [n], larger for more progress, in any unit.
        """

    @abstractmethod
    def quality(self, task_key: str, measures: Floats) -> Floats:
        """Map measures [n] of failures to [0, 1], monotonically."""

    def unseen(self, items: Sequence[Reference]) -> list[int]:
        """Return the indices of the references that `measure` has learned nothing from."""
        return list(range(len(items)))

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score each episode without a change of state."""
        features = _features(batch)
        self._memory.check_space(batch)
        valid = np.array([is_valid(rows) for rows in features], dtype=np.bool_)
        self._check_share(batch, valid)
        found = _Judgement(
            score=batch.success.astype(np.float64),
            progress=np.where(batch.success, 1.0, np.nan),
            # until it has been measured, a failure counts as unusable
            status=[SUCCESS if solved else INVALID for solved in batch.success],
            num_references=np.zeros(len(batch), dtype=np.int64),
            source=["none"] * len(batch),
        )
        # failures of one start have the same references
        for task_key, init_state_id in sorted(
            # sorted: a set of strings has another order in every process
            set(zip(batch.task_key, batch.init_state_id.tolist(), strict=True))
        ):
            at_start = [
                row
                for row in np.flatnonzero(~batch.success & valid).tolist()
                if batch.task_key[row] == task_key and batch.init_state_id[row] == init_state_id
            ]
            if at_start:
                references = self._memory.select(batch, task_key, init_state_id)
                self._judge_start(batch, task_key, at_start, references, found)
        # last: it takes the scores of the other failures of the group
        _neutralise(batch, found)
        return RewardResult(
            score=found.score.astype(np.float32),
            progress=found.progress.astype(np.float32),
            status=tuple(found.status),
            num_references=found.num_references,
            reference_source=tuple(found.source),
            metrics=self._metrics(batch, found, valid),
        )

    def update(self, batch: TrajectoryBatch) -> Mapping[str, float]:
        """Add the successes of a scored training batch, and update the success rates."""
        self._memory.add(batch)
        tasks = np.array(batch.task_key)
        for key in sorted(set(batch.task_key)):
            rate = float(batch.success[tasks == key].mean())
            # the first rate is taken as it is, not mixed with a made-up one
            before = self._rates[key] if key in self._rates else rate
            self._rates[key] = RATE_KEPT * before + (1 - RATE_KEPT) * rate
        return {"memory_references": float(len(self._memory))}

    def state_dict(self) -> dict[str, Any]:
        """Return the references and the success rates."""
        return {"memory": self._memory.state_dict(), "rates": dict(self._rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._memory.load_state_dict(state["memory"])
        self._rates = dict(state["rates"])

    def _judge_start(
        self,
        batch: TrajectoryBatch,
        task_key: str,
        rows: list[int],
        references: References,
        found: _Judgement,
    ) -> None:
        """Score the failures with valid features of one init state."""
        items = references.items
        for row in rows:
            found.status[row] = SHAPED if items else NO_REFERENCE
            found.num_references[row] = len(items)
            found.source[row] = references.source
        if not items:
            return
        features = _features(batch)
        measures = self.measure(task_key, [features[row] for row in rows], items)
        # finite features can still be too large to compute with
        measured = np.isfinite(measures)
        for row in np.array(rows)[~measured].tolist():
            found.status[row] = INVALID
        rows, measures = np.array(rows)[measured].tolist(), measures[measured]
        if not rows:
            return
        alpha = self._alpha_of(task_key)
        # whatever a subclass says, a failure stays between 0 and alpha
        scores = alpha * np.clip(self.quality(task_key, measures), 0.0, 1.0)
        noise = self._noise(task_key, items, measures)
        found.noise.append(noise)
        found.progress[rows], found.score[rows] = measures, scores
        if not self._noise_gate:
            return
        # by group: only there are scores compared
        for group in np.unique(batch.group_id[rows]):
            members = [i for i, row in enumerate(rows) if batch.group_id[row] == group]
            if _is_noise(measures[members], scores[members], noise):
                for i in members:
                    # the middle of what a failure can score, the same for all: no order among them
                    found.score[rows[i]] = alpha / 2
                    found.status[rows[i]] = GATED

    def _alpha_of(self, task_key: str) -> float:
        if not self._anneal or task_key not in self._rates:
            return self._alpha
        return self._alpha * (1 - self._rates[task_key])

    def _noise(self, task_key: str, items: Sequence[Reference], measures: Floats) -> float:
        """Estimate the spread of measures of equally good episodes, from that of successes.

        Each of the newest successes is measured against the others.
        """
        unseen = self.unseen(items)
        if len(unseen) < 2:
            return LONE_NOISE * float(np.abs(measures).mean())
        # the newest resemble what the policy does now
        newest = sorted(unseen, key=lambda i: items[i].episode_id)[-MAX_LEFT_OUT:]
        left_out = [
            float(self.measure(task_key, [items[i].features], without(items, i))[0]) for i in newest
        ]
        return float(np.std(left_out))

    def _check_share(self, batch: TrajectoryBatch, valid: npt.NDArray[np.bool_]) -> None:
        num_invalid = int((~valid).sum())
        if num_invalid > 1 and num_invalid > self._max_invalid_share * len(batch):
            raise ContractError(
                f"{num_invalid} of {len(batch)} episodes have no usable features, the first being "
                f"episode {batch.episode_id[~valid][0]}; look at the encoder's weights, dtype and "
                "images, or raise reward_args.max_invalid_share"
            )

    def _metrics(
        self, batch: TrajectoryBatch, found: _Judgement, valid: npt.NDArray[np.bool_]
    ) -> dict[str, float]:
        words = Counter(found.status)
        failed = [row for row in np.flatnonzero(~batch.success & valid)]
        shaped = [row for row in failed if found.status[row] == SHAPED]
        features = _features(batch)
        metrics = {f"num_{word}": float(words[word]) for word in (SHAPED, GATED, NO_REFERENCE)}
        metrics["num_invalid_features"] = float((~valid).sum())
        if failed:
            metrics["idle_share"] = float(np.mean([idle_share(features[row]) for row in failed]))
        if shaped:
            metrics["failure_score"] = float(found.score[shaped].mean())
            metrics["failure_spread"] = float(found.score[shaped].std())
        if found.noise:
            metrics["noise"] = float(np.mean(found.noise))
        return metrics


def _is_noise(measures: Floats, scores: Floats, noise: float) -> bool:
    """Check whether a group's failures differ, but by less than equally good episodes do.

    Measures that agree exactly do not count as noise.
    """
    spread = float(np.ptp(measures))
    return spread > 0 and (spread < noise or float(np.ptp(scores)) < TIE)


def _neutralise(batch: TrajectoryBatch, found: _Judgement) -> None:
    """Give failures without usable features the mean score of the measured failures of the group.

    The score is 0 in a group without measured failures.
    """
    for row, word in enumerate(found.status):
        if word == INVALID:
            siblings = [
                found.score[i]
                for i in np.flatnonzero(batch.group_id == batch.group_id[row])
                if found.status[i] in (SHAPED, GATED)
            ]
            # its features say nothing, so it stands in the middle of the group's failures
            found.score[row] = float(np.mean(siblings)) if siblings else 0.0


def _features(batch: TrajectoryBatch) -> tuple[Rows, ...]:
    if batch.features is None:
        raise ContractError("the reward measures features, and the batch has none")
    return batch.features
