"""A small causal network that learns from successes only to predict the progress of an episode.

Its objective combines two published ones: regression of normalised time with rewound, stalled and
spliced episodes as counter-examples (ReWiND, arXiv:2505.10911), and a ranking of rows by progress
(Video-Language Critic, arXiv:2405.19988). It has no input for absolute time: failures last to the
step limit, so time would reveal the outcome. It is never trained on failures: a preference for
successes over failures destroys the ranking among failures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from verl_vla.rewards.base import Rows
from verl_vla.rewards.features import Floats, center_on_start, normalised_time

MAX_ROWS = 32
"""Maximum number of rows that are sampled from one success for a training example."""
REWIND, STALL, SPLICE = 0.35, 0.20, 0.10
"""Shares of the examples that are rewound, stalled, or spliced with another task."""
RANK_WEIGHT, RANK_SCALE = 0.5, 2.0
MIN_RANK_GAP = 0.05
"""Difference in progress up to which two rows are not ranked."""
EMA_DECAY = 0.95
"""Decay of the averaged weights that score: an average over about 20 optimizer steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """Size and optimizer settings of the head."""

    width: int = 64
    steps: int = 50
    """Optimizer steps in one update."""
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2


class ProgressNetwork(nn.Module):
    """Maps [x_t, x_t - x_0] to a logit of progress; row t sees rows 0 to t."""

    def __init__(self, feature_size: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * feature_size)
        self.embed = nn.Linear(2 * feature_size, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.logit = nn.Linear(width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [n, T, 2 D] to logits [n, T]."""
        hidden = functional.gelu(self.embed(self.norm(inputs)))
        return self.logit(self.recurrent(hidden)[0]).squeeze(-1)


class ProgressHead:
    """The network, its optimizer, and the averaged weights that score."""

    def __init__(self, feature_size: int, config: HeadConfig, seed: int) -> None:
        """Make an untrained head; the random state of the process does not change."""
        self._feature_size = feature_size
        self._config = config
        self._seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = ProgressNetwork(feature_size, config.width)
            self._average = ProgressNetwork(feature_size, config.width)
        # the average begins where the network does
        self._average.load_state_dict(self.network.state_dict())
        self._average.requires_grad_(False)
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self._num_updates = 0

    @torch.no_grad()
    def progress(self, features: Rows) -> Floats:
        """Return the progress [T], 0 to 1, by the averaged weights."""
        return self._average(inputs_of(features)[None])[0].sigmoid().double().numpy()

    def train(self, successes: Mapping[str, Sequence[Rows]]) -> dict[str, float]:
        """Take `HeadConfig.steps` optimizer steps on successes, by task.

        Returns:
            ``head_loss``, the mean over the last quarter of the steps.
        """
        # by number of updates: a resumed run trains on the examples that it would have had
        rng = np.random.default_rng([self._seed, self._num_updates])
        losses: list[float] = []
        for _ in range(self._config.steps):
            examples = [make_example(successes, rng) for _ in range(self._config.batch_size)]
            loss = self.loss(examples)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._follow()
            losses.append(float(loss.detach()))
        self._num_updates += 1
        return {"head_loss": float(np.mean(losses[-max(1, len(losses) // 4) :]))}

    def loss(self, examples: Sequence[tuple[Rows, Floats]]) -> Tensor:
        """Return the binary cross entropy of progress plus a ranking loss over all rows.

        Args:
            examples: features [T, D] and progress [T], 0 to 1, ragged in T.
        """
        logits, labels = [], []
        for features, progress in examples:
            logits.append(self.network(inputs_of(features)[None])[0])
            labels.append(torch.from_numpy(progress.astype(np.float32)))
        logit, label = torch.cat(logits), torch.cat(labels)
        regression = functional.binary_cross_entropy_with_logits(logit, label)
        # [rows, rows] over all examples: row i should rank above row j
        gap = label[:, None] - label[None, :]
        ranked = gap > MIN_RANK_GAP
        # logistic: large where a pair is in the wrong order, near 0 where it is clearly right
        wrong = functional.softplus(-RANK_SCALE * (logit[:, None] - logit[None, :]))
        # a batch of stalled rows may hold no pair
        ranking = (wrong * ranked).sum() / ranked.sum().clamp(min=1)
        return regression + RANK_WEIGHT * ranking

    def state_dict(self) -> dict[str, Any]:
        """Return both sets of weights, the optimizer state, and the number of updates."""
        return {
            "feature_size": self._feature_size,
            "network": _copy(self.network.state_dict()),
            "average": _copy(self._average.state_dict()),
            "optimizer": self._optimizer.state_dict(),
            "num_updates": self._num_updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self._average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._num_updates = state["num_updates"]

    @torch.no_grad()
    def _follow(self) -> None:
        pairs = zip(self._average.parameters(), self.network.parameters(), strict=True)
        for averaged, newest in pairs:
            # decay x average + (1 - decay) x newest
            averaged.lerp_(newest, 1 - EMA_DECAY)


def inputs_of(features: Rows) -> Tensor:
    """Return [T, 2 D]: every row, and its difference from the first."""
    rows = np.concatenate([features, center_on_start(features)], axis=1)
    return torch.from_numpy(rows.astype(np.float32))


def make_example(
    successes: Mapping[str, Sequence[Rows]], rng: np.random.Generator
) -> tuple[Rows, Floats]:
    """Cut a success and, in a share of the examples, rewind, stall or splice it.

    Returns:
        Features [T, D] and their progress [T]: progress falls in rewound rows, stays in stalled
        ones, and is 0 in rows from another task.
    """
    tasks = sorted(successes)
    task = tasks[int(rng.integers(len(tasks)))]
    whole = successes[task][int(rng.integers(len(successes[task])))]
    progress = normalised_time(whole)
    # begins at the start, like every episode that is scored, and may end early
    end = int(rng.integers(min(2, len(whole)), len(whole) + 1))
    kept = np.unique(np.linspace(0, end - 1, min(end, MAX_ROWS)).round().astype(int))
    rows, labels = whole[kept], progress[kept]
    draw = rng.random()
    if draw < REWIND:
        # backwards from the last row, which is left out below: it is there already
        back = slice(None, -1 - int(rng.integers(1, max(2, len(rows)))), -1)
        return np.concatenate([rows, rows[back][1:]]), np.concatenate([labels, labels[back][1:]])
    if draw < REWIND + STALL:
        at, times = int(rng.integers(len(rows))), int(rng.integers(1, MAX_ROWS // 2))
        index = np.concatenate([np.arange(at + 1), np.full(times, at)])
        return rows[index], labels[index]
    others = [key for key in tasks if key != task]
    if draw < REWIND + STALL + SPLICE and others:
        other = others[int(rng.integers(len(others)))]
        stranger = successes[other][int(rng.integers(len(successes[other])))][-MAX_ROWS:]
        cut = int(rng.integers(1, len(rows) + 1))
        return (
            np.concatenate([rows[:cut], stranger]),
            np.concatenate([labels[:cut], np.zeros(len(stranger))]),
        )
    return rows, labels


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # copies: training goes on with the tensors that state_dict() hands out
    return {name: weight.clone() for name, weight in weights.items()}
