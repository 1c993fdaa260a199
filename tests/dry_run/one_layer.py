"""Run one layer of the published policy; print how attention is computed, and what an update moves.

one_layer.py, under the shim.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from verl_vla.diagnostics.planning.operators import OperatorCounts
from verl_vla.diagnostics.planning.trace import PROMPT_TOKENS
from verl_vla.diagnostics.planning.update_pass import REST, _label_modules, _run_update
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
            has_mask = len(args) > 3 and isinstance(args[3], Tensor)
            self.found.add((args[0].shape[-1], name, has_mask))
        return func(*args, **(kwargs or {}))


def small() -> OpenVLAOFTConfig:
    """The published sizes, with one layer that runs in each part."""
    towers = [asdict(replace(tower, depth=2)) for tower in OpenVLAOFTConfig().towers]
    config = OpenVLAOFTConfig(vision_towers=towers)
    config.language.num_hidden_layers = 1
    return config


def build(config: OpenVLAOFTConfig, device: str) -> nn.Module:
    with unset_fake_temporarily(), torch.device("meta"):
        model: Any = AutoModel.from_config(config)
    dtype = torch.bfloat16
    model = _convert(model, lambda w: torch.empty(w.shape, dtype=dtype, device=device))
    return model.train()


def attention(config: OpenVLAOFTConfig, ledger: MemoryLedger) -> dict[str, Any]:
    """Names of its operators without a mask, with one that masks nothing, and with padding."""
    model, side = build(config, "cuda"), config.image_size
    with torch.device("cuda"):
        pixels = torch.empty(ROWS, 6, side, side, dtype=torch.bfloat16)
        ids, mask = (torch.ones(ROWS, PROMPT_TOKENS, dtype=torch.int64) for _ in range(2))
    cases = {"none": (None, False), "all true": (mask, True), "padded": (mask, False)}
    found: dict[str, Any] = {}
    for case, (given, is_all_true) in cases.items():
        with ledger.answering(is_all_true), Names() as names:
            model(pixels, ids, attention_mask=given).logits.sum().backward()
        found[case] = sorted(names.found)
    return found


def moved(config: OpenVLAOFTConfig, device: str) -> dict[str, int]:
    """Bytes of an update by class of kernels."""
    model = build(config, device)
    with torch.device(device), OperatorCounts(REST) as counts:
        ids, mask = (torch.ones(ROWS, PROMPT_TOKENS, dtype=torch.int64) for _ in range(2))
        tokens = torch.ones(ROWS, config.num_action_tokens, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": mask, "action_tokens": tokens}
        images = torch.empty(ROWS, *config.shape.image_shape, dtype=torch.uint8)
        _label_modules(model, counts, {})
        _run_update(model, inputs, images, counts)
    found: Counter[str] = Counter()
    for call, number in counts.calls.items():
        found[call.kernel] += number * call.bytes
    return found


def main() -> None:
    ledger, config = MemoryLedger(), small()
    with ledger.following_resizes(), ledger:
        found = {
            "attention": attention(config, ledger),
            "moved": {device: moved(config, device) for device in ("cpu", "cuda")},
        }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
