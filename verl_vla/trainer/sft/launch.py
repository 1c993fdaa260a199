"""Start the ranks of a fine-tuning run, one process each, and end them, also after an error."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess

import torch
import torch.distributed

from verl_vla.config.sft import SFTClusterConfig
from verl_vla.core.allocator import allocator_variables
from verl_vla.core.errors import ConfigError
from verl_vla.core.signals import end_with_parent, leave_signals_to_parent, stop_requests
from verl_vla.trainer.sft.engine import SFTEngine
from verl_vla.trainer.sft.run import SFTRun
from verl_vla.trainer.sft.trainer import SFTTrainer
from verl_vla.trainer.verl_compat.process import choose_device, divert_output, prepare_verl


def train(run: SFTRun) -> None:
    """Fine-tune to the last step of ``run``'s recipe; this process is the first rank."""
    device = _device(run.recipe.cluster)
    num_ranks = run.recipe.cluster.num_ranks
    with ExitStack() as stack:
        store = stack.enter_context(tempfile.TemporaryDirectory(prefix="verl_vla_sft_"))
        # a file and not a port: no other process can take it first
        address = f"file://{store}/store"
        # before the process group, which waits until every rank has joined
        stack.enter_context(_other_ranks(run, num_ranks, device, address))
        stack.enter_context(_process_group(0, num_ranks, device, address))
        stack.enter_context(divert_output(run.folder))
        engine = SFTEngine(run)
        engine.initialize()
        plays = run.recipe.trainer.eval_every > 0
        simulators = stack.enter_context(run.open_simulators(engine.processor)) if plays else None
        # last: with no step to save yet, a signal may end the start at once
        stop = stack.enter_context(stop_requests())
        SFTTrainer(run, engine, simulators, stop).train()


def _other_rank(rank: int, run: SFTRun, num_ranks: int, device: str, address: str) -> None:
    end_with_parent()
    leave_signals_to_parent()
    with _process_group(rank, num_ranks, device, address), divert_output(run.folder):
        engine = SFTEngine(run)
        engine.initialize()
        SFTTrainer(run, engine, None, None).train()


@contextmanager
def _other_ranks(
    run: SFTRun, num_ranks: int, device: str, address: str
) -> Generator[list[BaseProcess]]:
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [
        context.Process(target=_other_rank, args=(rank, run, num_ranks, device, address))
        for rank in range(1, num_ranks)
    ]
    try:
        for process in processes:
            process.start()
        yield processes
        for process in processes:
            process.join()
    finally:
        for process in processes:
            # after an error here they wait in a collective for this rank; otherwise they have ended
            process.kill()


@contextmanager
def _process_group(rank: int, num_ranks: int, device: str, address: str) -> Generator[None]:
    if device == "cuda":
        # read at the first allocation
        os.environ.update(allocator_variables())
        # before the process group: NCCL takes the current device
        torch.cuda.set_device(rank)
    else:
        # ranks on a CPU share its cores
        torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=address,
        rank=rank,
        world_size=num_ranks,
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _device(cluster: SFTClusterConfig) -> str:
    device = choose_device(cluster.device)
    available = torch.cuda.device_count()
    if device == "cuda" and available < cluster.num_ranks:
        raise ConfigError(
            f"cluster.num_ranks is {cluster.num_ranks}, but this machine has {available} GPUs; "
            "set at most that, or cluster.device=cpu"
        )
    prepare_verl(device, option="cluster.device")
    return device
