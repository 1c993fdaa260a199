"""The kernels of an update at its published size, and the page about them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from verl_vla.cli.plan import policy_config
from verl_vla.config.choices import GPUS
from verl_vla.config.compose import load_recipe
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.diagnostics.planning.kernels import fusible_share, kernels_of
from verl_vla.diagnostics.planning.operators import UNKNOWN
from verl_vla.diagnostics.planning.plan import make_plan
from verl_vla.trainer.dry_run import shim

TERA = 1e12
LANGUAGE_HEAD, DINO_HEAD, SIGLIP_HEAD = 4096 // 32, 1024 // 16, 1152 // 16
FLASH = "_scaled_dot_product_flash_attention"
EFFICIENT = "_scaled_dot_product_efficient_attention"
needs_shim = pytest.mark.skipif(
    shim.shim_is_missing() is not None, reason=f"no dry run here: {shim.shim_is_missing()}"
)


@pytest.fixture(scope="module")
def layer() -> dict[str, Any]:
    """One layer of the published policy on an A100 that is not there: the installed PyTorch."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("one_layer.py"))],
        env=os.environ
        | {
            "LD_PRELOAD": str(shim.build_shim()),
            "VERL_VLA_FAKE_CUDA_BYTES": str(40 * 10**9),
            "CUDA_VISIBLE_DEVICES": "0",
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_shim
def test_the_flash_kernel_takes_no_padding_and_the_memory_efficient_one_does(layer) -> None:
    towers = [[DINO_HEAD, FLASH, False], [SIGLIP_HEAD, FLASH, False]]
    assert layer["attention"] == {
        "none": [*towers, [LANGUAGE_HEAD, FLASH, False]],
        # a mask that masks nothing is left out
        "all true": [*towers, [LANGUAGE_HEAD, FLASH, False]],
        "padded": [*towers, [LANGUAGE_HEAD, EFFICIENT, True]],
    }


@needs_shim
def test_the_operators_of_a_cpu_move_what_those_of_a_gpu_move(layer) -> None:
    """What `kernels_of` counts on tensors of a CPU, against the same update on a GPU."""
    # the mask is padded there, for the memory-efficient kernel
    assert layer["moved"]["cpu"] == pytest.approx(layer["moved"]["cuda"], rel=0.01)


PAGE = PROJECT_FOLDER / "docs" / "performance.md"
PROFILES = {"8gpu": "a100-80", "lora_24gb": "a10g", "qlora_24gb": "a10g"}
NONE = "-"


def page_rows(profile: str) -> dict[str, str]:
    """Read a profile's column of the page's table of kernels."""
    lines = PAGE.read_text().splitlines()
    (head,) = [index for index, line in enumerate(lines) if line.startswith("| share of the time")]
    titles = [cell.strip() for cell in lines[head].split("|")]
    (column,) = [index for index, title in enumerate(titles) if f"`{profile}`" in title]
    end = lines.index("", head)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[head + 2 : end]]
    return {row[1]: row[column] for row in cells}


@pytest.mark.parametrize("profile", PROFILES)
def test_the_page_has_the_kernels_of_the_published_policy(profile: str) -> None:
    recipe = load_recipe(["recipe=libero", f"profile={profile}"])
    config, source = policy_config(recipe)
    assert "OpenVLA-OFT as published" in source
    plan = make_plan(recipe, config, GPUS[PROFILES[profile]])
    kernels = kernels_of(plan, config)
    assert UNKNOWN not in {part.name for part in kernels}
    total = sum(part.seconds for part in kernels)
    expected = {part.name: f"{part.seconds / total:.1%}" for part in kernels} | {
        "together, s": f"{total:.1f}",
        "TFLOP": f"{sum(part.flops for part in kernels) / TERA:,.0f}",
        "TB moved": f"{sum(part.bytes for part in kernels) / TERA:.1f}",
        "TB received": f"{sum(part.link_bytes for part in kernels) / TERA:.1f}",
        "saved by fusing, at most": f"{fusible_share(kernels):.1%}",
    }
    assert {name: cell for name, cell in page_rows(profile).items() if cell != NONE} == expected
