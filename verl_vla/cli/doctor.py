"""Check whether this machine, or with ``--policy`` a checkpoint, can train.

With a recipe the machine is compared with what that recipe needs: disk, GPUs and their memory.
``--libero`` instead checks whether evaluations here match LIBERO's, and lists the differences in
order of their effect on a success rate. ``--fix`` also prints commands that fix the faults, without
running them.
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

from verl_vla.cli.arguments import STDOUT, make_parser
from verl_vla.cli.plan import policy_config
from verl_vla.config.choices import GPUS, Gpu
from verl_vla.config.compose import load_recipe
from verl_vla.config.grpo import Recipe
from verl_vla.config.shared import EnvironmentConfig
from verl_vla.core.episode import Start
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import atomic_write, require_place
from verl_vla.core.text import TextTable
from verl_vla.diagnostics.libero_check import as_rows, describe
from verl_vla.diagnostics.libero_report import examine_libero
from verl_vla.diagnostics.machine import examine_machine
from verl_vla.diagnostics.planning.plan import Plan, make_plan
from verl_vla.envs.base import Suite
from verl_vla.envs.registry import make_env, suite
from verl_vla.policies.base import DTYPES, observed_proprio
from verl_vla.policies.checks import Finding
from verl_vla.policies.openvla_oft.checks import judge_action_mass
from verl_vla.policies.registry import examine, load_policy, load_processor
from verl_vla.rl.setup import (
    describe_other_data,
    env_config,
    find_unnorm_key,
    starts,
    task_ids,
)

logger = logging.getLogger(__name__)

EXIT_FAULT = 1
"""Exit code of a fault: the machine or the checkpoint cannot train, or it differs from LIBERO."""
NOT_WITH_LIBERO = ("fix", "out", "images", "render_size", "dtype")
"""Options that ``--libero`` does not use."""
RUNS_FOLDER = "runs"
"""Folder of the runs where neither ``--out`` nor a recipe names one."""
WIDTH = 100
"""Width of the table in columns."""


def run(options: argparse.Namespace) -> int:
    """Run the checks, print the table, and return 1 if there is a fault."""
    if options.overrides and (options.libero or options.policy is not None):
        raise ConfigError(
            f"{' '.join(options.overrides)}: a recipe is compared with the machine, which --policy "
            "and --libero do not check; leave out the recipe or the option"
        )
    if options.libero:
        return _examine_libero(options)
    if options.json is not None:
        raise ConfigError(f"--json {options.json} is written by --libero only; add --libero")
    if options.policy is None:
        return _examine_machine(options)
    if options.images < 1:
        raise ConfigError(f"--images is {options.images}; set at least 1")
    findings = _examine_policy(options)
    _show(findings)
    return EXIT_FAULT if any(finding.is_fault for finding in findings) else 0


def _examine_policy(options: argparse.Namespace) -> list[Finding]:
    folder = Path(options.policy)
    chosen = None if options.suite is None else suite(options.suite)
    if chosen is not None:
        # so that all that follows uses the same statistics
        options.unnorm_key = find_unnorm_key(folder, options.unnorm_key, chosen)
    findings = examine(folder, options.unnorm_key)
    # weights with a fault may not load, and a number measured with them would mean nothing
    has_no_fault = not any(finding.is_fault for finding in findings)
    if has_no_fault and chosen is not None:
        findings.append(_judge_suite(folder, options.unnorm_key, chosen))
        findings.append(judge_action_mass(_action_mass(options)))
    elif has_no_fault:
        findings.append(
            Finding(
                subject="action mass",
                says="not measured; name a suite to look at its images, for example --suite mini",
                is_fault=False,
            )
        )
    return findings


def _judge_suite(folder: Path, unnorm_key: str | None, chosen: Suite) -> Finding:
    """Compare the data of the action statistics with the suite."""
    key = load_processor(folder, unnorm_key).codec.statistics.key
    other = describe_other_data(key, chosen)
    says = f"{chosen.name!r}, as the action statistics {key!r}" if other is None else other
    return Finding(subject="suite", says=says, is_fault=False, is_warning=other is not None)


def _examine_machine(options: argparse.Namespace) -> int:
    plan, folder = None, options.out or RUNS_FOLDER
    if options.overrides:
        recipe = load_recipe(options.overrides)
        plan, folder = _plan(recipe), options.out or recipe.out
    checks = examine_machine(Path(folder).expanduser(), plan=plan)
    _show([check.finding for check in checks])
    if options.fix:
        for check in checks:
            if check.fix is not None:
                logger.info("%s: %s", check.finding.subject, check.fix)
    return EXIT_FAULT if any(check.finding.is_fault for check in checks) else 0


def _plan(recipe: Recipe) -> Plan:
    """Plan the recipe for this machine's first GPU, or for its cores."""
    config, _ = policy_config(recipe)
    device = recipe.cluster.device
    if torch.cuda.is_available() and device != "cpu":
        found = torch.cuda.get_device_properties(0)
        # no time is asked for, so the speed does not matter
        here = Gpu(name=found.name, memory_bytes=found.total_memory, bf16_flops=1.0)
        return make_plan(recipe, config, here)
    # where GPUs are demanded and there are none, that is a finding; disk and host do not depend on
    # their kind
    return make_plan(recipe, config, next(iter(GPUS.values())) if device == "cuda" else None)


def _examine_libero(options: argparse.Namespace) -> int:
    _refuse_unused(options)
    if options.json not in (None, STDOUT):
        # the check takes a minute, and its result must have a place
        require_place(Path(options.json), "--json")
    # not to stdout, where --json may write
    sys.stderr.write("running six tasks in LIBERO's own environment, which takes a minute\n")
    checks = examine_libero(options.policy, options.unnorm_key, options.suite)
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
    """Raise an error for options that ``--libero`` would ignore."""
    # argparse does not say whether an option was given, so values are compared with defaults
    default = make_parser("doctor").get_default
    given, defaults = vars(options), {name: default(name) for name in NOT_WITH_LIBERO}
    unused = [name for name in NOT_WITH_LIBERO if given[name] != defaults[name]]
    if unused:
        shown = ", ".join(f"--{name.replace('_', '-')} {given[name]}" for name in unused)
        raise ConfigError(f"{shown}: not used by --libero; leave it out, or leave out --libero")


@torch.no_grad()
def _action_mass(options: argparse.Namespace) -> torch.Tensor:
    """Return the action mass [images, T] on the first held-out starts, alternating over tasks."""
    chosen = suite(options.suite)
    chosen.require_simulator()
    policy = load_policy(Path(options.policy), DTYPES[options.dtype], options.unnorm_key)
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
    """Return the first start of each task, then the second of each that has one, and so on."""
    laps = zip_longest(*by_task)
    return [start for lap in laps for start in lap if start is not None]


def _verdict(finding: Finding) -> str:
    return "FAULT" if finding.is_fault else "warn" if finding.is_warning else "ok"


def _show(findings: Sequence[Finding]) -> None:
    indent = " " * (max(len(finding.subject) for finding in findings) + len("  FAULT  "))
    rows = [
        [
            finding.subject,
            f"{_verdict(finding):<5}",
            textwrap.fill(
                finding.says, WIDTH, initial_indent=indent, subsequent_indent=indent
            ).lstrip(),
        ]
        for finding in findings
    ]
    logger.info("%s", TextTable([], rows, left=range(3)))
