"""RoboTwin 2.0 as a suite: its tasks, limits and sizes, without the simulator.

RoboTwin is in no package index: it is a repository with gigabytes of assets, and its simulator
SAPIEN and its motion planner need a GPU. The tasks and sizes here are those of SimpleVLA-RL, so
that a recipe can be planned; to train, extend `RoboTwin` by a `make_env` around your checkout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from verl_vla.core.errors import ConfigError
from verl_vla.envs.base import Env, EnvConfig, Suite, Task

STEPS = {
    "click_bell": 200,
    "move_can_pot": 200,
    "place_phone_stand": 200,
    "place_a2b_left": 200,
    "place_a2b_right": 200,
    "handover_mic": 200,
    "pick_dual_bottles": 100,
    "lift_pot": 200,
    "put_bottles_dustbin": 800,
    "stack_blocks_two": 400,
    "stack_bowls_two": 400,
    "handover_block": 400,
    "place_empty_cup": 200,
    "shake_bottle": 75,
    "move_stapler_pad": 200,
    "place_container_plate": 150,
    "blocks_ranking_rgb": 600,
    "beat_block_hammer": 200,
    "place_mouse_pad": 200,
    "place_shoe": 250,
    "move_pillbottle_pad": 200,
}
"""Step limits by task. Source: SimpleVLA-RL ``verl/workers/rollout/rob_rollout.py:435``."""
NUM_SEEDS = 1000
"""Number of arrangements per task that its expert solves: ``data.num_trials_per_task`` of
SimpleVLA-RL's ``examples/run_openvla_oft_rl_twin2.sh``."""
NO_SIMULATOR = (
    "RoboTwin's simulator is in no package index, so this suite can be planned and not played; "
    "extend it by a make_env around your checkout of RoboTwin, as docs/add-an-environment.md says, "
    "and name that with environment.suite=path/to/file.py:ClassName"
)
NUM_JOINTS = 14
"""Two arms, each with six joints and a gripper (openvla-oft ``prismatic/vla/constants.py``, ALOHA).
"""


class RoboTwin(Suite):
    """RoboTwin 2.0 for a checkpoint fine-tuned on joint positions of two arms."""

    name = "robotwin"
    tasks: Sequence[Task] = tuple(
        Task(name=name, instruction=name.replace("_", " "), published_steps=steps)
        for name, steps in STEPS.items()
    )
    """Tasks with placeholder instructions: RoboTwin words one for each arrangement, which the
    observation carries."""
    num_init_states = NUM_SEEDS
    cameras = ("head_camera", "left_camera", "right_camera")
    action_dim = NUM_JOINTS
    proprio_dim = NUM_JOINTS
    gripper_dims = ()
    """Empty: gripper openings are normalised like joints (openvla-oft ``oxe/materialize.py``)."""

    policy_sizes = MappingProxyType(
        {
            "chunk_length": 25,
            "action_dim": NUM_JOINTS,
            "use_proprio": True,
            "proprio_dim": NUM_JOINTS,
            "action_proprio_normalization_type": "bounds",
        }
    )
    """Sizes of openvla-oft ``prismatic/vla/constants.py``, ALOHA."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Empty, as nothing is simulated; name your checkout's commit and ``task_config`` here."""
        return {}

    def require_simulator(self) -> None:
        """Refuse to simulate unless a subclass has a `make_env`; see `Suite.require_simulator`."""
        if type(self).make_env is RoboTwin.make_env:
            raise ConfigError(NO_SIMULATOR)

    def make_env(self, config: EnvConfig) -> Env:
        """Refuse to build an environment; see `require_simulator`."""
        raise ConfigError(NO_SIMULATOR)
