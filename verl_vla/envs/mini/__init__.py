"""The embedded suite: seven table-top tasks on LIBERO's machinery, without LIBERO's assets.

Tasks 0 to 3 rise in difficulty: push, lift, place, stack. Tasks 4 and 5 share one scene and differ
in the object that the instruction names. Task 6 is task 0 with a cube of another colour.

The sizes and positions here are shared by the scene (`problem`) and the scripted experts.
"""

from __future__ import annotations

import math
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
"""Folder of the arena and its two textures, which LIBERO's loader uses as its asset folder."""
TABLE_M = 0.9
"""Height of the table top; fixed by LIBERO's table problem."""
CUBE_HALF_M = 0.025
"""Half an edge of a cube; the gripper opens 0.08 m."""
PLATE_RADIUS_M = 0.06
PLATE_HALF_HEIGHT_M = 0.005
START_JOINTS_RAD = (0.0, 0.3956, 0.0, -2.1852, 0.0, 2.5808, math.pi / 4)
"""Joint angles that put the gripper at (-0.10, 0, 1.02) m, pointing down: near the objects, so that
episodes are short, and behind all of them, so that it can push."""
EYE_M = (0.42, 0.0, 1.32)
LOOK_AT_M = (-0.02, 0.0, 0.93)
HIDDEN_BODIES = (
    *(f"robot0_link{i}" for i in range(5)),
    *(
        f"mount0_{part}"
        for part in ("base", "controller_box", "pedestal_feet", "torso", "pedestal")
    ),
)
"""Robot bodies beyond the image's upper edge; rendering them takes a quarter of the time and would
show only a corner of the base."""
