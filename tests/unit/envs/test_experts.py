"""The geometry behind the pick-and-place expert: boxes and what stands on a way."""

from __future__ import annotations

import numpy as np
import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.envs.experts.boxes import Boxes
from verl_vla.envs.experts.choice import check_experts


def turned(degrees: float, axis: int = 2) -> np.ndarray:
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    rotation = np.eye(3)
    rotation[i, i] = rotation[j, j] = cosine
    rotation[i, j], rotation[j, i] = -sine, sine
    return rotation


def box(rotation: np.ndarray) -> Boxes:
    """2 x 1 x 0.5 m around (10, 20, 3)."""
    return Boxes(np.array([[10.0, 20.0, 3.0]]), rotation[None], np.array([[1.0, 0.5, 0.25]]))


def test_a_box_is_as_high_as_its_corners() -> None:
    assert (box(np.eye(3)).bottom, box(np.eye(3)).top) == pytest.approx((2.75, 3.25))
    assert box(turned(90, axis=1)).top == pytest.approx(4.0)


def test_a_turned_box_covers_other_places() -> None:
    places = np.array([[10.9, 20.0], [10.0, 20.9], [12.0, 20.0]])
    nothing = -np.inf
    assert box(np.eye(3)).tops_over(places, 0.0) == pytest.approx([3.25, nothing, nothing])
    assert box(turned(90)).tops_over(places, 0.0) == pytest.approx([nothing, 3.25, nothing])


def test_a_margin_widens_a_box_but_does_not_raise_it() -> None:
    place = np.array([[11.2, 20.0]])
    assert box(np.eye(3)).tops_over(place, 0.3) == pytest.approx([3.25])


def test_a_leaning_box_is_as_high_as_it_is_over_that_place() -> None:
    # leaning by 45 degrees about y, its upper face falls by one metre for each along x
    tops = box(turned(45, axis=1)).tops_over(np.array([[10.0, 20.0], [9.8, 20.0]]), 0.0)
    assert tops[0] == pytest.approx(3.0 + 0.25 * np.sqrt(2))
    assert tops[1] - tops[0] == pytest.approx(0.2)


def test_no_box_is_nowhere() -> None:
    empty = box(np.eye(3)).between(5.0, 6.0)
    assert empty.tops_over(np.array([[10.0, 20.0]]), 0.1).tolist() == [-np.inf]


def test_a_suite_without_experts_is_refused() -> None:
    check_experts("libero_object")
    with pytest.raises(ConfigError, match="libero_90, which has no scripted experts; take"):
        check_experts("libero_90")
