"""Start Ray and TransferQueue, train, and end both whatever happens.

The trainer runs in the process that was started, not in an actor: signals, the console and the
simulators then belong to one process, and veRL is imported once less (ADR-0004).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

from verl_vla.build import Run
from verl_vla.errors import ConfigError, DivergedError, LearnerLostError
from verl_vla.interruption import stop_requests
from verl_vla.recipe import ClusterConfig
from verl_vla.trainer.checkpoint import complete_steps
from verl_vla.trainer.trainer import VLATrainer
from verl_vla.trainer.translate import to_verl
from verl_vla.trainer.verl_process import choose_device, divert_output, prepare_verl

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 * 1024**2
"""Ray's shared memory on one machine. Only actor calls pass through it, a few MB each;
images travel through TransferQueue."""

RAY_ATTEMPTS = 3
RAY_IS_LATE = "timed out during startup"
"""Ray raises a plain ``Exception`` with these words after a fixed 30 s (``_private/node.py``); on
a loaded machine its processes can need longer, and are faster the second time."""

WORKER_NICENESS = 0
"""Ray's own 15 would let the simulators, and whatever else runs on the machine, take the learner's
turns."""

LOGICAL_CPUS_BESIDE_RANKS = 3
"""Ray slots, not cores: TransferQueue's controller, its storage, and one spare. Ray starts an
idle Python process for every slot, so more would only cost start-up time."""


def train(run: Run) -> None:
    """Train to the last step of ``run``'s recipe, from its newest checkpoint if it has one."""
    prepare_verl(choose_device(run.recipe.cluster.device), knob="cluster.device")
    config = to_verl(run)
    with ExitStack() as stack:
        os.environ["TENSORBOARD_DIR"] = str(run.folder / "tensorboard")
        stack.enter_context(divert_output(run.folder))
        stack.enter_context(_ray_cluster(run, config))
        stack.enter_context(_own_errors(run))
        stack.enter_context(_transfer_queue(config))
        stop = stack.enter_context(stop_requests())  # after Ray, which has a handler of its own
        logger.info("starting the learner (about half a minute on two cores)")
        trainer = VLATrainer(config, run, stop)  # pyright: ignore[reportAbstractUsage] -- veRL's decorator hides the base
        trainer.init()
        trainer.train()


@contextmanager
def _ray_cluster(run: Run, config: DictConfig) -> Generator[None]:
    cluster = run.recipe.cluster
    environment = OmegaConf.to_container(OmegaConf.create(get_ppo_ray_runtime_env(config)))
    assert isinstance(environment, dict)
    variables = {
        "TRANSFER_QUEUE_ENABLE": "1",
        "VERL_PLATFORM": os.environ["VERL_PLATFORM"],
        "OMP_NUM_THREADS": "1",
    }
    environment["env_vars"] = {**environment["env_vars"], **variables}
    if cluster.address is not None:
        ray.init(address=cluster.address, runtime_env=environment, log_to_driver=False)
    else:
        _start_ray(cluster, environment)
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(cluster: ClusterConfig, environment: dict[Any, Any]) -> None:
    """Start a Ray of our own, a second time where a busy machine took longer than Ray waits."""
    for attempt in range(RAY_ATTEMPTS):
        try:
            ray.init(
                address="local",
                logging_level=logging.WARNING,
                num_cpus=_logical_cpus(cluster),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                runtime_env=environment,
                _system_config={"worker_niceness": WORKER_NICENESS},
            )
            return
        except Exception as error:
            if RAY_IS_LATE not in str(error) or attempt == RAY_ATTEMPTS - 1:
                raise
            logger.info("Ray did not start in time (load %.0f); trying again", os.getloadavg()[0])
            ray.shutdown()


def _logical_cpus(cluster: ClusterConfig) -> int | None:
    """Slots for the embedded profile; on a GPU node Ray counts the cores itself."""
    if choose_device(cluster.device) == "cuda":
        return None
    return LOGICAL_CPUS_BESIDE_RANKS + cluster.ranks_per_node


@contextmanager
def _own_errors(run: Run) -> Generator[None]:
    """Say what happened in a rank as if it had happened here, and what a rank's death means."""
    try:
        yield
    except RayTaskError as error:
        if not isinstance(error.cause, ConfigError | DivergedError):
            raise
        raise error.cause from error
    except (RayActorError, OutOfMemoryError) as error:
        steps = complete_steps(run.checkpoints)
        kept = f"checkpoint of step {steps[-1]}" if steps else "beginning: nothing was saved yet"
        raise LearnerLostError(
            f"a learner process died ({' '.join(str(error).split())}). The same command goes on "
            f"from the {kept}"
        ) from error


@contextmanager
def _transfer_queue(config: DictConfig) -> Generator[None]:
    tq.init(config.transfer_queue)
    try:
        yield
    finally:
        tq.close()
