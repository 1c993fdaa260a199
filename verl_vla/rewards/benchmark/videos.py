"""Videos of the benchmark's episodes, for rewards that compare videos.

Episodes are played once, for all rewards; a reward's `VideoNeed` must not change them. So they are
replayed from their recorded actions, once for every need, and frames are rendered only then. The
simulator is deterministic (ADR-0005); outcome and number of steps of each replay are checked.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from verl_vla.core.episode import EpisodeSpec, Outcome
from verl_vla.core.errors import ConfigError, EpisodeCrashed
from verl_vla.core.tables import Trajectories
from verl_vla.core.trajectory_io import read_trajectories, write_trajectories
from verl_vla.envs.base import ChunkResult
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.rewards import TrajectoryReward, VideoNeed, video_need
from verl_vla.rewards.benchmark.episodes import num_rounds, round_file
from verl_vla.rl.episode_record import Answer, thin_video
from verl_vla.rl.rollout import Simulators

logger = logging.getLogger(__name__)

Video = npt.NDArray[np.uint8]


def video_needs(rewards: Sequence[TrajectoryReward]) -> list[VideoNeed]:
    """Return the videos that rewards require, each once, in the order of the rewards."""
    needs = [video_need(reward) for reward in rewards]
    return list(dict.fromkeys(need for need in needs if need is not None))


def folder_name(need: VideoNeed) -> str:
    """Return the name of the folder of the episodes with these videos."""
    kept = "all" if need.max_frames is None else need.max_frames
    return f"every_{need.every}_frames_{kept}"


def film_missing(
    episodes: Path,
    folder: Path,
    num_groups: int,
    codec: ActionCodec,
    simulators: Simulators,
    *,
    max_frames: int | None,
    ended: Callable[[], None] | None = None,
) -> None:
    """Replay the rounds whose videos are not on disk yet, and write each when it is complete.

    Args:
        episodes: folder of the rounds as they were played.
        folder: folder of the same rounds with videos.
        num_groups: number of groups over all rounds.
        codec: codec of the policy that played them.
        simulators: a pool whose environments make videos and whose slots are all free.
        max_frames: most frames kept of an episode; see `VideoNeed`.
        ended: called as each replay ends, if given.
    """
    for index in range(num_rounds(num_groups)):
        file = round_file(folder, index)
        # a call before this one was stopped after it
        if file.is_file():
            continue
        trajectories = read_trajectories(round_file(episodes, index))
        videos = film(trajectories, codec, simulators, max_frames=max_frames, ended=ended)
        write_trajectories(file, replace(trajectories, videos=videos))
        logger.info("videos of round %d of %d", index + 1, num_rounds(num_groups))


def film(
    trajectories: Trajectories,
    codec: ActionCodec,
    simulators: Simulators,
    *,
    max_frames: int | None,
    ended: Callable[[], None] | None = None,
) -> tuple[Video, ...]:
    """Replay episodes and return their videos, B arrays [F, H, W, 3].

    Crashed episodes are not replayed and have no frames.

    Raises:
        ConfigError: a replay ends otherwise than its episode did, or its simulator is lost.
    """
    replays = _replays(trajectories, codec)
    queue = deque(replay for replay in replays if replay.outcome != Outcome.CRASH)
    playing: dict[int, _Replay] = {}
    while queue or playing:
        free = [slot for slot in range(simulators.num_slots) if slot not in playing]
        # shorter than the slots at the end, when the queue is empty
        starting = {slot: queue.popleft() for slot in free[: len(queue)]}
        simulators.reset({slot: replay.spec for slot, replay in starting.items()})
        playing |= starting
        answers = simulators.wait(list(playing))
        chunks: dict[int, npt.NDArray[np.float32]] = {}
        for slot, answer in answers.items():
            chunk = playing[slot].take(answer, max_frames)
            if chunk is None:
                del playing[slot]
                if ended is not None:
                    ended()
            else:
                chunks[slot] = chunk
        simulators.step(chunks)
    return tuple(replay.video for replay in replays)


@dataclass(slots=True)
class _Replay:
    """One episode and what its replay has shown so far."""

    spec: EpisodeSpec
    outcome: Outcome
    num_steps: int
    chunks: deque[npt.NDArray[np.float32]]
    """Action chunks [K, A] that are still to be run."""
    executed: int = 0
    parts: list[Video] = field(default_factory=list[Video])
    video: Video = field(default_factory=lambda: np.zeros((0, 0, 0, 3), dtype=np.uint8))

    def take(self, answer: Answer, max_frames: int | None) -> npt.NDArray[np.float32] | None:
        """Note an answer; return the next chunk, None where the episode has ended."""
        if isinstance(answer, EpisodeCrashed):
            raise ConfigError(
                f"the replay of episode {self.spec.episode_id} was lost: {answer}; repeat the "
                "command, which goes on where it stopped"
            ) from answer
        # else it is the answer to a reset: nothing was executed yet
        if isinstance(answer, ChunkResult):
            assert answer.video is not None, "environments follow EnvConfig.video_every"
            self.executed += answer.executed
            self.parts.append(answer.video)
            if answer.outcome is not None or not self.chunks:
                self._check_end(answer.outcome)
                self.video = thin_video(np.concatenate(self.parts), max_frames)
                self.parts.clear()
                return None
        return self.chunks.popleft()

    def _check_end(self, outcome: Outcome | None) -> None:
        # a video of another episode would be ranked by this one's outcome
        if outcome == self.outcome and self.executed == self.num_steps:
            return
        ended = "did not end" if outcome is None else f"ended as {outcome.name}"
        raise ConfigError(
            f"episode {self.spec.episode_id} ended as {self.outcome.name} after {self.num_steps} "
            f"steps, and its replay {ended} after {self.executed}; this machine simulates "
            "otherwise, or the policy's statistics have changed: play the episodes here, with "
            "another --out"
        )


def _replays(trajectories: Trajectories, codec: ActionCodec) -> list[_Replay]:
    episodes, steps = trajectories.episodes, trajectories.policy_steps
    columns = (
        episodes.task_id,
        episodes.init_state_id,
        episodes.group_id,
        episodes.episode_id,
        episodes.outcome,
        episodes.num_steps,
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    actions = codec.to_simulator(steps.action_tokens)
    return [
        _Replay(
            spec=EpisodeSpec(task_id=task, init_state_id=state, group_id=group, episode_id=episode),
            outcome=Outcome(outcome),
            num_steps=num_steps,
            chunks=deque(actions[torch.nonzero(steps.episode == row).flatten().numpy()]),
        )
        for row, (task, state, group, episode, outcome, num_steps) in enumerate(rows)
    ]
