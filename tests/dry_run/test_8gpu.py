"""One rank of profile 8gpu on an A100 of 80 GB, without the A100."""

from __future__ import annotations

import pytest
from published import AGREEMENT, GB, disagreements, least_free, replayed

from verl_vla.trainer.dry_run.shim import shim_is_missing

LARGEST_EXPORT = 4 * GB
"""Bytes of the host that an export may take."""

pytestmark = pytest.mark.skipif(
    shim_is_missing() is not None, reason=f"no dry run here: {shim_is_missing()}"
)


def test_a_rank_of_8gpu_fits_and_the_plan_says_what_it_takes(monkeypatch) -> None:
    plan, result = replayed("8gpu", "a100-80", monkeypatch)
    assert result.fits, result.out_of_memory
    assert least_free(plan, result) >= AGREEMENT
    assert not disagreements(plan, result)
    assert result.worst("export").host < LARGEST_EXPORT
    # each row of the update costs three forward passes
    rows = sum(int(p.name.split()[-2]) for p in result.phases if p.name.startswith("update"))
    flops = sum(p.flops for p in result.phases if p.name.startswith("update"))
    assert flops / rows == pytest.approx(plan.trace.training_flops, rel=AGREEMENT)
