"""One rank of a fine-tuning run: veRL's FSDP engine, fed with demonstrations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn
from verl.trainer.config import CheckpointConfig
from verl.utils.device import get_device_id
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

from verl_vla.datasets.sft_dataset import SampleBatch
from verl_vla.policies.base import DTYPES
from verl_vla.trainer.engine.divergence_guard import FiniteGuard
from verl_vla.trainer.engine.engine import VLAEngine
from verl_vla.trainer.engine.weights import checkpoint_contents, write_policy
from verl_vla.trainer.grpo.verl_config import PRECISION
from verl_vla.trainer.sft.loss import smoothed_nll, soft_targets
from verl_vla.trainer.sft.run import SFTRun
from verl_vla.trainer.verl_compat.process import MODEL_TYPE

NLL, ACCURACY = range(2)
"""Columns of the sums that ranks add up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTOutput:
    """Scores of a micro-batch of n samples, [n] each."""

    loss: Tensor
    """Mean loss of a sample's labels, nats; it has a gradient."""
    nll: Tensor
    """The same without smoothing, so that runs with different smoothing can be compared."""
    accuracy: Tensor
    """Share of the sample's tokens whose likeliest bin is demonstrated."""

    def measured(self) -> Tensor:
        """Return [2, n] float64 on the CPU: what is reported, without a gradient."""
        return torch.stack([self.nll, self.accuracy]).double().cpu()


