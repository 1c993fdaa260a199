"""Start Ray and TransferQueue, train, and end both, also after an error.

Most of a start is waiting for other processes to import, so things that need not wait for each
other do not: veRL's trainer is imported while Ray starts, the learner while TransferQueue does.

The trainer runs in the process that was started, not in an actor: signals, the console and the
simulators then belong to one process, and veRL is imported once less (ADR-0004).
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import tempfile
import time
from collections.abc import Generator, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import ray
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf
from ray.exceptions import AuthenticationError, OutOfMemoryError, RayActorError, RayTaskError
from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

from verl_vla.config.grpo import GRPOClusterConfig
from verl_vla.core.allocator import allocator_variables
from verl_vla.core.errors import ConfigError, DivergedError, Interrupted, LearnerLostError
from verl_vla.core.signals import stop_requests
from verl_vla.core.text import shorten
from verl_vla.envs.libero.assets import ASSETS_VARIABLE
from verl_vla.rewards import TrajectoryReward
from verl_vla.rewards.encoders.base import BATCHES_A_RANK, movable_encoders
from verl_vla.trainer.checkpoint import complete_steps
from verl_vla.trainer.grpo.env_nodes import open_env_nodes
from verl_vla.trainer.grpo.run import Run
from verl_vla.trainer.grpo.verl_config import to_verl
from verl_vla.trainer.verl_compat.placement import report_wait, require_room
from verl_vla.trainer.verl_compat.process import choose_device, divert_output, prepare_verl
from verl_vla.trainer.verl_compat.watchdog import Watchdog, dead_among, queue_actors, ray_daemons

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 * 1024**2
"""Ray's shared memory on one machine. Only actor calls pass through it, a few MB each;
images travel through TransferQueue."""
ENCODER_BATCH_BYTES = 16 * 1024**2
"""Bytes of the images of one batch for an encoder, which do pass through it: a clip of 64 frames of
256 px has 13 MB. Ray writes to disk what does not fit."""

MODE_VARIABLE, TOKEN_VARIABLE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"
"""Variables that say whether Ray asks for a token, and in which file it is. ``ray start`` asks for
one where the user's home has one, which each run on one machine makes; who connects to an address
is not asked unless the variable says so (``worker.py``, ``init``)."""

SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket (``sun_path`` of ``unix(7)``, less its end)."""
SOCKET_NAME_BYTES = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
"""Bytes that Ray appends to its folder."""
SHORT_FOLDER = "/tmp"

RAY_ATTEMPTS = 3
RAY_IS_LATE = "timed out during startup"
"""Ray raises a plain ``Exception`` with these words after a fixed 30 s (``_private/node.py``); on
a loaded machine its processes can need longer, and are faster the second time."""

NODES_LIMIT_S = 600.0
NODES_POLL_S = 1.0
"""A Slurm job's nodes start within minutes of each other."""

REASON_LENGTH = 400
"""Characters of Ray's reason for a death that a message shows; the first line says it."""

WORKER_NICENESS = 0
"""Ray's default of 15 would let simulators and other programs of the machine run before the
learner."""

LOGICAL_CPUS_BESIDE_RANKS = 3
"""Ray slots, not cores: TransferQueue's controller, its storage, and one spare. Ray starts an
idle Python process for every slot, so more would only cost start-up time; fewer, such as the four
cores of a small machine with a GPU, would let it wait for ever."""


