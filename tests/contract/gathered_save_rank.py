"""One of two ranks that save and load while they hold all weights, as after an evaluation."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed
from mini_engine import make_engine

from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.trainer.engine.engine import VLAEngine
from verl_vla.trainer.engine.weights import trained


def evaluate(engine: VLAEngine) -> torch.Tensor:
    """Decide once; the weights stay gathered behind it."""
    shape = engine.processor.shape
    ids, mask = engine.processor.collate([engine.processor.prompt("push the red cube")])
    images = torch.zeros(1, *shape.image_shape, dtype=torch.uint8)
    noise = torch.full((1, shape.num_tokens), 0.5, dtype=torch.float64)
    return engine.sample_actions(ids, mask, images, noise, 1.0)[1]


def shards(engine: VLAEngine) -> list[torch.Tensor]:
    return [weight.to_local().clone() for weight in trained(engine.module)]


def main(folder: Path, rank: int, lora_rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    policy = PROJECT_FOLDER / "bases" / "mini"
    engine = make_engine(policy, folder, lora_rank=lora_rank, param_dtype="bf16")
    before, answer = shards(engine), evaluate(engine)
    assert engine._holds_all_weights
    engine.save_checkpoint(str(folder / "ranks"), global_step=1)
    assert all(map(torch.equal, shards(engine), before))
    with torch.no_grad():
        for weight in trained(engine.module):
            weight.to_local().add_(1)
    assert not torch.equal(evaluate(engine), answer)
    engine.load_checkpoint(str(folder / "ranks"), del_local_after_load=False)
    assert all(map(torch.equal, shards(engine), before)), "loaded in the shards' own dtype"
    assert torch.equal(evaluate(engine), answer), "no gathered copy is left of other weights"
    torch.distributed.barrier()  # gloo aborts a rank whose partner is gone
    torch.distributed.destroy_process_group()
