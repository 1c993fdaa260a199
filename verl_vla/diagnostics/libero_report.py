"""``doctor --libero``: why is my success rate lower than published?

`libero_check` compares the simulator, in a separate process and in LIBERO's own environment. This
module checks the rest of an evaluation: every asset, the image pipeline, the policy.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from verl_vla.core.errors import ConfigError
from verl_vla.core.image_preprocessing import Pixels, prepare_image
from verl_vla.core.text import nearest
from verl_vla.diagnostics import libero_check
from verl_vla.diagnostics.libero_check import (
    INSTALL_ASSETS,
    NO_START,
    TASKS,
    UNKNOWN,
    Check,
    Effect,
)
from verl_vla.envs.libero.asset_files import describe_faults, remedy_for_assets
from verl_vla.envs.libero.assets import ASSETS_VARIABLE, assets_available, find_assets
from verl_vla.envs.libero.gl import prepare_gl
from verl_vla.envs.libero.suite import libero_suite
from verl_vla.policies.base import Processor
from verl_vla.policies.checks import Finding
from verl_vla.policies.normalization import NO_NOOPS_SUFFIX, read_datasets
from verl_vla.policies.registry import examine, load_processor
from verl_vla.rl.setup import JOINT_KEY, find_unnorm_key

CHECK_LIMIT_S = 900
"""Time limit of the six tasks, which take 40 s on one free core."""
PIPELINE_SHA256 = "c27f221ecc41f74089cfaec873ad947d386e6450ef4bcfb676df9bc77df4d72d"
"""SHA-256 of `golden_frame` after openvla-oft's operations in TensorFlow 2.15.1: encode_jpeg,
decode_image, resize (lanczos3, antialias), round, crop_and_resize (0.9), convert_image_dtype."""
HEAD = Effect(97, "success 0% where a regression checkpoint is read as tokens (openvla-oft 24)")
SCALE = Effect(90, "no published number; every motion gets the scale of other data")
ATTENTION = Effect(38, "LIBERO-Spatial 98% -> 60% (openvla-oft issue 135; also 5, 12 and 106)")
EFFECTS: Mapping[str, Effect] = MappingProxyType(
    {"action head": HEAD, "action statistics": SCALE, "attention": ATTENTION, "processor": SCALE}
)
"""Effects by the subject of a finding; a fault in any other subject prevents an evaluation."""
ABOUT_WEIGHTS = ("action head", "attention", "norm epsilon", "weights")
"""Subjects whose faults do not prevent reading the processor."""
SUITE_KEYS = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
GRIPPER_MASK = [True, True, True, True, True, True, False]
"""Normalization mask of every published LIBERO dataset: the gripper is not normalised."""
AS_PUBLISHED = "as in published checkpoints"
"""Expected value of every subject that `examine` checks."""
PUBLISHED_VIEWS = (1, 2)
"""Numbers of views of published checkpoints: SimpleVLA-RL's see the scene, OpenVLA-OFT's also the
wrist camera."""


def examine_libero(
    checkpoint: str | Path | None = None, unnorm_key: str | None = None, suite: str | None = None
) -> list[Check]:
    """Compare this machine, and a policy folder, with published evaluations; takes a minute.

    Args:
        checkpoint: a policy folder, or None for the machine only.
        unnorm_key: key of the action statistics to use.
        suite: suite to be evaluated, which the statistics must match; None for any of LIBERO.

    Raises:
        ConfigError: ``suite`` is not LIBERO's, ``checkpoint`` is no folder, there are no assets,
            rendering fails, or the check itself does not run.
    """
    if suite is not None and suite not in SUITE_KEYS:
        raise ConfigError(f"--suite is {suite!r}, not LIBERO's; {nearest(suite, SUITE_KEYS)}")
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise ConfigError(f"--policy is {checkpoint}, which is not a folder; name a policy's")
    if ASSETS_VARIABLE not in os.environ and not assets_available():
        # a check must not start a download
        raise ConfigError(f"LIBERO's assets are not on this machine; {remedy_for_assets()}")
    assets = find_assets()
    checks = [
        *run_simulator_check(assets),
        judge_assets(assets),
        judge_image_pipeline(prepare_image(golden_frame())),
    ]
    if checkpoint is not None:
        checks += judge_policy(checkpoint, unnorm_key, suite)
    return [_with_remedy(check) for check in checks]


def run_simulator_check(assets: Path, tasks: Sequence[str] = tuple(TASKS)) -> list[Check]:
    """Run `libero_check` as users of other projects do, on a folder of assets.

    Args:
        assets: folder of LIBERO's assets, or of substitutes.
        tasks: keys of `TASKS`.

    Raises:
        ConfigError: it ends without a result, or not in time; the message has its last line.
    """
    environ = dict(os.environ)
    # the check itself only knows EGL as a default; runs take what this machine has
    prepare_gl(environ)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        # a folder without a config: LIBERO reads the files of the installed package, as runs do
        environ["LIBERO_CONFIG_PATH"] = folder
        command = [sys.executable, libero_check.__file__, "--assets", str(assets)]
        command += ["--tasks", *tasks, "--json", str(answer)]
        done = _run(command, environ)
        # it writes its answer last, so without one it did not get to the end
        if not answer.is_file():
            why = (done.stderr.strip() or "no word").splitlines()[-1]
            raise ConfigError(
                f"the check of the simulator ended with {done.returncode} ({why}); see why with: "
                f"python {libero_check.__file__}"
            )
        found: dict[str, Any] = json.loads(answer.read_text())
    if found["measured"]["failure"] is not None:
        sys.stderr.write(done.stderr)  # the traceback that the remedy refers to
    rows: list[dict[str, Any]] = found["checks"]
    return [Check(**row)._replace(effect=Effect(**row["effect"])) for row in rows]


def _run(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CHECK_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"the check of the simulator gave no answer in {CHECK_LIMIT_S} s; it takes 40 s on a "
            f"free core. See where it stays with: python {libero_check.__file__}"
        ) from error


def judge_assets(folder: Path) -> Check:
    """Compare every file of a folder of assets with LIBERO's; reads 600 MB."""
    faults = describe_faults(folder)
    here = f"{folder}, {faults or 'every file as LIBERO has it'}"
    return Check(
        "all assets", here, "all there, no other", faults is not None, UNKNOWN, INSTALL_ASSETS
    )


