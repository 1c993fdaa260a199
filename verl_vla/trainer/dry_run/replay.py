"""The program of a dry run: one rank of a recipe, from loading to a resumed checkpoint.

python -m verl_vla.trainer.dry_run.replay JOB RESULT, under the shim of `fake_cuda.c`.
"""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine.fsdp import transformer_impl

from verl_vla.envs.base import EnvConfig
from verl_vla.policies.base import Processor
from verl_vla.policies.registry import load_processor
from verl_vla.rewards import load_reward
from verl_vla.trainer.dry_run.job import Job
from verl_vla.trainer.dry_run.memory_ledger import MemoryLedger
from verl_vla.trainer.dry_run.phases import Replay
from verl_vla.trainer.dry_run.stand_ins import FourBits, stand_ins
from verl_vla.trainer.engine.divergence_guard import FiniteGuard
from verl_vla.trainer.engine.engine import VLAEngine
from verl_vla.trainer.grpo.run import Run
from verl_vla.trainer.grpo.verl_config import to_verl
from verl_vla.trainer.grpo.worker import row_loss

NUM_OPTIMIZER_STEPS = 2
"""The first makes the optimizer's state, and the second meets it."""


class ReplayedEngine(VLAEngine):
    """The engine, which tells the ledger what it is about to do."""

    ledger: MemoryLedger

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        """Run one micro-batch; its phase lasts until the next one, and holds its backward pass."""
        step, rows = self.num_optimizer_steps + 1, f"{len(micro_batch)} rows"
        self.ledger.begin(f"log-probs, {rows}" if forward_only else f"update, step {step}, {rows}")
        return super().forward_step(micro_batch, loss_function, forward_only)

    def optimizer_step(self) -> float:
        """Take a step whose gradient is finite."""
        self.ledger.begin(f"optimizer step, {self.num_optimizer_steps + 1}")
        with self.ledger.answering(True):
            return super().optimizer_step()


