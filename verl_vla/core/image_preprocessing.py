"""Preprocessing of a rendered image into the one that the policy was fine-tuned on.

Follows openvla-oft's LIBERO evaluation (``experiments/robot/openvla_utils.py``), which runs on
TensorFlow: a JPEG round trip, a Lanczos resize, a centre crop. Here they are numpy, in the order
of TensorFlow's float32 operations, so that the bytes are the same.

Needs no torch, whose import would cost each simulator process seconds and hundreds of megabytes.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image
from scipy.sparse import csr_array

from verl_vla.core.errors import ConfigError, ContractError

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

LANCZOS_RADIUS = np.float32(3)
JPEG_QUALITY = 95
"""TensorFlow's default in `tf.image.encode_jpeg`, with colour at half resolution (4:2:0)."""
JPEG_SUBSAMPLING_420 = 2
"""Pillow's number for 4:2:0."""


def prepare_image(
    render: Pixels, *, size: int = 224, jpeg: bool = True, crop_area: float = 0.9
) -> Pixels:
    """Turn a rendered image into the one that the policy sees.

    Args:
        render: [H, W, 3] RGB, upright.
        size: height and width of the result, pixels.
        jpeg: whether to add the artefacts of JPEG; the fine-tuning data were stored as JPEG.
        crop_area: share of the area that the centre crop keeps; fine-tuning cropped to this share
            at random positions. 1 keeps everything.

    Returns:
        [size, size, 3] RGB.

    Raises:
        ContractError: if ``render`` is not a uint8 RGB image.
        ConfigError: if ``crop_area`` is not in (0, 1].
    """
    if render.dtype != np.uint8 or render.ndim != 3 or render.shape[2] != 3:
        raise ContractError(f"a render must be uint8 [H, W, 3], got {render.dtype} {render.shape}")
    if not 0 < crop_area <= 1:
        raise ConfigError(f"crop_area is {crop_area}; it is a share of the area, above 0 up to 1")
    pixels = _round_trip(render) if jpeg else render
    columns_first = _resize(pixels.astype(np.float32), size)
    # the resize swaps the axes once, and the crop swaps them back
    whole = columns_first.transpose(1, 0, 2)
    return (_crop(columns_first, crop_area) if crop_area < 1 else whole).astype(np.uint8)


def prepare_images(
    renders: Pixels, *, size: int = 224, jpeg: bool = True, crop_area: float = 0.9
) -> Pixels:
    """Apply `prepare_image` to [n, H, W, 3]; return [n, size, size, 3], equal to the bit.

    Images are processed one at a time: one and its intermediate results fit into a core's cache, a
    batch does not.
    """
    images = np.empty((len(renders), size, size, 3), np.uint8)
    for image, render in zip(images, renders, strict=True):
        image[:] = prepare_image(render, size=size, jpeg=jpeg, crop_area=crop_area)
    return images