def golden_frame() -> Pixels:
    """Return a frame [256, 256, 3] with edges, ramps and every colour, made by a formula."""
    y, x = np.mgrid[0:256, 0:256]
    frame = np.stack([(y // 32 * 37 + x // 16 * 61) % 256, (x + y) // 2, 255 - y], axis=-1)
    return frame.astype(np.uint8)


def judge_image_pipeline(prepared: Pixels) -> Check:
    """Compare the output of our pipeline for `golden_frame` with that of TensorFlow."""
    found = hashlib.sha256(np.ascontiguousarray(prepared).tobytes()).hexdigest()
    return Check(
        "image pipeline",
        f"{found[:8]} of a golden frame",
        f"{PIPELINE_SHA256[:8]}, by TensorFlow",
        found != PIPELINE_SHA256,
        UNKNOWN,
        "install the versions of requirements/run.lock of pillow, simplejpeg, scipy and numpy",
    )


def judge_policy(
    folder: str | Path, unnorm_key: str | None = None, suite: str | None = None
) -> list[Check]:
    """Compare a policy folder with published ones, without loading its weights."""
    if suite is not None:
        unnorm_key = find_unnorm_key(Path(folder), unnorm_key, libero_suite(suite))
    findings = examine(folder, unnorm_key)
    checks = [_from_finding(finding) for finding in findings]
    # a processor cannot be read from a folder with other faults
    if any(f.is_fault and f.subject not in ABOUT_WEIGHTS for f in findings):
        return checks
    processor = load_processor(folder, unnorm_key)
    return [*checks, *_judge_processor(Path(folder), processor, suite)]


def _judge_processor(folder: Path, processor: Processor, suite: str | None) -> list[Check]:
    statistics, views = processor.codec.statistics, processor.shape.num_views
    file, datasets = read_datasets(folder)
    wanted = [*(SUITE_KEYS if suite is None else (suite,)), JOINT_KEY]
    others = sorted(datasets)
    mask = statistics.mask.tolist()
    return [
        Check(
            "policy: statistics' key",
            statistics.key,
            " or ".join(wanted),
            statistics.key.removesuffix(NO_NOOPS_SUFFIX) not in wanted,
            SCALE,
            f"--unnorm-key with the dataset that the policy was fine-tuned on; {file} holds "
            f"{others}",
        ),
        Check(
            "policy: gripper mask",
            _spell(mask),
            _spell(GRIPPER_MASK),
            mask != GRIPPER_MASK,
            UNKNOWN,
            f"take {file.name} of the published checkpoint, or set '{statistics.key}' to this mask",
        ),
        Check(
            "policy: views",
            f"{views}",
            "1 (SimpleVLA-RL) or 2 (OpenVLA-OFT)",
            views not in PUBLISHED_VIEWS,
            Effect(UNKNOWN.points, "no published number; lower (openvla-oft issue 106)"),
            "set num_images_in_input in config.json to the number of fine-tuning",
        ),
    ]


def _from_finding(finding: Finding) -> Check:
    subject, is_known = finding.subject, finding.subject in EFFECTS
    effect = EFFECTS[subject] if is_known else NO_START
    remedy = finding.says if finding.is_fault else ""
    here = "refused, see below" if finding.is_fault else finding.says
    return Check(f"policy: {subject}", here, AS_PUBLISHED, finding.is_fault, effect, remedy)


def _with_remedy(check: Check) -> Check:
    """Replace the remedy for assets whose folder the user has set: choose another folder."""
    if check.remedy != INSTALL_ASSETS or ASSETS_VARIABLE not in os.environ:
        return check
    return check._replace(remedy=remedy_for_assets())


def _spell(mask: list[bool]) -> str:
    return "".join("x" if is_normalised else "-" for is_normalised in mask)
