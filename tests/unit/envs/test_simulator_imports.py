"""What a simulator process need not load."""

from __future__ import annotations

import subprocess
import sys


def test_a_simulator_process_imports_no_torch() -> None:
    """It would cost each of them two processor seconds and 200 MB."""
    code = (
        "import sys\n"
        "import verl_vla.envs.pool.worker\n"
        "from verl_vla.envs.base import EnvConfig\n"
        "from verl_vla.envs.libero.suite import make_libero_env\n"
        "from verl_vla.envs.registry import suite\n"
        "make_libero_env(EnvConfig())\n"
        "import verl_vla.envs.libero.simulator\n"
        "suite('libero_spatial').load_init_states(0)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
