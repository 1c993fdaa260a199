"""Start and end of what a run needs: Ray, TransferQueue, simulators, and errors on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from ray.exceptions import (
    AuthenticationError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from verl_vla.config.compose import load_recipe
from verl_vla.core.allocator import VARIABLES
from verl_vla.core.errors import ConfigError, DivergedError, Interrupted, LearnerLostError
from verl_vla.envs.libero.assets import ASSETS_VARIABLE
from verl_vla.rewards import load_reward
from verl_vla.rewards.encoders.base import BATCHES_A_RANK
from verl_vla.trainer.checkpoint import writing
from verl_vla.trainer.grpo import launch
from verl_vla.trainer.verl_compat import watchdog

CONFIG = OmegaConf.create({"transfer_queue": {"backend": "simple"}})
JOIN = ("cluster.address=auto", "cluster.num_nodes=2")
LATE = RuntimeError("The current node timed out during startup. This could happen because ...")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of Ray: the options of every `ray.init`, and "shutdown"."""
    calls: list[Any] = []
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setattr(
        launch, "get_ppo_ray_runtime_env", lambda _: {"env_vars": {"A": "1"}, "working_dir": None}
    )
    monkeypatch.setattr(launch.ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(launch.ray, "shutdown", lambda: calls.append("shutdown"))
    return calls


def run_of(*words: str, reward: str = "binary", **arguments: Any) -> Any:
    return SimpleNamespace(
        recipe=load_recipe(["recipe=quickstart", *words]), reward=load_reward(reward, arguments)
    )


def started(asked: list[Any], *words: str, **reward: Any) -> dict[str, Any]:
    """What Ray is asked for; no cluster is started."""
    asked.clear()
    with launch._ray_cluster(run_of(*words, **reward), CONFIG):
        (options,) = asked
    assert asked[1:] == ["shutdown"]
    return options


def variables_of_ranks(asked: list[Any], *words: str) -> dict[str, str]:
    return started(asked, *words)["runtime_env"]["env_vars"]


def test_ray_has_room_for_the_batches_of_an_encoder(asked) -> None:
    words = "cluster.ranks_per_node=3"
    plain = started(asked, words)["object_store_memory"]
    towers = {"encoder": "policy_towers", "encoder_args": {"path": "bases/mini"}}
    encoding = started(asked, words, reward="knn_align", **towers)
    here = started(asked, words, reward="knn_align", encoder="pixels")
    assert plain == here["object_store_memory"] == launch.OBJECT_STORE_BYTES
    each = BATCHES_A_RANK * launch.ENCODER_BATCH_BYTES
    assert encoding["object_store_memory"] == plain + 3 * each
    clip = 64 * 256 * 256 * 3
    assert clip <= launch.ENCODER_BATCH_BYTES < 2 * clip


def test_segments_are_expandable_on_ranks_with_a_gpu_alone(asked, monkeypatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    on_gpu = variables_of_ranks(asked, "cluster.device=cuda")
    assert on_gpu["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert not set(VARIABLES) & set(variables_of_ranks(asked, "cluster.device=cpu"))


def test_a_users_own_setting_reaches_the_ranks(asked, monkeypatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    on_gpu = variables_of_ranks(asked, "cluster.device=cuda")
    assert on_gpu["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:512"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in on_gpu


def test_ranks_know_their_platform_and_where_assets_are(asked, monkeypatch) -> None:
    monkeypatch.delenv(ASSETS_VARIABLE, raising=False)
    always = {
        "A": "1",
        "TRANSFER_QUEUE_ENABLE": "1",
        "VERL_PLATFORM": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    assert variables_of_ranks(asked) == always
    monkeypatch.setenv(ASSETS_VARIABLE, "some/folder")
    assert variables_of_ranks(asked) == always | {ASSETS_VARIABLE: "some/folder"}


def test_a_cluster_of_our_own_is_small_and_private(asked) -> None:
    options = started(asked, "cluster.ranks_per_node=2")
    environment = options.pop("runtime_env")
    assert environment["working_dir"] is None, "the rest is as veRL has it"
    assert options == {
        "address": "local",
        "logging_level": 30,
        "num_cpus": 5,
        "object_store_memory": 256 * 2**20,
        "include_dashboard": False,
        "log_to_driver": False,
        "_temp_dir": None,
        "_system_config": {"worker_niceness": 0},
    }


def test_a_cluster_that_is_there_is_joined_once_it_has_its_nodes(asked, monkeypatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(launch, "wait_for_nodes", lambda number: checked.append(number))
    monkeypatch.setattr(
        launch, "require_room", lambda cluster, use_gpu: checked.append((cluster, use_gpu))
    )
    for device, use_gpu in (("cuda", True), ("cpu", False)):
        words = (*JOIN, f"cluster.device={device}")
        options = started(asked, *words)
        assert options.pop("runtime_env")["env_vars"]["TRANSFER_QUEUE_ENABLE"] == "1"
        assert options == {"address": "auto", "log_to_driver": False}
        assert checked == [2, (run_of(*words).recipe.cluster, use_gpu)]
        checked.clear()


def test_ray_is_left_also_after_an_error(asked) -> None:
    with pytest.raises(KeyError), launch._ray_cluster(run_of(), CONFIG):
        raise KeyError
    assert asked[-1] == "shutdown"


@pytest.mark.parametrize(
    ("errors", "num_starts", "raised"),
    [
        ([], 1, None),
        ([LATE], 2, None),
        ([LATE, LATE], 3, None),
        ([LATE, LATE, LATE], 3, LATE),
        ([ValueError("no port")], 1, ValueError),
    ],
)
def test_ray_is_started_again_only_where_it_was_late(
    asked, monkeypatch, errors: list[Exception], num_starts: int, raised: Any
) -> None:
    left = [*errors]

    def init(**options: Any) -> None:
        asked.append(options)
        if left:
            raise left.pop(0)

    monkeypatch.setattr(launch.ray, "init", init)
    expected = nullcontext() if raised is None else pytest.raises(Exception, match="out|port")
    with expected:
        launch._start_ray(run_of().recipe.cluster, {}, launch.OBJECT_STORE_BYTES)
    assert len([call for call in asked if call != "shutdown"]) == num_starts
    assert asked.count("shutdown") == num_starts - 1, "what is half started is ended"


def node(is_alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": is_alive, "Resources": resources}


def test_nodes_that_hold_ranks_are_waited_for(monkeypatch) -> None:
    joined = [node(CPU=8), node(env_node=1), node(False, CPU=8)]
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        joined.append(node(CPU=8))

    monkeypatch.setattr(launch.ray, "nodes", lambda: joined)
    monkeypatch.setattr(launch.time, "sleep", sleep)
    launch.wait_for_nodes(1)
    assert naps == []
    launch.wait_for_nodes(3)
    assert naps == [launch.NODES_POLL_S] * 2


def test_nodes_that_do_not_come_are_named(monkeypatch) -> None:
    clock = iter([0.0, 600.0, 600.5, 600.6])
    naps: list[float] = []
    monkeypatch.setattr(launch.ray, "nodes", lambda: [node(CPU=8)])
    monkeypatch.setattr(launch, "report_wait", lambda _: nullcontext())
    monkeypatch.setattr(
        launch, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=naps.append)
    )
    with pytest.raises(ConfigError, match="num_nodes is 3, but 1 joined .* within 600 s.*nodes=1"):
        launch.wait_for_nodes(3)
    assert len(naps) == 1, "at the limit it still looks again"


@pytest.mark.parametrize("error", [ConfigError("set it"), DivergedError("lower it")])
def test_what_a_rank_says_to_the_user_is_said_here(error: Exception, tmp_path: Path) -> None:
    run: Any = SimpleNamespace(checkpoints=tmp_path)
    with pytest.raises(type(error), match=str(error)), launch._own_errors(run):
        raise RayTaskError("update_actor", "a traceback", error)


def test_any_other_error_keeps_the_traceback_of_its_rank(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(checkpoints=tmp_path)
    with pytest.raises(RayTaskError, match="a traceback"), launch._own_errors(run):
        raise RayTaskError("update_actor", "a traceback", ValueError("shape"))


@pytest.mark.parametrize("error", [RayActorError(), OutOfMemoryError("too much")])
def test_a_rank_that_died_costs_the_steps_since_the_last_checkpoint(
    error: Exception, tmp_path: Path
) -> None:
    run: Any = SimpleNamespace(checkpoints=tmp_path)
    nothing = "goes on from the beginning: nothing was saved yet"
    with pytest.raises(LearnerLostError, match=nothing), launch._own_errors(run):
        raise error
    for step in (3, 12):
        with writing(tmp_path, step):
            pass
    with (
        pytest.raises(LearnerLostError, match="from the checkpoint of step 12"),
        launch._own_errors(run),
    ):
        raise error


def test_transfer_queue_is_closed_whatever_became_of_its_start(monkeypatch) -> None:
    events: list[Any] = []

    def fail(config: Any) -> None:
        events.append(dict(config))
        raise RuntimeError("no room")

    monkeypatch.setattr(launch.tq, "init", fail)
    monkeypatch.setattr(launch.tq, "close", lambda: events.append("closed"))
    with (
        ThreadPoolExecutor(1) as beside,
        launch._transfer_queue(CONFIG, beside) as starting,
        pytest.raises(RuntimeError, match="no room"),
    ):
        starting.result()
    assert events == [{"backend": "simple"}, "closed"]


def test_transfer_queue_is_closed_once_its_start_has_ended(monkeypatch) -> None:
    events: list[str] = []
    is_leaving = threading.Event()

    def start(_: Any) -> None:
        assert is_leaving.wait(30)
        time.sleep(0.1)
        events.append("started")

    monkeypatch.setattr(launch.tq, "init", start)
    monkeypatch.setattr(launch.tq, "close", lambda: events.append("closed"))
    with (
        pytest.raises(KeyError),
        ThreadPoolExecutor(1) as beside,
        launch._transfer_queue(CONFIG, beside),
    ):
        is_leaving.set()
        raise KeyError
    assert events == ["started", "closed"]


class Trainer:
    """Notes when it is made, initialised and run."""

    events: list[Any] = []

    def __init__(self, config: Any, run: Any, simulators: Any, stop: Any) -> None:
        self.events.append((config, run, simulators))
        assert not stop.is_made

    def init(self) -> None:
        self.events.append("init")

    def train(self) -> None:
        self.events.append("train")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a launch starts, in order; everything that it starts is a stand-in."""
    noted: list[Any] = []

    @contextmanager
    def noting(name: str) -> Any:
        noted.append(name)
        try:
            yield name
        finally:
            noted.append(f"end {name}")

    monkeypatch.setattr(Trainer, "events", noted)
    monkeypatch.setattr(
        launch, "prepare_verl", lambda device, option: noted.append((device, option))
    )
    monkeypatch.setattr(launch, "to_verl", lambda _: CONFIG)
    monkeypatch.setattr(launch, "divert_output", lambda _: noting("output"))
    monkeypatch.setattr(launch, "_ray_cluster", lambda *_: noting("ray"))
    monkeypatch.setattr(launch, "open_env_nodes", lambda _: noting("env nodes"))
    monkeypatch.setattr(launch.tq, "init", lambda _: noted.append("queue"))
    monkeypatch.setattr(launch.tq, "close", lambda: noted.append("end queue"))
    monkeypatch.setattr(launch, "queue_actors", lambda num_units: {})
    trainer_module = SimpleNamespace(VLATrainer=Trainer)
    importing = SimpleNamespace(import_module=lambda _: trainer_module)
    monkeypatch.setattr(launch, "importlib", importing)
    monkeypatch.setenv("TENSORBOARD_DIR", "")
    return noted


@pytest.mark.parametrize("pool", ["a pool", None])
def test_everything_is_there_before_the_first_step_and_ended_after_the_last(
    events: list[Any], tmp_path: Path, pool: Any
) -> None:
    recipe = load_recipe(["recipe=quickstart", "cluster.device=cpu"])
    run: Any = SimpleNamespace(recipe=recipe, folder=tmp_path, simulators=pool)
    launch.train(run)
    assert os.environ["TENSORBOARD_DIR"] == str(tmp_path / "tensorboard")
    assert events.pop(0) == ("cpu", "cluster.device")
    assert events.index("queue") < events.index("train"), "the first rollout needs it"
    events.remove("queue")
    nodes = [] if pool else ["env nodes"]
    assert events == [
        "output",
        "ray",
        *nodes,
        (CONFIG, run, pool or "env nodes"),
        "init",
        "train",
        *(f"end {name}" for name in nodes),
        "end queue",
        "end ray",
        "end output",
    ]


def test_a_queue_that_cannot_start_ends_the_run_before_its_first_step(
    events: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(launch.tq, "init", fail)
    recipe = load_recipe(["recipe=quickstart", "cluster.device=cpu"])
    run: Any = SimpleNamespace(recipe=recipe, folder=tmp_path, simulators="a pool")
    with pytest.raises(RuntimeError, match="no room"):
        launch.train(run)
    assert "init" in events and "train" not in events
    assert events[-3:] == ["end queue", "end ray", "end output"]


def test_a_rank_that_dies_while_training_is_named(
    events: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: Trainer) -> None:
        raise RayActorError

    monkeypatch.setattr(Trainer, "train", die)
    recipe = load_recipe(["recipe=quickstart", "cluster.device=cpu"])
    run: Any = SimpleNamespace(
        recipe=recipe, folder=tmp_path, simulators="a pool", checkpoints=tmp_path
    )
    with pytest.raises(LearnerLostError, match="a learner process died"):
        launch.train(run)
    assert events[-3:] == ["end queue", "end ray", "end output"]


def test_a_daemon_of_ray_that_dies_while_the_learner_is_loaded_is_named(
    events: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setattr(watchdog, "CHECK_EVERY_S", 0.02)
    monkeypatch.setattr(launch, "ray_daemons", lambda: {"raylet": ended.pid})
    monkeypatch.setattr(Trainer, "init", lambda _: threading.Event().wait(60))
    recipe = load_recipe(["recipe=quickstart", "cluster.device=cpu"])
    run: Any = SimpleNamespace(
        recipe=recipe, folder=tmp_path, simulators="a pool", checkpoints=tmp_path
    )
    with pytest.raises(LearnerLostError, match=rf"raylet \(process {ended.pid}\) is dead.*nothing"):
        launch.train(run)
    assert "train" not in events
    assert events[-3:] == ["end queue", "end ray", "end output"]


def test_of_pages_that_ray_tells_of_a_death_a_message_has_the_beginning(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(checkpoints=tmp_path)
    pages = "4 worker(s) were killed\nfor memory\n" + 5000 * "x"
    with (
        pytest.raises(LearnerLostError) as caught,
        launch._own_errors(run),
    ):
        raise OutOfMemoryError(pages)
    said = str(caught.value)
    assert said.startswith("a learner process died (4 worker(s) were killed for memory xxx")
    assert said.endswith(
        "x...). The same command goes on from the beginning: nothing was saved yet"
    )
    assert len(said) < 600


@pytest.mark.parametrize("error", [ConnectionError("no"), AuthenticationError("no token")])
def test_a_cluster_that_lets_nobody_in_is_named_with_what_it_may_ask_for(
    monkeypatch, error: Exception
) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(launch.ray, "init", init)
    with pytest.raises(ConfigError, match="cluster.address is 'node1:6379'.*RAY_AUTH_MODE=token"):
        launch._join_ray("node1:6379", {})


def test_the_queue_starts_while_the_trainer_is_imported(
    events: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_starting = threading.Event()

    def import_module(_: str) -> Any:
        assert is_starting.wait(30), "the import holds the queue up"
        return SimpleNamespace(VLATrainer=Trainer)

    monkeypatch.setattr(launch, "importlib", SimpleNamespace(import_module=import_module))
    monkeypatch.setattr(launch.tq, "init", lambda _: is_starting.set())
    recipe = load_recipe(["recipe=quickstart", "cluster.device=cpu"])
    run: Any = SimpleNamespace(recipe=recipe, folder=tmp_path, simulators="a pool")
    launch.train(run)
    assert "train" in events


def test_a_long_temporary_folder_is_replaced_or_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    longest = launch.SOCKET_PATH_BYTES - launch.SOCKET_NAME_BYTES
    monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: "/" + "t" * (longest - 1))
    assert launch.short_temporary_folder() is None
    monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: "/" + "t" * longest)
    assert launch.short_temporary_folder() == f"{launch.SHORT_FOLDER}/ray-{os.getuid()}"
    monkeypatch.setattr(launch, "SHORT_FOLDER", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=rf"TMPDIR to a folder of at most {longest} characters"):
        launch.short_temporary_folder()


def test_a_proxy_is_not_asked_for_processes_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    without: dict[str, str] = {}
    launch.reach_own_machine_directly(without)
    assert without == {}
    own = "localhost,127.0.0.1,::1,10.0.0.7"
    proxied = {"http_proxy": "http://proxy:3128", "no_proxy": "intranet,localhost"}
    launch.reach_own_machine_directly(proxied)
    assert proxied["no_proxy"] == "intranet,localhost,127.0.0.1,::1,10.0.0.7"
    assert proxied["NO_PROXY"] == own


def test_sigterm_while_ray_starts_is_an_end_that_was_asked_for(monkeypatch, asked) -> None:
    def end(**_: Any) -> None:
        raise SystemExit(15)

    monkeypatch.setattr(launch.ray, "init", end)
    with (
        pytest.raises(Interrupted, match="SIGTERM while Ray started") as error,
        launch._ray_cluster(run_of(), CONFIG),
    ):
        pytest.fail("Ray started")
    assert error.value.signal_number == signal.SIGTERM