class Rehearsal:
    """One rank's life, phase by phase."""

    def __init__(self, job: Job, ledger: MemoryLedger, scratch: Path) -> None:
        self._job = job
        self._ledger = ledger
        self._scratch = scratch
        processor = load_processor(job.policy_folder, job.recipe.policy.unnorm_key)
        self._shape = processor.shape
        self._config: Any = to_verl(_run(job, processor, scratch)).actor_rollout_ref

    def play(self) -> None:
        """Go through a training step, a checkpoint and a second start."""
        begin, folder = self._ledger.begin, str(self._scratch / "checkpoint")
        loss = self._job.recipe.loss
        begin("build")
        # veRL builds a reference policy first; with adapters it is the policy without them
        has_reference = loss.kl.is_on and self._job.recipe.policy.lora_rank is None
        reference = self._build("ref") if has_reference else None
        engine = self._build()
        begin("rollout, first")
        self._sample(engine)
        engine.num_optimizer_steps = 0
        with engine.train_mode():
            for _ in range(NUM_OPTIMIZER_STEPS):
                self._update(engine)
        begin("rollout, with the optimizer's state")
        self._sample(engine)
        if loss.recompute_log_probs:
            self._score(engine)
        if loss.kl.is_on:
            with nullcontext() if reference is not None else engine.disable_adapter():
                self._score(reference or engine)
        begin("save")
        engine.save_checkpoint(folder)
        begin("export")
        engine.export(self._scratch / "policy")
        # another process: nothing is left of this one
        self._ledger.complete()
        del engine, reference
        gc.collect()
        torch.cuda.empty_cache()
        begin("resume")
        reference = self._build("ref") if has_reference else None
        self._build().load_checkpoint(folder)
        del reference

    def _build(self, role: Literal["actor", "ref"] = "actor") -> ReplayedEngine:
        model, actor = self._config.model, self._config.actor
        actor_config: Any = omega_conf_to_dataclass(actor)
        of_reference: Any = omega_conf_to_dataclass(self._config.ref.fsdp_config)
        # the mesh of the ranks is made of numbers
        with unset_fake_temporarily():
            engine = ReplayedEngine(
                model_config=omega_conf_to_dataclass(model),
                engine_config=actor_config.engine if role == "actor" else of_reference,
                optimizer_config=actor_config.optim,
                checkpoint_config=actor_config.checkpoint,
            )
        engine.ledger = self._ledger
        engine.guard = FiniteGuard(folder=self._scratch / "diverged", max_in_a_row=1)
        engine.initialize()
        return engine

    def _sample(self, engine: VLAEngine) -> None:
        rows, shape = self._job.rollout_rows, self._shape
        ids = self._prompts(rows)
        engine.sample_actions(
            ids,
            torch.ones_like(ids),
            torch.empty(rows, *shape.image_shape, dtype=torch.uint8),
            torch.empty(rows, shape.num_tokens, dtype=torch.float64),
            self._job.recipe.sampling.temperature,
            torch.empty(rows, shape.proprio_dim),
        )

    def _score(self, engine: VLAEngine) -> None:
        """Compute log-probs of rows, without gradients."""
        with engine.eval_mode(), torch.no_grad():
            for size in self._job.micro_batches:
                engine.forward_step(self._rows(size), None, forward_only=True)

    def _update(self, engine: VLAEngine) -> None:
        micro_batches = [self._rows(size) for size in self._job.micro_batches]
        loss = partial(
            row_loss,
            config=self._job.recipe.loss,
            action_dim=self._shape.action_dim,
            num_ranks=self._job.recipe.cluster.num_ranks,
        )
        # veRL's cutting needs jagged rows; which rows come together is the job's
        cut = mock.patch.object(
            transformer_impl, "prepare_micro_batches", lambda **_: (micro_batches, None)
        )
        with cut:
            engine.train_batch(self._rows(sum(self._job.micro_batches)), loss)

    def _prompts(self, rows: int) -> torch.Tensor:
        return torch.zeros(rows, self._job.prompt_tokens, dtype=torch.long)

    def _rows(self, rows: int) -> Any:
        shape = self._shape
        tokens = (rows, shape.num_tokens)
        return tu.get_tensordict(
            {
                "prompts": self._prompts(rows),
                "responses": torch.empty(tokens, dtype=torch.long),
                "response_mask": torch.empty(tokens, dtype=torch.long),
                "loss_mask": torch.empty(tokens, dtype=torch.long),
                "advantages": torch.empty((rows, 1)),
                "old_log_probs": torch.empty(tokens),
                # read with a KL term only
                "ref_log_prob": torch.empty(tokens),
                "images": torch.empty(rows, *shape.image_shape, dtype=torch.uint8),
                "proprio": torch.empty(rows, shape.proprio_dim),
                "trajectory_steps": torch.empty((rows, 1), dtype=torch.long),
                "num_trajectories": torch.empty((rows, 1), dtype=torch.long),
            },
            {"temperature": self._job.recipe.sampling.temperature},
        )


def _run(job: Job, processor: Processor, folder: Path) -> Run:
    """Make the part of a run that a rank's configuration is read from."""
    return Run(
        recipe=job.recipe,
        folder=folder,
        policy_folder=job.policy_folder,
        processor=processor,
        env_config=EnvConfig(),
        simulators=None,
        reward=load_reward("binary", {}, seed=0),
        training_starts=(),
        evaluation_starts=(),
        evaluation_kinds=(),
        task_names={},
        disk={},
    )


def main(job_file: Path, result: Path) -> None:
    """Replay the job and write its phases."""
    job = Job.read(job_file)
    uses_bitsandbytes = job.recipe.policy.quantization == "nf4" or "8bit" in (
        job.recipe.optimizer.name
    )
    four_bits = FourBits() if uses_bitsandbytes else None
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=0, world_size=job.recipe.cluster.num_ranks
    )
    ledger = MemoryLedger()
    if four_bits is not None:
        ledger.decomposed = four_bits.decomposed
    out_of_memory: str | None = None
    with stand_ins(four_bits), ledger.following_resizes(), ledger:
        try:
            Rehearsal(job, ledger, result.parent).play()
        except torch.OutOfMemoryError as error:
            out_of_memory = str(error)
    ledger.complete()
    Replay(phases=ledger.phases, out_of_memory=out_of_memory).write(result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
