"""The soak in small: real processes that die, and leaks that it must find."""

from __future__ import annotations

import json
import os
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch

from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.core.episode import Start
from verl_vla.core.errors import ConfigError
from verl_vla.core.tables import ActionChunk
from verl_vla.diagnostics.faulty_env import make_crashing
from verl_vla.diagnostics.soak import BOUNDS, Sample, excesses, growth, measure, soak
from verl_vla.envs.fake import FakeEnv, FakeEnvConfig
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.policies.base import PolicyShape
from verl_vla.rl.group_sampling import StartSampler

SHAPE = PolicyShape(num_views=1, image_size=16, chunk_length=8, action_dim=7, num_bins=3)


class RandomPolicy:
    """Moves at random; ``leak`` is called at every policy step."""

    shape = SHAPE

    def __init__(self, leak=lambda: None) -> None:
        self._leak = leak

    def act(self, observations, noise, *, temperature):
        self._leak()
        action_tokens = (noise * SHAPE.num_bins).long()
        actions = (action_tokens.float() - 1).reshape(-1, SHAPE.chunk_length, SHAPE.action_dim)
        return ActionChunk(
            action_tokens=action_tokens,
            log_probs=torch.zeros(action_tokens.shape),
            prompt_ids=[torch.zeros(3, dtype=torch.long)] * len(action_tokens),
            actions=actions.numpy(),
        )


def run(leak=lambda: None, *, blocks: int = 8, crash_share: float = 0.05) -> list[Sample]:
    starts = [Start(task_id=i % 4, init_state_id=i // 4) for i in range(40)]
    with EnvPool(
        partial(make_crashing, partial(FakeEnv, FakeEnvConfig(image_size=16)), crash_share),
        num_workers=1,
        num_slots=8,
        image_shape=(1, 16, 16, 3),
        timeout_s=60.0,
        worker_env={},
    ) as pool:
        sampler = StartSampler(starts, seed=0, group_size=1)
        samples = soak(pool, RandomPolicy(leak), sampler, block=12, temperature=1.0)
        return list(islice(samples, blocks))


def test_nothing_grows_while_simulators_die():
    samples = run()
    assert samples[-1].episodes == 96
    assert samples[-1].crashes == 4  # every twentieth
    assert excesses(growth(samples)) == []


@pytest.mark.parametrize("name", ["trainer_mib", "trainer_handles"])
def test_a_leak_is_found(name):
    held: list[object] = []

    def leak():
        if name == "trainer_mib":
            held.append(np.ones(2**20))  # 8 MiB
        else:
            held.append(os.open("/dev/null", os.O_RDONLY))

    try:
        (excess,) = excesses(growth(run(leak, crash_share=0.0)))
    finally:
        if name == "trainer_handles":
            for handle in held:
                os.close(handle)
    assert excess.startswith(f"{name} grew by")
    assert f"the bound is {BOUNDS[name]:g}" in excess


def sample(**values: float) -> Sample:
    nothing = dict.fromkeys(BOUNDS, 0.0) | {"episodes": 0, "crashes": 0}
    return Sample(**(nothing | values))


def test_growth_is_between_the_halves_after_the_warm_up():
    used = [500, 500, 10, 11, 12, 10, 12, 15]
    grown = growth([sample(trainer_mib=value) for value in used])
    assert grown == dict.fromkeys(BOUNDS, 0.0) | {"trainer_mib": 3}
    with pytest.raises(ConfigError, match="7 samples were taken; play at least 8 blocks"):
        growth([sample()] * 7)


def test_what_is_measured_is_there():
    before = measure([os.getpid()], episodes=3, crashes=1)
    held = np.ones(2**23)  # 64 MiB
    file = os.open("/dev/null", os.O_RDONLY)
    after = measure([os.getpid()], episodes=3, crashes=1)
    os.close(file)
    assert after.trainer_mib - before.trainer_mib == pytest.approx(64, abs=8)
    assert after.simulator_mib == pytest.approx(after.trainer_mib, abs=8)
    assert after.trainer_handles == after.simulator_handles == before.trainer_handles + 1
    assert held.sum() == 2**23
    assert measure([2**22 + 1], episodes=0, crashes=0).simulator_mib == 0


@pytest.mark.sim
def test_the_command_plays_real_physics_and_keeps_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr("verl_vla.cli.soak.growth", lambda samples: dict.fromkeys(BOUNDS, 0.0))
    out = tmp_path / "soak.json"
    words = ["--episodes", "2", "--block", "2", "--num-slots", "2", "--num-workers", "1"]
    assert main(["soak", *words, "--crash-share", "0", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["episodes"] == 2
    assert record["crashes"] == 0
    assert record["samples"][0]["simulator_mib"] > 50
    assert record["bounds"] == BOUNDS


def test_impossible_numbers_are_refused(capsys):
    assert main(["soak", "--crash-share", "1"]) == EXIT_USAGE
    assert "--crash-share is 1.0; set a share" in capsys.readouterr().err
    assert main(["soak", "--episodes", "0"]) == EXIT_USAGE
