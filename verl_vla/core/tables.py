"""Tables that carry rollout data: episodes and policy steps, linked by one key.

An *episode* is one attempt at a task. A *policy step* is one call of the policy inside an
episode; it yields one action chunk. Episodes differ in length, so policy steps are stored flat,
without padding, and ``PolicySteps.episode`` says which episode each one belongs to.

Dimensions, used in every shape in this package:

    B  episodes in the batch            N  policy steps in the batch, over all episodes
    n  policy steps taken at once       V  camera views
    H, W  image height and width, px    L  prompt tokens of one policy step
    K  actions in one chunk             A  values in one action
    T  action tokens in one chunk, always K * A
    P  proprio values                   S  simulator steps of one episode
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import compress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from verl_vla.core.episode import GoalReadings, Outcome
from verl_vla.core.errors import ContractError

Table = TypeVar("Table")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionChunk:
    """The policy's output for ``n`` observations."""

    action_tokens: Tensor
    """[n, T] int64, index of the sampled class among the action ids."""
    log_probs: Tensor
    """[n, T] float32, nats, at the requested temperature; zeros when greedy."""
    prompt_ids: list[Tensor]
    """n tensors [L] int64, the prompt each policy step was conditioned on, unpadded."""
    actions: npt.NDArray[np.float32]
    """[n, K, A], in simulator units, ready for `Env.step_chunk`."""


def column(*dims: str, dtype: torch.dtype, doc: str) -> Any:
    """Declare one tensor column of a table: its shape, dtype and meaning."""
    return field(metadata={"dims": dims, "dtype": dtype, "doc": doc})


