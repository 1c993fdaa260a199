"""The stand-in for veRL's request router: veRL finds it, and it costs next to nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from verl.workers.rollout.router import _load_router_yaml, _resolve_router_class

from verl_vla.trainer.grpo import no_router

FOLDER = Path(no_router.__file__).parent


def test_verl_resolves_it() -> None:
    config = _load_router_yaml(str(FOLDER / "no_router.yaml"))
    assert _resolve_router_class(config["router_class"]) is no_router.NoRouter
    no_router.NoRouter({"here": None}, config)


def test_its_process_imports_no_framework() -> None:
    program = (
        "import sys, verl_vla.trainer.grpo.no_router as _;print({*sys.modules} & {'verl', 'torch'})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
