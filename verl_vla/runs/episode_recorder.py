"""Records of training episodes.

Every episode gets a line in the episode log with its outcome and score. The episodes of a few
groups per training step also keep their actions, for replay, and a video of what the policy saw:
kilobytes each.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from verl_vla.core.files import recording
from verl_vla.core.tables import Trajectories
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.runs.episode_log import EpisodeLog, episode_lines

VIDEO_SIZE = 128
"""Height and width of a video, pixels."""
VIDEO_QUALITY = 60
"""WebP quality, 0 to 100; at this one an image takes about 2 kB."""
STEPS_PER_S = 20
"""Simulator steps per second of video: LIBERO's control rate, so a video runs at real speed."""
FIRST_VIEW = 0


class EpisodeRecorder:
    """Recorder of one run: writes the episode log and the videos.

    Args:
        folder: folder of the run.
        header: see `verl_vla.evaluation.conditions.played_in`.
        codec: decodes action tokens into the actions that are kept.
        groups_per_step: number of groups per training step whose actions and videos are kept.
    """

    def __init__(
        self, folder: Path, header: Mapping[str, Any], codec: ActionCodec, groups_per_step: int
    ) -> None:
        self._folder = folder
        self._episode_log = EpisodeLog(folder, header)
        self._codec = codec
        self._groups_per_step = groups_per_step
        self._step: int | None = None
        self._num_kept = 0
        # a video takes 0.2 s, and ranks wait for the end of a round but not for its videos
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="videos")
        self._videos: list[Future[None]] = []

    def rewind(self, last_step: int) -> None:
        """Drop the episodes after a training step."""
        self._episode_log.rewind(last_step)

    def add(self, step: int, played: Trajectories, scores: Mapping[int, float]) -> None:
        """Record one rollout round of a training step; its videos are written by `finish`.

        Args:
            step: the training step.
            played: complete groups, crashed episodes included.
            scores: scores by episode id; crashed episodes have none.
        """
        # a step may have several rounds, which share its number of groups
        if step != self._step:
            self._step, self._num_kept = step, 0
        chosen = _informative_groups(played)[: self._groups_per_step - self._num_kept]
        self._num_kept += len(chosen)
        groups = played.episodes.group_id.tolist()
        whole = episode_lines(played, self._codec, with_actions=True)
        lines = [
            line | {"step": step, "group": group, "score": scores.get(line["episode"])}
            for line, group in zip(whole, groups, strict=True)
        ]
        for row, line in enumerate(lines):
            if line["group"] in chosen:
                self._write_video(played, row)
            else:
                line |= {"actions": None, "executed": None}
        self._episode_log.append(lines)

    def finish(self) -> None:
        """Wait until all videos are written.

        Raises:
            WriteError: one could not be written.
        """
        videos, self._videos = self._videos, []
        for video in videos:
            video.result()

    def _write_video(self, played: Trajectories, row: int) -> None:
        policy_steps = played.policy_steps
        mine = policy_steps.episode == row
        # a copy: the round's images need not stay in memory for the few that are kept
        images = policy_steps.image[mine][:, FIRST_VIEW].numpy()
        # an episode whose simulator was lost at its start has no image
        if len(images):
            path = video_path(self._folder, int(played.episodes.episode_id[row]))
            executed = policy_steps.executed[mine].tolist()
            self._videos.append(self._writer.submit(write_video, path, images, executed))


def video_path(folder: Path, episode: int) -> Path:
    """Return the path of an episode's video, which exists only if it was kept."""
    return folder / "episodes" / f"episode_{episode}.webp"


def write_video(path: Path, images: npt.NDArray[np.uint8], executed: list[int]) -> None:
    """Write an animated WebP, which a browser plays in a loop.

    Args:
        path: path of the video; its folder is created if missing.
        images: [policy steps, H, W, 3], the images that the policy saw.
        executed: number of simulator steps that follow each image.

    Raises:
        WriteError: it cannot be written.
    """
    frames = [Image.fromarray(image).resize((VIDEO_SIZE, VIDEO_SIZE)) for image in images]
    with recording(path):
        path.parent.mkdir(exist_ok=True)
        frames[0].save(
            path,
            save_all=True,
            append_images=frames[1:],
            # milliseconds of each frame: a chunk cut short by the end is shown for its own steps
            duration=[1000 * steps // STEPS_PER_S for steps in executed],
            loop=0,
            quality=VIDEO_QUALITY,
        )


def _informative_groups(played: Trajectories) -> list[int]:
    """Return the groups in their order, those with both successes and failures first."""
    solved: dict[int, set[bool]] = {}
    for group, success in zip(
        played.episodes.group_id.tolist(), played.episodes.success.tolist(), strict=True
    ):
        solved.setdefault(group, set()).add(success)
    # sorted is stable, so groups of one kind stay in their order
    return sorted(solved, key=lambda group: len(solved[group]) == 1)
