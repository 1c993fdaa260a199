"""The profiles of recipes/profile, one training step each, with the embedded policy on the CPU.

What a CPU needs is overridden, and nothing else: the device, and sizes. `two_cores` is the profile
of every other run here.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor
from training_runs import PROJECT, RATIO_TOLERANCE

from verl_vla.cli.main import main
from verl_vla.rewards.encoders import make_encoder
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


NOTED = """
import numpy as np

from rewards.reaching import ReachingReward
from verl_vla.rewards.encoders import make_encoder


class NotedReward(ReachingReward):
    requires = ReachingReward.requires | {"features", "frames"}

    def __init__(self, out, encoder_args):
        super().__init__()
        self.out = out
        self.encoder = make_encoder("policy_towers", encoder_args)

    def __call__(self, batch):
        views = [frames[:, 0] for frames in batch.frames]
        noted = {f"frames_{i}": clip for i, clip in enumerate(views)}
        noted |= {f"features_{i}": rows for i, rows in enumerate(batch.features)}
        here = [self.encoder.network.is_read]
        np.savez(self.out, space=batch.feature_space, is_read_here=here, **noted)
        return super().__call__(batch)
"""
"""A reward whose ranks encode, and that writes down what they were given and what they made."""


@pytest.mark.parametrize(
    "profile", ["lora_24gb", pytest.param("qlora_24gb", marks=NO_BITSANDBYTES)]
)
def test_a_profile_trains(profile: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    before, after = train([f"profile={profile}"], out)
    assert "checkpoint check: " in capfd.readouterr().out
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["global_step_1", "latest"], "nothing is left of the one before the first step"
    assert moved(before, after) == linear(before)


def test_the_profile_of_eight_gpus_trains_and_its_ranks_encode(tmp_path: Path) -> None:
    """Two ranks, and an odd number of batches."""
    (tmp_path / "noted.py").write_text(NOTED)
    arguments = {"path": str(PROJECT / "bases" / "mini"), "batch_size": 5, "device": "cpu"}
    given = ", ".join(f"{name}: {value}" for name, value in arguments.items())
    words = [
        "profile=8gpu",
        "cluster.ranks_per_node=2",
        f"reward='{tmp_path / 'noted.py'}:NotedReward'",
        f"reward_args={{out: '{tmp_path / 'noted.npz'}', encoder_args: {{{given}}}}}",
    ]
    before, after = train(words, tmp_path / "run")
    assert linear(before) < moved(before, after)
    noted = np.load(tmp_path / "noted.npz")
    episodes = sum(name.startswith("frames_") for name in noted)
    frames = [noted[f"frames_{i}"] for i in range(episodes)]
    assert -(-sum(map(len, frames)) // 5) > 2
    encoder = make_encoder("policy_towers", arguments)
    for i, rows in enumerate(encoder.encode(frames)):
        assert np.array_equal(rows, noted[f"features_{i}"]), "to the bit"
    assert str(noted["space"]) == encoder.feature_space
    assert not noted["is_read_here"].any(), "no weights in the driver"


def train(words: list[str], out: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make one training step; return the weights before and after it."""
    assert main(["train", *SMALL, *words, f"out='{out}'"]) == 0
    (line,) = read_metrics(out / "metrics.jsonl")
    assert line["actor/grad_norm"] > 0
    assert line["actor/skipped_steps"] == 0
    assert abs(line["actor/ratio_first"] - 1) < RATIO_TOLERANCE
    checkpoint = step_folder(out / "checkpoints", 1)
    before = load_file(PROJECT / "bases" / "mini" / "model.safetensors")
    after = load_file(checkpoint / "policy" / "model.safetensors")
    assert after.keys() == before.keys(), "adapters are merged where a policy is exported"
    return before, after


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the weights that changed; a frozen base has 16 bits."""
    return {
        name for name, weight in after.items() if not weight.equal(before[name].to(weight.dtype))
    }


def linear(weights: dict[str, Tensor]) -> set[str]:
    """Names of the weights that adapters are for."""
    layers = {name for name in weights if name.startswith("language_model.model.layers.")}
    return {name for name in layers if "_proj." in name}
