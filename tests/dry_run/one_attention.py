"""Run one layer of the published policy with and without padding; print how attention is computed.

one_attention.py, under the shim.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from verl_vla.diagnostics.planning.trace import PROMPT_TOKENS
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig
from verl_vla.trainer.dry_run.memory_ledger import MemoryLedger
from verl_vla.trainer.dry_run.stand_ins import _convert

ROWS = 8
NAME = "scaled_dot_product"


class Names(TorchDispatchMode):
    """Operators of attention by the number of values of a head, and whether they have a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, str, bool]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if NAME in name and "backward" not in name:
            has_mask = len(args) > 3 and isinstance(args[3], torch.Tensor)
            self.found.add((args[0].shape[-1], name, has_mask))
        return func(*args, **(kwargs or {}))


def main() -> None:
    config = OpenVLAOFTConfig()
    towers = [asdict(replace(tower, depth=2)) for tower in config.towers]
    config = OpenVLAOFTConfig(vision_towers=towers)
    config.language.num_hidden_layers = 1
    ledger = MemoryLedger()
    with ledger.following_resizes(), ledger:
        with unset_fake_temporarily(), torch.device("meta"):
            model: Any = AutoModel.from_config(config).to(torch.bfloat16)
        made = {"dtype": torch.bfloat16, "device": "cuda"}
        model = _convert(model, lambda tensor: torch.empty(tensor.shape, **made)).train()
        inputs = {
            "pixel_values": torch.empty(ROWS, 6, config.image_size, config.image_size, **made),
            "input_ids": torch.empty(ROWS, PROMPT_TOKENS, dtype=torch.int64, device="cuda"),
        }
        mask = torch.ones(ROWS, PROMPT_TOKENS, dtype=torch.int64, device="cuda")
        cases = {"none": (None, False), "all true": (mask, True), "padded": (mask, False)}
        found: dict[str, Any] = {}
        for case, (given, is_all_true) in cases.items():
            with ledger.answering(is_all_true), Names() as names:
                model(**inputs, attention_mask=given).logits.sum().backward()
            found[case] = sorted(names.found)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
