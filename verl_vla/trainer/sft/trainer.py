"""The loop of a fine-tuning run on one rank; the first rank reports, plays and saves."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader
from verl.utils.device import get_device_id

from verl_vla.core.signals import StopRequest, leave_signals_to_parent
from verl_vla.core.success_rate import episode_entries
from verl_vla.datasets.sft_dataset import Draw, SampleBatch, StepSampler, collate
from verl_vla.evaluation.conditions import conditions
from verl_vla.evaluation.evaluate import evaluate
from verl_vla.rl.rollout import Simulators
from verl_vla.runs.console import episodes_bar
from verl_vla.runs.metrics import SFT_METRICS, MetricsFile, read_metrics
from verl_vla.runs.run_dir import evaluation_record
from verl_vla.runs.terminal import track
from verl_vla.trainer import checkpoint
from verl_vla.trainer.sft.console import SFTConsole
from verl_vla.trainer.sft.engine import SFTEngine
from verl_vla.trainer.sft.rank_policy import RankPolicy, serve
from verl_vla.trainer.sft.run import SFTRun

logger = logging.getLogger(__name__)
"""The first rank's lines reach the console; the others have no handler."""

VALUES = "values"
"""Key of a checkpoint's run state: what its step had measured before it was saved."""


class SFTTrainer:
    """Steps, tests, evaluations and checkpoints of one run.

    A step is saved before it is tested and evaluated, so that a fault there cannot cost the step;
    a test or evaluation that a saved step still lacks is made when the run resumes.
    """

    def __init__(
        self,
        run: SFTRun,
        engine: SFTEngine,
        simulators: Simulators | None,
        stop: StopRequest | None,
    ) -> None:
        """Make a loop.

        Args:
            run: the same on every rank.
            engine: initialized.
            simulators: of the first rank; None on the others.
            stop: of the first rank; None on the others.
        """
        self._run = run
        self._steps = run.recipe.trainer
        self._last_step = self._steps.total_training_steps
        self._engine = engine
        self._simulators = simulators
        self._stop = stop
        self._rank = torch.distributed.get_rank()
        self._num_ranks = torch.distributed.get_world_size()
        self._samples = run.samples(engine.processor)
        self._held_out = run.held_out_samples(engine.processor) if run.held_out else None
        self._metrics = MetricsFile(run.folder / "metrics.jsonl", SFT_METRICS)
        self._report = SFTConsole(run.folder, self._last_step, self._steps.show_every)

    def train(self) -> None:
        """Learn from the newest whole checkpoint to the last step.

        Raises:
            Interrupted: somebody asked for the end; on the first rank, the others return.
        """
        done = self._resume()
        began = time.perf_counter()
        batches = track(self._batches(done), "fine-tuning", self._steps.total_training_steps - done)
        for step, batch in enumerate(batches, done + 1):
            loaded = time.perf_counter()
            values = self._engine.train_step(batch)
            values |= {
                "timing_s/data": loaded - began,
                "timing_s/step": time.perf_counter() - loaded,
            }
            must_end = self._must_end()
            # the first step too: a run that cannot save fails at once
            if self._is_due(step, self._steps.save_every) or step == 1 or must_end:
                values["timing_s/save_checkpoint"] = self._save(step, values)
            self._finish(step, values)
            if must_end:
                if self._stop is not None:
                    self._stop.carry_out(step)
                return
            began = time.perf_counter()
        if self._is_first:
            self._report.draw(read_metrics(self._run.folder / "metrics.jsonl"))
            folder = checkpoint.step_folder(self._run.checkpoints, self._last_step)
            logger.info("the policy is in %s", folder / "policy")

    @property
    def _is_first(self) -> bool:
        return self._rank == 0

    def _must_end(self) -> bool:
        """Return true where the first rank was asked to stop; the same answer on every rank."""
        asked = self._stop is not None and self._stop.is_made
        # a rank that stopped alone would leave the others waiting in the next step's collective
        answer = torch.tensor(int(asked), device=get_device_id())
        torch.distributed.broadcast(answer, src=0)
        return bool(answer)

    def _is_due(self, step: int, every: int) -> bool:
        """Return true at every ``every``-th step and at the last one."""
        return every > 0 and (step % every == 0 or step == self._last_step)

    def _batches(self, done: int) -> Iterator[SampleBatch]:
        recipe = self._run.recipe
        sampler = StepSampler(
            len(self._samples),
            batch_size=recipe.optimizer.batch_size,
            seed=recipe.seed,
            first_step=done,
            last_step=self._last_step,
            rank=self._rank,
            num_ranks=self._num_ranks,
        )
        num_loaders = recipe.demos.num_loaders
        return iter(
            DataLoader(
                self._samples,
                batch_sampler=sampler,
                collate_fn=collate,
                num_workers=num_loaders,
                # a fresh interpreter inherits no HDF5 handle, no thread and no device
                multiprocessing_context="spawn" if num_loaders else None,
                worker_init_fn=leave_signals_to_parent,
            )
        )

    def _finish(self, step: int, values: dict[str, float]) -> None:
        """Test and play where it is time to, and write the step down."""
        if self._held_out is not None and self._is_due(step, self._steps.test_every):
            values |= self._test()
        if self._is_due(step, self._steps.eval_every):
            values |= self._evaluate(step)
        if self._is_first:
            self._metrics.append(step, values)
            self._report.show(step, values)

    def _test(self) -> dict[str, float]:
        assert self._held_out is not None
        began = time.perf_counter()
        loss, accuracy = self._engine.test(list(self._test_batches()), len(self._held_out))
        return {
            "val/loss": loss,
            "val/accuracy": accuracy,
            "timing_s/validation": time.perf_counter() - began,
        }

    def _test_batches(self) -> Iterator[tuple[SampleBatch, Tensor]]:
        """This rank's part of the held-out samples, in as many batches as on every other rank."""
        assert self._held_out is not None
        size = self._run.recipe.optimizer.micro_batch_size
        stride = size * self._num_ranks
        for start in range(0, len(self._held_out), stride):
            numbers = range(start + self._rank * size, start + (self._rank + 1) * size)
            last = len(self._held_out) - 1
            # the last sample fills up the batches and has weight 0
            draws = [Draw(row=min(number, last), number=number) for number in numbers]
            weights = torch.tensor([float(number <= last) for number in numbers])
            yield collate([self._held_out[draw] for draw in draws]), weights

    def _evaluate(self, step: int) -> dict[str, float]:
        """Play the held-out starts; the first rank plays, the others compute with it."""
        if self._simulators is None:
            serve(self._engine)
            return {}
        began = time.perf_counter()
        policy = RankPolicy(self._engine)
        recipe = self._run.recipe
        with episodes_bar("evaluation", len(self._run.starts)) as ended:
            result = evaluate(
                self._run.starts,
                policy,
                self._simulators,
                temperature=recipe.evaluation.temperature,
                seed=recipe.seed,
                ended=ended,
            )
        policy.dismiss()
        names = self._run.task_names
        given = conditions(
            self._run.env_config,
            names,
            states=recipe.evaluation.states,
            temperature=recipe.evaluation.temperature,
            seed=recipe.seed,
        )
        record = evaluation_record(episode_entries(result.trajectories), given, names)
        self._report.keep_evaluation(step, result, record)
        values = result.as_metrics(self._run.task_names)
        return values | {"timing_s/testing": time.perf_counter() - began}

    def _save(self, step: int, values: dict[str, float]) -> float:
        """Write a checkpoint; returns the seconds it took."""
        began = time.perf_counter()
        checkpoints = self._run.checkpoints
        if self._is_first:
            with checkpoint.writing(checkpoints, step) as folder:
                self._write_ranks(folder, step)
                checkpoint.save_run_state(folder, {VALUES: values})
            # after the new one is complete, so there is always one to resume from
            checkpoint.remove_old(checkpoints, self._steps.keep_checkpoints)
        else:
            self._write_ranks(checkpoint.unfinished_folder(checkpoints, step), step)
        # no rank trains on before the checkpoint is complete
        torch.distributed.barrier()
        return time.perf_counter() - began

    def _write_ranks(self, folder: Path, step: int) -> None:
        torch.distributed.barrier()  # until the first rank has made the folder
        self._engine.save_checkpoint(str(folder / "ranks"), global_step=step)
        self._engine.export(folder / "policy")

    def _newest_valid(self) -> int:
        """As the first rank finds it; 0 where there is none."""
        found = checkpoint.newest_valid(self._run.checkpoints) if self._is_first else None
        # one rank decides: all must load the same step
        step = torch.tensor(0 if found is None else found, device=get_device_id())
        torch.distributed.broadcast(step, src=0)
        return int(step)

    def _resume(self) -> int:
        """Load the newest whole checkpoint and finish its step; returns how many steps are done."""
        done = self._newest_valid()
        state: dict[str, Any] = {}
        if done:
            folder = checkpoint.step_folder(self._run.checkpoints, done)
            self._engine.load_checkpoint(str(folder / "ranks"), del_local_after_load=False)
            state = checkpoint.load_run_state(folder)
            if self._is_first:
                logger.info("resumed after step %d", done)
        path = self._run.folder / "metrics.jsonl"
        if self._is_first:
            # lines of later steps, which are made again
            self._metrics.rewind(done)
        torch.distributed.barrier()
        lines = read_metrics(path) if path.exists() else []
        # every rank has read the file before the first one writes to it
        torch.distributed.barrier()
        # the process was killed after it saved the step and before it finished it
        if done and (not lines or lines[-1]["step"] < done):
            self._finish(done, state[VALUES])
        return done