@dataclass(frozen=True, slots=True, kw_only=True)
class Episodes:
    """One row per episode."""

    task_id: Tensor = column("B", dtype=torch.int64, doc="index of the task in its suite")
    init_state_id: Tensor = column("B", dtype=torch.int64, doc="index of the recorded start")
    group_id: Tensor = column("B", dtype=torch.int64, doc="episodes compared with each other")
    episode_id: Tensor = column("B", dtype=torch.int64, doc="unique in the run")
    outcome: Tensor = column("B", dtype=torch.int64, doc="an `Outcome`")
    num_steps: Tensor = column("B", dtype=torch.int64, doc="simulator steps the policy chose")

    def __post_init__(self) -> None:
        check_table(self)

    def __len__(self) -> int:
        return len(self.task_id)

    @property
    def success(self) -> Tensor:
        """[B] bool, true where the task was solved."""
        return self.outcome == Outcome.SUCCESS

    @property
    def crashed(self) -> Tensor:
        """[B] bool, true where the simulator crashed."""
        return self.outcome == Outcome.CRASH


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySteps:
    """One row per policy step. Images stay uint8 until the learner needs them."""

    episode: Tensor = column("N", dtype=torch.int64, doc="row of `Episodes`")
    image: Tensor = column("N", "V", "H", "W", "3", dtype=torch.uint8, doc="RGB, 0..255")
    proprio: Tensor = column("N", "P", dtype=torch.float32, doc="as in `Observation`")
    action_tokens: Tensor = column("N", "T", dtype=torch.int64, doc="class index, not a token id")
    log_probs: Tensor = column("N", "T", dtype=torch.float32, doc="nats, at the rollout policy")
    executed: Tensor = column("N", dtype=torch.int64, doc="actions of the chunk run, 1..K")

    def __post_init__(self) -> None:
        check_table(self)

    def __len__(self) -> int:
        return len(self.episode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Result of a rollout: episodes, their policy steps in order, and their prompts.

    ``crashes`` holds the reason of every crashed episode, by ``episode_id``.
    """

    episodes: Episodes
    policy_steps: PolicySteps
    prompt_ids: tuple[Tensor, ...]
    """N tensors [L] int64; ragged, so not a column."""
    goals: tuple[GoalReadings, ...]
    """B arrays [policy steps + 1, G, 3]: before the first policy step, and after each."""
    crashes: dict[int, str] = field(default_factory=dict[int, str])
    final_images: tuple[npt.NDArray[np.uint8] | None, ...] = ()
    """B images [V, H, W, 3] after the last step, None where none was rendered; empty where the
    environments were not asked to render any."""
    videos: tuple[npt.NDArray[np.uint8], ...] = ()
    """B arrays [F, H, W, 3], ragged in F: frames of an episode in order, as its first camera
    renders them; empty where no videos were kept."""

    def __post_init__(self) -> None:
        if len(self.prompt_ids) != len(self.policy_steps):
            raise ContractError(
                f"{len(self.prompt_ids)} prompts for {len(self.policy_steps)} policy steps"
            )
        if len(self.goals) != len(self.episodes):
            raise ContractError(
                f"goal readings of {len(self.goals)} episodes for {len(self.episodes)}"
            )
        if len(self.final_images) not in (0, len(self.episodes)):
            raise ContractError(
                f"final images of {len(self.final_images)} episodes for {len(self.episodes)}"
            )
        if len(self.videos) not in (0, len(self.episodes)):
            raise ContractError(f"videos of {len(self.videos)} episodes for {len(self.episodes)}")
        # the smallest and the largest row stand for all; an empty column has neither
        for row in self.policy_steps.episode.aminmax() if len(self.policy_steps) else ():
            if not 0 <= int(row) < len(self.episodes):
                raise ContractError(
                    f"PolicySteps.episode points at row {int(row)}, "
                    f"but there are {len(self.episodes)} episodes"
                )

    def select(self, keep: Tensor) -> Trajectories:
        """Keep the episodes where ``keep`` ([B] bool) is true, and their policy steps.

        Raises:
            ContractError: ``keep`` is not bool, or its length is not the number of episodes.
        """
        if keep.dtype != torch.bool or keep.shape != (len(self.episodes),):
            raise ContractError(
                f"keep must be bool [{len(self.episodes)}], got {keep.dtype} {list(keep.shape)}"
            )
        # images of a round take gigabytes, and mostly nothing has crashed
        if keep.all():
            return self
        # the row that each kept episode has among the kept ones
        new_row = torch.cumsum(keep, 0) - 1
        rows = keep[self.policy_steps.episode]
        policy_steps = map_columns(self.policy_steps, lambda t: t[rows])
        episodes = map_columns(self.episodes, lambda t: t[keep])
        ids = set(episodes.episode_id.tolist())
        return Trajectories(
            episodes=episodes,
            policy_steps=replace(policy_steps, episode=new_row[policy_steps.episode]),
            prompt_ids=tuple(p for p, row in zip(self.prompt_ids, rows, strict=True) if row),
            goals=tuple(g for g, kept in zip(self.goals, keep, strict=True) if kept),
            crashes={key: why for key, why in self.crashes.items() if key in ids},
            final_images=tuple(compress(self.final_images, keep)),
            videos=tuple(compress(self.videos, keep)),
        )

    @staticmethod
    def concat(parts: Iterable[Trajectories]) -> Trajectories:
        """Stack batches, shifting ``PolicySteps.episode``; group ids must already differ.

        Parts that nobody else holds are freed while they are copied, so that the images of a round
        are held once.
        """
        parts = list(parts)
        offsets = np.cumsum([0] + [len(p.episodes) for p in parts])[:-1]
        moved = [
            replace(p.policy_steps, episode=p.policy_steps.episode + int(offset))
            for p, offset in zip(parts, offsets, strict=True)
        ]
        # a part whose episodes all crashed at their start does not know the columns' widths
        with_rows = [policy_steps for policy_steps in moved if len(policy_steps)] or moved[:1]
        rest: dict[str, Any] = {
            "episodes": concat_tables([p.episodes for p in parts]),
            "prompt_ids": tuple(prompt for p in parts for prompt in p.prompt_ids),
            "goals": tuple(readings for p in parts for readings in p.goals),
            "crashes": {key: why for p in parts for key, why in p.crashes.items()},
            "final_images": tuple(image for p in parts for image in p.final_images),
            "videos": tuple(video for p in parts for video in p.videos),
        }
        parts.clear()
        moved.clear()
        return Trajectories(policy_steps=concat_tables(_drain(with_rows)), **rest)


def check_table(table: Any) -> dict[str, int]:
    """Compare every column with its declaration and return the size of each dimension.

    Raises:
        ContractError: a column differs; names the column, what it must be and what it is.
    """
    sizes: dict[str, int] = {}
    for f in fields(table):
        dims, dtype = f.metadata["dims"], f.metadata["dtype"]
        value: Tensor = getattr(table, f.name)
        name = f"{type(table).__name__}.{f.name}"
        if value.dtype != dtype:
            raise ContractError(f"{name} must be {dtype}, got {value.dtype}")
        if value.dim() != len(dims):
            raise ContractError(f"{name} must be [{', '.join(dims)}], got {list(value.shape)}")
        for dim, size in zip(dims, value.shape, strict=True):
            if dim.isdigit() and size != int(dim):
                raise ContractError(f"{name} must be [{', '.join(dims)}], got {list(value.shape)}")
            # the first column with a letter fixes its size for the others
            if sizes.setdefault(dim, size) != size:
                raise ContractError(f"{name}: {dim} = {size}, but earlier columns say {sizes[dim]}")
    return sizes


def map_columns(table: Table, change: Callable[[Tensor], Tensor]) -> Table:
    """Apply ``change`` to every column of a table."""
    return replace(
        table,  # pyright: ignore[reportArgumentType]
        **{f.name: change(getattr(table, f.name)) for f in fields(table)},  # pyright: ignore[reportArgumentType]
    )


def concat_tables(tables: Iterable[Table], **known: Tensor) -> Table:
    """Stack the rows of tables of one type; a table that nobody else holds is freed meanwhile.

    Args:
        tables: at least one.
        known: columns whose rows lie in one tensor already.

    Raises:
        ContractError: rows of a column differ in shape.
    """
    tables = list(tables)
    kind = type(tables[0])
    columns: dict[str, list[Tensor]] = {
        f.name: [getattr(table, f.name) for table in tables]
        for f in fields(kind)  # pyright: ignore[reportArgumentType]
        if f.name not in known
    }
    tables.clear()
    # popped, so that a column's parts are freed while the next is stacked
    return kind(**known, **{name: _stack(name, columns.pop(name)) for name in list(columns)})


def _stack(name: str, parts: list[Tensor]) -> Tensor:
    """Stack the rows of ``parts``, which is emptied meanwhile; `torch.cat` would hold both."""
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    row = 0
    for part in _drain(parts):
        # an assignment would broadcast instead
        if part.shape[1:] != whole.shape[1:]:
            raise ContractError(
                f"rows of {name} are {list(part.shape[1:])} and {list(whole.shape[1:])}"
            )
        whole[row : row + len(part)] = part
        row += len(part)
    return whole


def _drain(items: list[Item]) -> Iterator[Item]:
    """Give up the items of a list, from the first on."""
    items.reverse()
    while items:
        yield items.pop()


def pick_by_time(num_frames: int, wanted: int) -> npt.NDArray[np.int64]:
    """Choose frames at equal steps of time, the first and the last included.

    >>> pick_by_time(7, 3).tolist(), pick_by_time(2, 3).tolist()
    ([0, 3, 6], [0, 1])
    """
    return np.linspace(0, num_frames - 1, min(num_frames, wanted), dtype=np.int64)
