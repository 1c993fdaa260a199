"""A script of a test in a process of its own, which finds this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def run_script(script: str, limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run an indented script to its end; one that takes longer than ``limit_s`` is an error."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
