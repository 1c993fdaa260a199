"""``doctor``: say in one table whether this machine can train; with ``--checkpoint``, a checkpoint.

``--libero`` says instead whether evaluations here are LIBERO's, and lists what differs in order of
its effect on a success rate. ``--fix`` also prints the commands that would mend what was found. It
runs none of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from verl_vla.cli.eval_arguments import DTYPES
from verl_vla.config.grpo import EnvironmentConfig
from verl_vla.core.episode import Start
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import atomic_write, require_place
from verl_vla.diagnostics.libero_check import as_rows, describe
from verl_vla.diagnostics.libero_report import examine_libero
from verl_vla.diagnostics.machine import examine_machine
from verl_vla.envs.libero.suite import SUITES
from verl_vla.envs.registry import make_env, suite
from verl_vla.policies.base import observed_proprio
from verl_vla.policies.checks import Finding
from verl_vla.policies.openvla_oft.checks import judge_action_mass
from verl_vla.policies.registry import examine, load_policy
from verl_vla.rl.setup import env_config, starts, task_ids

logger = logging.getLogger(__name__)

EXIT_FAULT = 1
"""The machine cannot train, or the checkpoint cannot be trained, as it is; or it is not LIBERO."""
STDOUT = "-"
NOT_WITH_LIBERO = ("fix", "out", "images", "render_size", "dtype")
"""Options of the other two examinations."""
WIDTH = 100
"""Columns of the table."""


def run(arguments: Sequence[str]) -> int:
    """Examine, print the table, and answer 1 where there is a fault."""
    options = _parser().parse_args(arguments)
    if options.libero:
        return _examine_libero(options)
    if options.json is not None:
        raise ConfigError(f"--json {options.json} is written by --libero only; add --libero")
    if options.checkpoint is None:
        return _examine_machine(options)
    if options.images < 1:
        raise ConfigError(f"--images is {options.images}; set at least 1")
    findings = examine(options.checkpoint, options.unnorm_key)
    is_sound = not any(finding.is_fault for finding in findings)
    if is_sound and options.suite is not None:
        findings.append(judge_action_mass(_action_mass(options)))
    elif is_sound:
        findings.append(
            Finding(
                subject="action mass",
                says="not measured; name a suite to look at its images, for example --suite mini",
                is_fault=False,
            )
        )
    _show(findings)
    return EXIT_FAULT if any(finding.is_fault for finding in findings) else 0


def _examine_machine(options: argparse.Namespace) -> int:
    checks = examine_machine(Path(options.out))
    _show([check.finding for check in checks])
    if options.fix:
        for check in checks:
            if check.fix is not None:
                logger.info("%s: %s", check.finding.subject, check.fix)
    return EXIT_FAULT if any(check.finding.is_fault for check in checks) else 0


def _examine_libero(options: argparse.Namespace) -> int:
    _refuse_unused(options)
    if options.json not in (None, STDOUT):
        require_place(Path(options.json), "--json")
    # not to stdout, which may be read as JSON
    sys.stderr.write("running six tasks in LIBERO's own environment, which takes a minute\n")
    checks = examine_libero(options.checkpoint, options.unnorm_key, options.suite)
    text = json.dumps({"checks": as_rows(checks)}, indent=1)
    if options.json is None:
        for line in describe(checks):
            logger.info("%s", textwrap.fill(line, WIDTH, subsequent_indent=" " * 6))
    elif options.json == STDOUT:
        print(text)
    else:
        atomic_write(Path(options.json), text + "\n")
    return EXIT_FAULT if any(check.differs for check in checks) else 0


def _refuse_unused(options: argparse.Namespace) -> None:
    """Options that ``--libero`` does not read would be taken for read."""
    default = _parser().get_default
    given, defaults = vars(options), {name: default(name) for name in NOT_WITH_LIBERO}
    unused = [name for name in NOT_WITH_LIBERO if given[name] != defaults[name]]
    if unused:
        shown = ", ".join(f"--{name.replace('_', '-')} {given[name]}" for name in unused)
        raise ConfigError(f"{shown}: not used by --libero; leave it out, or leave out --libero")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl_vla doctor", description=__doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        help="folder of a checkpoint to look at, instead of the machine; with --libero, besides it",
    )
    add("--libero", action="store_true", help="compare machine and checkpoint with LIBERO's own")
    add("--json", nargs="?", const=STDOUT, help="with --libero, write JSON to a file or to stdout")
    add("--out", default="runs", help="where runs will be written")
    add("--fix", action="store_true", help="print the commands that mend the machine; run none")
    add("--unnorm-key", help="entry of dataset_statistics.json")
    add(
        "--suite",
        help=f"load the weights and look at held-out images of {', '.join(SUITES)}; with --libero, "
        "the suite that the policy's action statistics must be of",
    )
    add("--images", type=int, default=8, help="how many images to look at")
    add(
        "--render-size",
        type=int,
        help="size of the rendered image, px; the policy's own if not given",
    )
    add("--dtype", choices=sorted(DTYPES), default="float32")
    return parser


@torch.no_grad()
def _action_mass(options: argparse.Namespace) -> torch.Tensor:
    """[images, T] on the first held-out starts of a suite, task by task."""
    chosen = suite(options.suite)
    chosen.require_simulator()
    policy = load_policy(Path(options.checkpoint), DTYPES[options.dtype], options.unnorm_key)
    torch.nn.Module.to(policy.model, "cuda" if torch.cuda.is_available() else "cpu")
    env = make_env(
        env_config(
            EnvironmentConfig(suite=options.suite, render_size=options.render_size),
            policy.processor,
        )
    )
    tasks = task_ids(chosen, None)
    by_task = [starts(chosen, [task], "held_out") for task in tasks]
    chosen_starts = in_turn(by_task)[: options.images]
    seen = [env.reset(start.task_id, start.init_state_id) for start in chosen_starts]
    env.close()
    images = torch.from_numpy(np.stack([observation.image for observation in seen]))
    prompts = [policy.processor.prompt(o.instruction) for o in seen]
    return policy.action_mass(images, prompts, proprio=observed_proprio(seen))


def in_turn(by_task: Sequence[Sequence[Start]]) -> list[Start]:
    """The first start of each task, then the second of each that has one, and so on."""
    laps = zip_longest(*by_task)
    return [start for lap in laps for start in lap if start is not None]


def _show(findings: Sequence[Finding]) -> None:
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        mark = "FAULT" if finding.is_fault else "ok"
        indent = " " * (width + 9)
        text = textwrap.fill(
            finding.says, WIDTH, initial_indent=indent, subsequent_indent=indent
        ).lstrip()
        logger.info("%-*s  %-5s  %s", width, finding.subject, mark, text)
