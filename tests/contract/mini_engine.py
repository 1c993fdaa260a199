"""The training engine of a rank, without Ray."""

from __future__ import annotations

from pathlib import Path

from verl.trainer.config import CheckpointConfig
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

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
