"""Adapter for a reward function that was written for plain veRL.

veRL calls ``compute_score(data_source, solution_str, ground_truth, extra_info)`` once per sample
(``verl/experimental/reward_loop/reward_manager/naive.py``). Here a sample is an episode and there
is no text, so the outcome takes its place: ``solution_str`` is ``success`` or ``failure`` and
``ground_truth`` is ``success``. Ids, length and outcome of the episode are in ``extra_info``.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.core.plugins import import_file
from verl_vla.rewards import RewardResult, StatelessReward, TrajectoryBatch

SUCCESS, FAILURE = "success", "failure"
SCORE = "score"
"""Key of the score where the function returns a mapping; as in veRL."""


class VerlFunctionReward(StatelessReward):
    """A reward that calls a veRL reward function, plain or async, once for each episode.

    It may return a number or a mapping that holds ``score``; other numbers of the mapping are
    averaged over the batch and logged. As under veRL, all episodes must return the same keys.
    """

    def __init__(
        self,
        path: str,
        function: str = "compute_score",
        reward_kwargs: Mapping[str, Any] | None = None,
        max_score: float = 1.0,
    ) -> None:
        """Import the function.

        Args:
            path: path of the Python file that defines the function.
            function: name of the function.
            reward_kwargs: further keyword arguments; as in veRL, they override the four above.
            max_score: the largest score that the function may return.

        Raises:
            ConfigError: no such file or function.
        """
        # a mistake in the file is found before anything is played
        module = import_file(Path(path).expanduser())
        functions = dict(inspect.getmembers(module, inspect.isfunction))
        if function not in functions:
            raise ConfigError(
                f"{path} has no function {function!r}; set reward_args.function to one of "
                f"{', '.join(functions) or 'none'}"
            )
        self._function = functions[function]
        self._kwargs = dict(reward_kwargs or {})
        self._max_score = max_score

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score each episode independently of the others."""
        answers = [self._call(batch, row) for row in range(len(batch))]
        for row, answer in enumerate(answers):
            if SCORE not in answer or answer.keys() != answers[0].keys():
                raise ContractError(
                    f"{self._function.__name__} returned {sorted(answer)} for episode "
                    f"{batch.episode_id[row]}, but {sorted(answers[0])} for episode "
                    f"{batch.episode_id[0]}; return {SCORE!r} and the same other keys for every one"
                )
        score = np.array([answer[SCORE] for answer in answers], dtype=np.float32)
        return RewardResult(
            score=score,
            progress=score,
            status=tuple(SUCCESS if solved else FAILURE for solved in batch.success),
            max_score=self._max_score,
            metrics=_mean_of_numbers(answers),
        )

    def _call(self, batch: TrajectoryBatch, row: int) -> dict[str, Any]:
        task_key = batch.task_key[row]
        solved = bool(batch.success[row])
        arguments: dict[str, Any] = {
            # from the right: the suite may be a path, which has slashes of its own
            "data_source": task_key.rsplit("/", 1)[0],
            "solution_str": SUCCESS if solved else FAILURE,
            "ground_truth": SUCCESS,
            "extra_info": {
                "index": int(batch.episode_id[row]),
                "split": batch.split,
                "success": solved,
                "num_steps": int(batch.num_steps[row]),
                "task": task_key,
                "init_state_id": int(batch.init_state_id[row]),
                "group_id": int(batch.group_id[row]),
            },
        }
        answer: Any = self._function(**{**arguments, **self._kwargs})
        # veRL awaits such a function in its own event loop; here is none
        if inspect.iscoroutine(answer):
            answer = asyncio.run(answer)
        if isinstance(answer, Mapping):
            return dict(cast("Mapping[str, Any]", answer))
        return {SCORE: answer}


def _mean_of_numbers(answers: list[dict[str, Any]]) -> dict[str, float]:
    first = answers[0] if answers else {}
    return {
        key: float(np.mean([answer[key] for answer in answers]))
        for key, value in first.items()
        if key != SCORE and isinstance(value, (int, float))
    }
