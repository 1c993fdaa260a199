"""Batches of fine-tuning from demonstrations.

The samples of a step and their augmentation are a function of the seed and the step only, so a run
needs no state but its step to resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from verl_vla.config.choices import CAMERAS
from verl_vla.core.image_preprocessing import Pixels, prepare_image
from verl_vla.datasets.action_targets import action_chunks, target_action_tokens
from verl_vla.datasets.augmentation import CROP_AREA, Change, augment
from verl_vla.datasets.libero_reader import Demo, FrameReader
from verl_vla.policies.action_codec import ActionCodec

WHOLE_IMAGE = 1.0
ORDER_STREAM = 1
"""Random stream of the order of samples, distinct from other streams of the same seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Request for one sample: its row, and its ``number`` in the order of the run."""

    row: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleBatch:
    """A batch of n samples."""

    images: Tensor
    """[n, V, S, S, 3] uint8, as the policy sees them."""
    action_tokens: Tensor
    """[n, K x A] int64, the action tokens of the next K actions."""
    instructions: tuple[str, ...]
    """The n instructions."""


class DemoSamples(Dataset[SampleBatch]):
    """A dataset of every step that has an image and begins a chunk of K actions to learn.

    Images are read on demand.

    Args:
        demos: episodes.
        codec: action codec of the policy.
        image_size: side of the policy's images, pixels.
        num_views: number of views V: the first V of `CAMERAS`.
        augment_seed: seed of the augmentations; None for the centre crop of evaluations instead.
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
        starts = [_chunk_starts(demo, codec.chunk_length) for demo in demos]
        # labels are small, so they are made at once; images are read on demand
        self._action_tokens = torch.cat(
            [
                target_action_tokens(demo.actions, codec)[steps]
                for demo, steps in zip(demos, starts, strict=True)
            ]
        )
        self._rows = [
            (demo, int(i)) for demo, steps in zip(demos, starts, strict=True) for i in steps
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
        # the augmentation crops for itself
        area = CROP_AREA if self._augment_seed is None else WHOLE_IMAGE
        image = torch.from_numpy(prepare_image(render, size=self._image_size, crop_area=area))
        if self._augment_seed is None:
            return image
        return augment(image, Change.draw([self._augment_seed, number, view]))


def _chunk_starts(demo: Demo, length: int) -> npt.NDArray[np.int64]:
    """Find the steps with an image that begin ``length`` actions of the expert's own."""
    own = np.logical_not(action_chunks(demo.disturbed[:, None], length)).all(axis=(1, 2))
    return np.flatnonzero(demo.rendered[: len(demo.actions) - length + 1] & own)


def collate(samples: Sequence[SampleBatch]) -> SampleBatch:
    """Concatenate batches."""
    return SampleBatch(
        images=torch.cat([sample.images for sample in samples]),
        action_tokens=torch.cat([sample.action_tokens for sample in samples]),
        instructions=tuple(text for sample in samples for text in sample.instructions),
    )


class StepSampler(Sampler[list[Draw]]):
    """A batch sampler of one rank: all samples in a new order each epoch.

    Args:
        num_samples: size of the dataset.
        batch_size: samples per step of all ranks.
        seed: seed of the order.
        first_step: number of steps that are done already.
        last_step: step after which it ends.
        rank: index of this rank; each rank gets its part of every step's batch.
        num_ranks: number of ranks; must divide ``batch_size``.
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
        # interleaved: whatever the number of ranks, a step trains on the same samples
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
            # from the seed and the epoch, so there is nothing to checkpoint
            rng = np.random.default_rng([ORDER_STREAM, self._seed, which])
            self._round, self._order = which, rng.permutation(self._num_samples)
        return int(self._order[index])
