"""What an index of packages has: versions of everything that fit together."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from project_extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
UV = ROOT / ".venv" / "uv" / "bin" / "uv"


@pytest.mark.skipif(not UV.exists(), reason=".venv was not made by scripts/_setup.sh")
def test_all_extras_together_resolve_beside_the_base() -> None:
    """A dry resolution: nothing is installed. What resolves together resolves alone."""
    chosen = " ".join(f"--extra {extra}" for extra in EXTRAS)
    done = subprocess.run(
        [
            "bash",
            "-c",
            'source scripts/_setup.sh; settings=$("$python" -m pip config list); '
            "take_over_pip_settings; "
            '"$uv" pip compile --quiet --python-version 3.11 --no-annotate --no-header '
            "--python-platform x86_64-manylinux_2_28 "
            f"{chosen} pyproject.toml requirements/run.in",
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = {line.split("==")[0] for line in done.stdout.splitlines()}
    assert names >= {"flash-attn", "bitsandbytes", "deepspeed", "mlflow", "swanlab", "vllm"}