def train(run: Run) -> None:
    """Train to the last step of ``run``'s recipe, from its newest checkpoint if it has one."""
    # first: the platform is chosen once a process, and Ray's workers are handed the choice
    prepare_verl(choose_device(run.recipe.cluster.device), option="cluster.device")
    config = to_verl(run)
    with ExitStack() as stack:
        # first, since it also bounds how long the others may take to end
        watchdog = stack.enter_context(Watchdog(lambda name: _lost(run, f"{name} is dead")))
        # where veRL's tracking looks for the folder (``verl/utils/tracking.py``)
        os.environ["TENSORBOARD_DIR"] = str(run.folder / "tensorboard")
        stack.enter_context(divert_output(run.folder))
        # one for the import, one for TransferQueue
        beside = stack.enter_context(ThreadPoolExecutor(max_workers=2))
        importing = beside.submit(importlib.import_module, "verl_vla.trainer.grpo.trainer")
        stack.enter_context(_ray_cluster(run, config))
        stack.enter_context(_own_errors(run))
        queue = stack.enter_context(_transfer_queue(config, beside))
        stop = stack.enter_context(stop_requests())  # after Ray, which has a handler of its own
        logger.info("starting the learner (some 20 seconds on two cores)")
        simulators = run.simulators or stack.enter_context(open_env_nodes(run))
        daemons = ray_daemons()
        with watchdog.watching(partial(dead_among, {}, daemons)):
            trainer = importing.result().VLATrainer(config, run, simulators, stop)
            trainer.init()
            # the learner is loaded while TransferQueue starts; the first rollout needs both
            with report_wait(lambda: "TransferQueue's processes"):
                queue.result()
        # veRL's storage: one process on each node
        actors = queue_actors(run.recipe.cluster.num_nodes)
        with watchdog.watching(partial(dead_among, actors, daemons)):
            trainer.train()


def wait_for_nodes(num_nodes: int, limit_s: float = NODES_LIMIT_S) -> None:
    """Wait until the Ray cluster has as many nodes as hold ranks; they rarely start together.

    Raises:
        ConfigError: they did not join within ``limit_s``.
    """
    deadline = time.monotonic() + limit_s
    with report_wait(lambda: f"{num_nodes} nodes with ranks; {_joined()} joined the Ray cluster"):
        while (there := _joined()) < num_nodes:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"cluster.num_nodes is {num_nodes}, but {there} joined the Ray cluster within "
                    f"{limit_s:.0f} s; start Ray on the others, or set cluster.num_nodes={there}"
                )
            time.sleep(NODES_POLL_S)


def _joined() -> int:
    """Return the number of nodes that can hold ranks: those that only simulate have no slots."""
    return sum(node["Alive"] and "CPU" in node["Resources"] for node in ray.nodes())


@contextmanager
def _ray_cluster(run: Run, config: DictConfig) -> Generator[None]:
    cluster = run.recipe.cluster
    reach_own_machine_directly()
    environment = OmegaConf.to_container(OmegaConf.create(get_ppo_ray_runtime_env(config)))
    assert isinstance(environment, dict)
    variables = {
        "TRANSFER_QUEUE_ENABLE": "1",
        "VERL_PLATFORM": os.environ["VERL_PLATFORM"],
        "OMP_NUM_THREADS": "1",
    }
    if choose_device(cluster.device) == "cuda":
        variables |= allocator_variables()
    if ASSETS_VARIABLE in os.environ:  # for nodes that simulate
        variables[ASSETS_VARIABLE] = os.environ[ASSETS_VARIABLE]
    environment["env_vars"] = {**environment["env_vars"], **variables}
    if cluster.address is not None:
        _join_ray(cluster.address, environment)
        wait_for_nodes(cluster.num_nodes)
        require_room(cluster, use_gpu=choose_device(cluster.device) == "cuda")
    else:
        _start_ray(cluster, environment, object_store_bytes(run.reward, cluster.ranks_per_node))
    try:
        yield
    finally:
        ray.shutdown()


def object_store_bytes(reward: TrajectoryReward, num_ranks: int) -> int:
    """Return the shared memory of a Ray of our own, with the batches that wait for ranks."""
    if not movable_encoders(reward):
        return OBJECT_STORE_BYTES
    return OBJECT_STORE_BYTES + num_ranks * BATCHES_A_RANK * ENCODER_BATCH_BYTES


def _join_ray(address: str, environment: dict[Any, Any]) -> None:
    """Join a cluster that runs.

    Raises:
        ConfigError: nothing answers, or what answers asks for another token.
    """
    try:
        ray.init(address=address, runtime_env=environment, log_to_driver=False)
    except (ConnectionError, AuthenticationError) as error:
        token = f"{MODE_VARIABLE}=token and {TOKEN_VARIABLE}"
        raise ConfigError(
            f"cluster.address is {address!r}, and no Ray cluster lets this process in there "
            f"({error}); start one with scripts/train_multinode.sh. One that was started by hand "
            f"may ask for a token: set {token} as it has them"
        ) from error


