"""One of the ranks of an update: learns from its rows as veRL hands them out; no weight moves."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed
from mini_engine import make_engine, training_worker

from verl_vla.config.grpo import LossConfig
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.trainer.engine.divergence_guard import load_rows
from verl_vla.trainer.engine.engine import VLAEngine
from verl_vla.trainer.grpo.worker import row_loss

MICRO_BATCH_SIZE = 3


class Recorder:
    """The gradients of every optimizer step, which is not taken."""

    def __init__(self, engine: VLAEngine) -> None:
        self.engine = engine
        self.steps: list[dict[str, torch.Tensor]] = []
        self.micro_batches: list[int] = []

    def optimizer_step(self) -> float:
        self.steps.append(
            {
                name: weight.grad.full_tensor()
                for name, weight in self.engine.module.named_parameters()
                if weight.grad is not None
            }
        )
        self.micro_batches.append(len(self.engine.losses))
        self.engine.losses.clear()
        self.engine.num_optimizer_steps += 1
        return 1.0


def main(folder: Path, rank: int, num_ranks: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder / 'store'}", rank=rank, world_size=num_ranks
    )
    engine = make_engine(PROJECT_FOLDER / "bases" / "mini", folder / "diverged")
    recorder = Recorder(engine)
    engine.optimizer_step = recorder.optimizer_step
    worker = training_worker(engine, micro_batch_size=MICRO_BATCH_SIZE)
    action_dim = engine.processor.shape.action_dim
    worker.loss_fn = partial(
        row_loss, config=LossConfig(), action_dim=action_dim, num_ranks=num_ranks
    )
    worker.train_mini_batch(load_rows(folder / f"rows_{rank}.pt"))
    found = {"gradients": recorder.steps, "micro_batches": recorder.micro_batches}
    torch.save(found, folder / f"found_{rank}.pt")
    torch.distributed.barrier()  # gloo aborts a rank whose partner is gone
    torch.distributed.destroy_process_group()
