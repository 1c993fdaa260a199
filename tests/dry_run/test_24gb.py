"""The profiles of one GPU of 24 GB, without the GPU."""

from __future__ import annotations

import pytest
from published import AGREEMENT, GB, beyond_training, disagreements, least_free, replayed

from verl_vla.trainer.dry_run.shim import shim_is_missing

LARGEST_EXPORT = 4 * GB
"""Bytes of the host that an export may take."""

pytestmark = pytest.mark.skipif(
    shim_is_missing() is not None, reason=f"no dry run here: {shim_is_missing()}"
)


@pytest.mark.parametrize("profile", ["lora_24gb", "qlora_24gb"])
def test_a_24_gb_profile_fits_and_the_plan_says_what_it_takes(profile: str, monkeypatch) -> None:
    plan, result = replayed(profile, "a10g", monkeypatch)
    assert result.fits, result.out_of_memory
    assert least_free(plan, result) >= AGREEMENT
    assert not disagreements(plan, result)
    assert beyond_training(result, "export") <= 2 * plan.trace.layer
    assert result.worst("export").host < LARGEST_EXPORT
