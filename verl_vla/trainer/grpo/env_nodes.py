"""Simulators on separate Ray nodes: one pool a node, used as one pool.

Which node plays an episode changes no number, since a simulator's answer depends on snapshot and
chunk alone. A lost node costs the episodes that it was playing; the other nodes continue.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Collection, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import ObjectLostError, RayActorError

from verl_vla.config.shared import EnvironmentConfig
from verl_vla.core.episode import EpisodeSpec
from verl_vla.core.errors import ConfigError, EpisodeCrashed
from verl_vla.envs.base import EnvConfig
from verl_vla.policies.base import PolicyShape
from verl_vla.rl.episode_record import Answer
from verl_vla.rl.setup import open_simulators
from verl_vla.trainer.grpo.run import Run

logger = logging.getLogger(__name__)

RESOURCE = "env_node"
"""Ray's name of the resource that a node that simulates has one of."""

NodeLost = (RayActorError, ObjectLostError)
"""Errors that Ray raises for an answer that will never come."""


class EnvNode:
    """The pool of one node, in an actor."""

    def __init__(self, env: EnvironmentConfig, config: EnvConfig, shape: PolicyShape) -> None:
        self._stack = ExitStack()
        self._pool = self._stack.enter_context(open_simulators(env, config, shape))

    def reset(self, slots: Mapping[int, EpisodeSpec]) -> None:
        """See `EnvPool.reset`."""
        self._pool.reset(slots)

    def step(self, chunks: Mapping[int, npt.NDArray[np.float32]]) -> None:
        """See `EnvPool.step`."""
        self._pool.step(chunks)

    def wait(self, slots: Collection[int]) -> bytes:
        """See `EnvPool.wait`; the answers are pickled here.

        Arrays that Ray hands out stay in its shared memory, which has no room for a whole rollout.
        """
        return pickle.dumps(self._pool.wait(slots), protocol=pickle.HIGHEST_PROTOCOL)

    def have_answered(self, slots: Collection[int]) -> bool:
        """See `EnvPool.have_answered`."""
        return self._pool.have_answered(slots)

    def close(self) -> None:
        """End the simulators."""
        self._stack.close()


class EnvNodes:
    """The pools of several nodes as the `verl_vla.rl.rollout.Simulators` of a rollout.

    Every pool has room for all slots, so that any node can take over any of them.
    """

    def __init__(self, nodes: list[Any], num_slots: int) -> None:
        self.num_slots = num_slots
        self._living = dict(enumerate(nodes))
        self._node_of: dict[int, int] = {}
        self._asked: dict[int, list[Any]] = {index: [] for index in self._living}

    def reset(self, slots: Mapping[int, EpisodeSpec]) -> None:
        """Start episodes, spread evenly over the nodes that live; does not wait.

        Raises:
            RuntimeError: no node lives.
        """
        if not self._living:
            raise RuntimeError(
                "every env node was lost, so no episode can be played; see the warnings above, "
                "start nodes again, and resume the run"
            )
        living = sorted(self._living)
        # an episode starts again from its start, so a slot may move to another node with each
        self._node_of.update({slot: living[slot % len(living)] for slot in slots})
        self._ask("reset", slots)

    def step(self, chunks: Mapping[int, npt.NDArray[np.float32]]) -> None:
        """Run one action chunk in each of these slots; does not wait."""
        self._ask("step", chunks)

    def wait(self, slots: Collection[int]) -> dict[int, Answer]:
        """Wait until exactly these slots have answered; those of a lost node have crashed."""
        # all are asked before the first answer is awaited, so that the nodes work side by side
        asked = {
            node: (mine, [*self._asked[node], self._living[node].wait.remote(mine)])
            for node, mine in self._by_node(slots).items()
            if node in self._living
        }
        answers: dict[int, Answer] = {}
        for node, (_, references) in asked.items():
            self._asked[node] = []
            try:
                # what was only told to do something has no answer, but may have raised
                answers |= pickle.loads(ray.get(references)[-1])
            except NodeLost as error:
                logger.warning("env node %d was lost: %s", node, error)
                del self._living[node]
        lost = EpisodeCrashed("its env node was lost")
        return {slot: answers[slot] if slot in answers else lost for slot in slots}

    def have_answered(self, slots: Collection[int]) -> bool:
        """Return True where `wait` would return at once, as it does for those of a lost node."""
        shares = self._by_node(slots).items()
        asked = [
            self._living[node].have_answered.remote(mine)
            for node, mine in shares
            if node in self._living
        ]
        try:
            return all(ray.get(asked))
        except NodeLost:
            # `wait` finds out which node it is
            return True

    def close(self) -> None:
        """End the simulators of the nodes that live."""
        for node in self._living.values():
            node.close.remote()

    def _ask(self, what: str, slots: Mapping[int, Any]) -> None:
        for node, mine in self._by_node(slots).items():
            # nothing is asked of a lost node: `wait` reports its slots as crashed
            if node in self._living:
                reference = getattr(self._living[node], what).remote({s: slots[s] for s in mine})
                self._asked[node].append(reference)

    def _by_node(self, slots: Collection[int]) -> dict[int, list[int]]:
        shares: dict[int, list[int]] = {}
        for slot in slots:
            shares.setdefault(self._node_of[slot], []).append(slot)
        return shares


@contextmanager
def open_env_nodes(run: Run) -> Generator[EnvNodes]:
    """Start a pool on each of as many nodes as the recipe says.

    Raises:
        ConfigError: the cluster has fewer such nodes.
    """
    wanted, env = run.recipe.cluster.env_nodes, run.recipe.environment
    found = sum(int(n["Resources"].get(RESOURCE) or 0) for n in ray.nodes() if n["Alive"])
    if found < wanted:
        raise ConfigError(
            f"cluster.env_nodes is {wanted}, but the Ray cluster has {found} of them; start more "
            f"with: ray start --address=HEAD:PORT --num-cpus=0 --resources='{{\"{RESOURCE}\": 1}}'"
        )
    # such a node has no CPU to give: it is started with --num-cpus=0
    actor: Any = ray.remote(EnvNode)
    placed = actor.options(num_cpus=0, resources={RESOURCE: 1})
    nodes = [placed.remote(env, run.env_config, run.processor.shape) for _ in range(wanted)]
    opened = EnvNodes(nodes, env.num_slots)
    try:
        yield opened
    finally:
        opened.close()
