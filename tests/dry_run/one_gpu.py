"""Ask the fake device for memory as PyTorch does; print what came of it as JSON.

one_gpu.py, under the shim, with a device of 4 GB.
"""

from __future__ import annotations

import json
import sys

import torch
from torch.cuda.memory import caching_allocator_alloc, caching_allocator_delete

from verl_vla.trainer.dry_run.memory_ledger import MemoryLedger

GB, MB = 10**9, 10**6
found = {
    "devices": torch.cuda.device_count(),
    "capability": torch.cuda.get_device_capability(),
    "total": torch.cuda.mem_get_info()[1],
}
stream = torch.cuda.current_stream()
blocks = [caching_allocator_alloc(GB, 0, stream) for _ in range(3)]
found["free_of_4"] = torch.cuda.mem_get_info()[0]
try:
    caching_allocator_alloc(2 * GB, 0, stream)
except torch.OutOfMemoryError as error:
    found["refused"] = str(error)
for block in blocks:
    caching_allocator_delete(block)
found["kept"] = torch.cuda.memory_reserved()
torch.cuda.empty_cache()
found["kept_after_emptying"] = torch.cuda.memory_reserved()
try:
    torch.ones(1, device="cuda")
except RuntimeError as error:
    found["kernel"] = str(error)

ledger = MemoryLedger()
with ledger.following_resizes(), ledger:
    ledger.begin("one")
    weight = torch.empty(100 * MB, dtype=torch.uint8, device="cuda")
    view = weight.view(2, -1)
    found["of_a_view"] = torch.cuda.memory_allocated()
    weight.untyped_storage().resize_(0)
    found["shrunk"] = torch.cuda.memory_allocated()
    weight.untyped_storage().resize_(50 * MB)
    found["grown"] = torch.cuda.memory_allocated()
    del weight, view
    found["gone"] = torch.cuda.memory_allocated()
    ledger.begin("two")
    on_host = torch.empty(10 * MB, dtype=torch.uint8)
    product = torch.empty(64, 32, device="cuda") @ torch.empty(32, 16, device="cuda")
    found["false"] = bool(product.isnan().any())
    with ledger.answering(True):
        found["true"] = bool(product.isnan().any())
    found["number"] = product.sum().item()
    ledger.complete()
found["phases"] = [
    (p.name, p.allocated, p.reserved, p.fragmented, p.free, p.host, p.flops) for p in ledger.phases
]
sys.stdout.write(json.dumps(found))
