"""Episodes that a reward could not score, kept for the corrected one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from verl_vla.core.episode import EpisodeSpec
from verl_vla.core.files import recording
from verl_vla.core.tables import Trajectories
from verl_vla.core.trajectory_io import read_trajectories, write_trajectories


class UnscoredEpisodes:
    """The episodes of one round, in a file of the run's folder that names its training step.

    They are taken up only by the first step after a start: from then on the weights are other ones
    than those that played.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """Look into a run's folder.

        Args:
            folder: of the run.
            first_step: the training step that this process begins with.
        """
        self._folder = folder
        self._first_step = first_step

    def file(self, step: int) -> Path:
        """Return the file for the episodes of a training step."""
        return self._folder / f"unscored_step_{step}.npz"

    def keep(self, played: Trajectories, step: int) -> None:
        """Write the episodes of a round of ``step``, crashed ones included.

        Raises:
            WriteError: the file cannot be written.
        """
        with recording(self.file(step)):
            write_trajectories(self.file(step), played)

    def take(self, specs: Sequence[EpisodeSpec], step: int) -> Trajectories | None:
        """Return what was kept of exactly these episodes; None where they must be played."""
        if step != self._first_step or not self.file(step).is_file():
            return None
        kept = read_trajectories(self.file(step))
        wanted = [spec.episode_id for spec in specs]
        # in the same order, too: the rows of a result are those of its specs
        return kept if kept.episodes.episode_id.tolist() == wanted else None

    def forget(self, step: int) -> None:
        """Delete what was kept of ``step``, once it has been scored."""
        # most steps have none: only a reward that raised leaves one
        self.file(step).unlink(missing_ok=True)
