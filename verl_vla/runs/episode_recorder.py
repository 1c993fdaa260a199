"""What is kept of the episodes that are played in training.

Of every episode a line in the journal: how it ended and what it was worth. Of a few groups a step
also the actions, which play it again, and a film of what the policy saw: kilobytes each.
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
from verl_vla.runs.episode_log import Journal, episode_lines

FILM_SIZE = 128
"""Height and width of a film, pixels."""
FILM_QUALITY = 60
"""Of WebP, 0 to 100; a picture takes about 2 kB."""
STEPS_PER_S = 20
"""LIBERO's control rate, so a film runs at real speed."""
FIRST_VIEW = 0


class Album:
    """Writes the journal and the films of one run.

    Args:
        folder: of the run.
        header: see `verl_vla.evaluation.conditions.played_in`.
        codec: turns bins into the actions that are kept.
        groups_per_step: of how many groups a training step actions and films are kept.
    """

    def __init__(
        self, folder: Path, header: Mapping[str, Any], codec: ActionCodec, groups_per_step: int
    ) -> None:
        self._folder = folder
        self._journal = Journal(folder, header)
        self._codec = codec
        self._groups_per_step = groups_per_step
        self._step: int | None = None
        self._num_kept = 0

    def rewind(self, last_step: int) -> None:
        """Forget what was played after a training step."""
        self._journal.rewind(last_step)

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
                self._film(played, row)
            else:
                line |= {"actions": None, "executed": None}
        self._journal.append(lines)

    def _film(self, played: Trajectories, row: int) -> None:
        decisions = played.decisions
        mine = decisions.episode == row
        pictures = decisions.image[mine][:, FIRST_VIEW].numpy()
        if len(pictures):
            path = film_path(self._folder, int(played.episodes.episode_id[row]))
            write_film(path, pictures, decisions.executed[mine].tolist())


def film_path(folder: Path, episode: int) -> Path:
    """Where the film of an episode is, if it was kept."""
    return folder / "episodes" / f"episode_{episode}.webp"


def write_film(path: Path, pictures: npt.NDArray[np.uint8], executed: list[int]) -> None:
    """Write an animated WebP, which a browser plays in a loop.

    Args:
        path: of the film; its folder is made where it is missing.
        pictures: [decisions, H, W, 3], what the policy saw.
        executed: how many steps of the simulator follow each picture.
    """
    path.parent.mkdir(exist_ok=True)
    frames = [Image.fromarray(picture).resize((FILM_SIZE, FILM_SIZE)) for picture in pictures]
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
