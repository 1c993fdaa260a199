"""The training engine of a rank, without Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from verl.trainer.config import CheckpointConfig
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine_workers import TrainingWorker

from verl_vla.trainer.engine.divergence_guard import FiniteGuard
from verl_vla.trainer.engine.engine import VLAEngine
from verl_vla.trainer.engine.weights import checkpoint_contents
from verl_vla.trainer.verl_compat.process import MODEL_TYPE


def make_engine(
    policy: Path, diverged: Path, *, lora_rank: int = 0, param_dtype: str = "fp32"
) -> VLAEngine:
    """The embedded policy, as a training run on a CPU holds it; it allows two skips in a row."""
    precision = {"param_dtype": param_dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    contents = checkpoint_contents(has_adapters=lora_rank > 0)
    engine = VLAEngine(
        HFModelConfig(
            path=str(policy),
            model_type=MODEL_TYPE,
            use_remove_padding=False,
            enable_gradient_checkpointing=False,
            override_config={
                "attn_implementation": "sdpa",
                "unnorm_key": None,
                "quantization": "none",
                "gather_once": True,
            },
            lora_rank=lora_rank,
            lora_alpha=16,
            target_modules="all-linear",
        ),
        FSDPEngineConfig(
            strategy="fsdp2", use_torch_compile=False, model_dtype="fp32", mixed_precision=precision
        ),
        FSDPOptimizerConfig(optimizer="adamw", lr=1e-3, clip_grad=1.0, total_training_steps=9),
        CheckpointConfig(save_contents=contents, load_contents=contents),
    )
    engine.initialize()
    engine.guard = FiniteGuard(folder=diverged, max_in_a_row=2)
    return engine


def training_worker(engine: VLAEngine, *, micro_batch_size: int) -> TrainingWorker:
    """veRL's worker around an engine, without the process group that Ray would give it."""
    worker: Any = TrainingWorker.__new__(TrainingWorker)
    worker.engine, worker.device_name, worker.flops_counter = engine, "cpu", None
    worker.profiler = SimpleNamespace(
        step=lambda: None, rank=engine.get_data_parallel_rank(), check_enable=lambda: False
    )
    worker.model_config = {}
    worker.engine_config = SimpleNamespace(
        forward_only=False,
        use_dynamic_bsz=True,
        max_token_len_per_gpu=micro_batch_size,
        infer_max_token_len_per_gpu=micro_batch_size,
        micro_batch_size_per_gpu=None,
        infer_micro_batch_size_per_gpu=None,
        use_fused_kernels=False,
    )
    return worker
