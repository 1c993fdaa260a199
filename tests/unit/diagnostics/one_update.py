"""Two updates of a small policy under FSDP2 on the CPU; prints how many bytes they added at most.

one_update.py CHECKPOINT_FOLDER BATCH CHECKPOINTING
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from verl_vla.diagnostics.planning.trace import PROMPT_TOKENS
from verl_vla.policies.action_distribution import log_prob
from verl_vla.policies.openvla_oft import OpenVLAOFTModel
from verl_vla.policies.registry import load_config


def resident(line: str) -> int:
    """``VmRSS``, bytes now, or ``VmHWM``, bytes at most."""
    for entry in Path("/proc/self/status").read_text().splitlines():
        if entry.startswith(line):
            return int(entry.split()[1]) * 1024
    raise AssertionError(line)


def warm_up() -> None:
    """Load what torch loads at its first product, attention and update."""
    x = torch.randn(1, 2, 8, 16, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(x, x @ x.mT @ x, x).sum().backward()
    torch.optim.AdamW([x]).step()


def main() -> None:
    config = load_config(sys.argv[1])
    batch = int(sys.argv[2])
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    warm_up()
    before = resident("VmRSS")
    model = OpenVLAOFTModel(config).train()
    precision = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for part in model.modules():
        if type(part).__name__ in model._no_split_modules:
            fully_shard(part, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    size, action_tokens = (
        config.image_size,
        torch.zeros(batch, config.num_action_tokens, dtype=torch.int64),
    )
    ids = torch.ones(batch, PROMPT_TOKENS, dtype=torch.int64)
    for num_passes in (1, 2):  # the second update has the optimizer's state, and adds gradients up
        for _ in range(num_passes):
            logits = model(
                torch.randn(batch, 3, size, size), ids, action_tokens=action_tokens
            ).logits
            log_prob(logits, action_tokens, 1.0).sum().backward()
            del logits
        optimizer.step()
        optimizer.zero_grad()
    sys.stdout.write(f"{resident('VmHWM') - before}\n")


if __name__ == "__main__":
    main()
