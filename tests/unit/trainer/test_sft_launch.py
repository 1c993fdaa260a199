"""Start and end of the ranks of a fine-tuning run; the processes are stand-ins."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed

from verl_vla.config.sft import SFTClusterConfig
from verl_vla.core.allocator import VARIABLES
from verl_vla.core.errors import ConfigError
from verl_vla.trainer.sft import launch


class Process:
    """A rank that is started, joined and killed, and runs nothing."""

    def __init__(self, events: list[Any], target: Any, args: tuple[Any, ...]) -> None:
        assert target is launch._other_rank
        self.events, self.rank, self.args = events, args[0], args

    def start(self) -> None:
        self.events.append(("start", *self.args))

    def join(self) -> None:
        self.events.append(f"join {self.rank}")

    def kill(self) -> None:
        self.events.append(f"kill {self.rank}")


class Engine:
    def __init__(self, run: Any) -> None:
        self.processor, self.events = "a processor", run.events
        self.events.append("engine")

    def initialize(self) -> None:
        self.events.append("initialize")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens, in order."""
    noted: list[Any] = []

    @contextmanager
    def noting(*name: Any) -> Generator[Any]:
        noted.append(name)
        try:
            yield name
        finally:
            noted.append(f"end {name[0]}")

    def context(method: str) -> Any:
        assert method == "spawn", "a fork would inherit handles, threads and devices"
        return SimpleNamespace(Process=lambda target, args: Process(noted, target, args))

    class Trainer:
        def __init__(self, run: Any, engine: Any, simulators: Any, stop: Any) -> None:
            noted.append(("trainer", simulators, stop is not None))

        def train(self) -> None:
            noted.append("train")

    monkeypatch.setattr(launch.multiprocessing, "get_context", context)
    monkeypatch.setattr(launch, "_process_group", lambda *given: noting("group", *given[:3]))
    monkeypatch.setattr(launch, "divert_output", lambda folder: noting("output", folder))
    monkeypatch.setattr(launch, "SFTEngine", Engine)
    monkeypatch.setattr(launch, "SFTTrainer", Trainer)
    monkeypatch.setattr(launch, "prepare_verl", lambda *_, **__: None)
    monkeypatch.setattr(launch, "end_with_parent", lambda: noted.append("end with parent"))
    monkeypatch.setattr(launch, "leave_signals_to_parent", lambda: noted.append("no signals"))
    noted.append(noting)
    return noted


def run_of(events: list[Any], tmp_path: Path, *, num_ranks: int, eval_every: int = 1) -> Any:
    noting = events.pop(0)
    return SimpleNamespace(
        recipe=SimpleNamespace(
            cluster=SFTClusterConfig(num_ranks=num_ranks, device="cpu"),
            trainer=SimpleNamespace(eval_every=eval_every),
        ),
        folder=tmp_path,
        events=events,
        open_simulators=lambda processor: noting("pool", processor),
    )


def test_the_first_rank_starts_the_others_and_waits_for_them(
    events: list[Any], tmp_path: Path
) -> None:
    run = run_of(events, tmp_path, num_ranks=3)
    launch.train(run)
    starts = [event for event in events if event[0] == "start"]
    (address,) = {event[-1] for event in starts}
    assert address.startswith("file://")
    assert starts == [("start", rank, run, 3, "cpu", address) for rank in (1, 2)]
    assert events[2:] == [
        ("group", 0, 3, "cpu"),
        ("output", tmp_path),
        "engine",
        "initialize",
        ("pool", "a processor"),
        ("trainer", ("pool", "a processor"), True),
        "train",
        "end pool",
        "end output",
        "end group",
        "join 1",
        "join 2",
        "kill 1",
        "kill 2",
    ]
    assert not Path(address.removeprefix("file://")).parent.exists()


def test_an_error_here_ends_the_others_without_waiting(
    events: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(events, tmp_path, num_ranks=2)

    def fail(_: Any) -> None:
        raise KeyError("here")

    monkeypatch.setattr(launch.SFTTrainer, "train", fail)
    with pytest.raises(KeyError, match="here"):
        launch.train(run)
    assert events[-4:] == ["end pool", "end output", "end group", "kill 1"]


def test_one_rank_that_never_plays_starts_neither_processes_nor_simulators(
    events: list[Any], tmp_path: Path
) -> None:
    launch.train(run_of(events, tmp_path, num_ranks=1, eval_every=0))
    assert ("trainer", None, True) in events
    assert not [e for e in events if e[0] in ("start", "pool") or str(e).startswith("kill")]


def test_another_rank_ends_with_its_parent_and_plays_nothing(
    events: list[Any], tmp_path: Path
) -> None:
    run = run_of(events, tmp_path, num_ranks=2)
    launch._other_rank(1, run, 2, "cpu", "file://store")
    assert events == [
        "end with parent",
        "no signals",
        ("group", 1, 2, "cpu"),
        ("output", tmp_path),
        "engine",
        "initialize",
        ("trainer", None, False),
        "train",
        "end output",
        "end group",
    ]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    noted: list[Any] = []
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda *given, **more: noted.append((*given, more)),
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: noted.append("end"))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: noted.append(number))
    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: noted.append(f"device {rank}"))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return noted


@pytest.mark.parametrize(
    ("device", "backend", "before"), [("cpu", "gloo", 1), ("cuda", "nccl", "device 2")]
)
def test_ranks_meet_by_the_backend_of_their_device(
    groups: list[Any], monkeypatch: pytest.MonkeyPatch, device: str, backend: str, before: Any
) -> None:
    given = {"init_method": "file://store", "rank": 2, "world_size": 3}
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        with pytest.raises(KeyError), launch._process_group(2, 3, device, "file://store"):
            assert groups == [before, (backend, given)]
            expandable = os.environ.keys() & set(VARIABLES)
            assert bool(expandable) == (device == "cuda")
            raise KeyError
    assert groups[-1] == "end"


@pytest.mark.parametrize("available", [2, 3])
def test_each_rank_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    prepared: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    monkeypatch.setattr(
        launch, "prepare_verl", lambda *given, **more: prepared.append((given, more))
    )
    cluster = SFTClusterConfig(num_ranks=3, device="cuda")
    if available < 3:
        with pytest.raises(ConfigError, match="num_ranks is 3, but this machine has 2 GPUs"):
            launch._device(cluster)
        return
    assert launch._device(cluster) == "cuda"
    assert prepared == [(("cuda",), {"option": "cluster.device"})]
    assert launch._device(SFTClusterConfig(num_ranks=9, device="cpu")) == "cpu"


def test_a_store_of_its_own_is_made_for_each_run(
    events: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    launch.train(run_of(events, tmp_path, num_ranks=2))
    (start,) = [event for event in events if event[0] == "start"]
    assert start[-1].startswith(f"file://{tmp_path}/verl_vla_sft_")
