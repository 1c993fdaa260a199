from __future__ import annotations

import math

import numpy as np
import pytest

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.core.image_preprocessing import (
    Pixels,
    _lanczos_weights,
    _weigh_rows,
    prepare_image,
    prepare_images,
)


def make_render(height: int, width: int, seed: int = 0) -> Pixels:
    """Smooth shapes with a few sharp edges, a little like a scene."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = 128 + 100 * np.sin(x / 17 + seed)[..., None] * np.cos(y / 23)[..., None]
    image = np.broadcast_to(waves, (height, width, 3)) + rng.normal(0, 4, (height, width, 3))
    image[height // 4 : height // 2, width // 3 : width // 2] = (200, 30, 60)
    return np.clip(image, 0, 255).astype(np.uint8)


def lanczos_reference(num_in: int, num_out: int) -> np.ndarray:
    """The kernel straight from its definition, in float64."""
    stretch = max(num_in / num_out, 1)
    matrix = np.zeros((num_out, num_in))
    for row in range(num_out):
        centre = (row + 0.5) * num_in / num_out
        for column in range(num_in):
            x = abs(column + 0.5 - centre) / stretch
            matrix[row, column] = np.sinc(x) * np.sinc(x / 3) if x < 3 else 0
        matrix[row] /= matrix[row].sum()
    return matrix


@pytest.mark.parametrize(("height", "width", "size"), [(96, 96, 56), (40, 64, 48), (30, 30, 56)])
def test_resize_is_an_antialiased_lanczos(height: int, width: int, size: int) -> None:
    render = make_render(height, width)
    exact = np.einsum(
        "hi,ijc,wj->hwc",
        lanczos_reference(height, size),
        render.astype(float),
        lanczos_reference(width, size),
    )
    resized = prepare_image(render, size=size, jpeg=False, crop_area=1.0)
    assert np.abs(resized - np.clip(np.rint(exact), 0, 255)).max() <= 1


@pytest.mark.parametrize(("num_in", "num_out"), [(64, 56), (48, 64), (100, 30)])
def test_neighbours_are_added_in_order_with_a_rounding_after_each_step(
    num_in: int, num_out: int
) -> None:
    """A build of SciPy that fuses product and sum would lose TensorFlow's bytes."""
    pixels = make_render(num_in, 40).astype(np.float32)
    total = np.zeros((num_out, 40, 3), np.float32)
    for neighbour, weight in enumerate(_lanczos_weights(num_in, num_out).toarray().T):
        total += weight[:, None, None] * pixels[neighbour]
    assert np.array_equal(_weigh_rows(pixels, num_out), total)


def test_crop_is_a_bilinear_look_at_the_middle() -> None:
    render = make_render(64, 64)
    side = math.sqrt(0.9)
    positions = (1 - side) / 2 * 63 + np.arange(64) * side
    low, part = np.floor(positions).astype(int), positions % 1
    values = render / 255
    rows = values[low] * (1 - part)[:, None, None] + values[low + 1] * part[:, None, None]
    both = rows[:, low] * (1 - part)[:, None] + rows[:, low + 1] * part[:, None]
    cropped = prepare_image(render, size=64, jpeg=False)
    difference = np.abs(cropped - np.floor(both * 255.5))
    assert difference.max() <= 1 and difference.mean() < 0.01


def test_the_border_that_the_crop_removes_has_no_influence() -> None:
    render = make_render(224, 224)
    changed = render.copy()
    changed[:5], changed[-5:], changed[:, :5], changed[:, -5:] = 0, 0, 0, 0  # crop starts at 5.7
    same = prepare_image(render, jpeg=False)
    assert np.array_equal(prepare_image(changed, jpeg=False), same)
    changed[:7] = 0
    assert not np.array_equal(prepare_image(changed, jpeg=False), same)


def test_nothing_to_do_changes_nothing() -> None:
    render = make_render(56, 56)
    assert np.array_equal(prepare_image(render, size=56, jpeg=False, crop_area=1.0), render)


def test_one_grey_stays_that_grey() -> None:
    for value in range(256):
        render = np.full((24, 24, 3), value, np.uint8)
        assert np.all(prepare_image(render, size=16) == value)


def test_upright_stays_upright() -> None:
    render = np.zeros((64, 64, 3), np.uint8)
    render[8:24, 8:16] = (255, 128, 0)
    image = prepare_image(render, size=32).astype(int)
    assert image[6, 5, 0] > 200 and image[6, 5, 2] < 60  # higher than wide, top left, red
    assert image[10, 5, 0] > 200 and image[6, 10, 0] < 60 and image[28, 28].max() < 20


def test_rows_and_columns_are_treated_alike() -> None:
    render = make_render(96, 64)
    image = prepare_image(render, size=48, jpeg=False).astype(int)
    turned = prepare_image(np.ascontiguousarray(render.transpose(1, 0, 2)), size=48, jpeg=False)
    assert np.abs(image.transpose(1, 0, 2) - turned).max() <= 1


def test_jpeg_leaves_its_mark_and_no_more() -> None:
    render = make_render(128, 128)
    plain = prepare_image(render, size=112, jpeg=False).astype(int)
    marked = prepare_image(render, size=112).astype(int)
    assert 0.1 < np.abs(plain - marked).mean() < 4


def test_pixels_that_every_machine_must_get() -> None:
    """Recorded while this code gave TensorFlow's bytes on all of the golden images."""
    y, x = np.mgrid[0:256, 0:256]
    render = np.stack([(y // 32 * 37 + x // 16 * 61) % 256, (x + y) // 2, 255 - y], -1)
    image = prepare_image(render.astype(np.uint8))
    assert image.shape == (224, 224, 3)
    diagonal = image[::70, ::70][np.arange(4), np.arange(4)].astype(int)
    recorded = [[0, 5, 248], [122, 82, 171], [189, 156, 93], [87, 234, 21]]
    assert np.abs(diagonal - recorded).max() <= 1


def test_a_batch_is_prepared_image_by_image() -> None:
    renders = np.stack([make_render(64, 64, seed) for seed in range(3)])
    images = prepare_images(renders, size=56)
    assert images.shape == (3, 56, 56, 3) and images.dtype == np.uint8
    for image, render in zip(images, renders, strict=True):
        assert np.array_equal(image, prepare_image(render, size=56))
    assert prepare_images(renders[:0], size=56).shape == (0, 56, 56, 3)


@pytest.mark.parametrize(
    "render",
    [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)],
)
def test_what_is_not_an_image_is_refused(render: Pixels) -> None:
    with pytest.raises(ContractError, match="a render must be uint8"):
        prepare_image(render)


@pytest.mark.parametrize("area", [0.0, 1.1, -0.9])
def test_an_impossible_crop_is_refused(area: float) -> None:
    with pytest.raises(ConfigError, match="crop_area"):
        prepare_image(make_render(16, 16), crop_area=area)
