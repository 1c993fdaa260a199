"""Pools on several nodes used as one, with nodes that live, answer late, and are lost."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_chunk_world import CRASH, SHAPE, NotingPolicy, OneChunkSimulators
from ray.exceptions import ObjectLostError, RayActorError

from verl_vla.config.grpo import GRPOClusterConfig
from verl_vla.config.shared import EnvironmentConfig
from verl_vla.core.episode import EpisodeSpec
from verl_vla.core.errors import ConfigError, EpisodeCrashed
from verl_vla.envs.base import EnvConfig
from verl_vla.rl.rollout import NoiseSource, rollout
from verl_vla.trainer.grpo import env_nodes
from verl_vla.trainer.grpo.env_nodes import RESOURCE, EnvNode, EnvNodes, open_env_nodes

ENV = EnvironmentConfig(suite="mini", num_slots=4)
CONFIG = EnvConfig(suite="mini")


class Node:
    """An actor in this process: each method has a ``remote`` whose answer `ray.get` takes."""

    def __init__(self, actor: EnvNode) -> None:
        self.actor = actor
        self.calls: list[tuple[str, Any]] = []
        self.is_lost: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        def remote(*given: Any) -> Callable[[], Any]:
            self.calls.append((name, *given))
            answer = None if self.is_lost else getattr(self.actor, name)(*given)

            def get() -> Any:
                if self.is_lost is not None:
                    raise self.is_lost
                return answer

            return get

        return SimpleNamespace(remote=remote)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[OneChunkSimulators]:
    """Pools in the order in which they were opened; a closed one leaves the list."""
    opened: list[OneChunkSimulators] = []

    @contextmanager
    def open_pool(env: Any, config: Any, shape: Any) -> Generator[OneChunkSimulators]:
        assert (env, config, shape) == (ENV, CONFIG, SHAPE)
        pool = OneChunkSimulators()
        opened.append(pool)
        yield pool
        opened.remove(pool)

    monkeypatch.setattr(env_nodes, "open_simulators", open_pool)
    monkeypatch.setattr(
        env_nodes.ray, "get", lambda got: [one() for one in got] if isinstance(got, list) else got()
    )
    return opened


def make_nodes(number: int) -> list[Node]:
    return [Node(EnvNode(ENV, CONFIG, SHAPE)) for _ in range(number)]


def specs(count: int) -> list[EpisodeSpec]:
    return [EpisodeSpec(task_id=0, init_state_id=i, group_id=0, episode_id=i) for i in range(count)]


def play(simulators: Any) -> Any:
    noise = NoiseSource(seed=0, stream=0)
    return rollout(specs(11), NotingPolicy(), simulators, temperature=1.0, noise=noise)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_nodes_play_what_one_pool_would(pools: list[OneChunkSimulators], number: int) -> None:
    class Pool(OneChunkSimulators):
        num_slots = 4

    right, mine = play(Pool()), play(EnvNodes(make_nodes(number), num_slots=4))
    assert torch.equal(mine.episodes.outcome, right.episodes.outcome)
    assert torch.equal(mine.policy_steps.action_tokens, right.policy_steps.action_tokens)
    assert mine.crashes == right.crashes
    played = [len(pool.specs) for pool in pools]
    assert sum(played) == 11
    assert min(played) >= 11 // 4, "every node has at least one of the four slots"


def test_a_lost_node_costs_its_episodes_and_the_others_take_over(
    pools: list[OneChunkSimulators], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = nodes = make_nodes(2)
    both = EnvNodes(nodes, num_slots=4)
    episodes = specs(8)
    both.reset(dict(enumerate(episodes[:4])))
    both.wait(range(4))
    second.is_lost = RayActorError()
    both.step({slot: None for slot in range(4)})  # pyright: ignore[reportArgumentType]
    assert both.have_answered(range(4)), "the wait that finds it out returns at once"
    answers = both.wait(range(4))
    assert "env node 1 was lost" in caplog.text
    lost = {slot for slot, answer in answers.items() if isinstance(answer, EpisodeCrashed)}
    assert lost == {1, 3, 2} and list(answers) == [0, 1, 2, 3]
    assert str(answers[1]) == str(answers[3]) == "its env node was lost"
    assert str(answers[2]) == "lost", "this one crashed in a simulator that lives"
    # nothing more is asked of it, neither what its slots do nor whether they have answered
    num_calls = len(second.calls)
    both.step({1: None})  # pyright: ignore[reportArgumentType]
    assert both.have_answered([1])
    assert isinstance(both.wait([1])[1], EpisodeCrashed)
    both.reset(dict(enumerate(episodes[4:])))
    assert len(second.calls) == num_calls
    assert [spec.episode_id for spec in pools[0].specs] == [0, 2, 4, 5, 6, 7]
    assert not any(isinstance(a, EpisodeCrashed) for a in both.wait(range(4)).values())
    both.close()
    assert [call for call in first.calls if call[0] == "close"] == [("close",)]
    assert len(second.calls) == num_calls


def test_an_answer_that_is_lost_is_one_of_a_lost_node(pools: list[OneChunkSimulators]) -> None:
    (node,) = nodes = make_nodes(1)
    alone = EnvNodes(nodes, num_slots=4)
    alone.reset({0: specs(1)[0]})
    node.is_lost = ObjectLostError("id", None, "")
    assert isinstance(alone.wait([0])[0], EpisodeCrashed)
    with pytest.raises(RuntimeError, match="every env node was lost"):
        alone.reset({0: specs(1)[0]})


def test_an_error_of_a_simulator_that_was_only_told_something_is_raised(
    pools: list[OneChunkSimulators],
) -> None:
    """What has no answer is collected with the next one that has."""
    (node,) = nodes = make_nodes(1)
    alone = EnvNodes(nodes, num_slots=4)
    alone.reset({0: specs(1)[0]})

    def fail() -> None:
        raise ValueError("no such slot")

    vars(node)["step"] = SimpleNamespace(remote=lambda _: fail)
    alone.step({0: None})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no such slot"):
        alone.wait([0])
    del vars(node)["step"]
    alone.wait([0])


def test_nodes_have_answered_once_all_have(pools: list[OneChunkSimulators]) -> None:
    nodes = make_nodes(2)
    both = EnvNodes(nodes, num_slots=4)
    both.reset(dict(enumerate(specs(2))))
    pools[1].have_answered = lambda slots: False
    assert not both.have_answered([0, 1])
    assert both.have_answered([0])


def node(number: int, is_alive: bool = True) -> dict[str, Any]:
    """A node as `ray.nodes` has it."""
    return {"Alive": is_alive, "Resources": {RESOURCE: number} if number else {}}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run that wants two nodes, and a cluster that places actors in this process."""
    placed: list[dict[str, Any]] = []

    def options(**given: Any) -> Any:
        placed.append(given)
        return SimpleNamespace(remote=lambda *more: Node(EnvNode(*more)))

    monkeypatch.setattr(env_nodes.ray, "remote", lambda cls: SimpleNamespace(options=options))
    cluster = GRPOClusterConfig(env_nodes=2, address="auto")
    return SimpleNamespace(
        recipe=SimpleNamespace(cluster=cluster, environment=ENV),
        env_config=CONFIG,
        processor=SimpleNamespace(shape=SHAPE),
        placed=placed,
    )