class SFTEngine(VLAEngine):
    """Learns to choose the demonstrated bins or their neighbours, and to stop behind them."""

    def __init__(self, run: SFTRun) -> None:
        """Describe the engine in veRL's words; `initialize` builds it."""
        self._run = run
        policy, schedule = run.recipe.policy, run.recipe.optimizer
        self.guard = FiniteGuard(
            folder=run.folder / "diverged", max_in_a_row=schedule.max_skipped_in_a_row
        )
        contents = checkpoint_contents(has_adapters=policy.lora_rank is not None)
        first, second = schedule.betas
        super().__init__(
            HFModelConfig(
                path=str(run.policy_folder),
                model_type=MODEL_TYPE,
                trust_remote_code=False,
                use_remove_padding=False,
                enable_gradient_checkpointing=policy.gradient_checkpointing,
                override_config={
                    "attn_implementation": policy.attention,
                    # the first policy has the statistics of these demonstrations only
                    "unnorm_key": None,
                    "quantization": "none",
                    "gather_once": True,
                },
                lora_rank=policy.lora_rank or 0,
                lora_alpha=policy.lora_alpha,
                # as openvla-oft's ``vla-scripts/finetune.py``
                target_modules="all-linear",
            ),
            FSDPEngineConfig(
                strategy="fsdp2",
                use_torch_compile=False,
                seed=run.recipe.seed,
                # Weights stay float32 for the optimizer; FSDP casts them for the arithmetic.
                model_dtype="fp32",
                mixed_precision={
                    "param_dtype": PRECISION[policy.dtype],
                    "reduce_dtype": "fp32",
                    "buffer_dtype": "fp32",
                },
            ),
            FSDPOptimizerConfig(
                # the schedule is `_build_lr_scheduler`'s; veRL has constant and cosine only
                optimizer="adamw",
                lr=schedule.lr,
                weight_decay=schedule.weight_decay,
                betas=(first, second),
                # an infinite bound measures the norm and clips nothing
                clip_grad=math.inf if schedule.clip_grad is None else schedule.clip_grad,
                lr_warmup_steps=schedule.warmup_steps,
                total_training_steps=run.recipe.trainer.total_training_steps,
            ),
            CheckpointConfig(save_contents=contents, load_contents=contents),
        )

    def _build_module(self) -> nn.Module:
        module = super()._build_module()
        self.processor = self._run.load_processor()
        return module

    def _build_lr_scheduler(
        self, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LambdaLR:
        recipe = self._run.recipe
        total_steps = recipe.trainer.total_training_steps
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(recipe.optimizer.lr_factor, total_steps=total_steps)
        )

    def train_step(self, batch: SampleBatch) -> dict[str, float]:
        """Take one optimizer step on this rank's part of a step's batch.

        Returns:
            ``train/loss``, ``train/accuracy``, ``train/grad_norm``, ``train/skipped_steps`` and
            ``train/lr``, of all ranks together.

        Raises:
            DivergedError: too many steps in a row were left out.
        """
        size = self._run.recipe.optimizer.micro_batch_size
        sums = torch.zeros(2, dtype=torch.float64)
        # which forgets the gradients when it ends
        with self.train_mode():
            # FSDP2 shares out every micro-batch's gradients. To wait for the last one, as veRL can,
            # keeps whole gradients, which FSDP2 cannot add up in another dtype than the weights'.
            for start in range(0, len(batch.action_tokens), size):
                output = self._sft_forward(batch, slice(start, start + size))
                # FSDP averages over ranks, each of which has as many samples
                (output.loss.sum() / len(batch.action_tokens)).backward()
                # `optimizer_step` leaves the step out where one of these is not finite
                self.losses.append(float(output.loss.detach().sum()))
                sums += output.measured().sum(1)
            norm = self.optimizer_step()
            assert self.optimizer is not None
            rate = float(self.optimizer.param_groups[0]["lr"])
            # after the rate of this step was read
            self.lr_scheduler_step()
        # a lambda: the batch is copied only if it is to be written
        self.guard.count(norm, lambda: asdict(batch), self.export)
        total = self._add_up(sums)
        num_samples = self._run.recipe.optimizer.batch_size
        return {
            "train/loss": total[NLL] / num_samples,
            "train/accuracy": total[ACCURACY] / num_samples,
            "train/grad_norm": norm,
            "train/skipped_steps": float(not math.isfinite(norm)),
            "train/lr": rate,
        }

    @torch.no_grad()
    def test(self, batches: Sequence[tuple[SampleBatch, Tensor]], num_samples: int) -> list[float]:
        """Measure loss and accuracy without learning.

        Args:
            batches: this rank's part, as many on every rank; with each the weights [n] of its
                samples, 0 for one that only fills the batch.
            num_samples: weights of all ranks together.

        Returns:
            Mean loss per label (nats) and share of tokens whose likeliest bin is demonstrated.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        with self.eval_mode():
            for batch, weights in batches:
                # as many passes on every rank, since FSDP's forward is a collective
                sums += self._sft_forward(batch, slice(None)).measured() @ weights.double()
        return [total / num_samples for total in self._add_up(sums)]

    def export(self, folder: Path) -> None:
        """As training does, with the weights in the recipe's type."""
        dtype = DTYPES[self._run.recipe.policy.dtype]
        write_policy(self.module, self.processor, folder, is_quantized=False, dtype=dtype)

    def _sft_forward(self, batch: SampleBatch, rows: slice) -> SFTOutput:
        """Score a micro-batch."""
        device = get_device_id()
        prompts = [self.processor.prompt(text) for text in batch.instructions[rows]]
        ids, mask = self.processor.collate(prompts)
        action_tokens = batch.action_tokens[rows].to(device)
        output = self.run_model(
            ids.to(device),
            mask.to(device),
            batch.images[rows].to(device),
            action_tokens=action_tokens,
            with_nll=True,
        )
        assert output.logits is not None
        assert output.nll is not None
        loss = output.nll
        smoothing = self._run.recipe.optimizer.smoothing
        if smoothing:
            targets = soft_targets(action_tokens, self.processor.codec, smoothing)
            loss = smoothed_nll(output.nll, output.logits, action_tokens, targets)
        is_right = output.logits.detach().argmax(-1) == action_tokens
        return SFTOutput(
            loss=loss.mean(1), nll=output.nll.detach().mean(1), accuracy=is_right.float().mean(1)
        )

    def _add_up(self, sums: Tensor) -> list[float]:
        """Sum over the ranks."""
        on_device = sums.to(get_device_id())
        torch.distributed.all_reduce(on_device)
        return on_device.tolist()