def _start_ray(cluster: GRPOClusterConfig, environment: dict[Any, Any], store_bytes: int) -> None:
    """Start Ray; try again where a busy machine took longer than Ray waits."""
    for attempt in range(RAY_ATTEMPTS):
        try:
            ray.init(
                # a cluster of its own, even where another one runs on this machine
                address="local",
                logging_level=logging.WARNING,
                num_cpus=logical_cpus(cluster),
                object_store_memory=store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                runtime_env=environment,
                _temp_dir=short_temporary_folder(),
                _system_config={"worker_niceness": WORKER_NICENESS},
            )
            return
        # Ray's own handler of SIGTERM, which it has from its start on
        except SystemExit as error:
            raise Interrupted(
                "SIGTERM while Ray started; nothing was trained yet", signal.SIGTERM
            ) from error
        except Exception as error:
            if RAY_IS_LATE not in str(error) or attempt == RAY_ATTEMPTS - 1:
                raise
            logger.info("Ray did not start in time (load %.0f); trying again", os.getloadavg()[0])
            # ends the half that did start
            ray.shutdown()


def short_temporary_folder() -> str | None:
    """Return a folder for Ray where the usual one has too long a name; else None.

    Raises:
        ConfigError: there is no other folder.
    """
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) + SOCKET_NAME_BYTES <= SOCKET_PATH_BYTES:
        return None
    if not os.access(SHORT_FOLDER, os.W_OK):
        raise ConfigError(
            f"the folder for temporary files is {usual} (TMPDIR), and Ray's sockets below it would "
            f"have names of more than {SOCKET_PATH_BYTES} bytes, which Linux refuses; set TMPDIR "
            f"to a folder of at most {SOCKET_PATH_BYTES - SOCKET_NAME_BYTES} characters"
        )
    # of its own for each user: the folder belongs to who makes it
    return f"{SHORT_FOLDER}/ray-{os.getuid()}"


def reach_own_machine_directly(environ: MutableMapping[str, str] = os.environ) -> None:
    """Exempt this machine from a proxy, which would be asked for processes of its own."""
    if not {"http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"} & environ.keys():
        return
    own = ["localhost", "127.0.0.1", "::1", ray.util.get_node_ip_address()]
    for name in ("no_proxy", "NO_PROXY"):
        given = environ[name].split(",") if name in environ else []
        environ[name] = ",".join(dict.fromkeys([*given, *own]))


def logical_cpus(cluster: GRPOClusterConfig) -> int:
    """Return the slots of a Ray of our own: one for each process that asks for one."""
    return LOGICAL_CPUS_BESIDE_RANKS + cluster.ranks_per_node


@contextmanager
def _own_errors(run: Run) -> Generator[None]:
    """Say what happened in a rank as if it had happened here, and what a rank's death means."""
    try:
        yield
    except RayTaskError as error:
        # these say what to change; any other error keeps the traceback of its rank
        if not isinstance(error.cause, ConfigError | DivergedError):
            raise
        raise error.cause from error
    except (RayActorError, OutOfMemoryError) as error:
        # of a worker that was killed for its memory Ray tells pages
        why = f"a learner process died ({shorten(' '.join(str(error).split()), REASON_LENGTH)})"
        raise LearnerLostError(_lost(run, why)) from error


def _lost(run: Run, why: str) -> str:
    """Return the message of a run that lost a process: what was saved, and how to resume."""
    steps = complete_steps(run.checkpoints)
    kept = f"checkpoint of step {steps[-1]}" if steps else "beginning: nothing was saved yet"
    return f"{why}. The same command goes on from the {kept}"


@contextmanager
def _transfer_queue(config: DictConfig, beside: ThreadPoolExecutor) -> Generator[Future[Any]]:
    starting = beside.submit(tq.init, config.transfer_queue)
    try:
        yield starting
    finally:
        starting.exception()  # what is half started can neither be used nor ended
        tq.close()