def test_each_node_opens_a_pool_and_closes_it(
    run: Any, pools: list[OneChunkSimulators], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env_nodes.ray, "nodes", lambda: [node(0), node(1), node(1)])
    with open_env_nodes(run) as opened:
        assert run.placed == [{"num_cpus": 0, "resources": {RESOURCE: 1}}]
        assert len(pools) == 2
        assert opened.num_slots == ENV.num_slots
    assert pools == []
    with pytest.raises(KeyError), open_env_nodes(run):
        raise KeyError
    assert pools == []


@pytest.mark.parametrize("nodes", [[], [node(1)], [node(1), node(1, is_alive=False), node(0)]])
def test_too_few_nodes_are_refused(
    run: Any, monkeypatch: pytest.MonkeyPatch, nodes: list[Any]
) -> None:
    monkeypatch.setattr(env_nodes.ray, "nodes", lambda: nodes)
    found = min(len(nodes), 1)
    with pytest.raises(ConfigError, match=f"env_nodes is 2, but the Ray cluster has {found} of"):
        open_env_nodes(run).__enter__()


def test_a_crash_is_not_a_lost_node(pools: list[OneChunkSimulators]) -> None:
    alone = EnvNodes(make_nodes(1), num_slots=4)
    played = play(alone)
    assert played.episodes.outcome.tolist().count(CRASH) == 3
    assert set(played.crashes.values()) == {"lost"}
