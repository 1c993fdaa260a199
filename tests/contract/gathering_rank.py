"""One of two ranks that play and learn with weights gathered once; writes what it counted."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from verl_vla.trainer.engine.fsdp import keep_gathered, shed_gathered

NUM_LAYERS, WIDTH, POLICY_STEPS = 3, 8, 4


class Rank:
    """A few sharded layers, and how often weights were gathered."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))
        for layer in self.model:
            fully_shard(layer, reshard_after_forward=True)
        fully_shard(self.model, reshard_after_forward=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.gathers = 0
        gather = _fsdp_param_group.foreach_all_gather

        def counted(*args, **kwargs):
            self.gathers += 1
            return gather(*args, **kwargs)

        _fsdp_param_group.foreach_all_gather = counted

    def play(self) -> tuple[int, list[float]]:
        """Decide a few times; return how many gathers that took, and what came out."""
        before = self.gathers
        seen = torch.linspace(-1, 1, WIDTH)[None]
        with torch.no_grad():
            for _ in range(POLICY_STEPS):
                answer = self.model(seen)
        return self.gathers - before, answer.flatten().tolist()

    def learn(self) -> None:
        self.model(torch.ones(1, WIDTH)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def shards(self) -> list[Tensor]:
        return [weight.to_local() for weight in self.model.parameters()]


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    one = Rank()
    found = {"each": one.play()}
    keep_gathered(one.model)
    found["kept"] = one.play()
    found["kept_again"] = one.play()
    shed_gathered(one.model, True)
    assert all(len(shard) < WIDTH for shard in one.shards()), "whole weights have gone"
    one.learn()
    found["learned"] = one.play()
    keep_gathered(one.model)
    found["kept_after_learning"] = one.play()
    whole = {name: list(w.shape) for name, w in one.model.named_parameters()}
    state = {name: list(w.full_tensor().shape) for name, w in one.model.state_dict().items()}
    assert state == whole, "a policy can be exported in the middle"
    found["kept_after_export"] = one.play()
    torch.distributed.barrier()  # gloo aborts a rank whose partner is gone
    torch.distributed.destroy_process_group()
    (folder / f"counted_{rank}.json").write_text(json.dumps(found))