def _round_trip(pixels: Pixels) -> Pixels:
    """Encode as JPEG and decode again.

    Pillow writes the same bytes as TensorFlow. simplejpeg decodes them, since it has the fast
    integer transform that TensorFlow uses and Pillow does not.
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file, "JPEG", quality=JPEG_QUALITY, subsampling=JPEG_SUBSAMPLING_420
    )
    return simplejpeg.decode_jpeg(
        file.getvalue(), colorspace="RGB", fastdct=True, fastupsample=False
    )


def _resize(pixels: Floats, size: int) -> Floats:
    """Resize [H, W, 3] by an antialiased Lanczos kernel; return integers as float32 [W, H, 3]."""
    rows = _weigh_rows(pixels, size)
    both = _weigh_rows(_turn(rows), size)
    # halves to even, as tf.round
    np.rint(both, out=both)
    return np.clip(both, 0, 255, out=both)


def _weigh_rows(pixels: Floats, size: int) -> Floats:
    """Replace the rows of ``pixels`` by ``size`` weighted sums of neighbouring rows.

    The sum runs over the neighbours in order, one float32 product and one float32 addition each,
    as in TensorFlow: SciPy's sparse product is such a loop. A dense product adds in another order,
    which changes single pixels.
    """
    if len(pixels) == size:
        return pixels
    total = _lanczos_weights(len(pixels), size) @ pixels.reshape(len(pixels), -1)
    return total.reshape(size, *pixels.shape[1:])


@lru_cache(maxsize=16)
def _lanczos_weights(num_in: int, num_out: int) -> csr_array:
    """Return the weight of each input row in each resized row, [num_out, num_in].

    Source: ``tf.image.resize(method="lanczos3", antialias=True)``, scale_and_translate_op.cc,
    with its float32 roundings.
    """
    one, half = np.float32(1), np.float32(0.5)
    scale = one / (np.float32(num_out) / np.float32(num_in))
    # antialiasing: where the image shrinks, the kernel widens by the same factor
    stretch = max(scale, one)
    centre = (np.arange(num_out, dtype=np.float32) + half) * scale
    reach = LANCZOS_RADIUS * stretch
    # a pixel's value is at its centre, half a pixel after its index
    first = np.maximum(np.ceil(centre - reach - half), 0).astype(np.int64)
    last = np.minimum(np.floor(centre + reach - half), num_in - 1).astype(np.int64)
    source = first[:, None] + np.arange(int((last - first).max()) + 1)
    distance = np.abs(source.astype(np.float32) + half - centre[:, None]) * (one / stretch)
    # output rows have different numbers of neighbours; the table is as wide as the most
    is_near = source <= last[:, None]
    weight = np.where(is_near, _lanczos(distance), np.float32(0))
    # cumsum adds one term after the other, as TensorFlow; sum would add in pairs
    weight *= one / np.cumsum(weight, axis=1, dtype=np.float32)[:, -1:]
    ends = np.concatenate([[0], np.cumsum(is_near.sum(axis=1))])
    return csr_array((weight[is_near], source[is_near], ends), shape=(num_out, num_in))


def _lanczos(distance: Floats) -> Floats:
    pi = np.float32(np.pi)
    angle = pi * distance
    with np.errstate(invalid="ignore", divide="ignore"):
        wave = LANCZOS_RADIUS * np.sin(angle) * np.sin(angle / LANCZOS_RADIUS)
        wave /= pi * pi * distance * distance
    wave = np.where(distance <= np.float32(1e-3), np.float32(1), wave)  # the limit at zero
    return np.where(distance > LANCZOS_RADIUS, np.float32(0), wave)


def _crop(columns_first: Floats, area: float) -> Floats:
    """Cut out the centre of [W, H, 3] in 0..255 and enlarge it again; return [H, W, 3].

    Source: ``tf.image.crop_and_resize`` on values in 0..1, then
    ``tf.image.convert_image_dtype(saturate=True)``, which multiplies by 255.5 and rounds down.
    """
    # a product, as in tf.image.convert_image_dtype; a quotient rounds differently
    share = columns_first * np.float32(1 / 255)
    # first along the image's rows, as crop_and_resize interpolates
    across = _blend_rows(share, area)
    both = _blend_rows(_turn(across), area)
    np.clip(both, 0, 1, out=both)
    both *= np.float32(255.5)
    return both


def _blend_rows(pixels: Floats, area: float) -> Floats:
    below, above, part = _crop_positions(len(pixels), area)
    flat = pixels.reshape(len(pixels), -1)
    low = np.take(flat, below, axis=0, mode="clip")
    high = np.take(flat, above, axis=0, mode="clip")
    # low + (high - low) * part, in this order, without a temporary array
    high -= low
    high *= part
    high += low
    return high.reshape(pixels.shape)


def _turn(pixels: Floats) -> Floats:
    """Swap rows and columns, copying each pixel as one item, which is three times as fast."""
    height, width, channels = pixels.shape
    whole = pixels.view(np.dtype((np.void, channels * pixels.itemsize)))[..., 0]
    return np.ascontiguousarray(whole.T).view(np.float32).reshape(width, height, channels)


@lru_cache(maxsize=16)
def _crop_positions(size: int, area: float) -> tuple[Indices, Indices, Floats]:
    """Return, for each row of the enlarged crop, the two rows around it and the second's share.

    The shares have the shape [size, 1].
    """
    side = np.sqrt(np.float32(area))
    start = (np.float32(1) - side) / np.float32(2)
    stop = start + side
    last = np.float32(size - 1)
    # crop_and_resize divides by the output's size, which here is the input's
    step = (stop - start) * last / last
    position = start * last + np.arange(size, dtype=np.float32) * step
    below = np.floor(position)
    part = (position - below)[:, None]
    return below.astype(np.int64), np.ceil(position).astype(np.int64), part
