"""The one reader of demonstration files: every field is checked where it is read.

Anybody may hand in such a file, and HDF5 holds arrays of any type and shape. An error names file,
demonstration, field, value and remedy. Images are checked by their type and shape alone: there are
gigabytes of them.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt
from pydantic import JsonValue, TypeAdapter, ValidationError

from verl_vla.config.choices import CAMERAS
from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import Entries, require_regular
from verl_vla.core.text import shorten
from verl_vla.datasets.libero_writer import DISTURBED, IMAGES, RECORDING

Node = Any
"""An h5py file, group or data set; h5py's types do not say which of them a name refers to."""

REMEDY = "fetch or record it again"
DATA = "data"
"""Name of the group that holds the demonstrations."""
PROBLEM, MODEL = "problem_info", "model_file"
"""Attributes of `DATA` with the instruction and of an episode with the XML of its model; LIBERO
``scripts/create_dataset.py``."""
NAME = re.compile(r"demo_(0|[1-9][0-9]{0,8})")
"""Name of a demonstration's group."""
ACTIONS, STATES = "actions", "states"
JOINTS = "obs/joint_states"
"""Path of the arm's joint angles [T, 7], rad, within an episode's group."""
ARM = slice(1, 8)
"""Columns of a state that hold the arm's joint angles: robosuite's robot is the model's first body,
and column 0 is the time."""
ACTION_DIM, NUM_JOINTS, RGB = 7, 7, 3
LARGEST_ACTION = 1.001
"""Bound of an action's values: robosuite clips them at 1. A little more, for rounded files."""
MOST_STEPS = 100_000
"""Most actions of a demonstration; LIBERO's longest has 505."""
MOST_VALUES = 10_000
"""Most values of a state; LIBERO's largest has 123."""
MOST_PX = 4096


class ProblemInfo(Entries):
    """Content of `PROBLEM`."""

    language_instruction: str | list[str]


@contextmanager
def open_demos(path: Path) -> Generator[DemoFile]:
    """Open a demonstration file.

    Raises:
        ConfigError: it is no HDF5 file of demonstrations, or what is read from it is missing,
            damaged or of another type or shape.
    """
    require_regular(path, REMEDY)
    with _reading(path):
        file = h5py.File(path, "r")
    with file:
        yield DemoFile(path, file)


@contextmanager
def _reading(path: Path) -> Generator[None]:
    """Name the file of what h5py raises where one is cut off or damaged, wherever it is read."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is no LIBERO demonstration file or is broken ({shorten(str(error))}); {REMEDY}"
        ) from error


class DemoFile:
    """An open demonstration file."""

    def __init__(self, path: Path, file: Node) -> None:
        self.path = path
        with _reading(path):
            data: Node = file[DATA] if DATA in file else None
        if not isinstance(data, h5py.Group):
            raise ConfigError(f"{path} holds no group {DATA!r} with demonstrations; {REMEDY}")
        self.data: Node = data

    @property
    def names(self) -> list[str]:
        """``demo_0``, ``demo_1``, ... ``demo_10``, in numerical order."""
        with _reading(self.path):
            names = [name for name in self.data if name.startswith("demo")]
        for name in names:
            if NAME.fullmatch(name) is None:
                raise ConfigError(
                    f"{self.path}: {DATA} holds {shorten(name)!r}; demonstrations are called "
                    "demo_0, demo_1, ...: rename it"
                )
        return sorted(names, key=lambda name: int(name.removeprefix("demo_")))

    def demo(self, name: str) -> DemoReader:
        """Return the reader of one demonstration."""
        with _reading(self.path):
            node = self.data[name]
        if not isinstance(node, h5py.Group):
            raise ConfigError(f"{self.path}: {name} is no group of HDF5; {REMEDY}")
        return DemoReader(self.path, name, node)

    def sentence(self) -> str:
        """Return the stored instruction: a BDDL file's sentence without its quotes."""
        problem = self._json(PROBLEM, ProblemInfo)
        return "".join(problem.language_instruction).strip('"')

    def recording(self) -> dict[str, Any] | None:
        """Return the settings of a recording of this project; None for other files."""
        if RECORDING not in self.data.attrs:
            return None
        return self._json(RECORDING, dict[str, JsonValue])

    def _json(self, name: str, schema: Any) -> Any:
        with _reading(self.path):
            text = self.data.attrs[name] if name in self.data.attrs else None
        if not isinstance(text, str | bytes):
            raise ConfigError(f"{self.path}: {DATA} has no text {name!r}; {REMEDY}")
        try:
            return TypeAdapter[Any](schema).validate_json(text)
        except ValidationError as error:
            # the first alone
            reason = error.errors(include_url=False)[0]["msg"]
            raise ConfigError(
                f"{self.path}: {name} is {shorten(str(text), 60)!r} ({reason}); {REMEDY}"
            ) from error


