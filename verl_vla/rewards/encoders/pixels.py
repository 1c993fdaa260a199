"""Encoder without weights: the downscaled image itself. It is the control for other encoders."""

from __future__ import annotations

import numpy as np

from verl_vla.core.errors import ContractError
from verl_vla.rewards.encoders.base import Features, ImageEncoder, Images, check_positive

FULL_SCALE = 255.0


class PixelEncoder(ImageEncoder):
    """Mean brightness, or colour, of each cell of a grid."""

    def __init__(self, grid: int = 16, *, colour: bool = False, batch_size: int = 256) -> None:
        """Make the encoder.

        Args:
            grid: cells in each direction.
            colour: keep the three channels instead of their mean.
            batch_size: images computed at once.
        """
        check_positive(grid=grid)
        self._grid = grid
        self._colour = colour
        description = {"grid": grid, "colour": colour}
        super().__init__("pixels", description, None, batch_size=batch_size)

    def embed(self, images: Images) -> Features:
        """Map [n, H, W, 3] to [n, grid x grid (x 3)], 0 to 1.

        Raises:
            ContractError: the images are smaller than the grid.
        """
        height, width = images.shape[1:3]
        if min(height, width) < self._grid:
            raise ContractError(
                f"images of {height} x {width} px have no {self._grid} x {self._grid} cells; "
                "lower encoder_args.grid"
            )
        # cells differ by a pixel where the grid does not divide the image
        rows = np.arange(self._grid) * height // self._grid
        columns = np.arange(self._grid) * width // self._grid
        # sums between neighbouring edges, first of rows, then of columns
        sums = np.add.reduceat(images.astype(np.float32), rows, axis=1)
        sums = np.add.reduceat(sums, columns, axis=2)
        heights = np.diff([*rows, height])[:, None]
        widths = np.diff([*columns, width])[None, :]
        mean = sums / (heights * widths * FULL_SCALE)[None, :, :, None]
        cells = mean if self._colour else mean.mean(axis=3)
        return cells.reshape(len(images), -1).astype(np.float32)
