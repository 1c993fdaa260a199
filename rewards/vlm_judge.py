"""Progress of failures, estimated by a vision-language model on a server.

The server has OpenAI's API, for example a local vLLM (the extra ``vllm``, in a separate process):

    vllm serve MODEL_FOLDER --port 8000 --limit-mm-per-prompt '{"image": 8}'

Only failures are sent to it, so it can never change the reward of a success.
"""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg

from verl_vla.core.errors import ConfigError, RewardError
from verl_vla.rewards import RewardResult, StatelessReward, TrajectoryBatch

QUESTION = (
    "A robot was told: {instruction}. These {count} images, in the order of time, show what it "
    "did; it did not finish. How far did it come, from 0 (nothing of it was done) to 100 (all but "
    "done)?"
)
ANSWER = {
    "type": "json_schema",
    "json_schema": {
        "name": "progress",
        "schema": {
            "type": "object",
            "properties": {"progress": {"type": "integer", "minimum": 0, "maximum": 100}},
            "required": ["progress"],
            "additionalProperties": False,
        },
    },
}
"""``response_format`` of OpenAI's API; vLLM then generates this JSON only."""
MAX_ANSWER_TOKENS = 16
JPEG_QUALITY = 90
FULL_PROGRESS = 100
LOST = (OSError, http.client.HTTPException, urllib.error.URLError)
"""Exceptions of a server that cannot be reached, or that disconnects during a request."""


class VlmJudgeReward(StatelessReward):
    """A reward of ``alpha`` times the judge's progress for a failure, 1 for a success."""

    requires = frozenset({"frames"})

    def __init__(
        self,
        model: str,
        instructions: Mapping[str, str],
        url: str = "http://127.0.0.1:8000/v1",
        alpha: float = 0.5,
        num_frames: int = 8,
        num_requests: int = 16,
        timeout_s: float = 120.0,
        max_lost_share: float = 0.05,
    ) -> None:
        """Check the arguments, and that the server has the model.

        Args:
            model: name of the model on the server.
            instructions: instruction of each task, by ``suite/task_id``.
            url: base URL of the server's API, including the version.
            alpha: score of the best possible failure, above 0 and below 1.
            num_frames: images sent of an episode, evenly spaced, including the last one.
            num_requests: number of concurrent requests, one per episode.
            timeout_s: timeout of one request.
            max_lost_share: largest share of failures without an answer; they score 0.

        Raises:
            ConfigError: a number outside its range, no server, or one without this model.
        """
        if not 0 < alpha < 1:
            raise ConfigError(f"reward_args.alpha is {alpha}; set more than 0 and less than 1")
        for name, value in (("num_frames", num_frames), ("num_requests", num_requests)):
            if value < 1:
                raise ConfigError(f"reward_args.{name} is {value}; set at least 1")
        self._model, self._url, self._timeout_s = model, url.rstrip("/"), timeout_s
        self._instructions = dict(instructions)
        self._alpha, self._num_frames, self._num_requests = alpha, num_frames, num_requests
        self._max_lost_share = max_lost_share
        # now, and not after the first round of episodes
        self._require_model()

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score the failures, several at a time.

        Raises:
            ConfigError: a task has no instruction.
            RewardError: the share of failures without an answer exceeds ``max_lost_share``.
        """
        assert batch.frames is not None
        failures = np.flatnonzero(~batch.success)
        missing = sorted({batch.task_key[row] for row in failures} - self._instructions.keys())
        if missing:
            raise ConfigError(f"reward_args.instructions has none for {missing[0]!r}; add it")
        # successes keep 1 and are never sent
        progress = np.ones(len(batch), dtype=np.float32)
        # threads, since each only waits for the server
        with ThreadPoolExecutor(self._num_requests) as pool:
            asked = [
                pool.submit(self._judge, _as_seen(batch, int(row)), batch.task_key[row])
                for row in failures
            ]
            progress[failures] = [answer.result() for answer in asked]
        lost = np.isnan(progress)
        if lost.sum() > self._max_lost_share * max(1, len(failures)):
            raise RewardError(
                f"the judge at {self._url} left {lost.sum()} of {len(failures)} failures without "
                "an answer; see the server's log, or set reward_args.max_lost_share"
            )
        shaped = self._alpha * np.nan_to_num(progress, nan=0.0)
        return RewardResult(
            score=np.where(batch.success, 1.0, shaped).astype(np.float32),
            progress=progress,
            status=tuple(
                "success" if solved else "lost" if gone else "failure"
                for solved, gone in zip(batch.success, lost, strict=True)
            ),
            metrics={"lost": float(lost.sum())},
        )

    def _judge(self, frames: npt.NDArray[np.uint8], task_key: str) -> float:
        """Return the progress in ``frames`` [T, H, W, 3], 0 to 1, or NaN without a valid answer."""
        rows = np.linspace(0, len(frames) - 1, min(self._num_frames, len(frames))).round()
        images = [frames[int(row)] for row in rows]
        question = QUESTION.format(instruction=self._instructions[task_key], count=len(images))
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        content += [{"type": "image_url", "image_url": {"url": _as_url(p)}} for p in images]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            # greedy, so that chance has no part in the answer
            "temperature": 0,
            "max_tokens": MAX_ANSWER_TOKENS,
            "response_format": ANSWER,
        }
        try:
            answer = self._ask("chat/completions", body)
            said = json.loads(answer["choices"][0]["message"]["content"])["progress"]
            # a server without constrained decoding may answer outside 0 to 100
            return min(max(float(said), 0), FULL_PROGRESS) / FULL_PROGRESS
        # whatever is wrong with one answer costs one failure its score, not the run
        except (*LOST, ValueError, KeyError, TypeError, IndexError):
            return float("nan")

    def _require_model(self) -> None:
        try:
            known = [entry["id"] for entry in self._ask("models")["data"]]
        except LOST as error:
            raise ConfigError(
                f"no judge answers at {self._url} ({error}); install the extra vllm "
                f"and run: vllm serve {self._model}, or set reward_args.url"
            ) from error
        if self._model not in known:
            raise ConfigError(
                f"reward_args.model is {self._model!r}, but {self._url} serves {', '.join(known)}"
            )

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a GET, or a POST of ``body``, and decode the JSON of the answer."""
        request = urllib.request.Request(
            f"{self._url}/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
            return json.load(answer)


def _as_seen(batch: TrajectoryBatch, row: int) -> npt.NDArray[np.uint8]:
    """Return an episode's first view [T, H, W, 3] with left and right as a person sees them."""
    assert batch.frames is not None
    frames = batch.frames[row][:, 0]
    return frames[:, :, ::-1] if batch.mirrored else frames


def _as_url(image: npt.NDArray[np.uint8]) -> str:
    # a mirrored image is a view with a negative stride; this makes it one block of memory
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