class DemoReader:
    """One demonstration of an open file, of T steps."""

    def __init__(self, path: Path, name: str, node: Node) -> None:
        self.path = path
        self.label = f"{path}: {name}"
        self.node: Node = node

    def actions(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Return the actions [T, 7], in simulator units, and which of them are disturbed, [T].

        The others are the expert's own, and alone are learned.
        """
        actions = self._floats(ACTIONS, width=ACTION_DIM)
        if not len(actions):
            raise self._refused(ACTIONS, "are none")
        disturbed = self.mask(DISTURBED, len(actions), absent=False)
        largest = np.where(disturbed, 0.0, np.abs(actions).max(axis=1))
        if largest.max() > LARGEST_ACTION:
            step = int(largest.argmax())
            raise self._refused(
                ACTIONS,
                f"reach {largest[step]:g} at step {step}, and a simulator's lie within -1..1, the "
                "gripper's as well",
            )
        return actions, disturbed

    def states(self, num_rows: int) -> npt.NDArray[np.float64]:
        """Return the states [T, 1 + nq + nv]: time, positions, velocities."""
        states = self._floats(STATES, num_rows=num_rows)
        if states.shape[1] < ARM.stop:
            raise self._refused(STATES, f"are {list(states.shape)}, too few for time and arm")
        return states

    def joints(self, num_rows: int) -> npt.NDArray[np.float64]:
        """Return the observed joint angles [T, 7], rad."""
        return self._floats(JOINTS, width=NUM_JOINTS, num_rows=num_rows)

    def mask(self, name: str, num_rows: int, *, absent: bool) -> npt.NDArray[np.bool_]:
        """Return a mask [T] of `verl_vla.datasets.libero_writer`; other writers' files have none.

        Args:
            name: path of the mask within the demonstration.
            num_rows: number of actions T.
            absent: value of every row where there is none.
        """
        if not self.has(name):
            return np.full(num_rows, absent)
        node = self._dataset(name, "biu")
        if node.shape != (num_rows,):
            raise self._refused(name, f"are {list(node.shape)}, and there are {num_rows} actions")
        with _reading(self.path):
            values: npt.NDArray[Any] = node[()]
        if not np.isin(values, (0, 1)).all():
            raise self._refused(name, "hold another value than 0 and 1")
        return values.astype(bool)

    def has(self, name: str) -> bool:
        """Return True for a field that is there."""
        with _reading(self.path):
            return name in self.node

    def model(self) -> str | None:
        """Return the XML of the demonstration's model; None where the file does not hold it."""
        with _reading(self.path):
            text = self.node.attrs[MODEL] if MODEL in self.node.attrs else None
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"{self.label}: its {MODEL} is no text; {REMEDY}")
        return text

    def render_size(self, num_rows: int) -> int:
        """Return the height of the images of all cameras, pixels.

        The first camera must have some.
        """
        present = [camera for camera in CAMERAS if self.has(IMAGES[camera])]
        sizes = {self._image_size(c, num_rows) for c in dict.fromkeys([CAMERAS[0], *present])}
        if len(sizes) > 1:
            raise self._refused("images", f"have the heights {sorted(sizes)}, and must have one")
        return sizes.pop()

    def _image_size(self, camera: str, num_rows: int) -> int:
        name = IMAGES[camera]
        node = self._dataset(name, "u")
        shape = node.shape
        if node.dtype != np.uint8 or len(shape) != 4 or shape[3] != RGB or shape[1] != shape[2]:
            raise self._refused(
                name, f"are {node.dtype} {list(shape)}, and must be uint8 [T, size, size, 3]"
            )
        if not 1 <= shape[1] <= MOST_PX:
            raise self._refused(name, f"have {shape[1]} px, and must have 1 to {MOST_PX}")
        if shape[0] != num_rows:
            raise ConfigError(
                f"{self.label} holds {num_rows} actions and {shape[0]} images; each action needs "
                f"the image before it: fetch or record the file again"
            )
        return shape[1]

    def _floats(
        self, name: str, *, width: int | None = None, num_rows: int | None = None
    ) -> npt.NDArray[np.float64]:
        """Read a table of finite floating-point numbers [T, width]."""
        node = self._dataset(name, "f")
        shape = node.shape
        wanted = f"[{num_rows or 'T'}, {width or 'values'}]"
        is_table = len(shape) == 2 and width in (None, shape[1]) and num_rows in (None, shape[0])
        # by the shape first: a few bytes may declare terabytes
        if not is_table or shape[0] > MOST_STEPS or shape[1] > MOST_VALUES:
            raise self._refused(name, f"are {list(shape)}, and must be {wanted}")
        with _reading(self.path):
            values = np.asarray(node[()], dtype=np.float64)
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            raise self._refused(name, f"hold {values[row].tolist()} at step {row}, not all finite")
        return values

    def _dataset(self, name: str, kinds: Literal["f", "u", "biu"]) -> Node:
        """Return a data set of one of numpy's kinds of numbers."""
        with _reading(self.path):
            node: Node = self.node[name] if name in self.node else None
        if node is None:
            raise self._refused(name, "are missing, so the file is broken")
        if not isinstance(node, h5py.Dataset):
            raise self._refused(name, "are a group of HDF5, and must be a table")
        with _reading(self.path):
            dtype = node.dtype
        if dtype.kind not in kinds:
            wanted = {"f": "floating-point numbers", "u": "uint8", "biu": "0 and 1"}[kinds]
            raise self._refused(name, f"are {dtype}, and must be {wanted}")
        return node

    def _refused(self, name: str, fault: str) -> ConfigError:
        return ConfigError(f"{self.label}: its {name} {fault}; {REMEDY}")


def check_recording(path: Path, recording: Mapping[str, Any]) -> None:
    """Check that a file was recorded with these settings.

    Raises:
        ConfigError: it was recorded with others, is no recording of this project, or is damaged.
    """
    with open_demos(path) as file:
        before = file.recording()
    if before is None:
        raise ConfigError(f"{path} is there and was not recorded here; name another --out")
    for name, value in recording.items():
        if name not in before or before[name] != value:
            raise ConfigError(
                f"{path} was recorded with {name} {before[name] if name in before else 'unset'}, "
                f"not {value}; name another --out, or delete the file to record it again"
            )


def require_one_size(sizes: Sequence[tuple[str, int]]) -> None:
    """Refuse demonstrations whose images differ in size: a policy is told one.

    Args:
        sizes: label and height of the images of each demonstration.

    Raises:
        ConfigError: names the first demonstration and the first that differs from it.
    """
    for label, size in sizes:
        if size != sizes[0][1]:
            raise ConfigError(
                f"{label} has images of {size} px, and {sizes[0][0]} of {sizes[0][1]}; set "
                "demos.images=rerendered, or leave one of them out"
            )
