"""The GPUs that a plan knows."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Kind of GPU of a rank."""

    name: str
    memory_bytes: int
    """Memory as ``nvidia-smi`` reports it, which is less than the name says."""
    bf16_flops: float
    """Peak FLOPs per second of dense matrix products with float32 accumulation; data sheet."""


GPUS = {
    "a100-80": Gpu(name="A100 80 GB", memory_bytes=81_920 * MIB, bf16_flops=312e12),
    "a100-40": Gpu(name="A100 40 GB", memory_bytes=40_960 * MIB, bf16_flops=312e12),
    "a10g": Gpu(name="A10G 24 GB", memory_bytes=23_028 * MIB, bf16_flops=70e12),
    "h100": Gpu(name="H100 SXM 80 GB", memory_bytes=81_559 * MIB, bf16_flops=989e12),
    "h200": Gpu(name="H200 141 GB", memory_bytes=143_771 * MIB, bf16_flops=989e12),
    "rtx4090": Gpu(name="RTX 4090 24 GB", memory_bytes=24_564 * MIB, bf16_flops=165e12),
}
