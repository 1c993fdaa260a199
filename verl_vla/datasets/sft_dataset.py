"""From demonstrations to the batches of every step.

Which samples a step takes, and how they are augmented, follows from the seed and the step alone:
a run that goes on after a stop needs to remember nothing but its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from verl_vla.core.image_preprocessing import Pixels, prepare_image
from verl_vla.datasets.action_targets import target_action_tokens
from verl_vla.datasets.augmentation import CROP_AREA, Change, augment
from verl_vla.datasets.libero_reader import Demo, FrameReader
from verl_vla.envs.libero.task import CAMERAS
from verl_vla.policies.action_codec import ActionCodec

WHOLE_IMAGE = 1.0
ORDER_STREAM = 1
"""Keeps the order of the samples apart from what else is sampled from the same seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One sample, the ``number``-th that a run takes."""

    row: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleBatch:
    """n samples."""

    images: Tensor
    """[n, V, S, S, 3] uint8, as the policy sees them."""
    action_tokens: Tensor
    """[n, K x A] int64, the classes that command the next K actions."""
    instructions: tuple[str, ...]
    """n sentences."""


class DemoSamples(Dataset[SampleBatch]):
    """Every step of every episode that K actions follow; images are read when asked for.

    Args:
        demos: episodes.
        codec: of the policy that learns.
        image_size: what the policy sees, pixels.
        num_views: V; the first V of `CAMERAS`.
        augment_seed: of the augmentations; None shows the centre crop of evaluations instead.
    """

    def __init__(
        self,
        demos: Sequence[Demo],
        codec: ActionCodec,
        *,
        image_size: int,
        num_views: int = 1,
        augment_seed: int | None,
    ) -> None:
        action_tokens = [target_action_tokens(demo.actions, codec) for demo in demos]
        self._action_tokens = torch.cat(action_tokens)
        self._rows = [
            (demo, i) for demo, b in zip(demos, action_tokens, strict=True) for i in range(len(b))
        ]
        self._image_size = image_size
        self._cameras = CAMERAS[:num_views]
        self._augment_seed = augment_seed
        self._frames = FrameReader()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, draw: Draw) -> SampleBatch:
        """Return one sample as a batch of one."""
        demo, index = self._rows[draw.row]
        views = [
            self._image(self._frames.read(demo, index, camera), draw.number, view)
            for view, camera in enumerate(self._cameras)
        ]
        return SampleBatch(
            images=torch.stack(views)[None],
            action_tokens=self._action_tokens[draw.row][None],
            instructions=(demo.instruction,),
        )

    def close(self) -> None:
        """Close the files that this process has opened."""
        self._frames.close()

    def _image(self, render: Pixels, number: int, view: int) -> Tensor:
        area = CROP_AREA if self._augment_seed is None else WHOLE_IMAGE
        image = torch.from_numpy(prepare_image(render, size=self._image_size, crop_area=area))
        if self._augment_seed is None:
            return image
        return augment(image, Change.draw([self._augment_seed, number, view]))


def collate(samples: Sequence[SampleBatch]) -> SampleBatch:
    """Put batches together."""
    return SampleBatch(
        images=torch.cat([sample.images for sample in samples]),
        action_tokens=torch.cat([sample.action_tokens for sample in samples]),
        instructions=tuple(text for sample in samples for text in sample.instructions),
    )


class StepSampler(Sampler[list[Draw]]):
    """The samples of one rank, step by step; all samples in a new order each time round.

    Args:
        num_samples: how many there are.
        batch_size: samples of a step, all ranks together.
        seed: of the order.
        first_step: steps that are done already.
        last_step: after which it ends.
        rank: of how many ranks; each takes its part of every step's batch.
        num_ranks: must divide ``batch_size``.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int,
        first_step: int,
        last_step: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._seed = seed
        self._steps = range(first_step, last_step)
        self._part = slice(rank, None, num_ranks)
        self._round = -1
        self._order = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in self._steps:
            numbers = range(step * self._batch_size, (step + 1) * self._batch_size)[self._part]
            yield [Draw(row=self._row(number), number=number) for number in numbers]

    def _row(self, number: int) -> int:
        which, index = divmod(number, self._num_samples)
        if which != self._round:
            rng = np.random.default_rng([ORDER_STREAM, self._seed, which])
            self._round, self._order = which, rng.permutation(self._num_samples)
        return int(self._order[index])
