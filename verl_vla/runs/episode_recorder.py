"""What is kept of the episodes that are played in training.

Of every episode a line in the episode log: how it ended and what it was worth. Of a few groups a
step also the actions, which play it again, and a video of what the policy saw: kilobytes each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from verl_vla.core.tables import Trajectories
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.runs.episode_log import EpisodeLog, episode_lines

VIDEO_SIZE = 128
"""Height and width of a video, pixels."""
FILM_QUALITY = 60
"""Of WebP, 0 to 100; an image takes about 2 kB."""
STEPS_PER_S = 20
"""LIBERO's control rate, so a video runs at real speed."""
FIRST_VIEW = 0


class EpisodeRecorder:
    """Writes the episode log and the videos of one run.

    Args:
        folder: of the run.
        header: see `verl_vla.evaluation.conditions.played_in`.
        codec: turns bins into the actions that are kept.
        groups_per_step: of how many groups a training step actions and videos are kept.
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

    def rewind(self, last_step: int) -> None:
        """Forget what was played after a training step."""
        self._episode_log.rewind(last_step)

    def add(self, step: int, played: Trajectories, scores: Mapping[int, float]) -> None:
        """Keep one round of a training step.

        Args:
            step: the training step.
            played: whole groups, crashed episodes included.
            scores: by episode id; crashed episodes have none.
        """
        if step != self._step:
            self._step, self._num_kept = step, 0
        chosen = _telling_groups(played)[: self._groups_per_step - self._num_kept]
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

    def _write_video(self, played: Trajectories, row: int) -> None:
        policy_steps = played.policy_steps
        mine = policy_steps.episode == row
        images = policy_steps.image[mine][:, FIRST_VIEW].numpy()
        if len(images):
            path = video_path(self._folder, int(played.episodes.episode_id[row]))
            write_video(path, images, policy_steps.executed[mine].tolist())


def video_path(folder: Path, episode: int) -> Path:
    """Where the video of an episode is, if it was kept."""
    return folder / "episodes" / f"episode_{episode}.webp"


def write_video(path: Path, images: npt.NDArray[np.uint8], executed: list[int]) -> None:
    """Write an animated WebP, which a browser plays in a loop.

    Args:
        path: of the video; its folder is made where it is missing.
        images: [policy steps, H, W, 3], what the policy saw.
        executed: how many steps of the simulator follow each image.
    """
    path.parent.mkdir(exist_ok=True)
    frames = [Image.fromarray(image).resize((VIDEO_SIZE, VIDEO_SIZE)) for image in images]
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=[1000 * steps // STEPS_PER_S for steps in executed],
        loop=0,
        quality=FILM_QUALITY,
    )


def _telling_groups(played: Trajectories) -> list[int]:
    """Groups in their order, those first that solved some and failed some."""
    solved: dict[int, set[bool]] = {}
    for group, success in zip(
        played.episodes.group_id.tolist(), played.episodes.success.tolist(), strict=True
    ):
        solved.setdefault(group, set()).add(success)
    return sorted(solved, key=lambda group: len(solved[group]) == 1)
