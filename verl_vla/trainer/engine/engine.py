"""veRL's FSDP engine around a vision-language-action policy.

One row is one policy step: an image, a prompt and T action tokens. The engine runs the model's
own ``forward``, so that FSDP2's hooks fire, and never builds logits of the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name, get_torch_device
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine
from verl.workers.engine.utils import detach_tree

from verl_vla.policies.action_distribution import entropy, log_prob
from verl_vla.policies.base import ActionLogits, ActionSampler
from verl_vla.policies.lora import nf4, without_adapters
from verl_vla.policies.registry import load_model, load_processor
from verl_vla.trainer.engine.divergence_guard import FiniteGuard, all_finite, plain_rows
from verl_vla.trainer.engine.fsdp import keep_gathered, shard, shed_gathered
from verl_vla.trainer.engine.optimizers import build_optimizer, make_state
from verl_vla.trainer.engine.weights import (
    load_trained,
    refuse_code,
    save_trained,
    trained,
    write_policy,
)
from verl_vla.trainer.grpo.rows import dense, pack_like_language_model, right_padded, stacked
from verl_vla.trainer.verl_compat.process import MODEL_TYPE


class VLAEngine(FSDPEngine):
    """Builds, shards, runs, saves and exports the policy on one rank."""

    num_optimizer_steps = 0
    """Number of optimizer steps since the last rollout; 0 during the first mini-batch."""
    guard: FiniteGuard
    """Set before the first update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        """This rank's losses of the micro-batches since the last optimizer step."""
        self._holds_all_weights = False

    @property
    def is_quantized(self) -> bool:
        """True where the weights under adapters are held in 4 bits, on one rank and not sharded."""
        return self.model_config.override_config["quantization"] == "nf4"

    def _build_module(self) -> nn.Module:
        folder = str(self.model_config.local_path)
        self.processor = load_processor(folder, self.model_config.override_config["unnorm_key"])
        module = load_model(
            folder,
            dtype=PrecisionType.to_dtype(self.engine_config.model_dtype),
            attn_implementation=self.model_config.hf_config._attn_implementation,
        )
        if self.model_config.enable_gradient_checkpointing:
            # the reentrant kind gives no gradients behind a frozen embedding
            module.gradient_checkpointing_enable({"use_reentrant": False})
        return module

    def _build_lora_module(self, module: nn.Module) -> Any:
        """Add adapters where the model says; veRL's own way needs a language model's methods.

        Frozen weights keep the dtype they were loaded in, trained ones are float32.
        """
        config, model = self.model_config, cast("Any", module)
        # the same adapters on every rank, and no other random number of the process moves
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.engine_config.seed)
            model.add_adapters(
                rank=config.lora_rank, alpha=config.lora_alpha, targets=config.target_modules
            )
        for weight in module.parameters():
            if weight.requires_grad:
                # a step of the optimizer can be smaller than one of bfloat16, and would be lost
                weight.data = weight.data.float()
        if self.is_quantized:
            nf4().quantize_under_adapters(model.decoder, get_device_id())
        return module

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        """Shard it; 4-bit weights stay whole, since FSDP2 would lose what belongs to them."""
        precision: dict[str, Any] = dict(self.engine_config.mixed_precision or {})
        self._autocast_dtype = PrecisionType.to_dtype(precision["param_dtype"])
        # no loss scaling: bfloat16 has the range of float32
        self.scaler = None
        if self.is_quantized:
            return module.to(get_device_id())
        # pinning needs an accelerator
        pin_memory = get_device_name() != "cpu"
        offload = CPUOffloadPolicy(pin_memory) if self.engine_config.offload_policy else None
        self._uses_fsdp2_cpu_offload_policy = offload is not None
        return shard(module, self.device_mesh, self.engine_config, offload)

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(trained(module), self.optimizer_config)

    def _build_lr_scheduler(
        self, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """Warm up linearly; veRL's schedule begins at 0, so that its first step learns nothing."""
        warmup = max(0, self.optimizer_config.lr_warmup_steps or 0)  # veRL's default is -1
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1))
        )

    def optimizer_zero_grad(self) -> None:
        """Forget the gradients of the weights; the optimizer may know only their shards."""
        self.module.zero_grad()

    def run_model(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        images: Tensor,
        *,
        action_tokens: Tensor | None = None,
        sampler: ActionSampler | None = None,
        with_nll: bool = False,
        proprio: Tensor | None = None,
    ) -> ActionLogits:
        """Score ``action_tokens``, or let ``sampler`` choose some.

        Args:
            input_ids: [B, L] prompts, padded on the right.
            attention_mask: [B, L], 1 where a prompt is.
            images: [B, V, H, W, 3] uint8.
            action_tokens: [B, T] int64.
            sampler: with the noise of B policy steps.
            with_nll: whether ``action_tokens`` are demonstrated.
            proprio: [B, P] float32 as observed; only a policy that reads it needs it.
        """
        # FSDP2 casts weights and inputs itself; without it, float32 adapters meet 16-bit weights
        is_mixed = self.is_quantized and self._autocast_dtype != torch.float32
        with torch.autocast(get_device_name(), self._autocast_dtype, enabled=is_mixed):
            return self.module(
                **self.processor.model_inputs(images, proprio),
                input_ids=input_ids,
                attention_mask=attention_mask,
                action_tokens=action_tokens,
                sampler=sampler,
                with_nll=with_nll,
            )

    def sample_actions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        images: Tensor,
        noise: Tensor,
        temperature: float,
        proprio: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sample action tokens for a batch of observations, for a rollout.

        Args:
            input_ids: [n, L] prompts, padded on the right.
            attention_mask: [n, L], 1 where a prompt is.
            images: [n, V, H, W, 3] uint8.
            noise: [n, T] float64, uniform in [0, 1).
            temperature: 0 takes the most likely bin.
            proprio: [n, P] float32, as of `run_model`.

        Returns:
            On the CPU, ``action_tokens`` [n, T] int64 and ``log_probs`` [n, T] float32, zeros if
            greedy.
        """
        device = get_device_id()
        self._hold_all_weights()
        with self.eval_mode(), torch.no_grad():
            sampler = ActionSampler(noise.to(device), temperature)
            output = self.run_model(
                input_ids.to(device),
                attention_mask.to(device),
                images.to(device),
                sampler=sampler,
                proprio=proprio,
            )
            assert output.logits is not None and output.action_tokens is not None
            log_probs = sampler.log_prob(output.logits, output.action_tokens)
        return output.action_tokens.cpu(), log_probs.cpu()

    def _hold_all_weights(self) -> None:
        """Gather them once for a rollout, not for every policy step, where the recipe lets us."""
        is_asked_for: bool = self.model_config.override_config["gather_once"]
        # weights that are offloaded for want of device memory must not stay gathered there
        may = is_asked_for and not self._uses_fsdp2_cpu_offload_policy
        if may and torch.distributed.get_world_size() > 1 and not self._holds_all_weights:
            keep_gathered(self.module)
            self._holds_all_weights = True

    def _hold_shards_alone(self) -> None:
        """Let go of what `_hold_all_weights` has gathered."""
        if self._holds_all_weights:
            shed_gathered(self.module, self.engine_config.reshard_after_forward)
            self._holds_all_weights = False

    def train_mode(self, **kwargs: Any) -> Any:
        """As veRL does, with the shards alone."""
        # the update changes the shards, and gathered copies would keep the old weights
        self._hold_shards_alone()
        return super().train_mode(**kwargs)

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable[..., Any], forward_only: bool = False
    ) -> Any:
        """Run a mini-batch in micro-batches of at most ``max_token_len_per_gpu`` rows.

        veRL counts the ids of ``input_ids``. A row costs its images and action tokens, whatever
        its prompt's length, so every row is given one id.
        """
        one_each = torch.ones(len(data), 1, dtype=torch.long)
        by_rows = data.copy()
        by_rows["input_ids"] = by_rows["attention_mask"] = one_each
        return super().forward_backward_batch(by_rows, loss_function, forward_only)  # pyright: ignore[reportArgumentType]

    def forward_step(
        self,
        micro_batch: TensorDict,
        loss_function: Callable[..., Any] | None,
        forward_only: bool,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run one micro-batch; veRL calls ``backward`` on the loss."""
        micro_batch = micro_batch.to(get_device_id())
        temperature = float(tu.get_non_tensor_data(micro_batch, "temperature", None))
        prompts, responses = micro_batch["prompts"], micro_batch["responses"]
        ids, attention = right_padded(prompts)
        shape = self.processor.shape
        # veRL's padding rows respond with an end of sequence, which may be no bin; their mask is 0
        action_tokens = dense(responses, shape.num_tokens).clamp(max=shape.num_bins - 1)
        images, proprio = (stacked(micro_batch[name]) for name in ("images", "proprio"))
        logits = self.run_model(
            ids, attention, images, action_tokens=action_tokens, proprio=proprio
        ).logits
        assert logits is not None
        # at the rollout's temperature, or the ratio of an unchanged policy would not be 1
        log_probs = log_prob(logits, action_tokens, temperature)
        # only reported: the loss has no entropy bonus
        with torch.no_grad():
            spread = entropy(logits.detach(), temperature)
        # veRL asks for log-probs alone, and reads them where a language model has them
        if loss_function is None:
            output = {
                "log_probs": pack_like_language_model(log_probs, prompts, responses),
                "entropy": pack_like_language_model(spread, prompts, responses),
            }
            # nothing calls backward() on it; veRL wants a tensor in this place
            return log_probs.sum(), {
                "model_output": detach_tree(output),
                "loss": 0.0,
                "metrics": {},
            }
        loss, metrics = loss_function(log_probs=log_probs, entropy=spread, data=micro_batch)
        # by it `summarise_update` finds the first step's micro-batches
        metrics["optimizer_step"] = self.num_optimizer_steps
        # `optimizer_step` leaves the step out where one of these is not finite
        self.losses.append(loss.detach().item())
        return loss, {"model_output": {}, "loss": self.losses[-1], "metrics": metrics}

    def train_batch(self, data: TensorDict, loss_function: Callable[..., Any]) -> Any:
        """Learn from a mini-batch.

        Raises:
            DivergedError: too many optimizer steps in a row were left out.
        """
        output = super().train_batch(data, loss_function)
        # a lambda: the rows are copied only if they are to be written
        self.guard.count(output["metrics"]["grad_norm"], lambda: plain_rows(data), self.export)
        return output

    def optimizer_step(self) -> float:
        """Clip, step, and count; a step is left out where a loss or the gradient is not finite.

        Returns:
            The gradient's norm before clipping; not finite where the step was left out.
        """
        if all_finite(self.losses):
            norm = super().optimizer_step()  # which leaves out what has no finite norm
        else:
            self.optimizer_zero_grad()
            norm = math.nan
        self.losses.clear()
        self.num_optimizer_steps += 1
        return norm

    def save_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        global_step: int = 0,
        max_ckpt_to_keep: int | None = None,
        **kwargs: Any,
    ) -> None:
        """As veRL does; on a CPU there is nothing to move to a device first."""
        # the file of a rank holds its shard: gathered copies are whole and of the forward's dtype
        self._hold_shards_alone()
        if get_device_name() != "cpu":
            super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep, **kwargs)
        else:
            self.checkpoint_manager.save_checkpoint(
                local_path=local_path,
                global_step=global_step,
                max_ckpt_to_keep=max_ckpt_to_keep,  # pyright: ignore[reportArgumentType]
            )
        if self._is_lora:
            save_trained(self.module, local_path)
        torch.distributed.barrier()

    def load_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        del_local_after_load: Any = True,
        **kwargs: Any,
    ) -> None:
        """As veRL does, and what is trained beside a frozen base."""
        # gathered copies would keep the old weights
        self._hold_shards_alone()
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load, **kwargs)
        # "model" is not among the contents of such a checkpoint, see `checkpoint_contents`
        if self._is_lora:
            load_trained(self.module, local_path)

    def make_optimizer_state(self) -> None:
        """Give the optimizer the state that its first step would make; see `make_state`."""
        self._hold_shards_alone()
        assert self.optimizer is not None, "only a reference policy has none"
        make_state(self.optimizer, trained(self.module))

    def drop_optimizer_state(self) -> None:
        """Forget the optimizer's state, as before the first step, and free its memory."""
        assert self.optimizer is not None, "only a reference policy has none"
        self.optimizer.state.clear()
        if get_device_name() != "cpu":
            get_torch_device().empty_cache()

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Answer as the reference policy, which the KL term asks for."""
        return without_adapters(self.module)

    def export(self, folder: Path) -> None:
        """Write a checkpoint folder that `verl_vla eval` and transformers load.

        Adapters are merged into the weights that they were trained on, 4-bit ones included.
        """
        # gathered copies are of the forward's dtype
        self._hold_shards_alone()
        write_policy(self.module, self.processor, folder, is_quantized=self.is_quantized)


# veRL imports this module in trainer and ranks (``external_lib``), before it reads a file
refuse_code()
# not as a decorator, which would hide the type of the class from whoever extends it
EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp2"], device=["cuda", "npu", "cpu"])(
    VLAEngine
)
