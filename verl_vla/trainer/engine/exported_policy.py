"""A policy that is spread over ranks, as a folder that can be loaded alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModel

from verl_vla.policies.base import Processor
from verl_vla.policies.lora import merge_adapters, nf4


def write_policy(
    module: nn.Module,
    processor: Processor,
    folder: Path,
    *,
    is_quantized: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the weights, merged and whole, and everything else; every rank takes part.

    Args:
        module: of this rank.
        processor: of the policy.
        folder: made where it is missing.
        is_quantized: whether weights under adapters are held in 4 bits.
        dtype: of the weights that are written; None leaves each in its own.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = (
        nf4().plain_state(module) if is_quantized else get_model_state_dict(module, options=options)
    )
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        whole: dict[str, Tensor] = merge_adapters(module, state)
        with torch.device("meta"):
            plain = AutoModel.from_config(cast("Any", module).merged_config())
        plain.save_pretrained(
            str(folder),
            state_dict={name: w if dtype is None else w.to(dtype) for name, w in whole.items()},
        )
        processor.save_pretrained(folder)
    torch.distributed.barrier()
