"""The profiles of recipes/profile, one training step each, with the embedded policy on the CPU.

What a CPU needs is overridden, and nothing else: the device, and sizes. `two_cores` is the profile
of every other run here.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import PROJECT, RATIO_TOLERANCE

from verl_vla.cli.main import main
from verl_vla.runs.metrics import read_metrics
from verl_vla.trainer.checkpoint import step_folder

pytestmark = [pytest.mark.smoke, pytest.mark.sim]

SMALL = (
    "recipe=libero",
    "suite=mini",
    "cluster.device=cpu",
    "environment.tasks=[0]",
    "environment.step_limit=16",
    "environment.num_workers=1",
    "environment.num_slots=8",
    "sampling.groups_per_step=2",
    "sampling.group_size=4",
    "sampling.dynamic=false",
    "optimizer.num_mini_batches=1",
    "cold_start.mode=off",
    "reward=reaching",  # so that failures differ
    "trainer.total_training_steps=1",
    "trainer.eval_before=false",
    "trainer.eval_every=0",
)
NO_BITSANDBYTES = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes, of the extra qlora, is not installed"
)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("8gpu", ["cluster.ranks_per_node=2"]),
        ("lora_24gb", []),
        pytest.param("qlora_24gb", [], marks=NO_BITSANDBYTES),
    ],
)
def test_a_profile_trains(
    profile: str, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", *SMALL, f"profile={profile}", *words, f"out='{out}'"]) == 0
    assert "checkpoint check: " in capfd.readouterr().out
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["global_step_1", "latest"], "nothing is left of the one before the first step"
    (line,) = read_metrics(out / "metrics.jsonl")
    assert line["actor/grad_norm"] > 0
    assert line["actor/skipped_steps"] == 0
    assert abs(line["actor/ratio_first"] - 1) < RATIO_TOLERANCE
    checkpoint = step_folder(out / "checkpoints", 1)
    before = load_file(PROJECT / "bases" / "mini" / "model.safetensors")
    after = load_file(checkpoint / "policy" / "model.safetensors")
    assert after.keys() == before.keys(), "adapters are merged where a policy is exported"
    moved = {
        name
        for name, weight in after.items()
        if not torch.equal(weight, before[name].to(weight.dtype))  # a frozen base has 16 bits
    }
    layers = {name for name in before if name.startswith("language_model.model.layers.")}
    linear = {name for name in layers if "_proj." in name}
    assert linear <= moved
    assert (moved == linear) == (profile != "8gpu")
