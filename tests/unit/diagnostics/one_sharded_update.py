"""Two micro-batches of a policy under FSDP2, by one rank of some; prints what FSDP2 moved.

one_sharded_update.py CONFIG RANKS,ADAPTERS ... prints a line for each pair, each of a new process.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from typing import Any

import torch
import torch.distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from verl_vla.diagnostics.planning.kernels import GATHERED, REDUCED
from verl_vla.diagnostics.planning.operators import OperatorCounts, moved_bytes
from verl_vla.diagnostics.planning.trace import PROMPT_TOKENS
from verl_vla.policies.action_distribution import log_prob
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig, OpenVLAOFTModel

ROWS = 4
STEPS = {"unshard": GATHERED, "wait_for_unshard": GATHERED, "post_backward": REDUCED}
"""Methods of FSDP2 that move weights and gradients."""
COLLECTIVES = {"_allgather_base_", "_reduce_scatter_base_"}


class Moved(OperatorCounts):
    """Bytes that FSDP2 moves in memory and between ranks."""

    def __init__(self, ranks: int) -> None:
        super().__init__("")
        self.ranks = ranks
        self.bytes = {step: [0.0, 0.0] for step in STEPS.values()}
        self._step: str | None = None
        for name, step in STEPS.items():
            setattr(FSDPParamGroup, name, self._during(step, getattr(FSDPParamGroup, name)))

    def _during(self, step: str, method: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            before, self._step = self._step, step
            try:
                return method(*args, **kwargs)
            finally:
                self._step = before

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if self._step is None:
            return result
        memory_and_link = self.bytes[self._step]
        if name in COLLECTIVES:
            # each of the ranks gives an equal part of the larger tensor
            whole = max(tensor.nbytes for tensor in args[:2])
            memory_and_link[1] += whole * (self.ranks - 1) / self.ranks
        elif name == "all_gather_copy_in":
            # returns the buffer, of which it writes the part of its own rank
            memory_and_link[0] += 2 * sum(tensor.nbytes for tensor in args[0])
        else:
            memory_and_link[0] += moved_bytes(func, args, kwargs, result)
        return result


def measure(config: OpenVLAOFTConfig, ranks: int, has_adapters: bool) -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = torch.distributed.init_device_mesh("cpu", (ranks,))
    model = OpenVLAOFTModel(config).train()
    if has_adapters:
        model.to(torch.bfloat16)
        model.add_adapters(rank=2, alpha=4, targets="language_model")
        for weight in model.parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": precision,
        "reshard_after_forward": True,
    }
    for part in model.modules():
        if type(part).__name__ in model._no_split_modules:
            fully_shard(part, **options)
    fully_shard(model, **options)
    size = config.image_size
    tokens = torch.zeros(ROWS, config.num_action_tokens, dtype=torch.int64)
    ids = torch.ones(ROWS, PROMPT_TOKENS, dtype=torch.int64)
    moved = Moved(ranks)
    with moved:
        for _ in range(2):
            logits = model(torch.randn(ROWS, 6, size, size), ids, action_tokens=tokens).logits
            log_prob(logits, tokens, 1.0).sum().backward()
    sys.stdout.write(f"{json.dumps(moved.bytes)}\n")


def main() -> None:
    config = OpenVLAOFTConfig.from_dict(json.loads(sys.argv[1]))
    # forked: what is imported above is there, and nothing has run that a fork could break
    context = multiprocessing.get_context("fork")
    for pair in sys.argv[2:]:
        ranks, has_adapters = pair.split(",")
        process = context.Process(target=measure, args=(config, int(ranks), has_adapters == "1"))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
