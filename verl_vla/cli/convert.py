"""Convert a checkpoint folder that cannot be read here into one that can; the source stays.

Pickled weights become safetensors, prefixes of wrappers are taken off, adapters of PEFT are merged
into their base, and ``norm_stats`` of config.json becomes dataset_statistics.json.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from verl_vla.cli.doctor import EXIT_FAULT
from verl_vla.core.errors import ConfigError
from verl_vla.policies.convert import carry_out, plan_conversion
from verl_vla.policies.registry import examine

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    """Print what is done, do it, and return 1 if the result still has a fault."""
    source, target = Path(options.source), Path(options.target)
    # before gigabytes are read
    if target.exists():
        raise ConfigError(f"{target} is there already; name a new folder")
    conversion = plan_conversion(source, None if options.base is None else Path(options.base))
    for step in conversion.steps:
        logger.info("%s", step)
    logger.info("copy %s", ", ".join(sorted(conversion.files)))
    if options.dry_run:
        logger.info("nothing was written; leave out --dry-run to write %s", target)
        return 0
    carry_out(conversion, target)
    logger.info("%d weights, written to %s", len(conversion.weights), target)
    faults = [finding for finding in examine(target) if finding.is_fault]
    for fault in faults:
        logger.info("%s: FAULT: %s", fault.subject, fault.says)
    return EXIT_FAULT if faults else 0
